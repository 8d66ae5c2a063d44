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

#define LOOK_AT_CLOCK 32 /* messages between two looks */

void iotlb_send(int fd, struct iotlb_burst *b, int64_t until)
{
	uint32_t i = b->done;

	b->error = 0;
	if (!b->done)
		b->begin = now_ns();
	while (i < b->count) {
		const struct vhost_msg_v2 *m = &b->messages[i];
		ssize_t r = write(fd, m, sizeof(*m));

		if (r != (ssize_t)sizeof(*m)) {
			b->error = r < 0 ? errno : EIO;
			break;
		}
		if (m->iotlb.type == VHOST_IOTLB_BATCH_BEGIN)
			b->batch = m->asid;
		else if (m->iotlb.type == VHOST_IOTLB_BATCH_END)
			b->batch = -1;
		if (!(++i % LOOK_AT_CLOCK) && now_ns() >= until)
			break;
	}
	b->end = now_ns();
	b->done = i;
}

void iotlb_repeat(struct vhost_msg_v2 *first, uint32_t count,
		  uint64_t iova_step, uint64_t uaddr_step)
{
	uint32_t i;

	for (i = 1; i < count; i++) {
		first[i] = first[i - 1];
		first[i].iotlb.iova += iova_step;
		first[i].iotlb.uaddr += uaddr_step;
	}
}
