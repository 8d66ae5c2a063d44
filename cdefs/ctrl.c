/* SPDX-License-Identifier: MIT */
/*
 * Control queues. A guest's command is copied before it is looked at, so that
 * a guest which changes its buffer afterwards changes nothing.
 */
#include "ring_access.h"

void ctrl_guest_start(struct ctrl_guest *g)
{
	g->used_idx = load_index(&g->ring.used->idx);
	g->last_avail = g->used_idx;
	g->ack = NULL;
	g->broken = SVQ_OK;
}

/* Where a command is copied to, and how long it is so far. */
struct copy {
	uint8_t *buffer;
	uint32_t size;
	uint32_t length;
};

static void copy_part(struct copy *c, const uint8_t *from, uint64_t size)
{
	const uint64_t room = c->length < c->size ? c->size - c->length : 0;

	memcpy(c->buffer + c->length * !!room, from, size < room ? size : room);
	/* saturates: a hostile chain may add up to more than 32 bits */
	c->length = size > UINT32_MAX - c->length ? UINT32_MAX :
						    c->length + (uint32_t)size;
}

static int take_buffer(struct ctrl_guest *g, const struct vring_desc *d,
		       struct copy *c)
{
	const int write = d->flags & VRING_DESC_F_WRITE;
	uint64_t gpa = d->addr, left = d->len, part;

	if (!left)
		return SVQ_ZERO_LENGTH;
	if (g->ack && !write)
		return SVQ_BAD_ORDER;
	for (; left; gpa += part, left -= part) {
		uint8_t *at;

		part = left;
		at = memory_part(g->memory, gpa, &part);
		if (!at)
			return SVQ_BAD_ADDRESS;
		if (!write) {
			copy_part(c, at, part);
		} else if (!g->ack) {
			g->ack = at;
			g->ack_gpa = gpa;
		}
	}
	return SVQ_OK;
}

/* A chain's descriptors: the ring's table, or one in guest memory. */
struct table {
	uint64_t gpa;
	uint32_t count;
	int indirect;
};

static int read_entry(const struct ctrl_guest *g, const struct table *t,
		      uint16_t i, struct vring_desc *d)
{
	if (!t->indirect) {
		*d = read_desc(&g->ring.desc[i]);
		return SVQ_OK;
	}
	if (memory_read(g->memory, t->gpa + (uint64_t)i * sizeof(*d), d, sizeof(*d)))
		return SVQ_BAD_ADDRESS;
	*d = read_desc(d);
	return SVQ_OK;
}

static int enter_table(const struct ctrl_guest *g, struct table *t,
		       const struct vring_desc *d)
{
	if (t->indirect || !(g->features & SVQ_F_INDIRECT) ||
	    d->flags & VRING_DESC_F_NEXT || !d->len || d->len % sizeof(*d))
		return SVQ_BAD_INDIRECT;
	*t = (struct table){ d->addr, d->len / sizeof(*d), 1 };
	return SVQ_OK;
}

static int take_chain(struct ctrl_guest *g, struct copy *c)
{
	struct table t = { .count = g->ring.num };
	uint16_t i = g->head;
	uint32_t steps;

	/* no chain is longer than the ring, and one step may lead to a table */
	for (steps = 0; steps <= g->ring.num; steps++) {
		struct vring_desc d;
		int bad = read_entry(g, &t, i, &d);

		if (!bad && d.flags & VRING_DESC_F_INDIRECT) {
			bad = enter_table(g, &t, &d);
			i = 0;
			if (bad)
				return bad;
			continue;
		}
		if (!bad)
			bad = take_buffer(g, &d, c);
		if (bad)
			return bad;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return g->ack && c->length ? SVQ_OK : SVQ_BAD_CHAIN;
		if (d.next >= t.count)
			return SVQ_BAD_CHAIN;
		i = d.next;
	}
	return SVQ_BAD_CHAIN;
}

static void mark_used(const struct ctrl_guest *g)
{
	memory_mark(g->memory, g->used_gpa,
		    offsetof(struct vring_used, ring) +
			    g->ring.num * sizeof(struct vring_used_elem) +
			    sizeof(uint16_t));
}

/* Number of waiting commands; before returning 0, asks the guest for a notification. */
static uint16_t pending(struct ctrl_guest *g)
{
	uint16_t n = load_index(&g->ring.avail->idx) - g->last_avail;

	if (n || !(g->features & SVQ_F_EVENT_IDX))
		return n;
	store_once16(avail_event(&g->ring), g->last_avail);
	mark_used(g);
	full_barrier();
	return load_index(&g->ring.avail->idx) - g->last_avail;
}

uint32_t ctrl_guest_pop(struct ctrl_guest *g, uint8_t *buffer, uint32_t size)
{
	struct copy c = { .buffer = buffer, .size = size };
	uint16_t waiting;

	if (g->broken)
		return 0;
	waiting = pending(g);
	if (waiting > g->ring.num)
		g->broken = SVQ_BAD_AVAIL_IDX;
	if (!waiting || g->broken)
		return 0;
	g->ack = NULL;
	g->head = load_once16(
		&g->ring.avail->ring[g->last_avail & (g->ring.num - 1)]);
	g->broken = g->head < g->ring.num ? take_chain(g, &c) : SVQ_BAD_HEAD;
	if (g->broken)
		return 0;
	g->last_avail++;
	return c.length;
}

static int wants_call(const struct ctrl_guest *g)
{
	if (g->features & SVQ_F_EVENT_IDX)
		return need_event(load_once16(used_event(&g->ring)), g->used_idx,
				  g->used_idx - 1);
	return !(load_once16(&g->ring.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

void ctrl_guest_answer(struct ctrl_guest *g, uint8_t ack)
{
	struct vring_used_elem *u =
		&g->ring.used->ring[g->used_idx & (g->ring.num - 1)];

	*g->ack = ack;
	memory_mark(g->memory, g->ack_gpa, 1);
	u->id = htole32(g->head);
	u->len = htole32(1);
	store_index(&g->ring.used->idx, ++g->used_idx);
	mark_used(g);
	full_barrier();
	if (wants_call(g) && eventfd_raise(g->call))
		g->broken = SVQ_BAD_EVENTFD;
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

static void write_command(struct vring_desc *to, uint16_t next, uint64_t address,
			  uint32_t size, uint64_t ack)
{
	to[0] = (struct vring_desc){
		.addr = htole64(address),
		.len = htole32(size),
		.flags = htole16(VRING_DESC_F_NEXT),
		.next = htole16(next),
	};
	to[1] = (struct vring_desc){
		.addr = htole64(ack),
		.len = htole32(1),
		.flags = htole16(VRING_DESC_F_WRITE),
	};
}

int ctrl_driver_add(struct ctrl_driver *d, uint64_t address, uint32_t size,
		    uint64_t ack)
{
	const uint16_t mask = d->ring.num - 1;
	/* commands are answered in order, all before the ring comes round */
	const uint16_t head = (uint16_t)(2 * d->avail_idx) & mask;

	if (2 * (d->open + 1) > d->ring.num)
		return -1;
	if (d->tables) {
		write_command(&d->tables[head], 1, address, size, ack);
		d->ring.desc[head] = (struct vring_desc){
			.addr = htole64(d->tables_gpa + head * sizeof(*d->tables)),
			.len = htole32(2 * sizeof(*d->tables)),
			.flags = htole16(VRING_DESC_F_INDIRECT),
		};
	} else {
		write_command(&d->ring.desc[head], head + 1, address, size, ack);
	}
	d->ring.avail->ring[d->avail_idx & mask] = htole16(head);
	d->avail_idx++;
	d->open++;
	return head / 2;
}

static int wants_kick(const struct ctrl_driver *d, uint16_t old)
{
	if (d->features & SVQ_F_EVENT_IDX)
		return need_event(load_once16(avail_event(&d->ring)), d->avail_idx,
				  old);
	return !(load_once16(&d->ring.used->flags) & VRING_USED_F_NO_NOTIFY);
}

void ctrl_driver_kick(struct ctrl_driver *d)
{
	const uint16_t old = load_once16(&d->ring.avail->idx);

	store_index(&d->ring.avail->idx, d->avail_idx);
	full_barrier();
	if (wants_kick(d, old))
		/* one that is closed leaves the command unanswered */
		(void)eventfd_raise(d->kick);
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

/* What is open; if anything is, the device is asked for a notification first. */
static int collect_or_ask(struct ctrl_driver *d)
{
	int open = collect(d);

	if (open <= 0 || !(d->features & SVQ_F_EVENT_IDX))
		return open;
	store_once16(used_event(&d->ring), d->used_idx);
	full_barrier();
	return collect(d);
}

int ctrl_driver_wait(struct ctrl_driver *d, int64_t deadline)
{
	struct pollfd p = { .fd = d->call, .events = POLLIN };

	for (;;) {
		int open = collect_or_ask(d);

		if (open <= 0 || now_ns() >= deadline)
			return open;
		if (poll(&p, 1, poll_timeout(deadline)) <= 0)
			continue;
		if (p.revents & (POLLNVAL | POLLERR))
			return -2;
		eventfd_clear(d->call);
	}
}
