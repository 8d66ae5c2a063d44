// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The control queue: what the driver asks of the device, and the receive filter
 * that comes of it. Commands are those of virtio 1.3, 5.1.6.5; each is refused
 * unless the feature it belongs to was negotiated.
 */
#include <linux/bitmap.h>
#include <linux/if_vlan.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

#include "cost.h"
#include "ctrl.h"
#include "device.h"
#include "ring.h"

#define HWSIM_CTRL_BURST	16

/* The part of a command that has not been looked at yet. */
struct reader {
	const u8 *p;
	size_t left;
};

static const u8 *get_bytes(struct reader *r, size_t n)
{
	const u8 *p = r->p;

	if (r->left < n)
		return NULL;
	r->p += n;
	r->left -= n;
	return p;
}

static bool get_u8(struct reader *r, u8 *v)
{
	const u8 *p = get_bytes(r, sizeof(*v));

	if (p)
		*v = *p;
	return p;
}

static bool get_u16(struct reader *r, u16 *v)
{
	const u8 *p = get_bytes(r, sizeof(*v));

	if (p)
		*v = get_unaligned_le16(p);
	return p;
}

static bool get_u32(struct reader *r, u32 *v)
{
	const u8 *p = get_bytes(r, sizeof(*v));

	if (p)
		*v = get_unaligned_le32(p);
	return p;
}

static bool ctrl_rx(struct hwsim_dev *dev, u8 cmd, struct reader *r)
{
	struct hwsim_ctrl *ctrl = &dev->ctrl;
	bool * const modes[] = {
		[VIRTIO_NET_CTRL_RX_PROMISC] = &ctrl->promisc,
		[VIRTIO_NET_CTRL_RX_ALLMULTI] = &ctrl->allmulti,
		[VIRTIO_NET_CTRL_RX_ALLUNI] = &ctrl->alluni,
		[VIRTIO_NET_CTRL_RX_NOMULTI] = &ctrl->nomulti,
		[VIRTIO_NET_CTRL_RX_NOUNI] = &ctrl->nouni,
		[VIRTIO_NET_CTRL_RX_NOBCAST] = &ctrl->nobcast,
	};
	u8 on;

	if (cmd >= ARRAY_SIZE(modes) || !get_u8(r, &on) || r->left)
		return false;
	if (!hwsim_has(dev, cmd < VIRTIO_NET_CTRL_RX_ALLUNI ? VIRTIO_NET_F_CTRL_RX :
		       VIRTIO_NET_F_CTRL_RX_EXTRA))
		return false;
	*modes[cmd] = on;
	return true;
}

static const u8 *get_macs(struct reader *r, u32 *n)
{
	if (!get_u32(r, n) || *n > r->left / ETH_ALEN)
		return NULL;
	return get_bytes(r, *n * ETH_ALEN);
}

static bool ctrl_mac_table(struct hwsim_dev *dev, struct reader *r)
{
	struct hwsim_ctrl *ctrl = &dev->ctrl;
	const u8 *uni, *multi;
	u32 nuni, nmulti;

	uni = get_macs(r, &nuni);
	multi = uni ? get_macs(r, &nmulti) : NULL;
	if (!hwsim_has(dev, VIRTIO_NET_F_CTRL_RX) || !multi || r->left)
		return false;
	ctrl->nuni = nuni;
	ctrl->nmulti = nmulti;
	memcpy(ctrl->uni, uni, min(nuni, HWSIM_MAX_MACS) * ETH_ALEN);
	memcpy(ctrl->multi, multi, min(nmulti, HWSIM_MAX_MACS) * ETH_ALEN);
	return true;
}

static bool ctrl_mac(struct hwsim_dev *dev, u8 cmd, struct reader *r)
{
	const u8 *mac;

	if (cmd == VIRTIO_NET_CTRL_MAC_TABLE_SET)
		return ctrl_mac_table(dev, r);
	if (hwsim_flawed(dev, HWSIM_FLAW_CVQ_HALF) && r->left == 3)
		memcpy(dev->config.mac, r->p, 3);
	mac = get_bytes(r, ETH_ALEN);
	if (cmd != VIRTIO_NET_CTRL_MAC_ADDR_SET || !mac || r->left ||
	    !hwsim_has(dev, VIRTIO_NET_F_CTRL_MAC_ADDR) || is_multicast_ether_addr(mac))
		return false;
	memcpy(dev->config.mac, mac, ETH_ALEN);
	return true;
}

static bool ctrl_vlan(struct hwsim_dev *dev, u8 cmd, struct reader *r)
{
	u16 vid;

	if (!hwsim_has(dev, VIRTIO_NET_F_CTRL_VLAN) || !get_u16(r, &vid) || r->left ||
	    vid >= VLAN_N_VID)
		return false;
	if (cmd == VIRTIO_NET_CTRL_VLAN_ADD)
		__set_bit(vid, dev->ctrl.vlans);
	else if (cmd == VIRTIO_NET_CTRL_VLAN_DEL)
		__clear_bit(vid, dev->ctrl.vlans);
	else
		return false;
	return true;
}

static bool ctrl_announce(struct hwsim_dev *dev, u8 cmd, struct reader *r)
{
	if (cmd != VIRTIO_NET_CTRL_ANNOUNCE_ACK || r->left ||
	    !hwsim_has(dev, VIRTIO_NET_F_GUEST_ANNOUNCE))
		return false;
	dev->config.status &= (__force __virtio16)~cpu_to_le16(VIRTIO_NET_S_ANNOUNCE);
	return true;
}

static bool set_pairs(struct hwsim_dev *dev, u16 pairs)
{
	if (pairs < VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN || pairs > dev->npairs)
		return false;
	dev->ctrl.pairs = pairs;
	return true;
}

static bool ctrl_pairs(struct hwsim_dev *dev, struct reader *r)
{
	u16 pairs;

	if (!hwsim_has(dev, VIRTIO_NET_F_MQ) || !get_u16(r, &pairs) || r->left ||
	    !set_pairs(dev, pairs))
		return false;
	/* A driver that wants this many pairs, and nothing else, has done with RSS. */
	dev->ctrl.rss.table_len = 0;
	return true;
}

static bool get_rss_key(struct reader *r, struct hwsim_rss *rss)
{
	const u8 *key;

	if (!get_u8(r, &rss->key_len) || rss->key_len > HWSIM_RSS_KEY)
		return false;
	key = get_bytes(r, rss->key_len);
	if (key)
		memcpy(rss->key, key, rss->key_len);
	return key && !r->left;
}

static bool ctrl_rss(struct hwsim_dev *dev, struct reader *r)
{
	struct hwsim_rss rss = {};
	u16 mask, i;

	if (!hwsim_has(dev, VIRTIO_NET_F_RSS) || !get_u32(r, &rss.hash_types) ||
	    !get_u16(r, &mask) || !get_u16(r, &rss.unclassified))
		return false;
	if (mask >= HWSIM_RSS_TABLE || (mask & (mask + 1)) || rss.unclassified >= dev->npairs)
		return false;
	rss.table_len = mask + 1;
	for (i = 0; i <= mask; i++)
		if (!get_u16(r, &rss.table[i]) || rss.table[i] >= dev->npairs)
			return false;
	if (!get_u16(r, &rss.max_tx_vq) || !get_rss_key(r, &rss) ||
	    !set_pairs(dev, rss.max_tx_vq))
		return false;
	dev->ctrl.rss = rss;
	return true;
}

static bool ctrl_hash(struct hwsim_dev *dev, struct reader *r)
{
	struct hwsim_rss rss = {};

	if (!hwsim_has(dev, VIRTIO_NET_F_HASH_REPORT) || !get_u32(r, &rss.hash_types) ||
	    !get_bytes(r, 4 * sizeof(u16)) || !get_rss_key(r, &rss))
		return false;
	dev->ctrl.rss = rss;
	return true;
}

static bool ctrl_mq(struct hwsim_dev *dev, u8 cmd, struct reader *r)
{
	switch (cmd) {
	case VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET:
		return ctrl_pairs(dev, r);
	case VIRTIO_NET_CTRL_MQ_RSS_CONFIG:
		return ctrl_rss(dev, r);
	case VIRTIO_NET_CTRL_MQ_HASH_CONFIG:
		return ctrl_hash(dev, r);
	}
	return false;
}

/* The guest offloads that VIRTIO_NET_F_CTRL_GUEST_OFFLOADS switches, as feature bits. */
static u64 guest_offloads(const struct hwsim_dev *dev)
{
	return dev->driver_features &
	       (BIT_ULL(VIRTIO_NET_F_GUEST_CSUM) | BIT_ULL(VIRTIO_NET_F_GUEST_TSO4) |
		BIT_ULL(VIRTIO_NET_F_GUEST_TSO6) | BIT_ULL(VIRTIO_NET_F_GUEST_ECN) |
		BIT_ULL(VIRTIO_NET_F_GUEST_UFO));
}

static bool ctrl_offloads(struct hwsim_dev *dev, u8 cmd, struct reader *r)
{
	const u8 *p = get_bytes(r, sizeof(u64));
	u64 offloads;

	if (cmd != VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET || !p || r->left ||
	    !hwsim_has(dev, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS))
		return false;
	offloads = get_unaligned_le64(p);
	if (offloads & ~guest_offloads(dev))
		return false;
	dev->ctrl.offloads = offloads;
	return true;
}

static bool execute(struct hwsim_dev *dev, const u8 *buf, size_t len)
{
	struct reader r = { buf, len };
	u8 class, cmd;

	if (!get_u8(&r, &class) || !get_u8(&r, &cmd))
		return false;
	switch (class) {
	case VIRTIO_NET_CTRL_RX:
		return ctrl_rx(dev, cmd, &r);
	case VIRTIO_NET_CTRL_MAC:
		return ctrl_mac(dev, cmd, &r);
	case VIRTIO_NET_CTRL_VLAN:
		return ctrl_vlan(dev, cmd, &r);
	case VIRTIO_NET_CTRL_ANNOUNCE:
		return ctrl_announce(dev, cmd, &r);
	case VIRTIO_NET_CTRL_MQ:
		return ctrl_mq(dev, cmd, &r);
	case VIRTIO_NET_CTRL_GUEST_OFFLOADS:
		return ctrl_offloads(dev, cmd, &r);
	}
	return false;
}

/* The state before a driver has sent a command; also called at FEATURES_OK. */
void hwsim_ctrl_reset(struct hwsim_dev *dev)
{
	if (hwsim_flawed(dev, HWSIM_FLAW_KEEP_CTRL) && dev->ctrl.pairs)
		return;
	memset(&dev->ctrl, 0, sizeof(dev->ctrl));
	/* virtio 1.3, 5.1.5: one pair until the driver asks for more, MQ or not. */
	dev->ctrl.pairs = 1;
	/* A device with receive filters begins by receiving everything. */
	dev->ctrl.promisc = hwsim_has(dev, VIRTIO_NET_F_CTRL_RX);
	dev->ctrl.offloads = guest_offloads(dev);
	dev->config.status &= (__force __virtio16)~cpu_to_le16(VIRTIO_NET_S_ANNOUNCE);
}

static bool in_table(const u8 (*table)[ETH_ALEN], u32 n, const u8 *mac)
{
	u32 i;

	if (n > HWSIM_MAX_MACS)
		return true;
	for (i = 0; i < n; i++)
		if (ether_addr_equal_unaligned(table[i], mac))
			return true;
	return false;
}

static bool accepts_mac(const struct hwsim_dev *dev, const u8 *mac)
{
	const struct hwsim_ctrl *ctrl = &dev->ctrl;

	if (is_broadcast_ether_addr(mac))
		return !ctrl->nobcast;
	if (is_multicast_ether_addr(mac)) {
		/* Without CTRL_RX mlx5_vdpa's steering rule takes all of them. */
		if (!hwsim_has(dev, VIRTIO_NET_F_CTRL_RX))
			return true;
		return !ctrl->nomulti &&
		       (ctrl->allmulti || in_table(ctrl->multi, ctrl->nmulti, mac));
	}
	if (ctrl->nouni)
		return false;
	return ctrl->alluni || ether_addr_equal_unaligned(dev->config.mac, mac) ||
	       in_table(ctrl->uni, ctrl->nuni, mac);
}

/* Untagged frames pass, tagged ones if their VLAN was added (mlx5_vdpa_add_mac_vlan_rules()). */
static bool accepts_vlan(const struct hwsim_dev *dev, const u8 *frame, size_t len)
{
	u16 proto = get_unaligned_be16(frame + 2 * ETH_ALEN);

	if (!hwsim_has(dev, VIRTIO_NET_F_CTRL_VLAN) || proto != ETH_P_8021Q ||
	    len < VLAN_ETH_HLEN)
		return true;
	return test_bit(get_unaligned_be16(frame + ETH_HLEN) & VLAN_VID_MASK, dev->ctrl.vlans);
}

/* The caller has seen to it that there is an Ethernet header. */
bool hwsim_accepts(const struct hwsim_dev *dev, const void *frame, size_t len)
{
	/* Promiscuous means everything, tags included, as for QEMU's virtio-net. */
	return dev->ctrl.promisc ||
	       (accepts_vlan(dev, frame, len) && accepts_mac(dev, frame));
}

/* Fetch one command. Returns 1, 0 without one, or an error after hwsim_fault(). */
static int fetch_command(struct hwsim_dev *dev, struct hwsim_vq *cvq, u16 *head,
			 struct hwsim_chain *chain)
{
	int ret;

	bool awake = (hwsim_flawed(dev, HWSIM_FLAW_CVQ_SUSPENDED) && dev->suspended) ||
		     (hwsim_flawed(dev, HWSIM_FLAW_NOT_READY) && hwsim_live(dev));

	if (!hwsim_has(dev, VIRTIO_NET_F_CTRL_VQ) ||
	    (!awake && (!hwsim_live(dev) || !cvq->ready)))
		return 0;
	ret = hwsim_vq_fetch(dev, cvq, 1);
	if (ret <= 0)
		return ret;
	*head = hwsim_vq_take(dev, cvq);
	*chain = (struct hwsim_chain){};
	ret = hwsim_chain_add(dev, cvq, *head, chain);
	if (!ret && chain->out <= HWSIM_MAX_CTRL)
		ret = hwsim_chain_read(dev, cvq, chain, dev->cvq_buf, chain->out);
	return ret ? ret : 1;
}

static bool answer_command(struct hwsim_dev *dev, struct hwsim_vq *cvq, u16 head,
			   const struct hwsim_chain *chain)
{
	bool ok = chain->out <= HWSIM_MAX_CTRL && execute(dev, dev->cvq_buf, chain->out);
	u8 ack = ok ? VIRTIO_NET_OK : VIRTIO_NET_ERR;
	u32 len = chain->in ? sizeof(ack) : 0;

	if (hwsim_flawed(dev, HWSIM_FLAW_CVQ_OK))
		ack = VIRTIO_NET_OK;
	if (hwsim_flawed(dev, HWSIM_FLAW_CVQ_ERR))
		ack = VIRTIO_NET_ERR;
	if (hwsim_flawed(dev, HWSIM_FLAW_CVQ_LONG) && chain->in > 1 &&
	    hwsim_chain_write(dev, cvq, chain, 1, &ack, sizeof(ack)))
		return false;
	if (hwsim_chain_write(dev, cvq, chain, 0, &ack, len))
		return false;
	if (hwsim_flawed(dev, HWSIM_FLAW_CVQ_LEN))
		len = 0;
	if (hwsim_vq_complete(dev, cvq, head, len) || hwsim_vq_publish(dev, cvq))
		return false;
	hwsim_vq_count(cvq, ok ? HWSIM_VQ_PACKETS : HWSIM_VQ_ERRORS, 1);
	hwsim_vq_signal(dev, cvq);
	return ok;
}

/* One command; ctl held. Returns whether there was one. */
static bool do_command(struct hwsim_dev *dev)
{
	u16 pairs = dev->ctrl.pairs, head;
	struct hwsim_chain chain;
	struct hwsim_vq *cvq;
	struct hwsim_op op;
	bool ok;
	int ret;

	down_read(&dev->dp);
	cvq = &dev->vqs[dev->cvq_index];
	ret = fetch_command(dev, cvq, &head, &chain);
	up_read(&dev->dp);
	if (ret <= 0)
		return false;
	if (hwsim_flawed(dev, HWSIM_FLAW_CVQ_MUTE))
		return true;

	hwsim_op_begin(&op, dev, HWSIM_OP_CVQ);
	hwsim_op_charge(&op, dev->cost[HWSIM_COST_CVQ]);
	hwsim_change(dev);
	/* While we slept, a data queue can have stopped the device, or other features been set. */
	ok = (hwsim_live(dev) || hwsim_flawed(dev, HWSIM_FLAW_CVQ_SUSPENDED)) &&
	     hwsim_is_cvq(dev, cvq->index) &&
	     answer_command(dev, cvq, head, &chain);
	hwsim_changed(dev);
	if (!ok)
		op.id = HWSIM_OP_CVQ_REFUSED;
	hwsim_op_end(&op, 0);
	if (dev->ctrl.pairs > pairs)
		hwsim_look_at_data(dev);
	return true;
}

void hwsim_cvq_work(struct work_struct *work)
{
	struct hwsim_dev *dev = container_of(work, struct hwsim_dev, cvq_work);
	unsigned int n = 0;

	mutex_lock(&dev->ctl);
	while (n < HWSIM_CTRL_BURST && do_command(dev))
		n++;
	mutex_unlock(&dev->ctl);
	if (n == HWSIM_CTRL_BURST)
		queue_work(dev->wq, &dev->cvq_work);
}
