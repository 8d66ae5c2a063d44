// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * Transmit segmentation: one large TCP frame of the driver's becomes several
 * that fit the MTU, as the NIC does it (HOST_TSO4, HOST_TSO6).
 */
#include <linux/if_vlan.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/unaligned.h>
#include <net/checksum.h>
#include <net/ip6_checksum.h>

#include "tso.h"

/* What TCP calls the smallest sensible segment; also bounds how many there are. */
#define HWSIM_MIN_MSS	48

/*
 * Nothing in @hdr is believed: lengths come from the frame, and must agree with
 * where the driver says that TCP begins. Returns whether it can be segmented.
 */
bool hwsim_tso_parse(const struct hwsim_dev *dev, const struct virtio_net_hdr *hdr,
		     const u8 *frame, size_t len, struct hwsim_tso *tso)
{
	u8 type = hdr->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
	u16 proto = get_unaligned_be16(frame + ETH_HLEN - sizeof(u16));
	size_t min_ip;

	tso->l3 = ETH_HLEN;
	if (proto == ETH_P_8021Q && len >= VLAN_ETH_HLEN) {
		tso->l3 = VLAN_ETH_HLEN;
		proto = get_unaligned_be16(frame + VLAN_ETH_HLEN - sizeof(u16));
	}
	tso->v6 = type == VIRTIO_NET_HDR_GSO_TCPV6;
	if (type != VIRTIO_NET_HDR_GSO_TCPV4 && !tso->v6)
		return false;
	if (!hwsim_has(dev, tso->v6 ? VIRTIO_NET_F_HOST_TSO6 : VIRTIO_NET_F_HOST_TSO4) ||
	    proto != (tso->v6 ? ETH_P_IPV6 : ETH_P_IP) ||
	    !(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
		return false;

	min_ip = tso->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	tso->l4 = le16_to_cpu((__force __le16)hdr->csum_start);
	if (tso->l4 < tso->l3 + min_ip || tso->l4 + sizeof(struct tcphdr) > len)
		return false;
	tso->headers = tso->l4 + (frame[tso->l4 + 12] >> 4) * 4;
	tso->size = le16_to_cpu((__force __le16)hdr->gso_size);
	if (tso->headers < tso->l4 + sizeof(struct tcphdr) || tso->headers >= len ||
	    tso->size < HWSIM_MIN_MSS)
		return false;
	tso->payload = len - tso->headers;
	tso->segs = DIV_ROUND_UP(tso->payload, tso->size);
	return true;
}

static void fix_ip(const struct hwsim_tso *tso, u8 *ip, unsigned int i, size_t len)
{
	size_t header = tso->l4 - tso->l3;
	__sum16 sum;

	if (tso->v6) {
		put_unaligned_be16(len - sizeof(struct ipv6hdr),
				   ip + offsetof(struct ipv6hdr, payload_len));
		return;
	}
	put_unaligned_be16(len, ip + offsetof(struct iphdr, tot_len));
	put_unaligned_be16(get_unaligned_be16(ip + offsetof(struct iphdr, id)) + i,
			   ip + offsetof(struct iphdr, id));
	memset(ip + offsetof(struct iphdr, check), 0, sizeof(sum));
	sum = csum_fold(csum_partial(ip, header, 0));
	memcpy(ip + offsetof(struct iphdr, check), &sum, sizeof(sum));
}

static void fix_tcp(const struct hwsim_tso *tso, const u8 *ip, struct tcphdr *tcp, unsigned int i,
		    size_t len)
{
	/* In both headers the destination follows the source. */
	const void *saddr = ip + (tso->v6 ? offsetof(struct ipv6hdr, saddr) :
				  offsetof(struct iphdr, saddr));
	bool last = i + 1 == tso->segs;
	__wsum sum;

	tcp->seq = cpu_to_be32(be32_to_cpu(tcp->seq) + i * tso->size);
	if (!last) {
		tcp->fin = 0;
		tcp->psh = 0;
	}
	if (i)
		tcp->cwr = 0;
	tcp->check = 0;
	sum = csum_partial(tcp, len, 0);
	if (tso->v6)
		tcp->check = csum_ipv6_magic(saddr, saddr + sizeof(struct in6_addr), len,
					     IPPROTO_TCP, sum);
	else
		tcp->check = csum_tcpudp_magic(get_unaligned((const __be32 *)saddr),
					       get_unaligned((const __be32 *)saddr + 1),
					       len, IPPROTO_TCP, sum);
}

/* Make the @i-th segment of @frame in @out, and return its length. */
size_t hwsim_tso_segment(const struct hwsim_tso *tso, const u8 *frame, unsigned int i, u8 *out)
{
	size_t from = (size_t)i * tso->size;
	size_t n = min_t(size_t, tso->size, tso->payload - from);
	size_t len = tso->headers + n;

	memcpy(out, frame, tso->headers);
	memcpy(out + tso->headers, frame + tso->headers + from, n);
	fix_ip(tso, out + tso->l3, i, len - tso->l3);
	fix_tcp(tso, out + tso->l3, (struct tcphdr *)(out + tso->l4), i, len - tso->l4);
	return len;
}
