// SPDX-License-Identifier: (MIT OR GPL-2.0)
/* Which devices there are, and which two are the ends of one wire. */
#include <linux/list.h>

#include "device.h"
#include "rx.h"
#include "wire.h"

/* Protects the list, and peer and wired of every device on it (for peer see hwsim_set_peer() too). */
static DECLARE_RWSEM(hwsim_wire);
static LIST_HEAD(hwsim_devices);

/* Both ends keep their (cut) wire: frames must not begin to loop back, not for a moment. */
static void cut(struct hwsim_dev *dev)
{
	if (dev->peer) {
		hwsim_set_peer(dev->peer, NULL);
		hwsim_set_peer(dev, NULL);
	}
}

static void connect(struct hwsim_dev *dev, struct hwsim_dev *peer)
{
	cut(dev);
	cut(peer);
	hwsim_set_peer(dev, peer);
	hwsim_set_peer(peer, dev);
	WRITE_ONCE(dev->wired, true);
	WRITE_ONCE(peer->wired, true);
}

/* With the wire option each device is connected to the first that waits for one. */
void hwsim_wire_add(struct hwsim_dev *dev)
{
	struct hwsim_dev *other;

	down_write(&hwsim_wire);
	if (dev->opt.wire) {
		WRITE_ONCE(dev->wired, true);
		list_for_each_entry(other, &hwsim_devices, node) {
			if (other->wired && !other->peer) {
				connect(dev, other);
				break;
			}
		}
	}
	list_add_tail(&dev->node, &hwsim_devices);
	up_write(&hwsim_wire);
}

void hwsim_wire_del(struct hwsim_dev *dev)
{
	down_write(&hwsim_wire);
	/* A device that a process has open runs on until it is closed. */
	cut(dev);
	list_del_init(&dev->node);
	up_write(&hwsim_wire);
}

/* Connect to the device of that name; no name means loopback. */
int hwsim_wire_connect(struct hwsim_dev *dev, const char *name)
{
	struct hwsim_dev *other;
	int err = -ENODEV;

	down_write(&hwsim_wire);
	if (!*name) {
		cut(dev);
		WRITE_ONCE(dev->wired, false);
		err = 0;
	}
	list_for_each_entry(other, &hwsim_devices, node) {
		if (other != dev && !strcmp(dev_name(&other->vdpa.dev), name)) {
			connect(dev, other);
			err = 0;
			break;
		}
	}
	up_write(&hwsim_wire);
	return err;
}

void hwsim_wire_show(struct hwsim_dev *dev, char *buf, size_t len)
{
	down_read(&hwsim_wire);
	if (!dev->wired)
		strscpy(buf, "loopback", len);
	else
		strscpy(buf, dev->peer ? dev_name(&dev->peer->vdpa.dev) : "cut", len);
	up_read(&hwsim_wire);
}

/* Returns whether there was another end; what it does with the frame is its own matter. */
bool hwsim_wire_send(struct hwsim_dev *dev, unsigned int pair, const void *frame, size_t len,
		     bool csum_ok)
{
	struct hwsim_dev *peer;

	down_read(&hwsim_wire);
	peer = dev->peer;
	if (peer) {
		down_read(&peer->dp);
		hwsim_receive(peer, pair, frame, len, csum_ok, NULL);
		up_read(&peer->dp);
	}
	up_read(&hwsim_wire);
	return peer;
}
