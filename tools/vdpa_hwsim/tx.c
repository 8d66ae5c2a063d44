// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The sending half of the data path: frames from transmit queues, looped back or
 * handed to the wire.
 *
 * One thread for each pair, the only one to touch the pair's transmit queue. It
 * has a low priority (HWSIM_DATA_NICE).
 *
 * A looped back frame is taken, delivered and completed under one hold of dp: a
 * suspend comes before or after all of it. A frame for the wire is completed
 * first and delivered afterwards, without our dp: it has left the device.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <net/checksum.h>

#include "device.h"
#include "ring.h"
#include "rx.h"
#include "tso.h"
#include "tx.h"
#include "wire.h"

/* Frames before a worker interrupts the driver, and lets others have dp. */
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
	int ret = hwsim_vq_complete(dev, tx, head, hwsim_flawed(dev, HWSIM_FLAW_TX_LEN) ? 64 : 0);

	return ret ? ret : hwsim_vq_publish(dev, tx);
}

static bool pair_live(const struct hwsim_pair *pair)
{
	struct hwsim_dev *dev = pair->dev;

	bool early = hwsim_flawed(dev, HWSIM_FLAW_EARLY) && !(dev->status & VIRTIO_CONFIG_S_DRIVER_OK) &&
		     (dev->status & VIRTIO_CONFIG_S_FEATURES_OK);
	bool mine = pair->index < dev->ctrl.pairs || hwsim_flawed(dev, HWSIM_FLAW_ALL_PAIRS);
	bool ready = hwsim_tx(dev, pair->index)->ready || hwsim_flawed(dev, HWSIM_FLAW_NOT_READY);

	return (hwsim_live(dev) || early) && mine && ready &&
	       !hwsim_flawed(dev, HWSIM_FLAW_STALL);
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

/* dp held, but released for a moment if there is a wire. */
static int deliver(struct hwsim_pair *pair, struct hwsim_vq *tx, u16 head,
		   const struct departure *dep)
{
	struct hwsim_dev *dev = pair->dev;
	int ret;

	if (hwsim_flawed(dev, HWSIM_FLAW_LOSE) && tx->next_used % 4 == 3)
		return finish(dev, tx, head);
	if (!READ_ONCE(dev->wired)) {
		emit_all(pair, dep, false);
		/* If that stopped the device, the frame was not sent. */
		return hwsim_live(dev) || hwsim_flawed(dev, HWSIM_FLAW_EARLY) ?
			finish(dev, tx, head) : -EIO;
	}
	ret = finish(dev, tx, head);
	if (ret)
		return ret;
	up_read(&dev->dp);
	emit_all(pair, dep, true);
	down_read(&dev->dp);
	return 0;
}

/* Send one frame. Returns 1, 0 without one (that may be sent now), or an error. */
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

static void pair_work(struct kthread_work *work)
{
	struct hwsim_pair *pair = container_of(work, struct hwsim_pair, work);
	struct hwsim_dev *dev = pair->dev;
	bool release = xchg(&pair->release, false);
	unsigned int sent = 0;
	bool held, broken;

	down_read(&dev->dp);
	while (sent < HWSIM_BURST && !READ_ONCE(dev->waiting) && send_one(pair, release) > 0)
		sent++;
	signal_pair(pair);
	held = pair_live(pair) && hwsim_tx(dev, pair->index)->nheld;
	/* It cannot get dp, and look at this, before we let go. */
	broken = READ_ONCE(dev->waiting);
	if (broken)
		WRITE_ONCE(dev->broken_off, true);
	/* What is held was to go with this look: it goes with the next. */
	if (release && held && (broken || sent == HWSIM_BURST))
		WRITE_ONCE(pair->release, true);
	up_read(&dev->dp);

	if (sent == HWSIM_BURST) {
		hwsim_look_at_pair(pair);
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
	hwsim_look_at_pair(pair);
}

static int make_thread(struct hwsim_pair *pair)
{
	struct kthread_worker *thread;

	kthread_init_work(&pair->work, pair_work);
	thread = kthread_create_worker(0, "%s/%u", dev_name(&pair->dev->vdpa.dev), pair->index);
	if (IS_ERR(thread))
		return PTR_ERR(thread);
	pair->thread = thread;
	set_user_nice(thread->task, HWSIM_DATA_NICE);
	/* Newer kernels leave that to the caller; to others it is nothing. */
	wake_up_process(thread->task);
	return 0;
}

int hwsim_tx_init(struct hwsim_dev *dev)
{
	unsigned int i;
	int err;

	dev->wq = alloc_workqueue("%s-%s", WQ_UNBOUND, 0, HWSIM_NAME, dev_name(&dev->vdpa.dev));
	dev->pairs = kcalloc(dev->npairs, sizeof(*dev->pairs), GFP_KERNEL);
	if (!dev->wq || !dev->pairs)
		return -ENOMEM;
	for (i = 0; i < dev->npairs; i++) {
		struct hwsim_pair *pair = &dev->pairs[i];

		pair->dev = dev;
		pair->index = i;
		INIT_DELAYED_WORK(&pair->release_work, release_work);
		pair->buf = kvmalloc(HWSIM_MAX_HDR + HWSIM_MAX_FRAME, GFP_KERNEL);
		pair->seg = kvmalloc(HWSIM_MAX_FRAME, GFP_KERNEL);
		if (!pair->buf || !pair->seg)
			return -ENOMEM;
		err = make_thread(pair);
		if (err)
			return err;
	}
	return 0;
}

/*
 * The device has been reset before: what is still queued finds nothing to do.
 * An item that looked before the reset may yet arm its timer, so the items go
 * first and the timers after them. What is on the workqueue (wake_work) may yet
 * queue an item, so the threads go last.
 */
void hwsim_tx_free(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; dev->pairs && i < dev->npairs && dev->pairs[i].thread; i++) {
		set_user_nice(dev->pairs[i].thread->task, 0);
		kthread_cancel_work_sync(&dev->pairs[i].work);
		cancel_delayed_work_sync(&dev->pairs[i].release_work);
	}
	if (dev->wq)
		destroy_workqueue(dev->wq);
	for (i = 0; dev->pairs && i < dev->npairs; i++) {
		if (dev->pairs[i].thread)
			kthread_destroy_worker(dev->pairs[i].thread);
		kvfree(dev->pairs[i].buf);
		kvfree(dev->pairs[i].seg);
	}
	kfree(dev->pairs);
}
