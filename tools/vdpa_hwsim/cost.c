// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * What operations cost. The README has the source of every number.
 *
 * An operation sleeps until its cost has passed since its beginning, so that
 * what the simulation needs itself is part of the charge and not on top of it.
 */
#include <linux/hrtimer.h>
#include <linux/log2.h>
#include <linux/math64.h>
#include <linux/sched.h>
#include <linux/sizes.h>

#include "cost.h"

struct hwsim_profile {
	const char *name;
	/* Queues exist in hardware from the previous reset on; DRIVER_OK resumes them. */
	bool precreate;
	/* A set_map() while running tears all queues down and makes them again. */
	bool map_rebuilds_vqs;
	u32 us[HWSIM_NCOSTS];
};

static const struct hwsim_profile profiles[] = {
	{
		.name = "none",
	}, {
		.name = "series-2023",
		.map_rebuilds_vqs = true,
		.us = {
			[HWSIM_COST_SET_MAP] = 25000,
			[HWSIM_COST_SET_MAP_GIB] = 5860,
			[HWSIM_COST_MAP_GIB] = 156000,
			[HWSIM_COST_UNMAP_GIB] = 11700,
			[HWSIM_COST_VQ_CREATE] = 11560,
			[HWSIM_COST_SUSPEND_VQ] = 1156,
			[HWSIM_COST_RESUME_VQ] = 500,
			[HWSIM_COST_RESET] = 695000,
		},
	}, {
		.name = "mlx5-2025",
		.precreate = true,
		.us = {
			[HWSIM_COST_SET_MAP] = 6250,
			[HWSIM_COST_SET_MAP_GIB] = 1465,
			[HWSIM_COST_MAP_GIB] = 68000,
			[HWSIM_COST_UNMAP_GIB] = 11700,
			[HWSIM_COST_VQ_CREATE] = 9690,
			[HWSIM_COST_SUSPEND_VQ] = 78,
			[HWSIM_COST_RESUME_VQ] = 156,
		},
	},
};

/* The profile of that name, or NULL. */
const struct hwsim_profile *hwsim_cost_find(const char *name)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(profiles); i++)
		if (sysfs_streq(profiles[i].name, name))
			return &profiles[i];
	return NULL;
}

void hwsim_cost_set_profile(struct hwsim_dev *dev, const struct hwsim_profile *profile)
{
	unsigned int i;

	dev->profile = profile;
	dev->precreate = profile->precreate;
	dev->map_rebuilds_vqs = profile->map_rebuilds_vqs;
	for (i = 0; i < HWSIM_NCOSTS; i++)
		dev->cost[i] = (u64)profile->us[i] * NSEC_PER_USEC;
}

const char *hwsim_cost_profile(const struct hwsim_dev *dev)
{
	return dev->profile->name;
}

void hwsim_op_begin(struct hwsim_op *op, struct hwsim_dev *dev, enum hwsim_op_id id)
{
	op->dev = dev;
	op->id = id;
	op->charged = 0;
	op->start = ktime_get();
}

/*
 * Neither fsleep() nor msleep(): they may overshoot by their own length, and
 * what user space measures here are milliseconds. TASK_IDLE, because a long
 * charge is not a hung task.
 */
void hwsim_op_charge(struct hwsim_op *op, u64 ns)
{
	ktime_t due;

	if (!ns)
		return;
	op->charged += ns;
	due = ktime_add_ns(op->start, op->charged);
	while (ktime_before(ktime_get(), due)) {
		set_current_state(TASK_IDLE);
		schedule_hrtimeout_range(&due, 0, HRTIMER_MODE_ABS);
	}
}

void hwsim_op_end(struct hwsim_op *op, int err)
{
	struct hwsim_op_counter *counter = &op->dev->op[op->id];

	atomic64_inc(&counter->count);
	atomic64_add(!!err, &counter->errors);
	atomic64_add(ktime_to_ns(ktime_sub(ktime_get(), op->start)), &counter->time_ns);
	atomic64_add(op->charged, &counter->charged_ns);
}

u64 hwsim_cost_bytes(const struct hwsim_dev *dev, enum hwsim_cost per_gib, u64 bytes)
{
	return mul_u64_u64_shr(bytes, dev->cost[per_gib], ilog2(SZ_1G));
}

/* Guest memory is charged as if there were mem_scale times as much; rings are as large as they are. */
static u64 cost_memory(const struct hwsim_dev *dev, enum hwsim_cost per_gib, u64 guest, u64 other)
{
	return hwsim_cost_bytes(dev, per_gib, guest * dev->opt.mem_scale + other);
}

/*
 * A piece that dma_map() or dma_unmap() is called with, the next of @run if it
 * begins where that ended. It is unknown how much follows, so a run turns out
 * to be guest memory when it has scale_min bytes, and what came before is
 * charged then.
 */
u64 hwsim_cost_run(const struct hwsim_dev *dev, enum hwsim_cost per_gib, struct hwsim_run *run,
		   u64 iova, u64 size)
{
	u64 before = iova == run->end ? run->bytes : 0;

	run->bytes = before + size;
	run->end = iova + size;
	if (run->bytes < dev->opt.scale_min)
		return cost_memory(dev, per_gib, 0, size);
	if (before >= dev->opt.scale_min)
		before = 0;
	return cost_memory(dev, per_gib, size + before, 0) - cost_memory(dev, per_gib, 0, before);
}

/* For all queues that are in use. */
u64 hwsim_cost_vqs(const struct hwsim_dev *dev, enum hwsim_cost base, enum hwsim_cost per_vq)
{
	return dev->cost[base] + 2 * dev->ctrl.pairs * dev->cost[per_vq];
}

struct tree_size {
	u64 bytes, guest;
	u64 holes;	/* each rounded up to GiB, as one null KLM covers at most that */
	unsigned int entries;
};

static void measure(struct vhost_iotlb *tree, struct tree_size *size)
{
	struct vhost_iotlb_map *entry = vhost_iotlb_itree_first(tree, 0, U64_MAX);
	u64 end = entry ? entry->start : 0;

	memset(size, 0, sizeof(*size));
	for (; entry; entry = vhost_iotlb_itree_next(entry, 0, U64_MAX)) {
		size->holes += DIV_ROUND_UP_ULL(entry->start - end, SZ_1G);
		size->bytes += entry->size;
		size->entries++;
		end = entry->last + 1;
	}
}

static int add_guest(struct vhost_iotlb *guest, u64 start, u64 last, u64 *bytes)
{
	*bytes += last - start + 1;
	return vhost_iotlb_add_range(guest, start, last, 0, VHOST_MAP_RW);
}

/* What of [@start, @last], which is mapped without a gap, is guest memory. */
static int find_guest(const struct hwsim_dev *dev, struct hwsim_as *as, u64 start, u64 last,
		      struct vhost_iotlb *guest, u64 *bytes)
{
	struct vhost_iotlb_map *known = as->guest ?
		vhost_iotlb_itree_first(as->guest, start, last) : NULL;
	int err = 0;

	for (; known && !err; known = vhost_iotlb_itree_next(known, start, last)) {
		u64 from = max(known->start, start), to = min(known->last, last);

		if (from - start >= dev->opt.scale_min)
			err = add_guest(guest, start, from - 1, bytes);
		if (!err)
			err = add_guest(guest, from, to, bytes);
		if (to == last)
			return err;
		start = to + 1;
	}
	if (!err && last - start + 1 >= dev->opt.scale_min)
		err = add_guest(guest, start, last, bytes);
	return err;
}

/*
 * Distinguish guest memory from rings and the like. A tree has nothing but
 * addresses, and memory comes in as many entries as it has physical pieces,
 * hence by length: what follows without a gap and is at least scale_min long is
 * guest memory. It stays that, so that a ring that is mapped right behind it
 * later is not taken for more of it.
 */
static int remember_guest(const struct hwsim_dev *dev, struct hwsim_as *as,
			  struct vhost_iotlb *tree, struct tree_size *size)
{
	struct vhost_iotlb_map *entry = vhost_iotlb_itree_first(tree, 0, U64_MAX);
	struct vhost_iotlb *guest = vhost_iotlb_alloc(HWSIM_MAX_ENTRIES, 0);
	int err = guest ? 0 : -ENOMEM;

	while (entry && !err) {
		u64 start = entry->start, last = entry->last;

		while ((entry = vhost_iotlb_itree_next(entry, 0, U64_MAX)) &&
		       entry->start == last + 1)
			last = entry->last;
		err = find_guest(dev, as, start, last, guest, &size->guest);
	}
	if (err) {
		vhost_iotlb_free(guest);
		return err;
	}
	vhost_iotlb_free(as->guest);
	as->guest = guest;
	return 0;
}

/* Queues change over to the new MR: a pause for all that run. */
static u64 swap_cost(const struct hwsim_dev *dev)
{
	if (!hwsim_live(dev))
		return 0;
	if (dev->map_rebuilds_vqs)
		return 2 * dev->npairs * (dev->cost[HWSIM_COST_VQ_CREATE] +
					  dev->cost[HWSIM_COST_VQ_DESTROY]);
	return hwsim_cost_vqs(dev, HWSIM_COST_SUSPEND, HWSIM_COST_SUSPEND_VQ) +
	       hwsim_cost_vqs(dev, HWSIM_COST_RESUME, HWSIM_COST_RESUME_VQ);
}

struct growth {
	u64 more, less;
};

static struct growth growth(u64 before, u64 now)
{
	return (struct growth){ now > before ? now - before : 0, before > now ? before - now : 0 };
}

/*
 * What it costs that @tree is mapped now, and count it. vhost-vdpa pins and
 * unpins before it calls; the difference to the previous tree is how much.
 */
int hwsim_cost_set_map(struct hwsim_dev *dev, struct hwsim_as *as,
		       struct vhost_iotlb *tree, struct hwsim_map_cost *cost)
{
	u64 given = as->given, guest = as->guest_bytes, rest = given - guest;
	struct tree_size size;
	struct growth all, memory, other;
	int err;

	measure(tree, &size);
	err = remember_guest(dev, as, tree, &size);
	if (err)
		return err;
	as->given = size.bytes;
	as->guest_bytes = size.guest;
	all = growth(given, size.bytes);
	memory = growth(guest, size.guest);
	other = growth(rest, size.bytes - size.guest);

	cost->heavy = max(given, size.bytes) >= dev->opt.heavy_min;
	cost->pin = cost_memory(dev, HWSIM_COST_MAP_GIB, memory.more, other.more) +
		    cost_memory(dev, HWSIM_COST_UNMAP_GIB, memory.less, other.less);
	/* Nothing mapped, no MR (mlx5_vdpa_create_mr() is not called). */
	cost->build = !size.entries ? 0 : dev->cost[HWSIM_COST_SET_MAP] +
		      size.entries * dev->cost[HWSIM_COST_SET_MAP_ENTRY] +
		      size.holes * dev->cost[HWSIM_COST_SET_MAP_HOLE_GIB] +
		      cost_memory(dev, HWSIM_COST_SET_MAP_GIB, size.guest,
				  size.bytes - size.guest);
	cost->swap = swap_cost(dev);

	hwsim_count(dev, HWSIM_MAP_ENTRIES, size.entries);
	hwsim_count(dev, HWSIM_MAP_PAGES, PFN_DOWN(all.more));
	hwsim_count(dev, HWSIM_UNMAP_PAGES, PFN_DOWN(all.less));
	return 0;
}

/* Nothing is mapped any more. Returns what unpinning it costs. */
u64 hwsim_cost_forget(const struct hwsim_dev *dev, struct hwsim_as *as)
{
	u64 cost = cost_memory(dev, HWSIM_COST_UNMAP_GIB, as->guest_bytes,
			       as->given - as->guest_bytes);

	vhost_iotlb_free(as->guest);
	as->guest = NULL;
	as->given = 0;
	as->guest_bytes = 0;
	return cost;
}

/* All queues there can be, one after the other, used or not (setup_virtqueues()). */
int hwsim_cost_create_vqs(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < 2 * dev->npairs; i++) {
		bool fail = hwsim_fail(dev, HWSIM_FAIL_VQ_CREATE);
		struct hwsim_op op;

		hwsim_op_begin(&op, dev, HWSIM_OP_VQ_CREATE);
		hwsim_op_charge(&op, dev->cost[HWSIM_COST_VQ_CREATE]);
		hwsim_op_end(&op, fail);
		if (fail)
			return -EIO;
	}
	dev->vqs_created = true;
	return 0;
}

void hwsim_cost_destroy_vqs(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; dev->vqs_created && i < 2 * dev->npairs; i++) {
		struct hwsim_op op;

		hwsim_op_begin(&op, dev, HWSIM_OP_VQ_DESTROY);
		hwsim_op_charge(&op, dev->cost[HWSIM_COST_VQ_DESTROY]);
		hwsim_op_end(&op, 0);
	}
	dev->vqs_created = false;
}
