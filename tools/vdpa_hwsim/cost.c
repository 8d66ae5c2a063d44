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

#include "hwsim.h"

struct hwsim_profile {
	const char *name;
	/* Queues exist in hardware from the previous reset on; DRIVER_OK resumes them. */
	bool precreate;
	/* A set_map() while running tears all queues down and makes them anew. */
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

int hwsim_cost_set_profile(struct hwsim_dev *dev, const char *name)
{
	unsigned int i, c;

	for (i = 0; i < ARRAY_SIZE(profiles); i++) {
		if (!sysfs_streq(profiles[i].name, name))
			continue;
		dev->profile = &profiles[i];
		dev->precreate = profiles[i].precreate;
		dev->map_rebuilds_vqs = profiles[i].map_rebuilds_vqs;
		for (c = 0; c < HWSIM_NCOSTS; c++)
			dev->cost[c] = (u64)profiles[i].us[c] * NSEC_PER_USEC;
		return 0;
	}
	return -EINVAL;
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
 * charge is no hung task.
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

/* @bytes of real memory, charged as if there were mem_scale times as much. */
u64 hwsim_cost_bytes(const struct hwsim_dev *dev, enum hwsim_cost per_gib, u64 bytes)
{
	return mul_u64_u64_shr(bytes * dev->opt.mem_scale, dev->cost[per_gib], ilog2(SZ_1G));
}

/* For all queues that are in use. */
u64 hwsim_cost_vqs(const struct hwsim_dev *dev, enum hwsim_cost base, enum hwsim_cost per_vq)
{
	return dev->cost[base] + 2 * dev->ctrl.pairs * dev->cost[per_vq];
}

struct tree_size {
	u64 bytes;
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

/*
 * What it costs that @tree is mapped now, and count it. vhost-vdpa pins and
 * unpins before it calls; the difference to the previous tree tells how much.
 */
void hwsim_cost_set_map(struct hwsim_dev *dev, struct hwsim_as *as,
			struct vhost_iotlb *tree, struct hwsim_map_cost *cost)
{
	u64 given = as->given, pinned, unpinned;
	struct tree_size size;

	measure(tree, &size);
	pinned = size.bytes > given ? size.bytes - given : 0;
	unpinned = given > size.bytes ? given - size.bytes : 0;
	as->given = size.bytes;

	cost->heavy = max(given, size.bytes) >= dev->opt.heavy_min;
	cost->pin = hwsim_cost_bytes(dev, HWSIM_COST_MAP_GIB, pinned) +
		    hwsim_cost_bytes(dev, HWSIM_COST_UNMAP_GIB, unpinned);
	/* Nothing mapped, no MR (mlx5_vdpa_create_mr() is not called). */
	cost->build = !size.entries ? 0 : dev->cost[HWSIM_COST_SET_MAP] +
		      size.entries * dev->cost[HWSIM_COST_SET_MAP_ENTRY] +
		      size.holes * dev->cost[HWSIM_COST_SET_MAP_HOLE_GIB] +
		      hwsim_cost_bytes(dev, HWSIM_COST_SET_MAP_GIB, size.bytes);
	cost->swap = swap_cost(dev);

	hwsim_count(dev, HWSIM_MAP_ENTRIES, size.entries);
	hwsim_count(dev, HWSIM_MAP_PAGES, PFN_DOWN(pinned));
	hwsim_count(dev, HWSIM_UNMAP_PAGES, PFN_DOWN(unpinned));
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
