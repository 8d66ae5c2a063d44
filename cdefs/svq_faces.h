/* SPDX-License-Identifier: MIT */
/*
 * What every shadow queue does at its two faces, whatever lies between them:
 * it marks what it writes into the guest's rings, and notifies either side.
 */
#ifndef SVQ_FACES_H
#define SVQ_FACES_H

#include "memory_access.h"
#include "ring_access.h"

/* what we write into the guest's own rings */
static inline void mark_ring(struct svq *q, uint64_t gpa, uint64_t len)
{
	uint32_t hint = q->last_region;
	const struct memory_region *r = find_region(q->memory, &hint, gpa);

	uint64_t *const dirty = r ? dirty_log_of(r) : NULL;

	if (dirty)
		mark_pages(r, dirty, gpa, len);
}

static inline void mark_used(struct svq *q, uint16_t first, uint32_t count)
{
	const uint64_t ring = q->used_gpa + offsetof(struct vring_used, ring);
	const uint32_t entry = sizeof(struct vring_used_elem);
	const uint32_t slot = first & (q->guest.num - 1);
	const uint32_t tail = q->guest.num - slot;

	mark_ring(q, q->used_gpa, offsetof(struct vring_used, ring));
	mark_ring(q, ring + slot * entry, (count < tail ? count : tail) * entry);
	if (count > tail)
		mark_ring(q, ring, (count - tail) * entry);
}

static inline void kick_device(struct svq *q, uint16_t old)
{
	full_barrier();
	if (q->features & SVQ_F_EVENT_IDX) {
		if (!need_event(load_once16(avail_event(&q->device)),
				q->device_avail, old))
			return;
	} else if (load_once16(&q->device.used->flags) &
		   VRING_USED_F_NO_NOTIFY) {
		return;
	}
	if (eventfd_raise(q->device_kick))
		q->broken = SVQ_BAD_EVENTFD;
	q->kicks++;
}

static inline void call_guest(struct svq *q, uint16_t old)
{
	full_barrier();
	if (q->features & SVQ_F_EVENT_IDX) {
		if (!need_event(load_once16(used_event(&q->guest)), q->used_idx,
				old))
			return;
	} else if (load_once16(&q->guest.avail->flags) &
		   VRING_AVAIL_F_NO_INTERRUPT) {
		return;
	}
	if (eventfd_raise(q->guest_call))
		q->broken = SVQ_BAD_EVENTFD;
	q->calls++;
}

#endif
