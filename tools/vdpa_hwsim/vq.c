// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The operations on one virtqueue: set-up, state, groups and doorbells. As in
 * ops.c, mlx5_vdpa (mlx5_vnet.c) is the model.
 */
#include <linux/hrtimer.h>
#include <linux/io.h>
#include <linux/sched.h>

#include "cost.h"
#include "device.h"
#include "vq.h"

/* In a queue's doorbell page: not rung. No queue has this index. */
#define HWSIM_NO_DOORBELL	0xffffffff

static struct hwsim_vq *to_vq(struct vdpa_device *vdpa, u16 index)
{
	return &hwsim_from(vdpa)->vqs[index];
}

int hwsim_set_vq_address(struct vdpa_device *vdpa, u16 index, u64 desc, u64 driver,
			 u64 device)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_vq *vq = to_vq(vdpa, index);

	if (hwsim_flawed(dev, HWSIM_FLAW_ADDR_KEPT) && vq->desc)
		return 0;
	hwsim_change(dev);
	vq->desc = desc;
	vq->avail = driver;
	vq->used = device;
	hwsim_changed(dev);
	return 0;
}

void hwsim_set_vq_num(struct vdpa_device *vdpa, u16 index, u32 num)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	hwsim_change(dev);
	to_vq(vdpa, index)->num = hwsim_flawed(dev, HWSIM_FLAW_NUM_IGNORED) ?
				  dev->opt.ring_max : num;
	hwsim_changed(dev);
}

static void look_at_data(struct hwsim_dev *dev, u16 index)
{
	if (!hwsim_is_cvq(dev, index) && index / 2 < dev->npairs)
		hwsim_look_at_pair(&dev->pairs[index / 2]);
}

/*
 * mlx5_vdpa_kick_vq(): a kick of a control queue that is not enabled is dropped,
 * and nothing looks at the ring instead of it, neither enabling nor DRIVER_OK.
 */
static void kick(struct hwsim_dev *dev, u16 index)
{
	struct hwsim_vq *vq = &dev->vqs[index];

	hwsim_vq_count(vq, HWSIM_VQ_KICKS, 1);
	if (hwsim_flawed(dev, HWSIM_FLAW_WAKE_KICK) && !hwsim_is_cvq(dev, index))
		WRITE_ONCE(dev->suspended, false);
	if ((hwsim_flawed(dev, HWSIM_FLAW_CVQ_SUSPENDED) ||
	     hwsim_flawed(dev, HWSIM_FLAW_NOT_READY)) && hwsim_is_cvq(dev, index))
		queue_work(dev->wq, &dev->cvq_work);
	if (!hwsim_is_cvq(dev, index))
		look_at_data(dev, index);
	else if (READ_ONCE(vq->ready))
		queue_work(dev->wq, &dev->cvq_work);
}

/* In the wake-up of an eventfd, interrupts off. */
void hwsim_kick_vq(struct vdpa_device *vdpa, u16 index)
{
	kick(hwsim_from(vdpa), index);
}

void hwsim_set_vq_cb(struct vdpa_device *vdpa, u16 index, struct vdpa_callback *cb)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	hwsim_change(dev);
	to_vq(vdpa, index)->cb = *cb;
	hwsim_changed(dev);
}

void hwsim_set_vq_ready(struct vdpa_device *vdpa, u16 index, bool ready)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	hwsim_change(dev);
	/* mlx5_vdpa_set_vq_ready() does nothing before the features are known. */
	if (dev->driver_features &&
	    !(ready && hwsim_flawed(dev, HWSIM_LIE_ENABLE) &&
	      (dev->status & VIRTIO_CONFIG_S_DRIVER_OK)))
		WRITE_ONCE(to_vq(vdpa, index)->ready, ready);
	if (ready && hwsim_flawed(dev, HWSIM_FLAW_WAKE_ENABLE))
		dev->suspended = false;
	hwsim_changed(dev);

	if (ready)
		look_at_data(dev, index);
}

bool hwsim_get_vq_ready(struct vdpa_device *vdpa, u16 index)
{
	return READ_ONCE(to_vq(vdpa, index)->ready);
}

int hwsim_set_vq_state(struct vdpa_device *vdpa, u16 index,
		       const struct vdpa_vq_state *state)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_vq *vq = to_vq(vdpa, index);
	int err = 0;

	hwsim_change(dev);
	if (hwsim_live(dev) && vq->ready) {
		err = -EINVAL;
	} else {
		vq->next_avail = state->split.avail_index;
		vq->next_used = state->split.avail_index;
		vq->signalled_used = state->split.avail_index;
		vq->signalled = false;
		vq->nheld = 0;
	}
	hwsim_changed(dev);
	return err;
}

/*
 * mlx5 hardware knows what it has used, not what it has fetched, and gives that
 * as the base: a device that continues there repeats what was in flight. With
 * base_avail the index of the next head to fetch is given instead, as vdpa_sim
 * does: then the next device has to know by itself what was in flight.
 */
int hwsim_get_vq_state(struct vdpa_device *vdpa, u16 index, struct vdpa_vq_state *state)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_vq *vq = to_vq(vdpa, index);

	hwsim_change(dev);
	state->split.avail_index = dev->opt.base_avail ? vq->next_avail : vq->next_used;
	if (hwsim_flawed(dev, HWSIM_FLAW_BASE_MOVES))
		vq->next_used++;
	state->split.avail_index += hwsim_flawed(dev, HWSIM_FLAW_BASE_OFF);
	hwsim_changed(dev);
	return 0;
}

u16 hwsim_get_vq_size(struct vdpa_device *vdpa, u16 index)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_vq *vq = to_vq(vdpa, index);
	u16 size;

	down_read(&dev->dp);
	size = vq->ready ? vq->num : dev->opt.ring_max;
	if (hwsim_flawed(dev, HWSIM_FLAW_SIZE_BEYOND))
		size *= 2;
	up_read(&dev->dp);
	return size;
}

u32 hwsim_get_vq_align(struct vdpa_device *vdpa)
{
	return PAGE_SIZE;
}

static u32 group_of(struct vdpa_device *vdpa, u16 index, enum hwsim_group data)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	if (hwsim_flawed(dev, HWSIM_FLAW_BAD_GROUP))
		return vdpa->ngroups;
	if (dev->opt.single_group)
		return HWSIM_GROUP_DATA;
	return hwsim_is_cvq(dev, index) ? HWSIM_GROUP_CVQ : data;
}

u32 hwsim_get_vq_group(struct vdpa_device *vdpa, u16 index)
{
	return group_of(vdpa, index, HWSIM_GROUP_DATA);
}

u32 hwsim_get_vq_desc_group(struct vdpa_device *vdpa, u16 index)
{
	return group_of(vdpa, index, HWSIM_GROUP_DESC);
}

int hwsim_set_group_asid(struct vdpa_device *vdpa, unsigned int group, unsigned int asid)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	unsigned int i;
	struct hwsim_op op;

	if (group >= vdpa->ngroups || asid >= dev->opt.nas)
		return -EINVAL;
	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_GROUP_ASID);
	hwsim_change(dev);
	/* If there is but one group, the others are in it. */
	for (i = 0; i < HWSIM_NGROUPS; i++)
		if ((i == group || dev->opt.single_group) &&
		    !hwsim_flawed(dev, HWSIM_FLAW_ONE_AS))
			dev->asid[i] = asid;
	hwsim_changed(dev);
	hwsim_op_end(&op, 0);
	mutex_unlock(&dev->ctl);
	return 0;
}

/* The one operation whose index vhost-vdpa has not checked: it comes from mmap(). */
struct vdpa_notification_area hwsim_get_vq_notification(struct vdpa_device *vdpa, u16 index)
{
	if (index >= vdpa->nvqs)
		return (struct vdpa_notification_area) {};
	return (struct vdpa_notification_area) {
		.addr = virt_to_phys(to_vq(vdpa, index)->doorbell),
		.size = PAGE_SIZE,
	};
}

/*
 * There is no event for a write to a page, so look, as long as the device
 * runs. Whatever starts the device again queues this again (hwsim_look_at_data()).
 */
void hwsim_doorbell_work(struct work_struct *work)
{
	struct hwsim_dev *dev = container_of(work, struct hwsim_dev, doorbell_work);
	unsigned int i;
	ktime_t pause;
	bool live;

	do {
		for (i = 0; i < dev->vdpa.nvqs; i++) {
			u32 *page = dev->vqs[i].doorbell;

			if (READ_ONCE(*page) != HWSIM_NO_DOORBELL) {
				WRITE_ONCE(*page, HWSIM_NO_DOORBELL);
				kick(dev, i);
			}
		}
		pause = ns_to_ktime((u64)dev->opt.doorbell_us * NSEC_PER_USEC);
		set_current_state(TASK_IDLE);
		schedule_hrtimeout_range(&pause, 0, HRTIMER_MODE_REL);
		down_read(&dev->dp);
		live = hwsim_live(dev);
		up_read(&dev->dp);
	} while (live);
}

/* The size is the one queues are created with by default (mvqs_set_defaults()). */
void hwsim_reset_vq(struct hwsim_dev *dev, struct hwsim_vq *vq)
{
	if (!hwsim_flawed(dev, HWSIM_FLAW_KEEP_READY))
		WRITE_ONCE(vq->ready, false);
	vq->signalled = false;
	if (!hwsim_flawed(dev, HWSIM_FLAW_KEEP_BASE)) {
		vq->next_avail = 0;
		vq->next_used = 0;
		vq->signalled_used = 0;
	}
	vq->nheld = 0;
	vq->num = dev->opt.ring_max;
	if (!hwsim_flawed(dev, HWSIM_FLAW_ADDR_KEPT)) {
		vq->desc = 0;
		vq->avail = 0;
		vq->used = 0;
	}
	memset(&vq->cb, 0, sizeof(vq->cb));
	if (vq->doorbell)
		WRITE_ONCE(*vq->doorbell, HWSIM_NO_DOORBELL);
}

/* One more than pairs need, always, like mlx5_vdpa; whether it is of use is negotiated. */
int hwsim_vqs_init(struct hwsim_dev *dev)
{
	unsigned int i;

	dev->vqs = kvcalloc(2 * dev->npairs + 1, sizeof(*dev->vqs), GFP_KERNEL);
	if (!dev->vqs)
		return -ENOMEM;
	for (i = 0; i < 2 * dev->npairs + 1; i++) {
		struct hwsim_vq *vq = &dev->vqs[i];

		mutex_init(&vq->rx_lock);
		vq->index = i;
		vq->segs = kvcalloc(HWSIM_MAX_SEGS, sizeof(*vq->segs), GFP_KERNEL);
		if (dev->opt.doorbell_us)
			vq->doorbell = (u32 *)get_zeroed_page(GFP_KERNEL);
		if (!vq->segs || (dev->opt.doorbell_us && !vq->doorbell))
			return -ENOMEM;
		hwsim_reset_vq(dev, vq);
	}
	return 0;
}

void hwsim_vqs_free(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; dev->vqs && i < 2 * dev->npairs + 1; i++) {
		kvfree(dev->vqs[i].segs);
		free_page((unsigned long)dev->vqs[i].doorbell);
	}
	kvfree(dev->vqs);
}
