/* SPDX-License-Identifier: MIT */
/*
 * The guest's descriptors are the guest's business: what it writes there
 * reaches the device as in passthrough, where an IOMMU has the last word. They
 * are read here to know which pages the device wrote. A guest that changes
 * them meanwhile has the wrong pages of its own memory marked.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "svq_faces.h"
#include "used_relay.h"

void used_relay_start(struct svq *q, uint16_t used_idx)
{
	const uint16_t num = q->device.num;

	memset(q->device.avail, 0, sizeof(*q->device.avail) + 2 * num + 2);
	memset(q->device.used, 0,
	       sizeof(*q->device.used) + num * sizeof(q->device.used->ring[0]) + 2);
	memset(q->given_at, 0, num * sizeof(*q->given_at));
	store_index(&q->device.avail->idx, used_idx);
	store_index(&q->device.used->idx, used_idx);
	/* the device waits for whatever comes first, until it says otherwise */
	store_once16(avail_event(&q->device), used_idx);
	q->last_avail = q->device_avail = used_idx;
	q->used_idx = q->device_used = used_idx;
	used_relay_memory_changed(q);
	q->broken = SVQ_OK;
}

/* ---------------------------------------------------------------------- */
/* Guest memory                                                            */

static const struct memory_region nowhere;

void used_relay_memory_changed(struct svq *q)
{
	const struct memory_map *m = q->memory;
	struct svq_spots *s = &q->spots;
	uint32_t i;

	q->last_region = 0;
	s->shift = DIRTY_PAGE_SHIFT;
	if (m->count) {
		const struct memory_region *last = &m->regions[m->count - 1];
		const uint64_t span = last->gpa - m->regions[0].gpa + last->size;

		/* wherever the count of parts begins, SVQ_SPOTS in a row have a place each */
		while (span >> s->shift >= SVQ_SPOTS - 1)
			s->shift++;
	}
	for (i = 0; i < SVQ_SPOTS; i++)
		s->at[i] = &nowhere;
}

static inline const struct memory_region **spot_of(struct svq *q, uint64_t gpa)
{
	return &q->spots.at[gpa >> q->spots.shift & (SVQ_SPOTS - 1)];
}

static __attribute__((noinline)) const struct memory_region *
search_spot(struct svq *q, uint64_t gpa)
{
	const struct memory_region *r = search_region(q->memory, &q->last_region, gpa);

	/* a search that finds it at a spot need not know where on a page it ends */
	if (r && !(r->size & ((1 << DIRTY_PAGE_SHIFT) - 1)))
		*spot_of(q, gpa) = r;
	return r;
}

/*
 * The region of gpa, or NULL. Receive buffers lie anywhere, so that the region
 * of the one before is not a good guess; where in guest memory this one lies
 * is.
 */
static inline const struct memory_region *region_of(struct svq *q, uint64_t gpa)
{
	const struct memory_region *const r = *spot_of(q, gpa);

	return gpa - r->gpa < r->size ? r : search_spot(q, gpa);
}

/* ---------------------------------------------------------------------- */
/* Guest to device                                                         */

/* count slots, not round the ring's end: those moved, fewer if one is bad. */
static inline uint32_t forward_run(struct svq *q, uint32_t slot, uint32_t count,
				   int *bad)
{
	const uint16_t *from = &q->guest.avail->ring[slot];
	uint16_t *to = &q->device.avail->ring[slot];
	uint64_t *const given_at = q->given_at;
	const uint32_t num = q->guest.num;
	const uint64_t before = q->forwarded;
	uint64_t order = before;

	for (; order != before + count; from++, to++) {
		const uint32_t head = load_once16(from);

		if (head >= num) {
			*bad = SVQ_BAD_HEAD;
			break;
		}
		if (given_at[head]) {
			*bad = SVQ_HEAD_TWICE;
			break;
		}
		given_at[head] = ++order;
		store_once16(to, (uint16_t)head);
	}
	q->forwarded = order;
	return (uint32_t)(order - before);
}

uint32_t used_relay_forward(struct svq *q)
{
	const uint16_t num = q->guest.num, old = q->last_avail;
	const uint16_t pending = load_index(&q->guest.avail->idx) - old;
	const uint32_t slot = old & (num - 1U), room = num - slot;
	int bad = SVQ_OK;
	uint32_t done;

	if (pending > num) {
		q->broken = SVQ_BAD_AVAIL_IDX;
		return 0;
	}
	done = forward_run(q, slot, pending < room ? pending : room, &bad);
	if (done == room && !bad)
		done += forward_run(q, 0, pending - room, &bad);
	if (done) {
		q->last_avail = q->device_avail = (uint16_t)(old + done);
		store_index(&q->device.avail->idx, q->device_avail);
		kick_device(q, old);
	}
	if (bad)
		q->broken = bad;
	return done;
}

/* ---------------------------------------------------------------------- */
/* Device to guest                                                         */

/*
 * How far one call has gone through what the guest describes. A table may be
 * as long as the ring and there may be one behind each head, so that a call
 * takes no further element after WALK_STEPS; the next call does.
 */
struct walk {
	uint32_t direct;	/* descriptors of the ring's own table */
	uint32_t steps;		/* those, entries of other tables, and pages of buffers */
	int bad;		/* SVQ_...: why it ended */
};

#define WALK_STEPS (2 * RING_MAX)

/*
 * A descriptor belongs to one chain until that is used (virtio 1.3, 2.7.13.1
 * takes free ones), so that all chains in flight have no more than the ring.
 */
static int step_direct(const struct svq *q, struct walk *w)
{
	w->steps++;
	return w->direct++ < q->guest.num ? SVQ_OK : SVQ_SHARED_DESC;
}

/* Mark one buffer, at most *left bytes; 0, or why not. It may lie across regions. */
static int mark_buffer(struct svq *q, struct walk *w, const struct vring_desc *d,
		       uint32_t *left)
{
	uint32_t len = d->len < *left ? d->len : *left, part;
	uint64_t gpa = d->addr;

	if (!(d->flags & VRING_DESC_F_WRITE))
		return SVQ_OK;
	*left -= len;
	w->steps += len >> DIRTY_PAGE_SHIFT;
	for (; len; gpa += part, len -= part) {
		const struct memory_region *r = region_of(q, gpa);
		uint64_t room, *dirty;

		if (!r)
			return SVQ_BAD_ADDRESS;
		room = r->size - (gpa - r->gpa);
		part = len < room ? len : (uint32_t)room;
		dirty = dirty_log_of(r);
		if (dirty)
			mark_pages(r, dirty, gpa, part);
	}
	return SVQ_OK;
}

/* An indirect table need not be aligned, nor lie in one region: copy once, then look. */
static int read_entry(const struct svq *q, uint64_t table, uint32_t i,
		      struct vring_desc *d)
{
	if (memory_read(q->memory, table + (uint64_t)i * sizeof(*d), d, sizeof(*d)))
		return SVQ_BAD_ADDRESS;
	*d = read_desc(d);
	return d->flags & VRING_DESC_F_INDIRECT ? SVQ_BAD_INDIRECT : SVQ_OK;
}

/* A table has no more steps than the ring is long (virtio 1.3, 2.7.5.3.1). */
static int mark_table(struct svq *q, struct walk *w, uint64_t table, uint32_t size,
		      uint32_t *left)
{
	const uint32_t count = size / sizeof(struct vring_desc);
	uint32_t i = 0, steps;

	if (!count || size % sizeof(struct vring_desc))
		return SVQ_BAD_INDIRECT;
	for (steps = 0; *left && steps < q->guest.num; steps++) {
		struct vring_desc d;
		int bad = read_entry(q, table, i, &d);

		w->steps++;
		bad = bad ? bad : mark_buffer(q, w, &d, left);
		if (bad || !(d.flags & VRING_DESC_F_NEXT))
			return bad;
		if (d.next >= count)
			return SVQ_BAD_CHAIN;
		i = d.next;
	}
	return *left ? SVQ_BAD_CHAIN : SVQ_OK;
}

/*
 * Mark the first *left bytes of the writable buffers of a chain; the device
 * could not write the rest. 0, or why it cannot be known what was written.
 */
static int mark_chain(struct svq *q, struct walk *w, uint32_t head, uint32_t *left)
{
	uint32_t i = head, steps;

	for (steps = 0; *left && steps < q->guest.num; steps++) {
		const struct vring_desc d = read_desc(&q->guest.desc[i]);
		int bad = step_direct(q, w);

		if (bad)
			return bad;
		if (d.flags & VRING_DESC_F_INDIRECT) {
			if (!(q->features & SVQ_F_INDIRECT) ||
			    d.flags & VRING_DESC_F_NEXT)
				return SVQ_BAD_INDIRECT;
			return mark_table(q, w, d.addr, d.len, left);
		}
		bad = mark_buffer(q, w, &d, left);
		if (bad || !(d.flags & VRING_DESC_F_NEXT))
			return bad;
		if (d.next >= q->guest.num)
			return SVQ_BAD_CHAIN;
		i = d.next;
	}
	return *left ? SVQ_BAD_CHAIN : SVQ_OK;
}

/*
 * Mark what the device wrote into an element, whatever that is: how much, cut
 * to the writable length, or less than that and w->bad.
 */
static __attribute__((noinline, cold)) uint32_t mark_element(struct svq *q, struct walk *w,
							     uint32_t head, uint32_t written)
{
	uint32_t left = written;

	w->bad = mark_chain(q, w, head, &left);
	if (!w->bad && left)
		q->clamped++;
	return written - left;
}

/*
 * Whether there is nothing to mark: most of what comes is within one buffer,
 * in the region that was found there last, on one page, and that was written
 * before. Nothing that this has read is used if it returns 0.
 */
static inline int nothing_to_mark(struct svq *q, const struct vring_desc *d,
				  uint32_t written)
{
	const uint64_t addr = load_once64(&d->addr);
	const struct memory_region *const r = *spot_of(q, addr);
	const uint64_t first = addr - r->gpa, page = first >> DIRTY_PAGE_SHIFT;
	const uint64_t *dirty;

	/* nothing written is not less than any length */
	if (load_once16(&d->flags) != VRING_DESC_F_WRITE ||
	    written - 1 >= load_once32(&d->len))
		return 0;
	if (first >= r->size || (first + (written - 1)) >> DIRTY_PAGE_SHIFT != page)
		return 0;
	dirty = dirty_log_of(r);
	return !dirty || is_marked(dirty, page);
}

/* The same as forward_run(), the other way; fewer also if that is enough for one call. */
static inline uint32_t return_run(struct svq *q, struct walk *w, uint32_t slot, uint32_t count)
{
	const struct vring_used_elem *from = &q->device.used->ring[slot];
	const struct vring_used_elem *const begin = from, *end = from + count;
	const struct vring_desc *const desc = q->guest.desc;
	struct vring_used_elem *to = &q->guest.used->ring[slot];
	uint64_t *const given_at = q->given_at;
	const uint32_t num = q->guest.num;

	for (; from != end; from++, to++) {
		const uint32_t id = load_once32(&from->id);
		uint32_t written = load_once32(&from->len);

		if (id >= num || !given_at[id]) {
			w->bad = SVQ_BAD_USED_ID;
			break;
		}
		if (__builtin_expect(!nothing_to_mark(q, &desc[id], written), 0)) {
			written = mark_element(q, w, id, written);
			if (w->bad)
				break;
			if (w->steps >= WALK_STEPS)
				end = from + 1;
		}
		given_at[id] = 0;
		*to = (struct vring_used_elem){ htole32(id), htole32(written) };
	}
	return (uint32_t)(from - begin);
}

uint32_t used_relay_return(struct svq *q)
{
	const uint16_t num = q->guest.num, old = q->used_idx;
	const uint16_t pending = load_index(&q->device.used->idx) - old;
	const uint32_t slot = old & (num - 1U), room = num - slot;
	struct walk w = { .bad = SVQ_OK };
	uint32_t done;

	if (pending > num) {
		q->broken = SVQ_BAD_USED_IDX;
		return 0;
	}
	done = return_run(q, &w, slot, pending < room ? pending : room);
	if (done == room && !w.bad && w.steps < WALK_STEPS)
		done += return_run(q, &w, 0, pending - room);
	if (done) {
		q->used_idx = q->device_used = (uint16_t)(old + done);
		store_index(&q->guest.used->idx, q->used_idx);
		mark_used(q, old, done);
		q->returned += done;
		call_guest(q, old);
	}
	if (w.bad)
		q->broken = w.bad;
	return done;
}

/* ---------------------------------------------------------------------- */

static int by_age(const void *a, const void *b, void *given_at)
{
	const uint64_t one = ((const uint64_t *)given_at)[*(const uint16_t *)a];
	const uint64_t other = ((const uint64_t *)given_at)[*(const uint16_t *)b];

	return (one > other) - (one < other);
}

/* Oldest first: the last that were given, unless some were used out of order. */
uint16_t used_relay_in_flight(const struct svq *q, uint16_t *heads)
{
	const uint16_t num = q->device.num, n = q->last_avail - q->used_idx;
	uint16_t found = 0, k;
	uint32_t i;

	for (k = 0; k < n; k++) {
		const uint16_t head = load_once16(
			&q->device.avail->ring[(uint16_t)(q->used_idx + k) & (num - 1)]);

		if (q->given_at[head & (num - 1)] != q->forwarded - n + k + 1)
			break;
		heads[k] = head;
	}
	if (k == n)
		return n;
	for (i = 0; i < num; i++)
		if (q->given_at[i])
			heads[found++] = (uint16_t)i;
	qsort_r(heads, found, sizeof(*heads), by_age, q->given_at);
	return found;
}

/* ---------------------------------------------------------------------- */

static int overlaps(uint64_t at, uint64_t len, uint64_t gpa, uint64_t size)
{
	return len && at < gpa + size && gpa < at + len;
}

/* Entries that are looked at in search of a buffer; what has more may have it. */
#define REACH_STEPS (64 * WALK_STEPS)

static int table_reaches(const struct svq *q, struct walk *w, const struct vring_desc *table,
			 uint64_t gpa, uint64_t size)
{
	const uint32_t count = table->len / sizeof(struct vring_desc);
	uint32_t i = 0, steps;

	for (steps = 0; i < count && steps < q->guest.num; steps++) {
		struct vring_desc d;

		if (++w->steps > REACH_STEPS)
			return 1;
		if (read_entry(q, table->addr, i, &d))
			return 0;
		if (overlaps(d.addr, d.len, gpa, size))
			return 1;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return 0;
		i = d.next;
	}
	return 0;
}

static int chain_reaches(const struct svq *q, struct walk *w, uint16_t head, uint64_t gpa,
			 uint64_t size)
{
	uint32_t i = head;

	while (i < q->guest.num) {
		const struct vring_desc d = read_desc(&q->guest.desc[i]);

		if (step_direct(q, w) || overlaps(d.addr, d.len, gpa, size))
			return 1;
		if (d.flags & VRING_DESC_F_INDIRECT)
			return table_reaches(q, w, &d, gpa, size);
		if (!(d.flags & VRING_DESC_F_NEXT))
			return 0;
		i = d.next;
	}
	return 0;
}

/*
 * By the guest's descriptors as they are now: only the device knows what it has
 * read of them before. Chains that cannot be all those in flight may reach
 * anything.
 */
int used_relay_reaches(const struct svq *q, uint64_t gpa, uint64_t size)
{
	struct walk w = { .bad = SVQ_OK };
	uint32_t head;

	for (head = 0; head < q->device.num; head++)
		if (q->given_at[head] && chain_reaches(q, &w, (uint16_t)head, gpa, size))
			return 1;
	return 0;
}
