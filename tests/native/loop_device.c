/*
 * The data path of a NIC whose frames come back to it, on real rings: a thread
 * that takes a frame from a transmit queue and puts it into a receive buffer
 * of the same pair. A frame for which there is no buffer is dropped and
 * counted. For tests of what stands between a driver and a device.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>

#include "ring_access.h"

#define LOOP_HELD 64
#define LOOP_FRAME 4096

struct loop_queue {
	struct vring ring;
	uint16_t avail, used;		/* next to fetch, next to write */
	int kick, call;
	uint32_t held;
	uint16_t heads[LOOP_HELD];	/* fetched and not used */
};

struct loop_device {
	uint64_t gpa, size;		/* guest memory: one region */
	uint8_t *hva;
	uint32_t pairs;
	uint32_t ahead;			/* descriptors that it fetches ahead */
	uint32_t reorder;		/* it uses those in any order: of receive queues 1, of all 2 */
	uint32_t simple;		/* as vdpa_sim: see loop_frame() and spare() */
	uint64_t frames, dropped, faults;
	int wake, stop;
	uint32_t seed;
	pthread_t thread;
	struct loop_queue queues[16];
};

static uint8_t *at(struct loop_device *d, uint64_t gpa, uint32_t len)
{
	if (gpa >= d->gpa && gpa - d->gpa <= d->size && len <= d->size - (gpa - d->gpa))
		return d->hva + (gpa - d->gpa);
	d->faults++;
	return NULL;
}

static void fetch(struct loop_device *d, struct loop_queue *q)
{
	while (q->held <= d->ahead && q->held < LOOP_HELD &&
	       load_index(&q->ring.avail->idx) != q->avail)
		q->heads[q->held++] =
			load_once16(&q->ring.avail->ring[q->avail++ & (q->ring.num - 1)]);
}

static uint16_t take(struct loop_device *d, struct loop_queue *q, int any)
{
	const uint32_t i = any ? (uint32_t)rand_r(&d->seed) % q->held : 0;
	const uint16_t head = q->heads[i];

	memmove(&q->heads[i], &q->heads[i + 1], (--q->held - i) * sizeof(head));
	return head;
}

static void use(struct loop_queue *q, uint16_t head, uint32_t len)
{
	q->ring.used->ring[q->used++ & (q->ring.num - 1)] =
		(struct vring_used_elem){ htole32(head), htole32(len) };
	store_index(&q->ring.used->idx, q->used);
	full_barrier();
	if (!(load_once16(&q->ring.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT))
		eventfd_raise(q->call);
}

/* Copy between a chain and a frame; returns the bytes. */
static uint32_t copy(struct loop_device *d, const struct loop_queue *q, uint16_t head,
		     uint8_t *frame, uint32_t room, int to_chain)
{
	uint32_t done = 0, steps;

	for (steps = 0; steps < q->ring.num; steps++) {
		const struct vring_desc s = read_desc(&q->ring.desc[head]);
		const uint32_t len = s.len < room - done ? s.len : room - done;
		uint8_t *p = at(d, s.addr, s.len);

		if (p && to_chain)
			memcpy(p, frame + done, len);
		else if (p)
			memcpy(frame + done, p, len);
		done += len;
		if (!(s.flags & VRING_DESC_F_NEXT))
			break;
		head = s.next;
	}
	return done;
}

/*
 * Whether it may go on with this pair. A simple device says first that it has
 * sent, and a frame without a buffer ends its work until the next kick.
 */
static int loop_frame(struct loop_device *d, struct loop_queue *rx, struct loop_queue *tx)
{
	uint8_t frame[LOOP_FRAME];
	uint32_t len;
	uint16_t head;

	fetch(d, tx);
	if (!tx->held)
		return 0;
	head = take(d, tx, d->reorder > 1);
	len = copy(d, tx, head, frame, sizeof(frame), 0);
	fetch(d, rx);
	if (rx->held) {
		const uint16_t buffer = take(d, rx, d->reorder > 0);

		len = copy(d, rx, buffer, frame, len, 1);
		if (d->simple)
			use(tx, head, 0);
		use(rx, buffer, len);
		if (!d->simple)
			use(tx, head, 0);
		d->frames++;
		return 1;
	}
	use(tx, head, 0);
	d->dropped++;
	return !d->simple;
}

/* Whether kicks are wanted; a simple device always wants them. */
static void spare(struct loop_device *d, int on)
{
	uint32_t i;

	for (i = 0; i < 2 * d->pairs && !d->simple; i++)
		store_once16(&d->queues[i].ring.used->flags, on ? VRING_USED_F_NO_NOTIFY : 0);
	full_barrier();
}

/* Whether a frame has come since. */
static int has_work(const struct loop_device *d)
{
	uint32_t i;

	for (i = 1; i < 2 * d->pairs && !d->simple; i += 2)
		if (load_index(&d->queues[i].ring.avail->idx) != d->queues[i].avail)
			return 1;
	return 0;
}

static void *loop_thread(void *device)
{
	struct loop_device *d = device;

	spare(d, 1);
	while (!__atomic_load_n(&d->stop, __ATOMIC_ACQUIRE)) {
		struct pollfd p[17];
		uint32_t i, moved = 0, n = 2 * d->pairs;

		for (i = 0; i < n; i += 2)
			while (!__atomic_load_n(&d->stop, __ATOMIC_ACQUIRE) &&
			       loop_frame(d, &d->queues[i], &d->queues[i + 1]))
				moved++;
		if (moved)
			continue;
		spare(d, 0);
		if (has_work(d)) {
			spare(d, 1);
			continue;
		}
		for (i = 0; i < n; i++)
			p[i] = (struct pollfd){ .fd = d->queues[i].kick, .events = POLLIN };
		p[n] = (struct pollfd){ .fd = d->wake, .events = POLLIN };
		poll(p, n + 1, -1);
		for (i = 0; i <= n; i++)
			if (p[i].revents & POLLIN)
				eventfd_clear(p[i].fd);
		spare(d, 1);
	}
	spare(d, 0);
	return NULL;
}

int loop_start(struct loop_device *d)
{
	d->stop = 0;
	return pthread_create(&d->thread, NULL, loop_thread, d);
}

/* It touches no ring any more when this returns, and has forgotten what it held. */
void loop_stop(struct loop_device *d)
{
	__atomic_store_n(&d->stop, 1, __ATOMIC_RELEASE);
	eventfd_raise(d->wake);
	pthread_join(d->thread, NULL);
}
