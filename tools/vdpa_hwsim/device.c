// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * What every part may do to the device as a whole: let its queues be looked at,
 * stop them for a moment or for good, interrupt the driver. It calls no other part.
 */
#include <linux/hrtimer.h>
#include <linux/sched.h>

#include "device.h"

/* Protects .waiting and the priority that follows from it, and .peer. */
static DEFINE_MUTEX(hwsim_lending);

/*
 * virtio 1.3, 5.1.2: behind the queues of all pairs if more than the first can
 * be used, which RSS allows as well. Then, and only then, it is not the index
 * of a queue of a pair in use. dp held for writing.
 */
void hwsim_update_cvq_index(struct hwsim_dev *dev)
{
	bool many = hwsim_has(dev, VIRTIO_NET_F_MQ) || hwsim_has(dev, VIRTIO_NET_F_RSS);

	WRITE_ONCE(dev->cvq_index, many ? 2 * dev->npairs : 2);
}

/* Atomic. */
void hwsim_look_at_pair(struct hwsim_pair *pair)
{
	kthread_queue_work(pair->thread, &pair->work);
}

/* The threads of its pairs hold its dp, and that of the other end of the wire. */
static void set_priority(struct hwsim_dev *dev)
{
	bool awaited = dev->waiting || (dev->peer && dev->peer->waiting);
	unsigned int i;

	for (i = 0; dev->pairs && i < dev->npairs && dev->pairs[i].thread; i++)
		set_user_nice(dev->pairs[i].thread->task, awaited ? 0 : HWSIM_DATA_NICE);
}

static void wait_for_data(struct hwsim_dev *dev, int change)
{
	mutex_lock(&hwsim_lending);
	WRITE_ONCE(dev->waiting, dev->waiting + change);
	set_priority(dev);
	if (dev->peer)
		set_priority(dev->peer);
	mutex_unlock(&hwsim_lending);
}

/*
 * Take dp for writing. The data path ends with the frame that it is at, as a
 * device does. Without .waiting it would go on for as long as there are frames
 * (readers may overtake a writer that was woken, rwsem_down_read_slowpath()), and
 * at its own priority it would hold dp until nothing else needs the CPU.
 */
void hwsim_change(struct hwsim_dev *dev)
{
	if (down_write_trylock(&dev->dp))
		return;
	wait_for_data(dev, 1);
	down_write(&dev->dp);
	wait_for_data(dev, -1);
}

/* Release dp, and let the data path go on where it made room for that. */
void hwsim_changed(struct hwsim_dev *dev)
{
	bool again = dev->broken_off && (hwsim_live(dev) || hwsim_flawed(dev, HWSIM_FLAW_EARLY));
	unsigned int i;

	dev->broken_off = false;
	up_write(&dev->dp);
	for (i = 0; again && i < dev->npairs; i++)
		hwsim_look_at_pair(&dev->pairs[i]);
}

/* The other end of the wire, or NULL; hwsim_wire held for writing. */
void hwsim_set_peer(struct hwsim_dev *dev, struct hwsim_dev *peer)
{
	mutex_lock(&hwsim_lending);
	dev->peer = peer;
	set_priority(dev);
	mutex_unlock(&hwsim_lending);
}

/*
 * Look once at every data queue, kicked or not. Not at the control queue: it is
 * served by mlx5_vdpa itself, at a kick and at nothing else (mlx5_vdpa_kick_vq()).
 */
void hwsim_look_at_data(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->npairs; i++)
		hwsim_look_at_pair(&dev->pairs[i]);
	if (dev->opt.doorbell_us)
		queue_work(dev->wq, &dev->doorbell_work);
}

/*
 * Look at the data queues of a device that was resumed, a moment later. The
 * thread that resumed it has returned by then: here the data path needs
 * its locks, which hardware would not take from that thread.
 */
void hwsim_wake_work(struct work_struct *work)
{
	ktime_t moment = ns_to_ktime(20 * NSEC_PER_USEC);

	set_current_state(TASK_IDLE);
	schedule_hrtimeout_range(&moment, 0, HRTIMER_MODE_REL);
	hwsim_look_at_data(container_of(work, struct hwsim_dev, wake_work));
}

/* A modelled pause of the data path, without a lock held meanwhile; ctl held. */
void hwsim_freeze(struct hwsim_dev *dev, bool frozen)
{
	hwsim_change(dev);
	dev->frozen = frozen;
	hwsim_changed(dev);
	if (!frozen)
		hwsim_look_at_data(dev);
}

/* dp held, so that the callback cannot be replaced under us. */
void hwsim_config_changed(struct hwsim_dev *dev)
{
	struct vdpa_callback *cb = &dev->config_cb;

	WRITE_ONCE(dev->generation, dev->generation + 1);
	if (!cb->callback || hwsim_flawed(dev, HWSIM_FLAW_NO_CONFIG_CALL))
		return;
	hwsim_count(dev, HWSIM_CONFIG_CALLS, 1);
	cb->callback(cb->private);
}

/* virtio 1.3, 2.1.2: notify the driver, and do nothing more until it resets us. */
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
