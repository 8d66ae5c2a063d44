/* SPDX-License-Identifier: MIT */
/*
 * The shadow virtqueue. The guest's rings are untrusted: each field is read
 * once, checked, and only the checked copy goes on to the device. The
 * device's used ring is not trusted either.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "ring_access.h"
#include "cdefs.h"

#define DIRTY_PAGE_SHIFT 12

static const struct memory_region *find_region(const struct memory_map *m,
					       uint32_t *hint, uint64_t gpa)
{
	uint32_t low = 0, high = m->count;

	if (*hint < m->count) {
		const struct memory_region *r = &m->regions[*hint];

		if (gpa - r->gpa < r->size)
			return r;
	}
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct memory_region *r = &m->regions[middle];

		if (gpa < r->gpa) {
			high = middle;
		} else if (gpa - r->gpa >= r->size) {
			low = middle + 1;
		} else {
			*hint = middle;
			return r;
		}
	}
	return NULL;
}

uint8_t *memory_hva(const struct memory_map *m, uint64_t gpa, uint64_t size)
{
	uint32_t hint = 0;
	const struct memory_region *r = find_region(m, &hint, gpa);

	if (!r || size > r->size - (gpa - r->gpa))
		return NULL;
	return r->hva + (gpa - r->gpa);
}

static void mark_dirty(const struct memory_map *m, uint32_t *hint, uint64_t gpa,
		       uint64_t len)
{
	const struct memory_region *r = find_region(m, hint, gpa);
	uint64_t page, last;

	if (!r || !r->dirty || !len)
		return;
	page = (gpa - r->gpa) >> DIRTY_PAGE_SHIFT;
	last = (gpa - r->gpa + len - 1) >> DIRTY_PAGE_SHIFT;
	for (; page <= last; page++)
		__atomic_fetch_or(&r->dirty[page / 64], 1ULL << (page % 64),
				  __ATOMIC_RELAXED);
}

static void free_chain(struct svq *q, uint16_t head)
{
	struct svq_element *e = &q->elements[head];

	q->segments[e->tail].next = q->free_head;
	q->free_head = head;
	q->free_count += e->segments;
	e->segments = 0;
}

void vring_indices(const struct vring *ring, uint16_t *avail, uint16_t *used)
{
	*used = load_index(&ring->used->idx);
	*avail = load_index(&ring->avail->idx);
}

void svq_start(struct svq *q)
{
	const uint16_t num = q->device.num;
	const uint16_t used_idx = load_index(&q->guest.used->idx);
	uint16_t i;

	memset(q->device.desc, 0, num * sizeof(*q->device.desc));
	memset(q->device.avail, 0, sizeof(*q->device.avail) + 2 * num + 2);
	memset(q->device.used, 0, sizeof(*q->device.used) +
					num * sizeof(q->device.used->ring[0]) + 2);

	for (i = 0; i < num; i++) {
		q->segments[i].next = (uint16_t)(i + 1);
		q->elements[i].segments = 0;
	}
	q->free_head = 0;
	q->free_count = num;
	q->given = 0;
	q->last_avail = used_idx;
	q->used_idx = used_idx;
	q->device_avail = 0;
	q->device_used = 0;
	q->last_region = 0;
	q->broken = SVQ_OK;
}

/*
 * Cut one guest buffer at region boundaries into scratch, with addresses the
 * device understands. scratch[].addr is the GPA; the IOVA is written when the
 * descriptor is. Returns the number of pieces, 0 if the buffer is not guest
 * memory or does not fit.
 */
static uint16_t translate(struct svq *q, const struct vring_desc *d,
			  uint16_t used)
{
	uint64_t gpa = d->addr;
	uint32_t left = d->len;
	uint16_t n = used;

	while (left) {
		const struct memory_region *r =
			find_region(q->memory, &q->last_region, gpa);
		uint64_t room;

		if (!r || n >= q->device.num)
			return 0;
		room = r->size - (gpa - r->gpa);
		q->scratch[n].addr = gpa;
		q->scratch[n].len = left < room ? left : (uint32_t)room;
		q->scratch[n].flags = d->flags & VRING_DESC_F_WRITE;
		left -= q->scratch[n].len;
		gpa += q->scratch[n].len;
		n++;
	}
	return (uint16_t)(n - used);
}

/* Copy and check one guest chain into scratch; its length, or 0 if broken. */
static uint16_t read_chain(struct svq *q, uint16_t head, uint32_t *writable)
{
	uint16_t i = head, pieces = 0, steps = 0;
	uint16_t order = 0;

	*writable = 0;
	for (;;) {
		const struct vring_desc *s = &q->guest.desc[i];
		struct vring_desc d = {
			.addr = load_once64(&s->addr),
			.len = load_once32(&s->len),
			.flags = load_once16(&s->flags),
			.next = load_once16(&s->next),
		};
		uint16_t n;

		if (++steps > q->guest.num)
			return q->broken = SVQ_BAD_CHAIN, 0;
		if (d.flags & VRING_DESC_F_INDIRECT)
			return q->broken = SVQ_INDIRECT, 0;
		if (!d.len)
			return q->broken = SVQ_ZERO_LENGTH, 0;
		if (order && !(d.flags & VRING_DESC_F_WRITE))
			return q->broken = SVQ_BAD_ORDER, 0;
		order = d.flags & VRING_DESC_F_WRITE;
		n = translate(q, &d, pieces);
		if (!n)
			return q->broken = SVQ_BAD_ADDRESS, 0;
		pieces += n;
		if (order)
			*writable += d.len;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return pieces;
		if (d.next >= q->guest.num)
			return q->broken = SVQ_BAD_CHAIN, 0;
		i = d.next;
	}
}

/* Put the checked chain in scratch into free shadow descriptors. */
static void write_chain(struct svq *q, uint16_t guest_head, uint16_t pieces,
			uint32_t writable)
{
	uint16_t head = q->free_head, i = head, tail = head, k;

	for (k = 0; k < pieces; k++) {
		const struct vring_desc *s = &q->scratch[k];
		struct vring_desc *d = &q->device.desc[i];
		const struct memory_region *r =
			find_region(q->memory, &q->last_region, s->addr);
		int last = k + 1 == pieces;

		d->addr = htole64(r->iova + (s->addr - r->gpa));
		d->len = htole32(s->len);
		d->flags = htole16(s->flags | (last ? 0 : VRING_DESC_F_NEXT));
		d->next = htole16(last ? 0 : q->segments[i].next);
		q->segments[i].gpa = s->addr;
		q->segments[i].len = s->len;
		q->segments[i].writable = !!(s->flags & VRING_DESC_F_WRITE);
		tail = i;
		i = q->segments[i].next;
	}
	q->free_head = i;
	q->free_count -= pieces;
	q->elements[head] = (struct svq_element){
		.segments = pieces,
		.tail = tail,
		.guest_head = guest_head,
		.writable = writable,
		.order = q->given++,
	};
	q->device.avail->ring[q->device_avail & (q->device.num - 1)] =
		htole16(head);
	q->device_avail++;
}

static void kick_device(struct svq *q)
{
	full_barrier();
	if (load_once16(&q->device.used->flags) & VRING_USED_F_NO_NOTIFY)
		return;
	eventfd_raise(q->device_kick);
	q->kicks++;
}

uint32_t svq_forward(struct svq *q)
{
	const uint16_t mask = q->guest.num - 1;
	uint16_t pending;
	uint32_t done = 0;

	if (q->broken)
		return 0;
	pending = load_index(&q->guest.avail->idx) - q->last_avail;
	if (pending > q->guest.num) {
		q->broken = SVQ_BAD_AVAIL_IDX;
		return 0;
	}
	while (done < pending) {
		uint32_t writable;
		uint16_t pieces;
		uint16_t head = load_once16(
			&q->guest.avail->ring[q->last_avail & mask]);

		if (head >= q->guest.num) {
			q->broken = SVQ_BAD_HEAD;
			break;
		}
		pieces = read_chain(q, head, &writable);
		if (!pieces)
			break;
		if (pieces > q->free_count) {
			/* last_avail stays: the chain is read anew once
			 * the device has returned some */
			q->stalls++;
			break;
		}
		write_chain(q, head, pieces, writable);
		q->last_avail++;
		done++;
	}
	if (done) {
		store_index(&q->device.avail->idx, q->device_avail);
		q->forwarded += done;
		kick_device(q);
	}
	return done;
}

/* The device wrote at most len bytes; all it could have written is marked. */
static void mark_element(struct svq *q, uint16_t head)
{
	const struct svq_element *e = &q->elements[head];
	uint16_t i = head, k;

	for (k = 0; k < e->segments; k++) {
		if (q->segments[i].writable)
			mark_dirty(q->memory, &q->last_region,
				   q->segments[i].gpa, q->segments[i].len);
		i = q->segments[i].next;
	}
}

static void write_used(struct svq *q, uint16_t head, uint32_t len)
{
	const uint16_t slot = q->used_idx & (q->guest.num - 1);
	struct vring_used_elem *u = &q->guest.used->ring[slot];

	if (len > q->elements[head].writable) {
		/* a device must not claim more than it was lent */
		len = q->elements[head].writable;
		q->clamped++;
	}
	u->id = htole32(q->elements[head].guest_head);
	u->len = htole32(len);
	mark_dirty(q->memory, &q->last_region,
		   q->used_gpa + offsetof(struct vring_used, ring) +
			   slot * sizeof(*u),
		   sizeof(*u));
	q->used_idx++;
}

static void call_guest(struct svq *q)
{
	full_barrier();
	if (load_once16(&q->guest.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT)
		return;
	eventfd_raise(q->guest_call);
	q->calls++;
}

uint32_t svq_return(struct svq *q)
{
	const uint16_t mask = q->device.num - 1;
	uint16_t pending;
	uint32_t done = 0;

	if (q->broken)
		return 0;
	pending = load_index(&q->device.used->idx) - q->device_used;
	if (pending > q->device.num) {
		q->broken = SVQ_BAD_USED_IDX;
		return 0;
	}
	while (done < pending) {
		const struct vring_used_elem *u =
			&q->device.used->ring[q->device_used & mask];
		uint32_t id = load_once32(&u->id);

		if (id >= q->device.num || !q->elements[id].segments) {
			q->broken = SVQ_BAD_USED_ID;
			break;
		}
		mark_element(q, (uint16_t)id);
		write_used(q, (uint16_t)id, load_once32(&u->len));
		free_chain(q, (uint16_t)id);
		q->device_used++;
		done++;
	}
	if (done) {
		store_index(&q->guest.used->idx, q->used_idx);
		mark_dirty(q->memory, &q->last_region, q->used_gpa, 4);
		q->returned += done;
		call_guest(q);
	}
	return done;
}

static int by_order(const void *a, const void *b, void *elements)
{
	const struct svq_element *e = elements;
	uint64_t x = e[*(const uint16_t *)a].order;
	uint64_t y = e[*(const uint16_t *)b].order;

	return (x > y) - (x < y);
}

/*
 * The shadow avail ring does not tell: an element that the device holds while
 * the ring goes round is no longer in it.
 */
uint16_t svq_in_flight(const struct svq *q, uint16_t *heads)
{
	uint16_t n = 0, k;
	uint32_t i;

	for (i = 0; i < q->device.num; i++)
		if (q->elements[i].segments)
			heads[n++] = (uint16_t)i;
	qsort_r(heads, n, sizeof(*heads), by_order, q->elements);
	for (k = 0; k < n; k++)
		heads[k] = q->elements[heads[k]].guest_head;
	return n;
}

uint16_t svq_republish(struct svq *q)
{
	uint16_t heads[32768];
	uint16_t n = svq_in_flight(q, heads), k;

	for (k = 0; k < n; k++)
		q->guest.avail->ring[(uint16_t)(q->last_avail - n + k) &
				     (q->guest.num - 1)] = htole16(heads[k]);
	if (n)
		mark_dirty(q->memory, &q->last_region, q->avail_gpa,
			   sizeof(struct vring_avail) + 2 * q->guest.num);
	full_barrier();
	return q->last_avail - n;
}

/* ---------------------------------------------------------------------- */

static void suppress(struct svq *q, int on)
{
	if (q->broken)
		return;
	store_once16(&q->guest.used->flags, on ? VRING_USED_F_NO_NOTIFY : 0);
	store_once16(&q->device.avail->flags,
		     on ? VRING_AVAIL_F_NO_INTERRUPT : 0);
	mark_dirty(q->memory, &q->last_region, q->used_gpa, 2);
}

static uint32_t relay_round(struct relay *r)
{
	uint32_t moved = 0, i;

	for (i = 0; i < r->count; i++)
		moved += svq_return(r->queues[i]);
	for (i = 0; i < r->count; i++)
		moved += svq_forward(r->queues[i]);
	r->rounds++;
	return moved;
}

static int count_broken(const struct relay *r)
{
	int n = 0;
	uint32_t i;

	for (i = 0; i < r->count; i++)
		n += r->queues[i]->broken != SVQ_OK;
	return n;
}

static void wait_for_notification(struct relay *r, int64_t deadline)
{
	struct pollfd *p = r->pollfds;
	uint32_t i, n = 2 * r->count;

	for (i = 0; i < r->count; i++) {
		p[2 * i].fd = r->queues[i]->guest_kick;
		p[2 * i + 1].fd = r->queues[i]->device_call;
	}
	p[n].fd = r->wake;
	for (i = 0; i <= n; i++)
		p[i].events = POLLIN;
	r->sleeps++;
	if (poll(p, n + 1, poll_timeout(deadline)) <= 0)
		return;
	for (i = 0; i <= n; i++)
		if (p[i].revents & POLLIN)
			eventfd_clear(p[i].fd);
}

int relay_run(struct relay *r, int64_t deadline)
{
	uint32_t i;

	for (;;) {
		for (i = 0; i < r->count; i++)
			suppress(r->queues[i], 1);
		while (relay_round(r))
			if (__atomic_load_n(&r->stop, __ATOMIC_ACQUIRE) ||
			    now_ns() >= deadline)
				break;
		for (i = 0; i < r->count; i++)
			suppress(r->queues[i], 0);
		full_barrier();
		if (__atomic_load_n(&r->stop, __ATOMIC_ACQUIRE) ||
		    now_ns() >= deadline || count_broken(r))
			break;
		if (relay_round(r))
			continue;
		wait_for_notification(r, deadline);
	}
	return count_broken(r);
}
