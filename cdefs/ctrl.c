/* SPDX-License-Identifier: MIT */
/*
 * Control queues. A guest's command is copied before it is looked at, so that
 * a guest which changes its buffer afterwards changes nothing.
 */
#include "ring_access.h"
#include "cdefs.h"

static void mark(const struct memory_map *m, uint64_t gpa, uint64_t size)
{
	uint32_t i;

	for (i = 0; i < m->count; i++) {
		const struct memory_region *r = &m->regions[i];
		uint64_t page = (gpa - r->gpa) >> 12;

		if (gpa - r->gpa >= r->size || !r->dirty)
			continue;
		for (; page <= (gpa - r->gpa + size - 1) >> 12; page++)
			__atomic_fetch_or(&r->dirty[page / 64],
					  1ULL << (page % 64), __ATOMIC_RELAXED);
	}
}

void ctrl_guest_start(struct ctrl_guest *g)
{
	g->used_idx = load_index(&g->ring.used->idx);
	g->last_avail = g->used_idx;
	g->ack = NULL;
	g->broken = SVQ_OK;
}

static int take_buffer(struct ctrl_guest *g, const struct vring_desc *d,
		       uint8_t *buffer, uint32_t size, uint32_t *length)
{
	uint8_t *at = memory_hva(g->memory, d->addr, d->len);

	if (!d->len)
		return SVQ_ZERO_LENGTH;
	if (!at)
		return SVQ_BAD_ADDRESS;
	if (d->flags & VRING_DESC_F_WRITE) {
		if (!g->ack) {
			g->ack = at;
			g->ack_gpa = d->addr;
		}
		return SVQ_OK;
	}
	if (g->ack)
		return SVQ_BAD_ORDER;
	if (*length < size)
		memcpy(buffer + *length, at,
		       d->len < size - *length ? d->len : size - *length);
	/* saturates: a hostile chain may add up to more than 32 bits */
	*length = d->len > UINT32_MAX - *length ? UINT32_MAX : *length + d->len;
	return SVQ_OK;
}

static int take_chain(struct ctrl_guest *g, uint8_t *buffer, uint32_t size,
		      uint32_t *length)
{
	uint16_t i = g->head, steps;

	for (steps = 0; steps < g->ring.num; steps++) {
		const struct vring_desc *s = &g->ring.desc[i];
		const struct vring_desc d = {
			.addr = load_once64(&s->addr),
			.len = load_once32(&s->len),
			.flags = load_once16(&s->flags),
			.next = load_once16(&s->next),
		};
		int bad;

		if (d.flags & VRING_DESC_F_INDIRECT)
			return SVQ_BAD_INDIRECT;
		bad = take_buffer(g, &d, buffer, size, length);
		if (bad)
			return bad;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return g->ack && *length ? SVQ_OK : SVQ_BAD_CHAIN;
		if (d.next >= g->ring.num)
			return SVQ_BAD_CHAIN;
		i = d.next;
	}
	return SVQ_BAD_CHAIN;
}

uint32_t ctrl_guest_take(struct ctrl_guest *g, uint8_t *buffer, uint32_t size)
{
	uint32_t length = 0;
	uint16_t pending;

	if (g->broken)
		return 0;
	pending = load_index(&g->ring.avail->idx) - g->last_avail;
	if (pending > g->ring.num)
		g->broken = SVQ_BAD_AVAIL_IDX;
	if (!pending || g->broken)
		return 0;
	g->ack = NULL;
	g->head = load_once16(
		&g->ring.avail->ring[g->last_avail & (g->ring.num - 1)]);
	g->broken = g->head < g->ring.num ?
			    take_chain(g, buffer, size, &length) :
			    SVQ_BAD_HEAD;
	if (g->broken)
		return 0;
	g->last_avail++;
	return length;
}

void ctrl_guest_answer(struct ctrl_guest *g, uint8_t ack)
{
	struct vring_used_elem *u =
		&g->ring.used->ring[g->used_idx & (g->ring.num - 1)];

	*g->ack = ack;
	mark(g->memory, g->ack_gpa, 1);
	u->id = htole32(g->head);
	u->len = htole32(1);
	store_index(&g->ring.used->idx, ++g->used_idx);
	mark(g->memory, g->used_gpa,
	     offsetof(struct vring_used, ring) + g->ring.num * sizeof(*u));
	full_barrier();
	if (!(load_once16(&g->ring.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT))
		eventfd_raise(g->call);
}

/* ---------------------------------------------------------------------- */

void ctrl_driver_start(struct ctrl_driver *d)
{
	const uint16_t num = d->ring.num;

	memset(d->ring.desc, 0, num * sizeof(*d->ring.desc));
	memset(d->ring.avail, 0, sizeof(*d->ring.avail) + 2 * num + 2);
	memset(d->ring.used, 0,
	       sizeof(*d->ring.used) + num * sizeof(d->ring.used->ring[0]) + 2);
	d->avail_idx = 0;
	d->used_idx = 0;
	d->open = 0;
}

int ctrl_driver_add(struct ctrl_driver *d, uint64_t address, uint32_t size,
		    uint64_t ack)
{
	const uint16_t mask = d->ring.num - 1;
	/* commands are answered in order, all before the ring comes round */
	const uint16_t head = (uint16_t)(2 * d->avail_idx) & mask;

	if (2 * (d->open + 1) > d->ring.num)
		return -1;
	d->ring.desc[head] = (struct vring_desc){
		.addr = htole64(address),
		.len = htole32(size),
		.flags = htole16(VRING_DESC_F_NEXT),
		.next = htole16(head + 1),
	};
	d->ring.desc[head + 1] = (struct vring_desc){
		.addr = htole64(ack),
		.len = htole32(1),
		.flags = htole16(VRING_DESC_F_WRITE),
	};
	d->ring.avail->ring[d->avail_idx & mask] = htole16(head);
	d->avail_idx++;
	d->open++;
	return head / 2;
}

void ctrl_driver_kick(struct ctrl_driver *d)
{
	store_index(&d->ring.avail->idx, d->avail_idx);
	full_barrier();
	eventfd_raise(d->kick);
}

static int collect(struct ctrl_driver *d)
{
	uint16_t done = load_index(&d->ring.used->idx) - d->used_idx;

	if (done > d->open)
		return -1;
	d->used_idx += done;
	d->open -= done;
	return d->open;
}

int ctrl_driver_wait(struct ctrl_driver *d, int64_t deadline)
{
	struct pollfd p = { .fd = d->call, .events = POLLIN };

	for (;;) {
		int open = collect(d);

		if (open <= 0 || now_ns() >= deadline)
			return open;
		if (poll(&p, 1, poll_timeout(deadline)) > 0)
			eventfd_clear(d->call);
	}
}
