/* SPDX-License-Identifier: MIT */
/* The synthetic guest's sections, written and taken by the exchange. */
#include "bytes_access.h"
#include "ring_access.h"
#include "cdefs.h"

#define SECTION_GUEST 2
#define SECTION_REST 4
#define SECTION_VERSION 1
#define SECTION_HEAD 8		/* bytes: u16 kind, u16 version, u32 length of what follows */
#define GUEST_BYTES 40

static void put8(struct out *o, uint8_t v)
{
	put(o, &v, sizeof(v));
}

static uint8_t get8(struct in *i)
{
	const uint8_t *at = get(i, 1);

	return at ? *at : 0;
}

static void put_head(struct out *o, uint16_t kind, uint32_t length)
{
	put16(o, kind);
	put16(o, SECTION_VERSION);
	put32(o, length);
}

/* Whether a section of that kind follows, and nothing else. */
static int is_section(struct in *i, uint16_t kind)
{
	const uint16_t found = get16(i), version = get16(i);
	const uint32_t length = get32(i);

	return found == kind && version == SECTION_VERSION && !i->short_of &&
	       length == (uint64_t)(i->end - i->at);
}

/* ---------------------------------------------------------------------- */

static int64_t put_guest(const struct guest_rest *g, uint8_t *to, uint64_t room)
{
	struct out o = { to, to + room };
	const struct guest_writer *w = g->writer;

	if (room < SECTION_HEAD + GUEST_BYTES)
		return -1;
	put_head(&o, SECTION_GUEST, GUEST_BYTES);
	put64(&o, (uint64_t)now_ns());
	put64(&o, w ? g->writer_gpa : 0);
	put64(&o, w ? w->pages : 0);
	put64(&o, w ? w->rate : 0);
	put64(&o, w ? w->written : 0);
	return o.at - to;
}

static int64_t put_nic(const struct nic_rest *n, uint8_t *to, uint64_t room)
{
	const uint64_t in_front = SECTION_HEAD + 4, at_end = 1 + 6 + 1;
	uint64_t needed = in_front + at_end;
	struct out head = { to, to + in_front }, o;
	uint32_t wrong;
	int64_t length;

	for (wrong = 0; wrong < n->count; wrong++)
		needed += nic_rest_room(n->pairs[wrong]->rx.num, n->pairs[wrong]->tx.num);
	if (needed > room)
		return -1;
	length = nic_put_rest(n->pairs, n->count, to + in_front, room - in_front, &wrong);
	if (length < 0)
		return -1;
	o = (struct out){ to + in_front + length, to + room };
	put8(&o, n->control != NULL);
	if (n->control) {
		put16(&o, n->control->avail_idx);
		put16(&o, n->control->used_idx);
		put16(&o, n->control->open);
	}
	put8(&o, 0);
	put_head(&head, SECTION_REST, (uint32_t)(o.at - to - SECTION_HEAD));
	put32(&head, (uint32_t)length);
	return o.at - to;
}

int64_t guest_put(void *guest, uint32_t number, uint8_t *to, uint64_t room)
{
	const struct guest_rest *g = guest;

	return number < g->count ? put_nic(&g->nics[number], to, room) :
				   put_guest(g, to, room);
}

/* ---------------------------------------------------------------------- */

/* A guest's CPU may write nothing but memory that nobody else uses. */
static int writer_fits(const struct guest_rest *g, uint64_t gpa, uint64_t pages,
		       uint64_t rate)
{
	const uint64_t size = pages * g->page_size;
	uint32_t i;

	if (!g->memory || size / g->page_size != pages || gpa % g->page_size ||
	    rate > WRITER_MAX_RATE || !memory_hva(g->memory, gpa, size))
		return 0;
	for (i = 0; i < g->used_count; i++)
		if (gpa < g->used[i].gpa + g->used[i].length && g->used[i].gpa < gpa + size)
			return 0;
	return 1;
}

static int guest_part_fits(struct guest_rest *g, const uint8_t *from, uint64_t length)
{
	struct in i = { from, from + length, 0 };
	uint64_t gpa, pages, rate;

	if (!is_section(&i, SECTION_GUEST) || i.end - i.at != GUEST_BYTES)
		return 0;
	get64(&i);
	gpa = get64(&i);
	pages = get64(&i);
	rate = get64(&i);
	g->writer_comes = pages != 0;
	return !pages || writer_fits(g, gpa, pages, rate);
}

struct control_indices {
	uint16_t avail, used, open;
};

static struct control_indices get_control(struct in *i)
{
	struct control_indices c;

	c.avail = get16(i);
	c.used = get16(i);
	c.open = get16(i);
	return c;
}

/* Whether a control queue's driver with these indices fits its ring in memory. */
static int control_fits(const struct ctrl_driver *d, struct control_indices c)
{
	uint16_t avail, used;

	vring_indices(&d->ring, &avail, &used);
	return (uint16_t)(c.avail - c.used) == c.open && 2 * c.open <= d->ring.num &&
	       avail == c.avail && (uint16_t)(used - c.used) <= c.open;
}

static int nic_fits(const struct nic_rest *n, const uint8_t *from, uint64_t length)
{
	struct in i = { from, from + length, 0 };
	const uint8_t *pairs;
	uint32_t bytes, wrong;

	if (!is_section(&i, SECTION_REST))
		return 0;
	bytes = get32(&i);
	pairs = get(&i, bytes);
	if (!pairs || get8(&i) != (n->control != NULL))
		return 0;
	if (n->control && !control_fits(n->control, get_control(&i)))
		return 0;
	return !get8(&i) && !i.short_of && i.at == i.end &&
	       !nic_check_rest(n->pairs, n->count, pairs, bytes, &wrong);
}

int guest_fits(void *guest, uint32_t number, const uint8_t *from, uint64_t length)
{
	struct guest_rest *g = guest;

	return number < g->count ? nic_fits(&g->nics[number], from, length) :
				   guest_part_fits(g, from, length);
}

void guest_take(void *guest, uint32_t number, const uint8_t *from, uint64_t length)
{
	const struct guest_rest *g = guest;
	struct in i = { from + SECTION_HEAD, from + length, 0 };
	const struct nic_rest *n;
	struct control_indices c;
	const uint8_t *pairs;
	uint32_t bytes;

	if (number >= g->count)
		return;
	n = &g->nics[number];
	bytes = get32(&i);
	pairs = get(&i, bytes);
	nic_apply_rest(n->pairs, n->count, pairs, bytes);
	get8(&i);
	if (!n->control)
		return;
	c = get_control(&i);
	n->control->avail_idx = c.avail;
	n->control->used_idx = c.used;
	n->control->open = c.open;
}
