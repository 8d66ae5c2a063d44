/* SPDX-License-Identifier: MIT */
/*
 * The shadow virtqueue. The guest's rings are untrusted: each field is read
 * once, checked, and only the checked copy reaches the device. The
 * device's used ring is not trusted either.
 */
#include "svq_faces.h"
#include "used_relay.h"

void svq_start(struct svq *q)
{
	const uint16_t num = q->device.num;
	const uint16_t used_idx = load_index(&q->guest.used->idx);
	uint16_t i;

	if (q->given_at) {
		used_relay_start(q, used_idx);
		return;
	}
	memset(q->device.desc, 0, num * sizeof(*q->device.desc));
	memset(q->device.avail, 0, sizeof(*q->device.avail) + 2 * num + 2);
	memset(q->device.used, 0,
	       sizeof(*q->device.used) + num * sizeof(q->device.used->ring[0]) + 2);
	for (i = 0; i < num; i++) {
		q->next[i] = (uint16_t)(i + 1);
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
	q->spans = 0;
}

/* ---------------------------------------------------------------------- */
/* Guest to device                                                         */

struct chain {
	uint16_t pieces;
	uint16_t order;		/* VRING_DESC_F_WRITE once one was writable */
	uint32_t writable;
	uint32_t buffers;
	int joined;		/* pieces that can be joined are */
};

static void join_pieces(struct svq *q, struct chain *c)
{
	uint16_t to = 0, from;

	for (from = 1; from < c->pieces; from++) {
		if (q->pieces[from].joins)
			q->pieces[to].len += q->pieces[from].len;
		else
			q->pieces[++to] = q->pieces[from];
	}
	c->pieces = to + 1;
	c->joined = 1;
	q->spans = 1;
}

/*
 * Lay a piece aside. A chain may be as long as the ring, and cutting it at
 * region boundaries makes it longer: then pieces that lie side by side for the
 * device too are made one again.
 */
static int add_piece(struct svq *q, struct chain *c, const struct svq_piece *p)
{
	if (c->pieces == q->device.num && !c->joined)
		join_pieces(q, c);
	if (p->joins && c->joined)
		q->pieces[c->pieces - 1].len += p->len;
	else if (c->pieces < q->device.num)
		q->pieces[c->pieces++] = *p;
	else
		return c->buffers > q->guest.num ? SVQ_BAD_CHAIN : SVQ_NO_ROOM;
	return SVQ_OK;
}

/* Check one guest buffer and cut it at region boundaries; 0, or why not. */
static inline int add_buffer(struct svq *q, struct chain *c,
			     const struct vring_desc *d)
{
	const uint16_t write = d->flags & VRING_DESC_F_WRITE;
	uint64_t gpa = d->addr, behind = 0;
	uint32_t left = d->len, part;
	int bad;

	if (!left)
		return SVQ_ZERO_LENGTH;
	if (c->order & ~write)
		return SVQ_BAD_ORDER;
	c->order = write;
	/* a chain of 4 GiB must not count as one that the device does not write */
	if (write && __builtin_add_overflow(c->writable, left, &c->writable))
		c->writable = UINT32_MAX;
	c->buffers++;
	for (; left; gpa += part, left -= part) {
		const struct memory_region *r =
			find_region(q->memory, &q->last_region, gpa);
		uint64_t at, room;

		if (!r)
			return SVQ_BAD_ADDRESS;
		at = gpa - r->gpa;
		room = r->size - at;
		part = left <= room ? left : (uint32_t)room;
		bad = add_piece(q, c,
				&(struct svq_piece){
					.gpa = gpa,
					.iova = r->iova + at,
					.len = part,
					.region = q->last_region * 2 +
						  write / VRING_DESC_F_WRITE,
					.flags = write,
					.joins = gpa != d->addr &&
						 r->iova + at == behind,
				});
		if (bad)
			return bad;
		behind = r->iova + at + part;
	}
	return SVQ_OK;
}

/* The chain in an indirect table, which is guest memory like any other. */
static int add_indirect(struct svq *q, struct chain *c, uint64_t table,
			uint32_t size)
{
	const uint32_t entry = sizeof(struct vring_desc);
	uint32_t count = size / entry, i = 0, steps;

	if (!count || size % entry)
		return SVQ_BAD_INDIRECT;
	for (steps = 0; steps < count; steps++) {
		struct vring_desc d;
		int bad;

		/* a table need not be aligned: copy once, then look */
		if (memory_read(q->memory, table + (uint64_t)i * entry, &d, entry))
			return SVQ_BAD_ADDRESS;
		d = read_desc(&d);
		if (d.flags & VRING_DESC_F_INDIRECT)
			return SVQ_BAD_INDIRECT;
		bad = add_buffer(q, c, &d);
		if (bad)
			return bad;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return SVQ_OK;
		if (d.next >= count)
			return SVQ_BAD_CHAIN;
		i = d.next;
	}
	return SVQ_BAD_CHAIN;
}

/* Copy and check one guest chain into pieces; 0, or why not. */
static int read_chain(struct svq *q, uint16_t head, struct chain *c)
{
	uint16_t i = head, steps;
	int bad;

	for (steps = 0; steps < q->guest.num; steps++) {
		const struct vring_desc d = read_desc(&q->guest.desc[i]);

		if (d.flags & VRING_DESC_F_INDIRECT) {
			if (!(q->features & SVQ_F_INDIRECT) ||
			    d.flags & VRING_DESC_F_NEXT)
				return SVQ_BAD_INDIRECT;
			return add_indirect(q, c, d.addr, d.len);
		}
		bad = add_buffer(q, c, &d);
		if (bad)
			return bad;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return SVQ_OK;
		if (d.next >= q->guest.num)
			return SVQ_BAD_CHAIN;
		i = d.next;
	}
	return SVQ_BAD_CHAIN;
}

/*
 * What a burst moves, apart from the queue: the compiler must think that any
 * store into a ring could change the queue's own fields.
 */
struct forward {
	struct vring_desc *desc;
	uint16_t *ring;
	struct svq_segment *segments;
	struct svq_element *elements;
	const uint16_t *next;
	uint16_t mask;
	uint16_t avail;
	uint16_t free_head;
	uint16_t free_count;
	uint32_t given;
};

static inline void write_piece(const struct forward *f, uint16_t i,
			       const struct svq_piece *p, uint16_t more)
{
	f->desc[i] = (struct vring_desc){
		.addr = htole64(p->iova),
		.len = htole32(p->len),
		.flags = htole16(p->flags | more),
		.next = htole16(f->next[i]),
	};
	f->segments[i] = (struct svq_segment){
		.gpa = p->gpa,
		.len = p->len,
		.region = p->region,
	};
}

static inline void write_element(struct forward *f, uint16_t tail,
				 uint16_t guest_head, const struct chain *c)
{
	const uint16_t head = f->free_head;

	f->elements[head] = (struct svq_element){
		.segments = c->pieces,
		.tail = tail,
		.guest_head = guest_head,
		.writable = c->writable,
		.order = f->given++,
	};
	f->ring[f->avail++ & f->mask] = htole16(head);
	f->free_head = f->next[tail];
	f->free_count -= c->pieces;
}

/*
 * Most elements are one descriptor within one region, and need no pieces laid
 * aside. Whatever is not that, or wrong, is left to read_chain.
 */
static inline int forward_single(struct svq *q, struct forward *f, uint16_t head)
{
	const struct vring_desc d = read_desc(&q->guest.desc[head]);
	const struct memory_region *r;
	uint16_t write;
	uint64_t at;

	if (d.flags & (VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT) || !d.len ||
	    !f->free_count)
		return 0;
	r = find_region(q->memory, &q->last_region, d.addr);
	if (!r)
		return 0;
	at = d.addr - r->gpa;
	if (d.len > r->size - at)
		return 0;
	write = d.flags & VRING_DESC_F_WRITE;
	write_piece(f, f->free_head,
		    &(struct svq_piece){
			    .gpa = d.addr,
			    .iova = r->iova + at,
			    .len = d.len,
			    .region = q->last_region * 2 +
				      write / VRING_DESC_F_WRITE,
			    .flags = write,
		    },
		    0);
	write_element(f, f->free_head, head,
		      &(struct chain){ .pieces = 1,
				       .writable = write ? d.len : 0 });
	return 1;
}

/* Put the checked chain into free shadow descriptors. */
static inline void write_chain(struct forward *f, const struct svq_piece *p,
			       uint16_t guest_head, const struct chain *c)
{
	uint16_t i = f->free_head, left;

	for (left = c->pieces; left > 1; left--, p++, i = f->next[i])
		write_piece(f, i, p, VRING_DESC_F_NEXT);
	write_piece(f, i, p, 0);
	write_element(f, i, guest_head, c);
}

static uint32_t forward_pending(struct svq *q, struct forward *f, uint16_t pending)
{
	const uint16_t num = q->guest.num;
	const uint16_t *const ring = q->guest.avail->ring;
	struct svq_piece *const pieces = q->pieces;
	uint16_t last = q->last_avail;
	uint32_t done = 0;

	for (; done < pending; done++, last++) {
		const uint16_t head = load_once16(&ring[last & (num - 1)]);
		struct chain c;
		int bad;

		if (head < num && forward_single(q, f, head))
			continue;
		c = (struct chain){ 0 };
		bad = head < num ? read_chain(q, head, &c) : SVQ_BAD_HEAD;
		if (bad) {
			q->broken = bad;
			break;
		}
		if (c.pieces > f->free_count) {
			/* last_avail stays: the chain is read again once
			 * the device has returned some */
			q->stalls++;
			break;
		}
		write_chain(f, pieces, head, &c);
	}
	q->last_avail = last;
	return done;
}

static uint32_t full_forward(struct svq *q)
{
	struct forward f = {
		.desc = q->device.desc,
		.ring = q->device.avail->ring,
		.segments = q->segments,
		.elements = q->elements,
		.next = q->next,
		.mask = q->device.num - 1,
		.avail = q->device_avail,
		.free_head = q->free_head,
		.free_count = q->free_count,
		.given = q->given,
	};
	uint32_t done;
	uint16_t pending;

	pending = load_index(&q->guest.avail->idx) - q->last_avail;
	if (pending > q->guest.num) {
		q->broken = SVQ_BAD_AVAIL_IDX;
		return 0;
	}
	done = forward_pending(q, &f, pending);
	if (done) {
		uint16_t old = q->device_avail;

		q->device_avail = f.avail;
		q->free_head = f.free_head;
		q->free_count = f.free_count;
		q->given = f.given;
		q->forwarded += done;
		store_index(&q->device.avail->idx, f.avail);
		kick_device(q, old);
	}
	return done;
}

/* ---------------------------------------------------------------------- */
/* Device to guest                                                         */

/*
 * What the device says that it wrote is marked: the first written bytes of the
 * writable buffers. A driver must not rely on what is behind them (virtio 1.3,
 * 2.7.8.2), so that it does not matter whether that moves with the guest.
 */
static inline void mark_element(const struct svq *q, uint16_t head, uint16_t left,
				uint32_t written, int spans)
{
	uint16_t i = head;

	for (; left && written; left--, i = q->next[i]) {
		const struct svq_segment *s = &q->segments[i];
		const struct memory_region *r = &q->memory->regions[s->region / 2];
		uint64_t *dirty;
		uint32_t len;

		if (!(s->region & 1))
			continue;
		len = s->len < written ? s->len : written;
		written -= len;
		if (spans) {
			memory_mark(q->memory, s->gpa, len);
			continue;
		}
		dirty = dirty_log_of(r);
		if (dirty)
			mark_pages(r, dirty, s->gpa, len);
	}
}

/* Built twice: a call to mark what spans regions would cost all others registers. */
static __attribute__((always_inline)) inline uint32_t
return_pending(struct svq *q, uint16_t pending, const int spans)
{
	const struct vring_used_elem *const from = q->device.used->ring;
	struct vring_used_elem *const to = q->guest.used->ring;
	struct svq_element *const elements = q->elements;
	uint16_t *const next = q->next;
	const uint16_t num = q->device.num, mask = q->guest.num - 1;
	uint16_t taken = q->device_used, used = q->used_idx;
	uint16_t free_head = q->free_head, free_count = q->free_count;
	uint32_t done = 0;

	for (; done < pending; done++, taken++, used++) {
		const struct vring_used_elem *u = &from[taken & (num - 1)];
		const uint32_t id = load_once32(&u->id);
		uint32_t len = load_once32(&u->len);
		struct svq_element *e = &elements[id];

		if (id >= num || !e->segments) {
			q->broken = SVQ_BAD_USED_ID;
			break;
		}
		if (len > e->writable) {
			/* a device must not claim more than it may write */
			len = e->writable;
			q->clamped++;
		}
		mark_element(q, (uint16_t)id, e->segments, len, spans);
		to[used & mask] = (struct vring_used_elem){
			htole32(e->guest_head), htole32(len)
		};
		next[e->tail] = free_head;
		free_head = (uint16_t)id;
		free_count += e->segments;
		e->segments = 0;
	}
	q->device_used = taken;
	q->used_idx = used;
	q->free_head = free_head;
	q->free_count = free_count;
	return done;
}

static uint32_t full_return(struct svq *q)
{
	const uint16_t old = q->used_idx;
	uint32_t done;
	uint16_t pending;

	pending = load_index(&q->device.used->idx) - q->device_used;
	if (pending > q->device.num) {
		q->broken = SVQ_BAD_USED_IDX;
		return 0;
	}
	done = q->spans ? return_pending(q, pending, 1) : return_pending(q, pending, 0);
	if (done) {
		store_index(&q->guest.used->idx, q->used_idx);
		mark_used(q, old, done);
		q->returned += done;
		call_guest(q, old);
	}
	return done;
}

/* ---------------------------------------------------------------------- */

uint32_t svq_forward(struct svq *q)
{
	if (q->broken)
		return 0;
	return q->given_at ? used_relay_forward(q) : full_forward(q);
}

uint32_t svq_return(struct svq *q)
{
	if (q->broken)
		return 0;
	return q->given_at ? used_relay_return(q) : full_return(q);
}

void svq_want_notifications(struct svq *q, int on)
{
	if (q->broken)
		return;
	if (!(q->features & SVQ_F_EVENT_IDX)) {
		store_once16(&q->guest.used->flags,
			     on ? 0 : VRING_USED_F_NO_NOTIFY);
		store_once16(&q->device.avail->flags,
			     on ? 0 : VRING_AVAIL_F_NO_INTERRUPT);
		mark_ring(q, q->used_gpa, sizeof(uint16_t));
	} else if (on) {
		/* with EVENT_IDX an event that is not moved asks for nothing */
		store_once16(avail_event(&q->guest), q->last_avail);
		store_once16(used_event(&q->device), q->device_used);
		mark_ring(q, q->used_gpa + offsetof(struct vring_used, ring) +
				     q->guest.num * sizeof(struct vring_used_elem),
			  sizeof(uint16_t));
	}
}
