/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
/*
 * vdpa_hwsim: a vDPA network device without hardware, which behaves as
 * mlx5_vdpa does where user space can see the difference.
 *
 * Locking
 * =======
 *
 * Outermost first; a lock may be taken while those above it are held, never
 * the other way round.
 *
 * 1. vhost_dev.mutex, vdpa_device.cf_lock, the owner's mmap_lock (read): the
 *    cores' own, held around our operations. mmap_lock is held over set_map()
 *    and dma_map() when an IOTLB update comes outside of a batch, therefore
 *    nothing below may fault in user memory.
 *
 * 2. hwsim_dev.ctl (mutex): one operation that changes the device at a time.
 *    Held over the modelled cost as well, and by the control queue's worker
 *    over one whole command, as mlx5_vdpa holds reslock. That makes suspend()
 *    and reset() wait for a command under way.
 *
 * 3. hwsim_wire (rwsem, global): which devices are wired together. Read by a
 *    worker that hands a frame to the other end, which therefore cannot go away.
 *
 * 4. hwsim_dev.dp (rwsem): the data path. Workers process descriptors with it
 *    held for reading, one worker for each queue pair, hence on several CPUs
 *    at a time. Code that changes what a worker looks at (status, rings,
 *    translations, filters) takes it for writing, by hwsim_change(), and only for
 *    moments: a modelled cost during which the device is stopped is slept with
 *    .frozen set, not with this lock held. Releasing it after a change is the
 *    barrier: no worker acts on the former state from then on.
 *    Never hold two devices' dp at once (a worker releases its own before it
 *    delivers to the other end of the wire), else two writers could close a
 *    circle between two devices wired to each other.
 *
 * 5. hwsim_vq.rx_lock (mutex): deliveries into one receive queue. With
 *    a wire that can be several of the other device's workers. Transmit queues
 *    and the control queue are touched by their own worker only.
 *
 * 6. hwsim_lending (mutex, global, in device.c): which threads of the data path
 *    have the ordinary priority, since someone waits for a dp that they hold.
 *
 * 7. hwsim_dev.fault_lock (spinlock): the text about the latest fault.
 *
 * kick_vq() comes from within an eventfd wake-up, with interrupts off: it may
 * only count and queue work. Virtqueue and config callbacks are called from
 * workers, from suspend() and from debugfs, never from kick_vq():
 * eventfd_signal() drops an event that is signalled from within an eventfd wake-up.
 */
#ifndef HWSIM_H
#define HWSIM_H

#include <linux/atomic.h>
#include <linux/etherdevice.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/vdpa.h>
#include <linux/vhost_iotlb.h>
#include <linux/workqueue.h>
#include <uapi/linux/virtio_config.h>
#include <uapi/linux/virtio_net.h>
#include <uapi/linux/virtio_ring.h>

#define HWSIM_NAME		"vdpa_hwsim"
#define HWSIM_MAX_PAIRS		16
#define HWSIM_MAX_NAS		32
#define HWSIM_MAX_RING		32768
/* mlx5_vdpa: MLX5_VDPA_MAX_VQ_ENTRIES */
#define HWSIM_DEF_RING		256
/* Of one chain, or of the chains of one merged receive buffer; QEMU's limit is the same. */
#define HWSIM_MAX_SEGS		1024
#define HWSIM_MAX_MERGE		64
#define HWSIM_MAX_INFLIGHT	256
#define HWSIM_MAX_HELD		(HWSIM_MAX_INFLIGHT + HWSIM_MAX_MERGE)
#define HWSIM_MAX_HDR		sizeof(struct virtio_net_hdr_v1_hash)
#define HWSIM_MAX_FRAME		(65535 + ETH_HLEN + 8)
/* More than any command needs: the longest is RSS with a full table and key. */
#define HWSIM_MAX_CTRL		4096
#define HWSIM_MAX_MACS		64
#define HWSIM_RSS_TABLE		128
#define HWSIM_RSS_KEY		40
#define HWSIM_FAULT_TEXT	96
/* vhost-vdpa limits its own trees; this only keeps a broken caller from filling memory. */
#define HWSIM_MAX_ENTRIES	(1U << 20)

/* Numbers as in mlx5_vdpa (mlx5_vdpa.h); the control queue's descriptors are in its own group. */
enum hwsim_group {
	HWSIM_GROUP_DATA,
	HWSIM_GROUP_CVQ,
	HWSIM_GROUP_DESC,
	HWSIM_NGROUPS,
};

enum hwsim_vq_counter {
	HWSIM_VQ_KICKS,
	HWSIM_VQ_CALLS,
	HWSIM_VQ_CHAINS,
	HWSIM_VQ_PACKETS,
	HWSIM_VQ_BYTES,
	HWSIM_VQ_ERRORS,
	HWSIM_VQ_OVERRUNS,
	HWSIM_VQ_FILTERED,
	HWSIM_VQ_DOWN,
	HWSIM_VQ_NCOUNTERS,
};

enum hwsim_op_id {
	HWSIM_OP_SET_MAP,
	HWSIM_OP_SET_MAP_HEAVY,
	HWSIM_OP_DMA_MAP,
	HWSIM_OP_DMA_UNMAP,
	HWSIM_OP_RESET_MAP,
	HWSIM_OP_GROUP_ASID,
	HWSIM_OP_DRIVER_OK,
	HWSIM_OP_SUSPEND,
	HWSIM_OP_RESUME,
	HWSIM_OP_RESET,
	HWSIM_OP_RESET_CLEAN,
	HWSIM_OP_VQ_CREATE,
	HWSIM_OP_VQ_DESTROY,
	HWSIM_OP_CVQ,
	HWSIM_OP_CVQ_REFUSED,
	HWSIM_NOPS,
};

enum hwsim_counter {
	HWSIM_MAP_ENTRIES,
	HWSIM_MAP_PAGES,
	HWSIM_UNMAP_PAGES,
	HWSIM_FAULTS,
	HWSIM_CONFIG_CALLS,
	HWSIM_NCOUNTERS,
};

enum hwsim_cost {
	HWSIM_COST_SET_MAP,
	HWSIM_COST_SET_MAP_ENTRY,
	HWSIM_COST_SET_MAP_GIB,
	HWSIM_COST_SET_MAP_HOLE_GIB,
	HWSIM_COST_MAP_GIB,
	HWSIM_COST_UNMAP_GIB,
	HWSIM_COST_VQ_CREATE,
	HWSIM_COST_VQ_DESTROY,
	HWSIM_COST_SUSPEND,
	HWSIM_COST_SUSPEND_VQ,
	HWSIM_COST_RESUME,
	HWSIM_COST_RESUME_VQ,
	HWSIM_COST_RESET,
	HWSIM_COST_CVQ,
	HWSIM_NCOSTS,
};

/* Countdowns: n hits the n-th event from now, 0 never. */
enum hwsim_fail {
	HWSIM_FAIL_SET_MAP,
	HWSIM_FAIL_CLEAN_MAP,
	HWSIM_FAIL_SUSPEND,
	HWSIM_FAIL_RESUME,
	HWSIM_FAIL_VQ_CREATE,
	HWSIM_FAIL_USED_ID,
	HWSIM_FAIL_USED_LEN,
	HWSIM_NFAILS,
};

/* Switches: true as long as they are on. A lie is a feature offered but broken. */
enum hwsim_flaw {
	HWSIM_FLAW_STALL,
	HWSIM_FLAW_CVQ_MUTE,
	HWSIM_LIE_PERSIST,
	HWSIM_LIE_SUSPEND,
	HWSIM_LIE_RESUME,
	HWSIM_LIE_DESC_ASID,
	HWSIM_LIE_ENABLE,
	HWSIM_FLAW_NO_CALL,
	HWSIM_FLAW_CALL_ALWAYS,
	HWSIM_FLAW_NO_CONFIG_CALL,
	HWSIM_FLAW_CONFIG_CALL,
	HWSIM_FLAW_KEEP_ASID,
	HWSIM_FLAW_KEEP_READY,
	HWSIM_FLAW_KEEP_BASE,
	HWSIM_FLAW_KEEP_STATUS,
	HWSIM_FLAW_KEEP_CTRL,
	HWSIM_FLAW_KEEP_FAULT,
	HWSIM_FLAW_IGNORE_PERM,
	HWSIM_FLAW_STALE_MAP,
	HWSIM_FLAW_ONE_AS,
	HWSIM_FLAW_CORRUPT,
	HWSIM_FLAW_BEYOND,
	HWSIM_FLAW_SHORT_LEN,
	HWSIM_FLAW_TX_LEN,
	HWSIM_FLAW_NUM_BUFFERS,
	HWSIM_FLAW_JUNK_HEADER,
	HWSIM_FLAW_LOSE,
	HWSIM_FLAW_CVQ_OK,
	HWSIM_FLAW_CVQ_ERR,
	HWSIM_FLAW_CVQ_LEN,
	HWSIM_FLAW_CVQ_LONG,
	HWSIM_FLAW_CVQ_HALF,
	HWSIM_FLAW_CVQ_SUSPENDED,
	HWSIM_FLAW_SUSPENDED_STATUS,
	HWSIM_FLAW_WAKE_STATUS,
	HWSIM_FLAW_WAKE_ENABLE,
	HWSIM_FLAW_WAKE_KICK,
	HWSIM_FLAW_BASE_OFF,
	HWSIM_FLAW_BASE_MOVES,
	HWSIM_FLAW_RESUME_AT_0,
	HWSIM_FLAW_EARLY,
	HWSIM_FLAW_NOT_READY,
	HWSIM_FLAW_NO_FEATURES_OK,
	HWSIM_FLAW_NO_DRIVER_OK,
	HWSIM_FLAW_FEATURES_MOVE,
	HWSIM_FLAW_CONFIG_MOVES,
	HWSIM_FLAW_BAD_GROUP,
	HWSIM_FLAW_NUM_IGNORED,
	HWSIM_FLAW_ADDR_KEPT,
	HWSIM_FLAW_EVENT_IGNORED,
	HWSIM_FLAW_INDIRECT_FIRST,
	HWSIM_FLAW_CHAIN_FIRST,
	HWSIM_FLAW_ALL_PAIRS,
	HWSIM_FLAW_USED_TWICE,
	HWSIM_FLAW_SIZE_BEYOND,
	HWSIM_FLAW_RINGS_IN_1,
	HWSIM_NFLAWS,
};

/* How a device is made; a copy of the module parameters as they were at dev_add(). */
struct hwsim_options {
	unsigned int nas;
	unsigned int ring_max;
	unsigned int inflight;
	unsigned int inflight_us;
	unsigned int mem_scale;
	unsigned int doorbell_us;
	unsigned long heavy_min;
	unsigned long scale_min;
	bool single_group;
	bool dma_map;
	bool identity;
	bool suspend, resume, enable_after_driver_ok, desc_asid, persist;
	bool clean_map;
	bool vq_size;
	bool base_avail;
	bool reorder;
	bool resume_cvq;
	bool indirect_in_data;
	bool filter;
	bool wire;
};

/* What was mapped, or unmapped, without a gap between: vhost-vdpa does that piece by piece. */
struct hwsim_run {
	u64 end, bytes;
};

struct hwsim_as {
	struct vhost_iotlb *map;
	/*
	 * Bytes in the tree of the latest set_map(), and what of them is guest
	 * memory: .guest has these ranges (NULL for none), .guest_bytes their sum.
	 * A reset does not touch vhost-vdpa's tree and its pinned pages, so it
	 * does not touch this.
	 */
	u64 given, guest_bytes;
	struct vhost_iotlb *guest;
	struct hwsim_run mapped, unmapped;	/* with dma_map */
};

struct hwsim_seg {
	u64 addr;
	u32 len;
	bool write;
};

/* The buffers of one descriptor chain, or of several that receive one frame. */
struct hwsim_chain {
	unsigned int nsegs;
	u64 out;
	u64 in;
};

struct hwsim_vq {
	struct mutex rx_lock;	/* see Locking, 5 */
	u16 index;
	bool ready;
	bool signalled;		/* at least once since the queue was set up */
	u16 next_avail;		/* the next head to fetch */
	u16 next_used;		/* the next used element to write */
	u16 signalled_used;
	u16 nheld;
	u32 num;
	u64 desc, avail, used;
	u16 held[HWSIM_MAX_HELD];	/* fetched, without effect yet; oldest first */
	struct hwsim_seg *segs;
	struct vdpa_callback cb;
	u32 *doorbell;
	atomic64_t counter[HWSIM_VQ_NCOUNTERS];
};

struct hwsim_pair {
	struct hwsim_dev *dev;
	u16 index;
	bool release;		/* forward what is held back, too */
	struct kthread_worker *thread;
	struct kthread_work work;
	struct delayed_work release_work;
	u8 *buf;		/* one frame and its header */
	u8 *seg;		/* a part of it, made a frame of its own */
};

struct hwsim_op_counter {
	atomic64_t count, errors, time_ns, charged_ns;
};

struct hwsim_rss {
	u32 hash_types;
	u16 table_len;
	u16 unclassified;
	u16 max_tx_vq;
	u8 key_len;
	u16 table[HWSIM_RSS_TABLE];
	u8 key[HWSIM_RSS_KEY];
};

/* What the control queue has set. */
struct hwsim_ctrl {
	bool promisc, allmulti, alluni, nomulti, nouni, nobcast;
	u16 pairs;
	u32 nuni, nmulti;	/* more than HWSIM_MAX_MACS means all of them */
	u8 uni[HWSIM_MAX_MACS][ETH_ALEN];
	u8 multi[HWSIM_MAX_MACS][ETH_ALEN];
	u64 offloads;
	struct hwsim_rss rss;
	DECLARE_BITMAP(vlans, 4096);
};

struct hwsim_dev {
	struct vdpa_device vdpa;
	struct vdpa_config_ops ops;
	struct hwsim_options opt;
	struct list_head node;
	struct workqueue_struct *wq;
	struct mutex ctl;		/* see Locking, 2 */
	struct rw_semaphore dp;		/* see Locking, 4 */
	int waiting;			/* for dp, to change something: no further frame is begun */
	bool broken_off;		/* because of that, though there may be more frames */

	u64 features, driver_features;
	u32 generation;
	u16 npairs;
	u16 cvq_index;
	u8 status;
	bool suspended;
	bool frozen;
	bool vqs_created, vqs_used;
	unsigned long needs_reset;	/* bit 0 */
	struct vdpa_callback config_cb;
	struct virtio_net_config config;
	struct hwsim_ctrl ctrl;
	unsigned int asid[HWSIM_NGROUPS];
	struct hwsim_as *as;
	struct hwsim_vq *vqs;
	struct hwsim_pair *pairs;
	struct work_struct cvq_work;
	struct work_struct doorbell_work;
	struct work_struct wake_work;
	u8 *cvq_buf;

	bool wired;
	struct hwsim_dev *peer;

	const struct hwsim_profile *profile;
	u64 cost[HWSIM_NCOSTS];
	bool precreate, map_rebuilds_vqs;
	atomic_t fail[HWSIM_NFAILS];
	bool flaw[HWSIM_NFLAWS];

	struct hwsim_op_counter op[HWSIM_NOPS];
	atomic64_t counter[HWSIM_NCOUNTERS];
	spinlock_t fault_lock;		/* .fault */
	char fault[HWSIM_FAULT_TEXT];
	struct dentry *debugfs;
};

static inline struct hwsim_dev *hwsim_from(struct vdpa_device *vdpa)
{
	return container_of(vdpa, struct hwsim_dev, vdpa);
}

static inline bool hwsim_has(const struct hwsim_dev *dev, unsigned int feature)
{
	return dev->driver_features & BIT_ULL(feature);
}

static inline struct hwsim_vq *hwsim_rx(struct hwsim_dev *dev, unsigned int pair)
{
	return &dev->vqs[2 * pair];
}

static inline struct hwsim_vq *hwsim_tx(struct hwsim_dev *dev, unsigned int pair)
{
	return &dev->vqs[2 * pair + 1];
}

static inline bool hwsim_is_cvq(const struct hwsim_dev *dev, u16 index)
{
	return index == READ_ONCE(dev->cvq_index);
}

/* Whether descriptors are processed now; dp held. */
static inline bool hwsim_live(const struct hwsim_dev *dev)
{
	return (dev->status & VIRTIO_CONFIG_S_DRIVER_OK) && !dev->suspended &&
	       !dev->frozen && !test_bit(0, &dev->needs_reset);
}

static inline void hwsim_count(struct hwsim_dev *dev, enum hwsim_counter which, u64 n)
{
	atomic64_add(n, &dev->counter[which]);
}

static inline void hwsim_vq_count(struct hwsim_vq *vq, enum hwsim_vq_counter which, u64 n)
{
	atomic64_add(n, &vq->counter[which]);
}

static inline bool hwsim_fail(struct hwsim_dev *dev, enum hwsim_fail which)
{
	return atomic_dec_if_positive(&dev->fail[which]) == 0;
}

static inline bool hwsim_flawed(const struct hwsim_dev *dev, enum hwsim_flaw which)
{
	return READ_ONCE(dev->flaw[which]);
}

#endif /* HWSIM_H */
