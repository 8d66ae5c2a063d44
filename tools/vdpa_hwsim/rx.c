// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The receiving half of the data path: a frame that arrives, from our own
 * transmit queue or from the other end of the wire, into a receive queue.
 */
#include <linux/unaligned.h>

#include "ctrl.h"
#include "ring.h"
#include "rss.h"
#include "rx.h"

/* What leads a frame in both directions; with VERSION_1 always the long form. */
size_t hwsim_hdr_len(const struct hwsim_dev *dev)
{
	if (hwsim_has(dev, VIRTIO_NET_F_HASH_REPORT))
		return sizeof(struct virtio_net_hdr_v1_hash);
	if (hwsim_has(dev, VIRTIO_F_VERSION_1) || hwsim_has(dev, VIRTIO_NET_F_MRG_RXBUF))
		return sizeof(struct virtio_net_hdr_v1);
	return sizeof(struct virtio_net_hdr);
}

/* Buffers collected for one frame; more than one only with MRG_RXBUF. */
struct rx_bufs {
	struct hwsim_chain chain;
	unsigned int n;
	u16 head[HWSIM_MAX_MERGE];
	u32 size[HWSIM_MAX_MERGE];
};

static int collect_bufs(struct hwsim_dev *dev, struct hwsim_vq *rx, size_t need,
			struct rx_bufs *bufs)
{
	unsigned int max = hwsim_has(dev, VIRTIO_NET_F_MRG_RXBUF) ? HWSIM_MAX_MERGE : 1;

	bufs->n = 0;
	bufs->chain = (struct hwsim_chain){};
	while (bufs->chain.in < need && bufs->n < max) {
		u64 before = bufs->chain.in;
		int ret;

		ret = hwsim_vq_fetch(dev, rx, dev->opt.inflight + 1);
		if (ret <= 0)
			return ret ? ret : -ENOBUFS;
		bufs->head[bufs->n] = hwsim_vq_take(dev, rx);
		ret = hwsim_chain_add(dev, rx, bufs->head[bufs->n++], &bufs->chain);
		if (ret)
			return ret;
		bufs->size[bufs->n - 1] = min_t(u64, bufs->chain.in - before, U32_MAX);
	}
	return bufs->chain.in < need ? -EMSGSIZE : 0;
}

/* A frame on its way to a receive queue. */
struct arrival {
	const void *frame;
	size_t len;
	bool csum_ok;
	struct hwsim_hash hash;
};

/* The hash's fields have other names in other kernels, but always this place. */
static void fill_hdr(struct hwsim_dev *dev, const struct arrival *arrival, unsigned int bufs,
		     u8 *buf)
{
	struct virtio_net_hdr_v1 *hdr = (struct virtio_net_hdr_v1 *)buf;

	memset(buf, 0, HWSIM_MAX_HDR);
	hdr->num_buffers = (__force __virtio16)cpu_to_le16(bufs);
	if (hwsim_flawed(dev, HWSIM_FLAW_NUM_BUFFERS))
		hdr->num_buffers = 0;
	if (hwsim_flawed(dev, HWSIM_FLAW_JUNK_HEADER))
		hdr->gso_type = VIRTIO_NET_HDR_GSO_UDP;
	if (arrival->csum_ok && (dev->ctrl.offloads & BIT_ULL(VIRTIO_NET_F_GUEST_CSUM)))
		hdr->flags = VIRTIO_NET_HDR_F_DATA_VALID;
	put_unaligned_le32(arrival->hash.value, buf + sizeof(*hdr));
	put_unaligned_le16(arrival->hash.type, buf + sizeof(*hdr) + sizeof(u32));
}

/* What a faulty device writes beside the frame of @len bytes, its header included. */
static int spoil_bufs(struct hwsim_dev *dev, struct hwsim_vq *rx, const struct rx_bufs *bufs,
		      size_t len)
{
	const u8 junk = 0xf5;
	int ret = 0;

	if (hwsim_flawed(dev, HWSIM_FLAW_CORRUPT))
		ret = hwsim_chain_write(dev, rx, &bufs->chain, len - 1, &junk, sizeof(junk));
	if (!ret && hwsim_flawed(dev, HWSIM_FLAW_BEYOND) && bufs->chain.in > len)
		ret = hwsim_chain_write(dev, rx, &bufs->chain, len, &junk, sizeof(junk));
	return ret;
}

static int fill_bufs(struct hwsim_dev *dev, struct hwsim_vq *rx, struct rx_bufs *bufs,
		     const struct arrival *arrival)
{
	u8 hdr[HWSIM_MAX_HDR] __aligned(8);
	size_t hdr_len = hwsim_hdr_len(dev);
	size_t left = hdr_len + arrival->len;
	unsigned int i;
	int ret;

	fill_hdr(dev, arrival, bufs->n, hdr);
	ret = hwsim_chain_write(dev, rx, &bufs->chain, 0, hdr, hdr_len);
	if (!ret)
		ret = hwsim_chain_write(dev, rx, &bufs->chain, hdr_len, arrival->frame,
					arrival->len);
	if (!ret)
		ret = spoil_bufs(dev, rx, bufs, hdr_len + arrival->len);
	for (i = 0; !ret && i < bufs->n; i++) {
		u32 used = min_t(size_t, left, bufs->size[i]);

		ret = hwsim_vq_complete(dev, rx, bufs->head[i],
					used - hwsim_flawed(dev, HWSIM_FLAW_SHORT_LEN));
		left -= used;
	}
	return ret ? ret : hwsim_vq_publish(dev, rx);
}

static int receive_locked(struct hwsim_dev *dev, struct hwsim_vq *rx,
			  const struct arrival *arrival)
{
	struct rx_bufs bufs;
	int ret;

	ret = collect_bufs(dev, rx, hwsim_hdr_len(dev) + arrival->len, &bufs);
	if (ret) {
		/* Nothing was written to them: they wait for the next frame. */
		hwsim_vq_put_back(rx, bufs.head, bufs.n);
		hwsim_vq_count(rx, ret == -ENOBUFS ? HWSIM_VQ_OVERRUNS : HWSIM_VQ_ERRORS, 1);
		return ret;
	}
	ret = fill_bufs(dev, rx, &bufs, arrival);
	if (ret) {
		hwsim_vq_count(rx, HWSIM_VQ_ERRORS, 1);
		return ret;
	}
	hwsim_vq_count(rx, HWSIM_VQ_PACKETS, 1);
	hwsim_vq_count(rx, HWSIM_VQ_BYTES, arrival->len);
	return 0;
}

/*
 * A frame arrives; dp held. The sender does not care what becomes of it, but
 * whether it has to interrupt for receive queue @own itself, at the end of its
 * burst; for other queues that is done here.
 */
void hwsim_receive(struct hwsim_dev *dev, unsigned int pair, const void *frame, size_t len,
		   bool csum_ok, const struct hwsim_vq *own)
{
	struct arrival arrival = { .frame = frame, .len = len, .csum_ok = csum_ok };
	struct hwsim_vq *rx;
	bool ready;

	arrival.hash = hwsim_hash(dev, frame, len);
	rx = hwsim_rx(dev, hwsim_steer(dev, pair, &arrival.hash));
	ready = rx->ready || hwsim_flawed(dev, HWSIM_FLAW_NOT_READY);
	/* what it was sending to itself when the stall began is not lost by that */
	if (!hwsim_live(dev) || !ready || (!own && hwsim_flawed(dev, HWSIM_FLAW_STALL))) {
		hwsim_vq_count(rx, HWSIM_VQ_DOWN, 1);
		return;
	}
	if (dev->opt.filter && !hwsim_accepts(dev, frame, len)) {
		hwsim_vq_count(rx, HWSIM_VQ_FILTERED, 1);
		return;
	}
	mutex_lock(&rx->rx_lock);
	if (!receive_locked(dev, rx, &arrival) && rx != own)
		hwsim_vq_signal(dev, rx);
	mutex_unlock(&rx->rx_lock);
}
