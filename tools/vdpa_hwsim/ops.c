// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The operations vhost-vdpa, virtio_vdpa and the vdpa core ask for. The order of
 * things, what survives what, and what is ignored follow mlx5_vdpa (mlx5_vnet.c)
 * unless an option says otherwise.
 */
#include <uapi/linux/vhost_types.h>
#include <uapi/linux/virtio_ids.h>

#include "cost.h"
#include "ctrl.h"
#include "device.h"
#include "map.h"
#include "ops.h"
#include "ring.h"
#include "stats.h"
#include "vq.h"

static u64 hwsim_get_device_features(struct vdpa_device *vdpa)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	if (hwsim_flawed(dev, HWSIM_FLAW_FEATURES_MOVE) &&
	    (dev->status & VIRTIO_CONFIG_S_FEATURES_OK))
		return dev->features & ~BIT_ULL(VIRTIO_NET_F_MTU);
	return dev->features;
}

static u64 hwsim_get_backend_features(const struct vdpa_device *vdpa)
{
	const struct hwsim_dev *dev = container_of(vdpa, const struct hwsim_dev, vdpa);

	return dev->opt.enable_after_driver_ok ?
	       BIT_ULL(VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK) : 0;
}

/* verify_driver_features() */
static int hwsim_set_driver_features(struct vdpa_device *vdpa, u64 features)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	if (!(features & BIT_ULL(VIRTIO_F_ACCESS_PLATFORM)))
		return -EOPNOTSUPP;
	if ((features & (BIT_ULL(VIRTIO_NET_F_MQ) | BIT_ULL(VIRTIO_NET_F_CTRL_VQ))) ==
	    BIT_ULL(VIRTIO_NET_F_MQ))
		return -EINVAL;

	/* A command under way looks at what it changes with ctl held, and not always dp. */
	mutex_lock(&dev->ctl);
	hwsim_change(dev);
	WRITE_ONCE(dev->driver_features, features & dev->features);
	hwsim_update_cvq_index(dev);
	hwsim_ctrl_reset(dev);
	hwsim_changed(dev);
	mutex_unlock(&dev->ctl);
	return 0;
}

static u64 hwsim_get_driver_features(struct vdpa_device *vdpa)
{
	return READ_ONCE(hwsim_from(vdpa)->driver_features);
}

static void hwsim_set_config_cb(struct vdpa_device *vdpa, struct vdpa_callback *cb)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	hwsim_change(dev);
	dev->config_cb = *cb;
	hwsim_changed(dev);
}

static u16 hwsim_get_vq_num_max(struct vdpa_device *vdpa)
{
	return hwsim_from(vdpa)->opt.ring_max;
}

static u32 hwsim_get_device_id(struct vdpa_device *vdpa)
{
	return VIRTIO_ID_NET;
}

static u32 hwsim_get_vendor_id(struct vdpa_device *vdpa)
{
	return 0;
}

static u8 hwsim_get_status(struct vdpa_device *vdpa)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	if (hwsim_flawed(dev, HWSIM_FLAW_SUSPENDED_STATUS) && READ_ONCE(dev->suspended))
		return READ_ONCE(dev->status) & ~VIRTIO_CONFIG_S_DRIVER_OK;
	return READ_ONCE(dev->status) |
	       (test_bit(0, &dev->needs_reset) ? VIRTIO_CONFIG_S_NEEDS_RESET : 0);
}

/* Ring sizes a queue cannot be created with, as the firmware would find. */
static bool rings_valid(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->vdpa.nvqs; i++) {
		const struct hwsim_vq *vq = &dev->vqs[i];

		if (vq->ready && (!is_power_of_2(vq->num) || vq->num > dev->opt.ring_max))
			return false;
	}
	return true;
}

/* Queues created ahead have the default size; any other means to create them again. */
static bool default_rings(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < 2 * dev->npairs; i++)
		if (dev->vqs[i].num != dev->opt.ring_max)
			return false;
	return true;
}

static int start(struct hwsim_dev *dev)
{
	bool valid, by_default;
	struct hwsim_op op;
	u64 cost = 0;
	int err = 0;

	down_read(&dev->dp);
	valid = rings_valid(dev);
	by_default = default_rings(dev);
	up_read(&dev->dp);
	if (!valid)
		return -EINVAL;
	if (dev->vqs_created && !by_default)
		hwsim_cost_destroy_vqs(dev);
	/* Queues come into being running; those that were there before are resumed. */
	if (dev->vqs_created)
		cost = hwsim_cost_vqs(dev, HWSIM_COST_RESUME, HWSIM_COST_RESUME_VQ);
	else
		err = hwsim_cost_create_vqs(dev);
	hwsim_op_begin(&op, dev, HWSIM_OP_DRIVER_OK);
	hwsim_op_charge(&op, cost);
	hwsim_op_end(&op, err);
	dev->vqs_used = true;
	return err;
}

static void hwsim_set_status(struct vdpa_device *vdpa, u8 status)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	bool starts;
	int err = 0;

	if (hwsim_flawed(dev, HWSIM_FLAW_NO_FEATURES_OK))
		status &= ~VIRTIO_CONFIG_S_FEATURES_OK;
	if (hwsim_flawed(dev, HWSIM_FLAW_NO_DRIVER_OK))
		status &= ~VIRTIO_CONFIG_S_DRIVER_OK;
	mutex_lock(&dev->ctl);
	starts = status & ~dev->status & VIRTIO_CONFIG_S_DRIVER_OK;
	/* Only a reset takes DRIVER_OK back. */
	if (dev->status & ~status & VIRTIO_CONFIG_S_DRIVER_OK)
		goto out;
	if (starts)
		err = start(dev);
	if (err)
		status = dev->status | VIRTIO_CONFIG_S_FAILED;
	hwsim_change(dev);
	WRITE_ONCE(dev->status, status & ~VIRTIO_CONFIG_S_NEEDS_RESET);
	if (hwsim_flawed(dev, HWSIM_FLAW_WAKE_STATUS))
		dev->suspended = false;
	if (hwsim_flawed(dev, HWSIM_FLAW_CONFIG_CALL))
		hwsim_config_changed(dev);
	hwsim_changed(dev);
	/* Kicks before now were for nothing; hardware looks at its queues when they start. */
	if (starts && !err)
		hwsim_look_at_data(dev);
out:
	mutex_unlock(&dev->ctl);
}

/* A MAC the driver has set stays, as mlx5_vdpa's does. */
static void reset_state(struct hwsim_dev *dev)
{
	unsigned int i;

	hwsim_change(dev);
	for (i = 0; i < dev->vdpa.nvqs; i++)
		hwsim_reset_vq(dev, &dev->vqs[i]);
	if (!hwsim_flawed(dev, HWSIM_FLAW_KEEP_ASID))
		memset(dev->asid, 0, sizeof(dev->asid));
	memset(&dev->config_cb, 0, sizeof(dev->config_cb));
	WRITE_ONCE(dev->status, hwsim_flawed(dev, HWSIM_FLAW_KEEP_STATUS) ?
		   dev->status & (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER) : 0);
	WRITE_ONCE(dev->driver_features, 0);
	dev->suspended = false;
	if (!hwsim_flawed(dev, HWSIM_FLAW_KEEP_FAULT))
		clear_bit(0, &dev->needs_reset);
	hwsim_update_cvq_index(dev);
	hwsim_ctrl_reset(dev);
	WRITE_ONCE(dev->generation, dev->generation + 1);
	hwsim_changed(dev);
}

static int hwsim_compat_reset(struct vdpa_device *vdpa, u32 flags)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	bool clean = flags & VDPA_RESET_F_CLEAN_MAP;
	struct hwsim_op op;
	int err = 0;
	bool used;

	mutex_lock(&dev->ctl);
	used = dev->vqs_used;
	hwsim_op_begin(&op, dev, clean ? HWSIM_OP_RESET_CLEAN : HWSIM_OP_RESET);
	reset_state(dev);
	if (clean || hwsim_flawed(dev, HWSIM_LIE_PERSIST))
		err = hwsim_as_clean(dev);
	/*
	 * reset_map() is called when vhost-vdpa is closed. A device without it
	 * has no PERSIST either, so that a reset without CLEAN_MAP is that of
	 * the next open().
	 */
	if (!clean && !dev->opt.persist && dev->opt.clean_map)
		hwsim_as_forget(dev);
	/* A device that was not started is as good as reset (needs_vqs_reset()). */
	if (used)
		hwsim_op_charge(&op, dev->cost[HWSIM_COST_RESET]);
	hwsim_op_end(&op, err);
	if (used)
		hwsim_cost_destroy_vqs(dev);
	dev->vqs_used = false;
	/* If that fails, DRIVER_OK tries it again, and reports it (setup_vq_resources()). */
	if (dev->precreate && !dev->vqs_created)
		hwsim_cost_create_vqs(dev);
	mutex_unlock(&dev->ctl);
	/* Everything else is reset; but maps that should have gone are still there. */
	return err;
}

static int hwsim_reset(struct vdpa_device *vdpa)
{
	return hwsim_compat_reset(vdpa, 0);
}

static void set_suspended(struct hwsim_dev *dev, bool suspended)
{
	unsigned int i;

	hwsim_change(dev);
	/*
	 * With a wire dp is released behind a completion: what was published is
	 * signalled before the device is silent. It may be reset next, which forgets it.
	 */
	for (i = 0; suspended && hwsim_live(dev) && i < 2 * dev->npairs; i++)
		hwsim_vq_signal(dev, &dev->vqs[i]);
	dev->suspended = suspended;
	/* mlx5_vdpa_cvq_suspend(); its resume does not undo that. */
	if (suspended && !dev->opt.resume_cvq)
		WRITE_ONCE(dev->vqs[dev->cvq_index].ready, false);
	hwsim_changed(dev);
}

/* What a device does that forgets its queues' indices. */
static void hwsim_rewind(struct hwsim_dev *dev)
{
	unsigned int i;

	hwsim_change(dev);
	for (i = 0; i < dev->vdpa.nvqs; i++) {
		dev->vqs[i].next_avail = 0;
		dev->vqs[i].next_used = 0;
	}
	hwsim_changed(dev);
}

static int hwsim_suspend(struct vdpa_device *vdpa)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_op op;
	int err;

	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_SUSPEND);
	err = hwsim_fail(dev, HWSIM_FAIL_SUSPEND) ? -EIO : 0;
	/* Even a suspend that fails leaves the device suspended (mlx5_vdpa_suspend()). */
	if (!hwsim_flawed(dev, HWSIM_LIE_SUSPEND))
		set_suspended(dev, true);
	hwsim_op_charge(&op, hwsim_cost_vqs(dev, HWSIM_COST_SUSPEND, HWSIM_COST_SUSPEND_VQ));
	hwsim_op_end(&op, err);
	mutex_unlock(&dev->ctl);
	return err;
}

static int hwsim_resume(struct vdpa_device *vdpa)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_op op;
	int err;

	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_RESUME);
	err = hwsim_fail(dev, HWSIM_FAIL_RESUME) ? -EIO : 0;
	hwsim_op_charge(&op, hwsim_cost_vqs(dev, HWSIM_COST_RESUME, HWSIM_COST_RESUME_VQ));
	if (!err && !hwsim_flawed(dev, HWSIM_LIE_RESUME)) {
		if (hwsim_flawed(dev, HWSIM_FLAW_RESUME_AT_0))
			hwsim_rewind(dev);
		set_suspended(dev, false);
		queue_work(dev->wq, &dev->wake_work);
		/* A device that keeps the queue ready owes it the kicks that came meanwhile. */
		if (dev->opt.resume_cvq)
			queue_work(dev->wq, &dev->cvq_work);
	}
	hwsim_op_end(&op, err);
	mutex_unlock(&dev->ctl);
	return err;
}

static size_t hwsim_get_config_size(struct vdpa_device *vdpa)
{
	return sizeof(struct virtio_net_config);
}

static void hwsim_get_config(struct vdpa_device *vdpa, unsigned int offset, void *buf,
			     unsigned int len)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	if (offset > sizeof(dev->config) || len > sizeof(dev->config) - offset)
		return;
	down_read(&dev->dp);
	memcpy(buf, (u8 *)&dev->config + offset, len);
	if (hwsim_flawed(dev, HWSIM_FLAW_CONFIG_MOVES))
		*(u8 *)buf ^= atomic64_inc_return(&dev->counter[HWSIM_CONFIG_CALLS]);
	up_read(&dev->dp);
}

/* All of it is read-only for a driver that is not older than virtio 1.0. */
static void hwsim_set_config(struct vdpa_device *vdpa, unsigned int offset, const void *buf,
			     unsigned int len)
{
}

static u32 hwsim_get_generation(struct vdpa_device *vdpa)
{
	return READ_ONCE(hwsim_from(vdpa)->generation);
}

const struct vdpa_config_ops hwsim_ops = {
	.set_vq_address = hwsim_set_vq_address,
	.set_vq_num = hwsim_set_vq_num,
	.kick_vq = hwsim_kick_vq,
	.set_vq_cb = hwsim_set_vq_cb,
	.set_vq_ready = hwsim_set_vq_ready,
	.get_vq_ready = hwsim_get_vq_ready,
	.set_vq_state = hwsim_set_vq_state,
	.get_vq_state = hwsim_get_vq_state,
	.get_vendor_vq_stats = hwsim_vendor_vq_stats,
	.get_vq_notification = hwsim_get_vq_notification,
	.get_vq_size = hwsim_get_vq_size,
	.get_vq_align = hwsim_get_vq_align,
	.get_vq_group = hwsim_get_vq_group,
	.get_vq_desc_group = hwsim_get_vq_desc_group,
	.get_device_features = hwsim_get_device_features,
	.get_backend_features = hwsim_get_backend_features,
	.set_driver_features = hwsim_set_driver_features,
	.get_driver_features = hwsim_get_driver_features,
	.set_config_cb = hwsim_set_config_cb,
	.get_vq_num_max = hwsim_get_vq_num_max,
	.get_device_id = hwsim_get_device_id,
	.get_vendor_id = hwsim_get_vendor_id,
	.get_status = hwsim_get_status,
	.set_status = hwsim_set_status,
	.reset = hwsim_reset,
	.compat_reset = hwsim_compat_reset,
	.suspend = hwsim_suspend,
	.resume = hwsim_resume,
	.get_config_size = hwsim_get_config_size,
	.get_config = hwsim_get_config,
	.set_config = hwsim_set_config,
	.get_generation = hwsim_get_generation,
	.set_map = hwsim_set_map,
	.dma_map = hwsim_dma_map,
	.dma_unmap = hwsim_dma_unmap,
	.reset_map = hwsim_reset_map,
	.set_group_asid = hwsim_set_group_asid,
};
