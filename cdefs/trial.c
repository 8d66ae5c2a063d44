/* SPDX-License-Identifier: MIT */
#include "ring_access.h"
#include "cdefs.h"

#define LOOK_MS 2	/* a device that gives no interrupt is looked at this often */

void trial_begin(struct trial_queue *q, uint16_t base)
{
	struct vring *ring = &q->ring;

	memset(ring->desc, 0, ring->num * sizeof(*ring->desc));
	memset(ring->avail->ring, 0, (ring->num + 1) * sizeof(*ring->avail->ring));
	memset(ring->used->ring, 0, ring->num * sizeof(*ring->used->ring));
	store_once16(avail_event(ring), 0);
	store_once16(&ring->avail->flags, 0);
	store_once16(&ring->used->flags, 0);
	q->avail = q->used = base;
	store_index(&ring->used->idx, base);
	store_index(&ring->avail->idx, base);
}

void trial_write(struct vring_desc *table, uint32_t index,
		 const struct trial_desc *descs, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		table[index + i] = (struct vring_desc){
			.addr = htole64(descs[i].addr),
			.len = htole32(descs[i].len),
			.flags = htole16(descs[i].flags),
			.next = htole16(descs[i].next),
		};
}

void trial_publish(struct trial_queue *q, const uint16_t *heads, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++, q->avail++)
		store_once16(&q->ring.avail->ring[q->avail & (q->ring.num - 1)], heads[i]);
	store_index(&q->ring.avail->idx, q->avail);
	full_barrier();
}

void trial_set_avail(struct trial_queue *q, uint16_t index)
{
	q->avail = index;
	store_index(&q->ring.avail->idx, index);
	full_barrier();
}

void trial_set_flags(struct trial_queue *q, uint16_t flags)
{
	store_once16(&q->ring.avail->flags, flags);
	full_barrier();
}

void trial_set_used_event(struct trial_queue *q, uint16_t index)
{
	store_once16(used_event(&q->ring), index);
	full_barrier();
}

uint16_t trial_avail_event(const struct trial_queue *q)
{
	return load_once16(avail_event(&q->ring));
}

uint16_t trial_used_index(const struct trial_queue *q)
{
	return load_index(&q->ring.used->idx);
}

uint16_t trial_used_flags(const struct trial_queue *q)
{
	return load_once16(&q->ring.used->flags);
}

void trial_kick(struct trial_queue *q)
{
	eventfd_raise(q->kick);
}

static void copy(struct trial_queue *q, struct trial_used *to)
{
	const struct vring_used_elem *u = &q->ring.used->ring[q->used & (q->ring.num - 1)];

	*to = (struct trial_used){ load_once32(&u->id), load_once32(&u->len) };
	q->used++;
}

int trial_collect(struct trial_queue *q, struct trial_used *to, uint32_t count,
		  int64_t deadline)
{
	uint32_t n = 0;

	for (;;) {
		const uint16_t fresh = trial_used_index(q) - q->used;

		if (fresh > (uint16_t)(q->avail - q->used))
			return -1;
		while (n < count && trial_used_index(q) != q->used)
			copy(q, &to[n++]);
		if (n == count || now_ns() >= deadline)
			return n;
		/* interrupts have their own rules: this one polls */
		poll(NULL, 0, LOOK_MS);
	}
}
