/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "ring_access.h"
#include "cdefs.h"

#define ETH_HEADER 14
#define ETHERTYPE_EXPERIMENTAL 0x88b5 /* IEEE 802 local experimental 1 */
#define HEADER sizeof(struct virtio_net_hdr_v1)

int populate_in_order(uint8_t *address, uint64_t page, const uint32_t *order,
		      uint32_t count)
{
	uint32_t i;
	int r = 0;

	for (i = 0; i < count && !r; i++)
		r = populate(address + order[i] * page, page);
	return r;
}

int advise_small(uint8_t *address, uint64_t size)
{
	return madvise(address, size, MADV_NOHUGEPAGE) ? errno : 0;
}

static void empty_ring(struct vring *ring)
{
	memset(ring->desc, 0, ring->num * sizeof(*ring->desc));
	store_once16(&ring->avail->flags, 0);
	store_once16(&ring->used->flags, 0);
	store_index(&ring->used->idx, 0);
	store_index(&ring->avail->idx, 0);
}

void touch_start(struct touch *t)
{
	empty_ring(&t->rx);
	empty_ring(&t->tx);
	t->rx_avail = t->rx_used = t->tx_avail = t->tx_used = 0;
}

static void publish(struct vring *ring, uint16_t *avail, uint16_t head, int kick)
{
	ring->avail->ring[*avail & (ring->num - 1)] = htole16(head);
	(*avail)++;
	store_index(&ring->avail->idx, *avail);
	full_barrier();
	eventfd_raise(kick);
}

static void post(struct touch *t, const struct touch_place *to, uint32_t size)
{
	uint16_t head = t->rx_avail & (t->rx.num - 1);

	t->rx.desc[head] = (struct vring_desc){
		.addr = htole64(to->iova + head * t->apart),
		.len = htole32(HEADER + size),
		.flags = htole16(VRING_DESC_F_WRITE),
	};
	publish(&t->rx, &t->rx_avail, head, t->rx_kick);
}

static void build(struct touch *t, uint8_t *buffer, uint32_t size)
{
	uint8_t *f = buffer + HEADER;
	uint64_t word = ++t->seq * 0x9e3779b97f4a7c15ull;
	uint32_t at;

	memset(buffer, 0, HEADER);
	memset(f, 0xff, 6);
	memcpy(f + 6, "\x52\x54\x91\x76\x64\x01", 6);
	f[12] = ETHERTYPE_EXPERIMENTAL >> 8;
	f[13] = ETHERTYPE_EXPERIMENTAL & 0xff;
	for (at = ETH_HEADER; at < size; at++, word = (word << 7) | (word >> 57))
		f[at] = (uint8_t)word;
}

/* two descriptors, header and frame, as drivers without ANY_LAYOUT send */
static void send_from(struct touch *t, const struct touch_place *from, uint32_t size)
{
	uint16_t head = (2 * t->tx_avail) & (t->tx.num - 1);

	t->tx.desc[head] = (struct vring_desc){
		.addr = htole64(from->iova),
		.len = htole32(HEADER),
		.flags = htole16(VRING_DESC_F_NEXT),
		.next = htole16(head + 1),
	};
	t->tx.desc[head + 1] = (struct vring_desc){
		.addr = htole64(from->iova + HEADER),
		.len = htole32(size),
	};
	publish(&t->tx, &t->tx_avail, head, t->tx_kick);
}

static void wait_for_calls(const struct touch *t, int64_t deadline)
{
	struct pollfd fds[2] = {
		{ .fd = t->rx_call, .events = POLLIN },
		{ .fd = t->tx_call, .events = POLLIN },
	};
	int i;

	if (poll(fds, 2, poll_timeout(deadline)) <= 0)
		return;
	for (i = 0; i < 2; i++)
		if (fds[i].revents & POLLIN)
			eventfd_clear(fds[i].fd);
}

/* Take received frames; a foreign one is dropped to make room for the next. */
static int take(struct touch *t, const struct touch_place *to, const uint8_t *sent,
		uint32_t size)
{
	while (load_index(&t->rx.used->idx) != t->rx_used) {
		const struct vring_used_elem *u =
			&t->rx.used->ring[t->rx_used & (t->rx.num - 1)];
		uint32_t id;

		if ((uint16_t)(load_index(&t->rx.used->idx) - t->rx_used) >
		    (uint16_t)(t->rx_avail - t->rx_used))
			return TOUCH_NONSENSE;
		id = load_once32(&u->id);
		if (id >= t->rx.num)
			return TOUCH_NONSENSE;
		t->rx_used++;
		if (load_once32(&u->len) == HEADER + size &&
		    !memcmp(to->hva + id * t->apart + HEADER, sent, size))
			return TOUCH_BACK;
		post(t, to, size);
	}
	return 0;
}

int touch_frame(struct touch *t, const struct touch_place *from,
		const struct touch_place *to, uint32_t size, int64_t deadline,
		int64_t grace)
{
	uint8_t sent[TOUCH_MAX];
	int64_t begin, now;
	int state = 0;

	t->took = 0;
	build(t, from->hva, size);
	memcpy(sent, from->hva + HEADER, size);
	memset(to->hva, 0, HEADER + size);
	/* as Linux does it: half of them at once (virtio_net.c:virtnet_receive()) */
	if ((uint16_t)(t->rx_avail - t->rx_used) <= t->ahead / 2)
		while ((uint16_t)(t->rx_avail - t->rx_used) <= t->ahead)
			post(t, to, size);
	begin = now_ns();
	send_from(t, from, size);
	for (;;) {
		state |= take(t, to, sent, size);
		now = now_ns();
		if (!(state & TOUCH_SENT) &&
		    load_index(&t->tx.used->idx) != t->tx_used) {
			t->tx_used++;
			state |= TOUCH_SENT;
			if (deadline > now + grace)
				deadline = now + grace;
		}
		if ((state & TOUCH_BACK) && !t->took)
			t->took = now - begin;
		if (state & TOUCH_NONSENSE ||
		    (state & (TOUCH_SENT | TOUCH_BACK)) == (TOUCH_SENT | TOUCH_BACK) ||
		    now >= deadline)
			return state;
		wait_for_calls(t, deadline);
	}
}

uint32_t ioctl_repeat(int fd, uint64_t request, const uint8_t *argument,
		      uint32_t size, uint32_t count, int64_t *took,
		      int *error)
{
	uint64_t copy[8]; /* aligned as any argument may need */
	uint32_t i;

	*error = 0;
	for (i = 0; i < count; i++) {
		int64_t begin;

		memcpy(copy, argument, size);
		begin = now_ns();
		if (ioctl(fd, request, size ? copy : NULL) < 0)
			*error = errno;
		took[i] = now_ns() - begin;
		if (*error)
			break;
	}
	return i;
}
