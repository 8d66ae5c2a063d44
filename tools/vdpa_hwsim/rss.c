// SPDX-License-Identifier: (MIT OR GPL-2.0)
/* Receive hashes and what follows from them: steering (RSS) and reporting. */
#include <linux/if_vlan.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/unaligned.h>

#include "rss.h"

/* Two IPv6 addresses and two ports. */
#define HWSIM_HASH_INPUT	36

/* The part of a frame a hash can be made of. */
struct flow {
	u8 input[HWSIM_HASH_INPUT];
	size_t addrs;		/* bytes of addresses in .input, ports behind them */
	u8 proto;
	bool ports;
	bool v6;
};

static void add_ports(struct flow *flow, const u8 *transport, size_t left)
{
	if ((flow->proto != IPPROTO_TCP && flow->proto != IPPROTO_UDP) || left < 4)
		return;
	memcpy(flow->input + flow->addrs, transport, 4);
	flow->ports = true;
}

static bool parse_ipv4(struct flow *flow, const u8 *p, size_t len)
{
	const struct iphdr *ip = (const struct iphdr *)p;
	size_t header;

	if (len < sizeof(*ip))
		return false;
	header = ip->ihl * 4;
	flow->addrs = 2 * sizeof(ip->saddr);
	memcpy(flow->input, p + offsetof(struct iphdr, saddr), flow->addrs);
	flow->proto = ip->protocol;
	/* A fragment's ports are in the first of them only. */
	if (header >= sizeof(*ip) && header <= len &&
	    !(get_unaligned_be16(p + offsetof(struct iphdr, frag_off)) & 0x3fff))
		add_ports(flow, p + header, len - header);
	return true;
}

static bool parse_ipv6(struct flow *flow, const u8 *p, size_t len)
{
	const struct ipv6hdr *ip = (const struct ipv6hdr *)p;

	if (len < sizeof(*ip))
		return false;
	flow->v6 = true;
	flow->addrs = 2 * sizeof(ip->saddr);
	memcpy(flow->input, p + offsetof(struct ipv6hdr, saddr), flow->addrs);
	flow->proto = ip->nexthdr;
	add_ports(flow, p + sizeof(*ip), len - sizeof(*ip));
	return true;
}

static bool parse(struct flow *flow, const u8 *frame, size_t len)
{
	size_t header = ETH_HLEN;
	u16 proto = get_unaligned_be16(frame + ETH_HLEN - sizeof(u16));

	memset(flow, 0, sizeof(*flow));
	if (proto == ETH_P_8021Q && len >= VLAN_ETH_HLEN) {
		header = VLAN_ETH_HLEN;
		proto = get_unaligned_be16(frame + VLAN_ETH_HLEN - sizeof(u16));
	}
	if (proto == ETH_P_IP)
		return parse_ipv4(flow, frame + header, len - header);
	if (proto == ETH_P_IPV6)
		return parse_ipv6(flow, frame + header, len - header);
	return false;
}

/* For each bit set in the input, the 32 key bits that begin there (virtio 1.3, 5.1.6.4.3). */
static u32 toeplitz(const struct hwsim_rss *rss, const u8 *input, size_t len)
{
	u32 window = get_unaligned_be32(rss->key), hash = 0;
	size_t i;
	int bit;

	for (i = 0; i < len; i++) {
		u8 next = i + 4 < HWSIM_RSS_KEY ? rss->key[i + 4] : 0;

		for (bit = 7; bit >= 0; bit--) {
			if (input[i] & BIT(bit))
				hash ^= window;
			window = window << 1 | (next >> bit & 1);
		}
	}
	return hash;
}

/* What is reported to the driver about @frame's hash; the type is NONE without one. */
struct hwsim_hash hwsim_hash(const struct hwsim_dev *dev, const void *frame, size_t len)
{
	const struct hwsim_rss *rss = &dev->ctrl.rss;
	struct hwsim_hash hash = { .type = VIRTIO_NET_HASH_REPORT_NONE };
	struct flow flow;
	u32 with_ports, alone;

	if (!rss->hash_types || !parse(&flow, frame, len))
		return hash;
	alone = flow.v6 ? VIRTIO_NET_RSS_HASH_TYPE_IPv6 : VIRTIO_NET_RSS_HASH_TYPE_IPv4;
	/* Of both families TCP is the type after plain IP, and UDP the one after that. */
	with_ports = alone << (flow.proto == IPPROTO_TCP ? 1 : 2);
	if (flow.ports && (rss->hash_types & with_ports)) {
		hash.type = ilog2(with_ports) + VIRTIO_NET_HASH_REPORT_IPv4;
		hash.value = toeplitz(rss, flow.input, flow.addrs + 4);
	} else if (rss->hash_types & alone) {
		hash.type = ilog2(alone) + VIRTIO_NET_HASH_REPORT_IPv4;
		hash.value = toeplitz(rss, flow.input, flow.addrs);
	}
	return hash;
}

/* The pair that receives a frame which was sent on @pair. */
unsigned int hwsim_steer(const struct hwsim_dev *dev, unsigned int pair,
			 const struct hwsim_hash *hash)
{
	const struct hwsim_rss *rss = &dev->ctrl.rss;

	if (!rss->table_len)
		return pair % max_t(u16, dev->ctrl.pairs, 1);
	if (hash->type == VIRTIO_NET_HASH_REPORT_NONE)
		return rss->unclassified;
	return rss->table[hash->value & (rss->table_len - 1)];
}
