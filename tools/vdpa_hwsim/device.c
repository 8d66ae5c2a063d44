// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * What every part may do to the device as a whole: let its queues be looked at,
 * stop them for a moment or for good, interrupt the driver. It calls no other part.
 */
#include "device.h"

/*
 * virtio 1.3, 5.1.2: behind the queues of all pairs if more than the first can
 * be used, which RSS allows as well. Then, and only then, is no queue of a pair
 * in use taken for it. dp held for writing.
 */
void hwsim_update_cvq_index(struct hwsim_dev *dev)
{
	bool many = hwsim_has(dev, VIRTIO_NET_F_MQ) || hwsim_has(dev, VIRTIO_NET_F_RSS);

	WRITE_ONCE(dev->cvq_index, many ? 2 * dev->npairs : 2);
}

/*
 * Look once at every data queue, kicked or not. Not at the control queue: it is
 * served by mlx5_vdpa itself, at a kick and at nothing else (mlx5_vdpa_kick_vq()).
 */
void hwsim_look_at_data(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->npairs; i++)
		queue_work(dev->wq, &dev->pairs[i].work);
	if (dev->opt.doorbell_us)
		queue_work(dev->wq, &dev->doorbell_work);
}

/* A modelled pause of the data path, without a lock held meanwhile; ctl held. */
void hwsim_freeze(struct hwsim_dev *dev, bool frozen)
{
	down_write(&dev->dp);
	dev->frozen = frozen;
	up_write(&dev->dp);
	if (!frozen)
		hwsim_look_at_data(dev);
}

/* dp held, so that the callback cannot be replaced under us. */
void hwsim_config_changed(struct hwsim_dev *dev)
{
	struct vdpa_callback *cb = &dev->config_cb;

	WRITE_ONCE(dev->generation, dev->generation + 1);
	if (!cb->callback)
		return;
	hwsim_count(dev, HWSIM_CONFIG_CALLS, 1);
	cb->callback(cb->private);
}

/* virtio 1.3, 2.1.2: tell the driver, and do nothing more until it resets us. */
void hwsim_fault(struct hwsim_dev *dev, const struct hwsim_vq *vq, const char *what)
{
	hwsim_count(dev, HWSIM_FAULTS, 1);
	if (test_and_set_bit(0, &dev->needs_reset))
		return;
	spin_lock(&dev->fault_lock);
	snprintf(dev->fault, sizeof(dev->fault), "vq %u: %s", vq->index, what);
	spin_unlock(&dev->fault_lock);
	hwsim_config_changed(dev);
}
