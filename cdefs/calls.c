/* SPDX-License-Identifier: MIT */
#include <sys/ioctl.h>

#include "ring_access.h"
#include "cdefs.h"

uint32_t calls_run(int fd, struct prepared_call *calls, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		struct prepared_call *c = &calls[i];

		c->begin = now_ns();
		c->result = ioctl(fd, c->request, (void *)(uintptr_t)c->argument);
		if (c->result < 0)
			c->result = -errno;
		c->end = now_ns();
		if (c->result < 0)
			break;
	}
	return i;
}

void rings_remember(const struct vring *rings, uint32_t count,
		    struct vring_start *starts)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		vring_remember(&rings[i], &starts[i]);
}

uint32_t rings_in_order(const struct vring *rings, uint32_t count,
			const struct vring_start *starts, int64_t settle)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		if (!vring_in_order(&rings[i], starts ? &starts[i] : NULL,
				    now_ns() + settle))
			break;
	return i;
}

uint32_t rings_hold_bases(const struct vring *rings, uint32_t count,
			  const uint16_t *bases)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		uint16_t avail, used, taken;

		vring_indices(&rings[i], &avail, &used);
		taken = bases[i] - used;
		if (taken > rings[i].num || (uint16_t)(avail - used) < taken)
			break;
	}
	return i;
}
