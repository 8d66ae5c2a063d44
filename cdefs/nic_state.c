/* SPDX-License-Identifier: MIT */
/*
 * What changes in a NIC while its guest runs, as bytes: written on the source,
 * checked and loaded at the destination, all while the guest is paused.
 * Little-endian, without padding; vhost-vdpa help migration has the format.
 */
#include <limits.h>

#include "bytes_access.h"
#include "ring_access.h"
#include "cdefs.h"

/* ---------------------------------------------------------------------- */

/* Used index, avail index, and the heads between them, which is as many as follow. */
static int put_ring(struct out *o, const struct vring *r)
{
	uint16_t avail, used, heads[RING_MAX];
	int count, k;

	vring_indices(r, &avail, &used);
	count = vring_open_heads(r, heads);
	if (count < 0)
		return -1;
	put16(o, used);
	put16(o, avail);
	for (k = 0; k < count; k++)
		heads[k] = htole16(heads[k]);
	put(o, heads, 2 * (size_t)count);
	return 0;
}

/* The bitmap as runs of equal words, how many and which: nearly all of its bits are set, or none. */
static void put_seen(struct out *o, const uint64_t *seen)
{
	uint32_t i, end;

	for (i = 0; i < NIC_WINDOW / 64; i = end) {
		for (end = i + 1; end < NIC_WINDOW / 64 && seen[end] == seen[i];)
			end++;
		put16(o, (uint16_t)(end - i));
		put64(o, seen[i]);
	}
}

static int put_pair(struct out *o, const struct nic_pair *p)
{
	const struct out from = *o;
	uint32_t gaps = 0, i;

	put32(o, 0);
	if (put_ring(o, &p->rx) || put_ring(o, &p->tx))
		return -1;
	put16(o, p->rx_avail);
	put16(o, p->rx_used);
	put16(o, p->tx_avail);
	put16(o, p->tx_used);
	put16(o, p->sending != 0);
	put64(o, p->sent);
	put64(o, p->received);
	put64(o, p->duplicated);
	put64(o, p->corrupted);
	put64(o, p->reordered);
	put64(o, p->highest);
	put64(o, p->ring_errors);
	put64(o, (uint64_t)p->last_rx);
	put_seen(o, p->seen);
	put16(o, p->tx_free_count);
	for (i = 0; i < p->tx_free_count; i++)
		put16(o, p->tx_free[i]);
	for (i = 0; i < NIC_GAPS; i++)
		gaps += p->gaps[i].end != 0;
	put16(o, (uint16_t)gaps);
	for (i = 0; i < NIC_GAPS; i++)
		if (p->gaps[i].end) {
			put64(o, (uint64_t)p->gaps[i].begin);
			put64(o, (uint64_t)p->gaps[i].end);
		}
	if (o->at < o->end) {
		struct out length = from;

		put32(&length, (uint32_t)(o->at - from.at - 4));
	}
	return 0;
}

uint64_t nic_rest_room(uint32_t rx, uint32_t tx)
{
	return 4 + 2 * 4 + 2 * rx + 2 * tx + 5 * 2 + 8 * 8 +
	       (2 + 8) * (NIC_WINDOW / 64) + 2 + 2 * tx + 2 + 16 * NIC_GAPS + 1;
}

int64_t nic_put_rest(struct nic_pair **pairs, uint32_t count, uint8_t *to,
		     uint64_t room, uint32_t *wrong)
{
	struct out o = { to, to + room };

	for (*wrong = 0; *wrong < count; ++*wrong)
		if (put_pair(&o, pairs[*wrong]))
			return -1;
	return o.at - to;
}

/* ---------------------------------------------------------------------- */

/* Whether a ring holds in memory what the source says that it left. */
static int check_ring(struct in *i, const struct vring *r, uint16_t *avail,
		      uint16_t *used, uint32_t side)
{
	const uint8_t *heads;
	uint16_t found_avail, found_used, n, k;

	*used = get16(i);
	*avail = get16(i);
	n = *avail - *used;
	if (i->short_of)
		return REST_SHORT;
	if (n > r->num)
		return REST_FAR_APART + side;
	heads = get(i, 2 * (size_t)n);
	if (!heads)
		return REST_SHORT;
	vring_indices(r, &found_avail, &found_used);
	if (found_avail != *avail || found_used != *used)
		return REST_INDICES + side;
	for (k = 0; k < n; k++) {
		uint16_t told;

		memcpy(&told, heads + 2 * (size_t)k, sizeof(told));
		if (le16toh(told) !=
		    load_once16(&r->avail->ring[(uint16_t)(*used + k) & (r->num - 1)]))
			return REST_HEADS + side;
	}
	return 0;
}

/* A driver has published what it has added, and its device used no more than that. */
static int driver_fits(uint16_t avail, uint16_t used, uint16_t driver_avail,
		       uint16_t driver_used)
{
	return driver_avail == avail && (uint16_t)(used - driver_used) <=
					       (uint16_t)(avail - driver_used);
}

static int is_time(int64_t t)
{
	return t >= -REST_MAX_TIME && t <= REST_MAX_TIME;
}

static int check_free(struct in *i, const struct nic_pair *p, uint16_t open)
{
	uint64_t seen[RING_MAX / 64] = { 0 };
	const uint16_t step = p->tx_descs, num = p->tx.num;
	const uint16_t count = get16(i);
	uint16_t k;

	if (count > num)
		return REST_FREE;
	for (k = 0; k < count; k++) {
		const uint16_t slot = get16(i);

		if (slot % step || slot + step > num ||
		    seen[slot / 64] & 1ULL << (slot % 64))
			return REST_FREE;
		seen[slot / 64] |= 1ULL << (slot % 64);
	}
	return count + open > num / step ? REST_SLOTS : 0;
}

static int check_counters(struct in *i)
{
	uint64_t counters[7];
	int k;

	for (k = 0; k < 7; k++)
		counters[k] = get64(i);
	if (counters[1] > counters[0] || counters[5] > counters[0])
		return REST_RECEIVED;
	for (k = 0; k < 7; k++)
		if (counters[k] > INT64_MAX)
			return REST_COUNTERS;
	return is_time((int64_t)get64(i)) ? 0 : REST_TIME;
}

static int check_seen(struct in *i)
{
	uint16_t left = NIC_WINDOW / 64;

	while (left) {
		const uint16_t words = get16(i);

		if (!get(i, 8))
			return REST_SHORT;
		if (!words || words > left)
			return REST_SEEN;
		left -= words;
	}
	return 0;
}

static int check_gaps(struct in *i)
{
	const uint16_t count = get16(i);
	uint16_t k;

	if (count > NIC_GAPS)
		return REST_GAPS;
	for (k = 0; k < count; k++) {
		const int64_t begin = (int64_t)get64(i), end = (int64_t)get64(i);

		if (!is_time(begin) || !is_time(end) || begin > end)
			return REST_GAPS;
	}
	return 0;
}

static int check_pair(struct in *i, const struct nic_pair *p)
{
	uint16_t avail[2], used[2], rx_avail, rx_used, tx_avail, tx_used, sending;
	int bad;

	if ((bad = check_ring(i, &p->rx, &avail[0], &used[0], 0)) ||
	    (bad = check_ring(i, &p->tx, &avail[1], &used[1], 1)))
		return bad;
	rx_avail = get16(i);
	rx_used = get16(i);
	tx_avail = get16(i);
	tx_used = get16(i);
	sending = get16(i);
	if (i->short_of)
		return REST_SHORT;
	if ((uint16_t)(rx_avail - rx_used) > p->rx.num)
		return REST_DRIVER;
	if (!driver_fits(avail[0], used[0], rx_avail, rx_used))
		return REST_DRIVER;
	if (!driver_fits(avail[1], used[1], tx_avail, tx_used))
		return REST_DRIVER + 1;
	if (sending > 1)
		return REST_SENDING;
	if ((bad = check_counters(i)))
		return bad;
	if ((bad = check_seen(i)) || (bad = check_free(i, p, tx_avail - tx_used)) ||
	    (bad = check_gaps(i)))
		return bad;
	return i->short_of || i->at != i->end ? REST_SHORT : 0;
}

static struct in part_of(struct in *i)
{
	const uint32_t length = get32(i);
	const uint8_t *at = get(i, length);

	return (struct in){ at, at ? at + length : at, !at };
}

int nic_check_rest(struct nic_pair **pairs, uint32_t count, const uint8_t *from,
		   uint64_t length, uint32_t *wrong)
{
	struct in i = { from, from + length, 0 };

	for (*wrong = 0; *wrong < count; ++*wrong) {
		struct in part = part_of(&i);
		int bad = i.short_of ? REST_SHORT : check_pair(&part, pairs[*wrong]);

		if (bad)
			return bad;
	}
	return i.at == i.end ? 0 : REST_SHORT;
}

/* ---------------------------------------------------------------------- */

static void take_pair(struct in *i, struct nic_pair *p)
{
	uint16_t used = get16(i), avail = get16(i), k;

	get(i, 2 * (size_t)(uint16_t)(avail - used));
	used = get16(i);
	avail = get16(i);
	get(i, 2 * (size_t)(uint16_t)(avail - used));
	p->rx_avail = get16(i);
	p->rx_used = get16(i);
	p->tx_avail = get16(i);
	p->tx_used = get16(i);
	p->sending = get16(i);
	p->sent = get64(i);
	p->received = get64(i);
	p->duplicated = get64(i);
	p->corrupted = get64(i);
	p->reordered = get64(i);
	p->highest = get64(i);
	p->ring_errors = get64(i);
	p->last_rx = (int64_t)get64(i);
	for (k = 0; k < NIC_WINDOW / 64;) {
		const uint16_t end = k + get16(i);
		const uint64_t word = get64(i);

		while (k < end)
			p->seen[k++] = word;
	}
	p->tx_free_count = get16(i);
	for (k = 0; k < p->tx_free_count; k++)
		p->tx_free[k] = get16(i);
	memset(p->gaps, 0, sizeof(p->gaps));
	for (k = get16(i); k--;) {
		p->gaps[k].begin = (int64_t)get64(i);
		p->gaps[k].end = (int64_t)get64(i);
	}
}

void nic_apply_rest(struct nic_pair **pairs, uint32_t count, const uint8_t *from,
		    uint64_t length)
{
	struct in i = { from, from + length, 0 };
	uint32_t k;

	for (k = 0; k < count; k++) {
		struct in part = part_of(&i);

		take_pair(&part, pairs[k]);
	}
}
