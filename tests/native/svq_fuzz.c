/* SPDX-License-Identifier: MIT */
/*
 * Arbitrary guests and devices against the shadow virtqueue, to be built with
 * ASan and UBSan. Each input is a program of a few bytes an instruction; after
 * each step the queue's account must add up, and nothing may have been given
 * to the device that is not the guest's memory. fuzz.h says how to run it.
 */
/* small, since each input starts on fresh memory */
#define MODEL_REGION 0x8000ULL
#define MODEL_USED 0x2000
#include "svq_model.h"
#include "fuzz.h"

#define REGIONS 3

static const struct memory_region *region_of(const struct model *m, uint64_t iova)
{
	uint32_t i;

	for (i = 0; i < m->map.count; i++)
		if (iova - m->regions[i].iova < MODEL_REGION)
			return &m->regions[i];
	return NULL;
}

/* A buffer may reach into the next region where that is next for the device too. */
static int is_guest_memory(const struct model *m, uint64_t iova, uint32_t len)
{
	while (len) {
		const struct memory_region *r = region_of(m, iova);
		uint64_t part;

		if (!r)
			return 0;
		part = MODEL_REGION - (iova - r->iova);
		part = len < part ? len : part;
		iova += part;
		len -= (uint32_t)part;
	}
	return 1;
}

static int is_marked(const struct memory_region *r, uint64_t at)
{
	const uint64_t page = at / 4096;

	return r->dirty[page / 64] >> page % 64 & 1;
}

/* What the device says that it wrote is marked. */
static void check_marked(const struct model *m, uint64_t iova, uint32_t len)
{
	const struct memory_region *r;
	uint64_t i;

	for (i = 0; i < len; i += 4096) {
		r = region_of(m, iova + i);
		CHECK(is_marked(r, iova + i - r->iova));
	}
	r = region_of(m, iova + len - 1);
	CHECK(is_marked(r, iova + len - 1 - r->iova));
}

/* The chain as it would be written, where descriptors are the guest's own; a table at most, or nothing. */
static uint16_t guest_chain(const struct model *m, uint32_t id, struct vring_desc *chain)
{
	const struct vring *ring = &m->q.guest;
	uint16_t n = 0, i = (uint16_t)id;

	while (n < ring->num && i < ring->num) {
		chain[n] = ring->desc[i];
		if (chain[n].flags & VRING_DESC_F_INDIRECT)
			return 0;
		i = chain[n].flags & VRING_DESC_F_NEXT ? chain[n].next : ring->num;
		n++;
	}
	return n;
}

/* Take back what the device used, and look at the marks of the first of it. */
static void take_back(struct model *m)
{
	struct svq *q = &m->q;
	const struct vring_used_elem *u =
		&q->device.used->ring[q->device_used % q->device.num];
	struct vring_desc chain[256];
	uint16_t n = 0, i = (uint16_t)u->id, k;
	uint32_t left = u->len;

	if (q->given_at)
		n = guest_chain(m, u->id, chain);
	else if (u->id < q->device.num)
		for (; n < q->elements[u->id].segments; n++) {
			chain[n] = q->device.desc[i];
			i = q->next[i];
		}
	for (k = 0; k < m->map.count; k++)
		memset(m->regions[k].dirty, 0, MODEL_REGION / 4096 / 8);
	if (!svq_return(q))
		return;
	for (k = 0; k < n && left; k++) {
		const uint32_t len = chain[k].len < left ? chain[k].len : left;

		if (!(chain[k].flags & VRING_DESC_F_WRITE))
			continue;
		check_marked(m, chain[k].addr, len);
		left -= len;
	}
}

static void check_given(const struct model *m, uint16_t head)
{
	const struct svq *q = &m->q;
	uint16_t i = head, steps;

	for (steps = 0; steps < q->device.num; steps++) {
		const struct vring_desc *d = &q->device.desc[i];

		CHECK(d->len);
		CHECK(is_guest_memory(m, d->addr, d->len));
		CHECK(!(d->flags & VRING_DESC_F_INDIRECT));
		if (!(d->flags & VRING_DESC_F_NEXT))
			return;
		CHECK(d->next < q->device.num);
		i = d->next;
	}
	CHECK(!"a chain given to the device does not end");
}

static void check(const struct model *m)
{
	const struct svq *q = &m->q;
	uint16_t heads[256], num = q->device.num;
	uint32_t open = 0, elements = 0, i;

	for (i = 0; q->given_at && i < num; i++)
		elements += !!q->given_at[i];
	for (i = 0; !q->given_at && i < num; i++) {
		open += q->elements[i].segments;
		elements += !!q->elements[i].segments;
		if (q->elements[i].segments)
			check_given(m, (uint16_t)i);
	}
	CHECK(q->given_at || open + q->free_count == num);
	CHECK(!svq_reaches(q, 0, 0x1000) || q->given_at);
	CHECK(svq_in_flight(q, heads) == elements);
	CHECK(elements == (uint16_t)(q->last_avail - q->used_idx));
	CHECK(q->forwarded - q->returned == elements);
}

static void step(struct model *m, struct input *in)
{
	struct svq *q = &m->q;
	uint16_t num = q->guest.num;
	uint32_t op = take(in, 1);

	switch (op % 12) {
	case 0:
	case 1:
	case 2:
		write_desc(in, m, &q->guest, 4099);
		break;
	case 3:
	case 4: /* a guest that publishes */
		publish(in, &q->guest);
		break;
	case 5: /* and one that does as it likes */
		q->guest.avail->idx = (uint16_t)take(in, 2);
		break;
	case 6:
	case 7:
		svq_forward(q);
		break;
	case 8: /* a device that completes what it was given */
		q->device.used->ring[q->device.used->idx % num] =
			(struct vring_used_elem){
				q->device.avail->ring[take(in, 1) % num],
				take(in, 3)
			};
		q->device.used->idx++;
		break;
	case 9:
		if (op & 0x40) /* or what it was not */
			q->device.used->idx = (uint16_t)take(in, 2);
		q->device.used->ring[take(in, 1) % num].id = take(in, 2);
		break;
	case 10:
		take_back(m);
		break;
	default:
		svq_want_notifications(q, op & 0x10);
		q->guest.avail->ring[num] = (uint16_t)take(in, 2);
	}
}

static void finish(struct model *m)
{
	struct svq *q = &m->q;
	uint16_t heads[256], n = svq_in_flight(q, heads), k;
	uint16_t base;

	/* whatever the rings hold, the answer comes at once */
	vring_in_order(&q->guest, NULL, 0);
	base = svq_republish(q);

	CHECK(base == q->used_idx);
	for (k = 0; k < n; k++)
		CHECK(q->guest.avail->ring[(uint16_t)(base + k) % q->guest.num] ==
		      heads[k]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	uint32_t kind = take(&in, 1);
	struct model m;

	model_init(&m, (uint16_t)(2 << (kind & 3)), REGIONS, kind >> 2 & 3,
		   kind >> 4 & (kind & 0x40 ? MODEL_ADJACENT : 3));
	m.q.guest.avail->idx = m.q.guest.used->idx = kind & 0x80 ? 0xfffe : 0;
	if (kind & 0x40)
		model_share(&m);
	svq_start(&m.q);
	while (in.left) {
		step(&m, &in);
		check(&m);
	}
	finish(&m);
	model_free(&m);
	return 0;
}
