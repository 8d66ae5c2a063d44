/* SPDX-License-Identifier: MIT */
/* What a ring shows of its indices, of the order of its elements, and of those that are open. */
#include "ring_access.h"

void vring_indices(const struct vring *ring, uint16_t *avail, uint16_t *used)
{
	*used = load_index(&ring->used->idx);
	*avail = load_index(&ring->avail->idx);
}

void vring_remember(const struct vring *ring, struct vring_start *start)
{
	uint16_t avail;

	vring_indices(ring, &avail, &start->used_idx);
	/* in one piece, while a guest is paused for it; of a slot that a driver writes just now either value will do */
	memcpy(start->avail, ring->avail->ring, ring->num * sizeof(*start->avail));
	memcpy(start->used, ring->used->ring, ring->num * sizeof(*start->used));
}

static int matches_in_order(const struct vring *ring,
			    const struct vring_start *start)
{
	const uint16_t mask = ring->num - 1;
	uint16_t avail, used, since, k;

	vring_indices(ring, &avail, &used);
	/* such indices show nothing; the reader of the base refuses them */
	if ((uint16_t)(avail - used) > ring->num)
		return 1;
	since = start ? used - start->used_idx : 0;
	/* a slot of the avail ring shows what it held until the guest writes it again */
	for (k = avail - ring->num; k != used; k++) {
		const uint16_t head = load_once16(&ring->avail->ring[k & mask]);
		const uint32_t id = load_once32(&ring->used->ring[k & mask].id);

		if (head == id)
			continue;
		/* the indices come round every 65,536 elements: the slot shows its round */
		if (start && (uint16_t)(used - k) > since &&
		    head == le16toh(start->avail[k & mask]) &&
		    id == le32toh(start->used[k & mask].id))
			continue;
		return 0;
	}
	return 1;
}

/*
 * Whether a head is twice among those that are open if the device keeps order.
 * A driver gives a head again only when it was used: the first of the two was,
 * and something before it was not. A driver that refills its ring leaves
 * nothing else to see. Slots between the indices are not written meanwhile.
 */
static int open_twice(const struct vring *ring)
{
	uint64_t seen[RING_MAX / 64] = { 0 };
	uint16_t avail, k;

	vring_indices(ring, &avail, &k);
	if ((uint16_t)(avail - k) > ring->num)
		return 0;
	for (; k != avail; k++) {
		const uint16_t head = load_once16(&ring->avail->ring[k & (ring->num - 1)]);

		if (head >= ring->num)
			continue;
		if (seen[head / 64] & 1ULL << (head % 64))
			return 1;
		seen[head / 64] |= 1ULL << (head % 64);
	}
	return 0;
}

int vring_in_order(const struct vring *ring, const struct vring_start *start,
		   int64_t deadline)
{
	for (;;) {
		/* in this order: what a refill takes from the first, the second sees */
		const int matches = matches_in_order(ring, start);

		if (open_twice(ring))
			return 0;
		if (matches)
			return 1;
		if (now_ns() >= deadline)
			return 0;
		poll(NULL, 0, 1);
	}
}

int vring_open_heads(const struct vring *ring, uint16_t *heads)
{
	uint16_t avail, used, n, k;

	vring_indices(ring, &avail, &used);
	n = avail - used;
	if (n > ring->num)
		return -1;
	for (k = 0; k < n; k++)
		heads[k] = load_once16(
			&ring->avail->ring[(uint16_t)(used + k) & (ring->num - 1)]);
	return n;
}
