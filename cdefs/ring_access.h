/* SPDX-License-Identifier: MIT */
/*
 * Access to memory that a guest or a device changes at the same time:
 * everything is read once, and indices carry the ordering of virtio 1.3
 * section 2.7.13 and 2.7.14.
 */
#ifndef RING_ACCESS_H
#define RING_ACCESS_H

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cdefs.h"

#define NSEC_PER_SEC 1000000000LL
#define RING_MAX 32768	/* virtio 1.3, 2.7 */

static inline uint16_t load_once16(const uint16_t *p)
{
	return le16toh(__atomic_load_n(p, __ATOMIC_RELAXED));
}

static inline uint32_t load_once32(const uint32_t *p)
{
	return le32toh(__atomic_load_n(p, __ATOMIC_RELAXED));
}

static inline uint64_t load_once64(const uint64_t *p)
{
	return le64toh(__atomic_load_n(p, __ATOMIC_RELAXED));
}

/* what the other side wrote before it moved the index is visible after this */
static inline uint16_t load_index(const uint16_t *p)
{
	return le16toh(__atomic_load_n(p, __ATOMIC_ACQUIRE));
}

static inline void store_once16(uint16_t *p, uint16_t v)
{
	__atomic_store_n(p, htole16(v), __ATOMIC_RELAXED);
}

/* what was written before is visible to a reader of the new index */
static inline void store_index(uint16_t *p, uint16_t v)
{
	__atomic_store_n(p, htole16(v), __ATOMIC_RELEASE);
}

/*
 * Between publishing an index and reading the other side's suppression flag
 * (or the other way round) a store must not pass a later load.
 */
static inline void full_barrier(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

/* 0, or -1 if fd is no longer an eventfd; nothing for an fd of -1; a full one is raised already */
static inline int eventfd_raise(int fd)
{
	const uint64_t one = 1;
	ssize_t r;

	if (fd < 0)
		return 0;
	do
		r = write(fd, &one, sizeof(one));
	while (r < 0 && errno == EINTR);
	return r < 0 && errno != EAGAIN ? -1 : 0;
}

/* the eventfds are non-blocking: reading an empty one is not an error */
static inline void eventfd_clear(int fd)
{
	uint64_t count;
	ssize_t r;

	do
		r = read(fd, &count, sizeof(count));
	while (r < 0 && errno == EINTR);
}

/* virtio 1.3, 2.7.7.2: notify if event lies in what was added since old */
static inline int need_event(uint16_t event, uint16_t new, uint16_t old)
{
	return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

static inline uint16_t *used_event(const struct vring *r)
{
	return &r->avail->ring[r->num];
}

static inline uint16_t *avail_event(const struct vring *r)
{
	return (uint16_t *)&r->used->ring[r->num];
}

static inline struct vring_desc read_desc(const struct vring_desc *s)
{
	return (struct vring_desc){
		.addr = load_once64(&s->addr),
		.len = load_once32(&s->len),
		.flags = load_once16(&s->flags),
		.next = load_once16(&s->next),
	};
}

/* milliseconds to wait for poll(), never longer than the deadline allows */
static inline int poll_timeout(int64_t deadline)
{
	int64_t left = deadline - now_ns();

	if (left <= 0)
		return 0;
	left = left / 1000000 + 1;
	return left > 1000 ? 1000 : (int)left;
}

#endif
