/* SPDX-License-Identifier: MIT */
/* What a shadow virtqueue leaves: the guest's heads that the device has not used, handed back in the guest's ring. */
#define _GNU_SOURCE
#include <stdlib.h>

#include "svq_faces.h"
#include "used_relay.h"

/* Oldest first. Counted back from now, so that an element that is held for long stays the oldest. */
static int by_age(const void *a, const void *b, void *queue)
{
	const struct svq *q = queue;
	const uint32_t one = q->given - q->elements[*(const uint16_t *)a].order;
	const uint32_t other = q->given - q->elements[*(const uint16_t *)b].order;

	return (one < other) - (one > other);
}

/*
 * Whether the last elements given are those in flight: a device that uses them in order leaves it so. What the loop needs
 * is in locals: a guest stands still for it, and heads might be any part of q for all that a compiler knows.
 */
static int last_in_flight(const struct svq *q, uint16_t n, uint16_t *heads)
{
	const struct svq_element *const elements = q->elements;
	const uint16_t *const ring = q->device.avail->ring;
	const uint16_t mask = q->device.num - 1;
	uint16_t at = q->device_avail - n, k;
	uint32_t order = q->given - n;

	for (k = 0; k < n; k++, at++, order++) {
		const struct svq_element *e = &elements[load_once16(&ring[at & mask]) & mask];

		if (e->order != order || !e->segments)
			return 0;
		heads[k] = e->guest_head;
	}
	return 1;
}

/*
 * The shadow avail ring alone is not enough: an element that the device holds
 * while the ring goes round is no longer in it.
 */
uint16_t svq_in_flight(const struct svq *q, uint16_t *heads)
{
	/* what was given and is not back */
	uint16_t n = q->device_avail - q->device_used, k;
	uint32_t i;

	if (q->given_at)
		return used_relay_in_flight(q, heads);
	if (last_in_flight(q, n, heads))
		return n;
	n = 0;
	for (i = 0; i < q->device.num; i++)
		if (q->elements[i].segments)
			heads[n++] = (uint16_t)i;
	qsort_r(heads, n, sizeof(*heads), by_age, (void *)q);
	for (k = 0; k < n; k++)
		heads[k] = q->elements[heads[k]].guest_head;
	return n;
}

uint16_t svq_republish(struct svq *q)
{
	uint16_t heads[RING_MAX];
	uint16_t *const ring = q->guest.avail->ring;
	const uint16_t n = svq_in_flight(q, heads), mask = q->guest.num - 1;
	uint16_t at = q->last_avail - n, k;

	for (k = 0; k < n; k++, at++)
		ring[at & mask] = htole16(heads[k]);
	if (n)
		mark_ring(q, q->avail_gpa,
			  sizeof(struct vring_avail) + 2 * q->guest.num);
	full_barrier();
	return q->last_avail - n;
}

void svqs_take_over(struct svq **queues, uint32_t count, uint16_t *bases)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		while (svq_return(queues[i]))
			;
	for (i = 0; i < count; i++)
		if (!queues[i]->broken)
			bases[i] = svq_republish(queues[i]);
}
