// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The sending half of the data path: frames from transmit queues, looped back or
 * handed to the wire.
 *
 * One work item for each pair. The workqueue never runs an item twice at the
 * same time, which makes it the only one to touch the pair's transmit queue, and
 * being unbound it spreads the pairs over the CPUs.
 *
 * A looped back frame is taken, delivered and completed under one hold of dp: a
 * suspend comes before or after all of it. A frame for the wire is completed
 * first and delivered afterwards, without our dp: it has left the device.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <net/checksum.h>

#include "ring.h"
#include "rx.h"
#include "tso.h"
#include "tx.h"
#include "wire.h"

/* Frames before a worker makes room for those who wait for dp. */
#define HWSIM_BURST	64

static size_t max_frame(const struct hwsim_dev *dev)
{
	size_t mtu = le16_to_cpu((__force __le16)dev->config.mtu);

	/* Room for a tag and one more, as Linux NICs have it. */
	return mtu + ETH_HLEN + 2 * 4;
}

/* Do what the driver left to us with NEEDS_CSUM (virtio 1.3, 5.1.6.2). */
static bool checksum(u8 *frame, size_t len, const struct virtio_net_hdr *hdr)
{
	size_t start = le16_to_cpu((__force __le16)hdr->csum_start);
	size_t field = start + le16_to_cpu((__force __le16)hdr->csum_offset);
	__sum16 sum;

	if (start >= len || field + sizeof(sum) > len)
		return false;
	sum = csum_fold(csum_partial(frame + start, len - start, 0)) ?: CSUM_MANGLED_0;
	memcpy(frame + field, &sum, sizeof(sum));
	return true;
}

/* A frame on its way from a transmit queue; with .tso.segs it is several. */
struct departure {
	u8 *frame;
	size_t len;
	bool csum_ok;
	struct hwsim_tso tso;
};

/* Whether a NIC would send that. */
static bool check_frame(struct hwsim_dev *dev, const struct virtio_net_hdr *hdr,
			struct departure *dep)
{
	dep->csum_ok = hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
	if (hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE)
		return hwsim_tso_parse(dev, hdr, dep->frame, dep->len, &dep->tso) &&
		       dep->tso.headers + dep->tso.size <= max_frame(dev);
	if (dep->len > max_frame(dev))
		return false;
	return !dep->csum_ok ||
	       (hwsim_has(dev, VIRTIO_NET_F_CSUM) && checksum(dep->frame, dep->len, hdr));
}

/*
 * Read the frame of @head into the pair's buffer. Returns 1, 0 if it is one that
 * no NIC would send, or an error after hwsim_fault().
 */
static int read_frame(struct hwsim_pair *pair, struct hwsim_vq *tx, u16 head,
		      struct departure *dep)
{
	struct hwsim_dev *dev = pair->dev;
	size_t hdr_len = hwsim_hdr_len(dev);
	struct hwsim_chain chain = {};
	int ret;

	ret = hwsim_chain_add(dev, tx, head, &chain);
	if (ret)
		return ret;
	if (chain.out < hdr_len + ETH_HLEN || chain.out > hdr_len + HWSIM_MAX_FRAME)
		return 0;
	ret = hwsim_chain_read(dev, tx, &chain, pair->buf, chain.out);
	if (ret)
		return ret;

	*dep = (struct departure){ .frame = pair->buf + hdr_len, .len = chain.out - hdr_len };
	return check_frame(dev, (struct virtio_net_hdr *)pair->buf, dep);
}

static int finish(struct hwsim_dev *dev, struct hwsim_vq *tx, u16 head)
{
	int ret = hwsim_vq_complete(dev, tx, head, 0);

	return ret ? ret : hwsim_vq_publish(dev, tx);
}

static bool pair_live(const struct hwsim_pair *pair)
{
	struct hwsim_dev *dev = pair->dev;

	return hwsim_live(dev) && pair->index < dev->ctrl.pairs &&
	       hwsim_tx(dev, pair->index)->ready && !hwsim_flawed(dev, HWSIM_FLAW_STALL);
}

/* dp held, but not if there is a wire. */
static void emit(struct hwsim_pair *pair, const void *frame, size_t len, bool csum_ok, bool wired)
{
	struct hwsim_dev *dev = pair->dev;

	if (!wired)
		hwsim_receive(dev, pair->index, frame, len, csum_ok, hwsim_rx(dev, pair->index));
	else if (!hwsim_wire_send(dev, pair->index, frame, len, csum_ok))
		hwsim_vq_count(hwsim_tx(dev, pair->index), HWSIM_VQ_DOWN, 1);
}

static void emit_all(struct hwsim_pair *pair, const struct departure *dep, bool wired)
{
	unsigned int i;

	if (!dep->tso.segs)
		emit(pair, dep->frame, dep->len, dep->csum_ok, wired);
	for (i = 0; i < dep->tso.segs; i++) {
		size_t len = hwsim_tso_segment(&dep->tso, dep->frame, i, pair->seg);

		emit(pair, pair->seg, len, true, wired);
	}
}

/* dp held, but let go of for a moment if there is a wire. */
static int deliver(struct hwsim_pair *pair, struct hwsim_vq *tx, u16 head,
		   const struct departure *dep)
{
	struct hwsim_dev *dev = pair->dev;
	int ret;

	if (!READ_ONCE(dev->wired)) {
		emit_all(pair, dep, false);
		/* If that stopped the device, the frame was not sent. */
		return hwsim_live(dev) ? finish(dev, tx, head) : -EIO;
	}
	ret = finish(dev, tx, head);
	if (ret)
		return ret;
	up_read(&dev->dp);
	emit_all(pair, dep, true);
	down_read(&dev->dp);
	return 0;
}

/* Send one frame. Returns 1, 0 if there is none (that may be sent now), or an error. */
static int send_one(struct hwsim_pair *pair, bool release)
{
	struct hwsim_dev *dev = pair->dev;
	struct hwsim_vq *tx = hwsim_tx(dev, pair->index);
	unsigned int hold = release ? 0 : dev->opt.inflight;
	struct departure dep;
	int ret;
	u16 head;

	if (!pair_live(pair))
		return 0;
	ret = hwsim_vq_fetch(dev, tx, hold + 1);
	if (ret < 0)
		return ret;
	if (ret <= hold)
		return 0;
	head = hwsim_vq_take(dev, tx);
	ret = read_frame(pair, tx, head, &dep);
	if (ret > 0) {
		hwsim_vq_count(tx, HWSIM_VQ_PACKETS, dep.tso.segs ?: 1);
		hwsim_vq_count(tx, HWSIM_VQ_BYTES, dep.len);
		ret = deliver(pair, tx, head, &dep);
	} else {
		hwsim_vq_count(tx, HWSIM_VQ_ERRORS, 1);
		ret = ret ? ret : finish(dev, tx, head);
	}
	return ret ? ret : 1;
}

static void signal_pair(struct hwsim_pair *pair)
{
	struct hwsim_dev *dev = pair->dev;
	struct hwsim_vq *rx = hwsim_rx(dev, pair->index);

	if (!hwsim_live(dev))
		return;
	hwsim_vq_signal(dev, hwsim_tx(dev, pair->index));
	mutex_lock(&rx->rx_lock);
	hwsim_vq_signal(dev, rx);
	mutex_unlock(&rx->rx_lock);
}

static void pair_work(struct work_struct *work)
{
	struct hwsim_pair *pair = container_of(work, struct hwsim_pair, work);
	struct hwsim_dev *dev = pair->dev;
	bool release = xchg(&pair->release, false);
	unsigned int sent = 0;
	bool held;

	down_read(&dev->dp);
	while (sent < HWSIM_BURST && send_one(pair, release) > 0)
		sent++;
	signal_pair(pair);
	held = pair_live(pair) && hwsim_tx(dev, pair->index)->nheld;
	up_read(&dev->dp);

	if (sent == HWSIM_BURST) {
		if (release)
			WRITE_ONCE(pair->release, true);
		queue_work(dev->wq, &pair->work);
	} else if (held) {
		mod_delayed_work(dev->wq, &pair->release_work,
				 usecs_to_jiffies(dev->opt.inflight_us));
	}
}

static void release_work(struct work_struct *work)
{
	struct hwsim_pair *pair = container_of(to_delayed_work(work), struct hwsim_pair,
					       release_work);

	WRITE_ONCE(pair->release, true);
	queue_work(pair->dev->wq, &pair->work);
}

int hwsim_tx_init(struct hwsim_dev *dev)
{
	unsigned int i;

	dev->wq = alloc_workqueue("%s-%s", WQ_UNBOUND, 0, HWSIM_NAME, dev_name(&dev->vdpa.dev));
	dev->pairs = kcalloc(dev->npairs, sizeof(*dev->pairs), GFP_KERNEL);
	if (!dev->wq || !dev->pairs)
		return -ENOMEM;
	for (i = 0; i < dev->npairs; i++) {
		struct hwsim_pair *pair = &dev->pairs[i];

		pair->dev = dev;
		pair->index = i;
		INIT_WORK(&pair->work, pair_work);
		INIT_DELAYED_WORK(&pair->release_work, release_work);
		pair->buf = kvmalloc(HWSIM_MAX_HDR + HWSIM_MAX_FRAME, GFP_KERNEL);
		pair->seg = kvmalloc(HWSIM_MAX_FRAME, GFP_KERNEL);
		if (!pair->buf || !pair->seg)
			return -ENOMEM;
	}
	return 0;
}

/*
 * The device has been reset before: what is still queued finds nothing to do.
 * An item that looked before the reset may yet arm its timer, so the items go
 * first and the timers after them.
 */
void hwsim_tx_free(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; dev->pairs && i < dev->npairs && dev->pairs[i].dev; i++) {
		cancel_work_sync(&dev->pairs[i].work);
		cancel_delayed_work_sync(&dev->pairs[i].release_work);
	}
	if (dev->wq)
		destroy_workqueue(dev->wq);
	for (i = 0; dev->pairs && i < dev->npairs; i++) {
		kvfree(dev->pairs[i].buf);
		kvfree(dev->pairs[i].seg);
	}
	kfree(dev->pairs);
}
