/* SPDX-License-Identifier: MIT */
#include "ring_access.h"
#include "cdefs.h"

uint32_t iotlb_write_burst(int fd, const struct vhost_msg_v2 *messages,
			   uint32_t count, int64_t *times, int *error)
{
	uint32_t i;

	*error = 0;
	for (i = 0; i < count; i++) {
		ssize_t r;

		times[2 * i] = now_ns();
		r = write(fd, &messages[i], sizeof(messages[i]));
		if (r != (ssize_t)sizeof(messages[i]))
			*error = r < 0 ? errno : EIO;
		times[2 * i + 1] = now_ns();
		if (*error)
			break;
	}
	return i;
}
