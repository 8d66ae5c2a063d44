/* SPDX-License-Identifier: MIT */
/* What a shadow virtqueue does when regions of guest memory come and go. No thread may serve it. */
#include "memory_access.h"
#include "used_relay.h"

/* What the device has of an element: its segments, as svq.c walks them. */
static int element_reaches(const struct svq *q, uint16_t head, uint64_t gpa,
			   uint64_t size)
{
	uint16_t i = head, left = q->elements[head].segments;

	for (; left; left--, i = q->next[i]) {
		const struct svq_segment *s = &q->segments[i];

		if (s->gpa < gpa + size && gpa < s->gpa + s->len)
			return 1;
	}
	return 0;
}

int svq_reaches(const struct svq *q, uint64_t gpa, uint64_t size)
{
	uint32_t head;

	if (q->given_at)
		return used_relay_reaches(q, gpa, size);
	for (head = 0; head < q->device.num; head++)
		if (element_reaches(q, (uint16_t)head, gpa, size))
			return 1;
	return 0;
}

static void number_element(struct svq *q, uint16_t head)
{
	uint16_t i = head, left = q->elements[head].segments;

	for (; left; left--, i = q->next[i]) {
		struct svq_segment *s = &q->segments[i];
		uint32_t region;

		if (search_region(q->memory, &region, s->gpa))
			s->region = region * 2 | (s->region & 1);
		else
			q->broken = SVQ_BAD_ADDRESS;
	}
}

void svq_memory_changed(struct svq *q)
{
	uint32_t head;

	q->last_region = 0;
	if (q->given_at) {
		used_relay_memory_changed(q);
		return;
	}
	for (head = 0; head < q->device.num; head++)
		number_element(q, (uint16_t)head);
}
