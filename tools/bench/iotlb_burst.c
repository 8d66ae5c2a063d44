/* SPDX-License-Identifier: MIT */
/*
 * What it costs to write IOTLB messages to a vhost-vdpa device, without
 * anything around it: the baseline that pyvhostvdpa's bursts are compared with.
 *
 *   iotlb_burst DEV MESSAGES REPEAT [write|linked|unlinked]
 *
 * Each repetition opens a batch, maps MESSAGES pages of 4 KiB at every
 * second page's IOVA, and unmaps them. Printed is one line each: the
 * nanoseconds that the map messages took, without BATCH_BEGIN and BATCH_END.
 * "linked" sends them as io_uring writes in one chain, "unlinked" without order
 * (then there must be no batch that depends on it; here order does not matter).
 *
 *   cc -O2 -o iotlb_burst iotlb_burst.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/vhost.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ULL
#define IOVA (4ULL << 30)

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static struct vhost_msg_v2 message(uint8_t type, uint64_t iova, uint64_t size,
				   uint64_t uaddr, uint8_t perm)
{
	struct vhost_msg_v2 m;

	memset(&m, 0, sizeof(m));
	m.type = VHOST_IOTLB_MSG_V2;
	m.iotlb.iova = iova;
	m.iotlb.size = size;
	m.iotlb.uaddr = uaddr;
	m.iotlb.perm = perm;
	m.iotlb.type = type;
	return m;
}

static void put(int fd, struct vhost_msg_v2 m)
{
	if (write(fd, &m, sizeof(m)) != sizeof(m))
		die("write");
}

/* ---- plain writes ----------------------------------------------------- */

static void write_all(int fd, const struct vhost_msg_v2 *messages, unsigned count)
{
	unsigned i;

	for (i = 0; i < count; i++)
		if (write(fd, &messages[i], sizeof(messages[i])) !=
		    sizeof(messages[i]))
			die("write");
}

/* ---- io_uring, by its system calls ------------------------------------- */

struct ring {
	int fd;
	struct io_uring_params p;
	uint8_t *sq, *cq;
	struct io_uring_sqe *sqes;
};

static void *map_ring(int fd, size_t size, uint64_t offset)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_POPULATE, fd, offset);

	if (p == MAP_FAILED)
		die("mmap of the io_uring");
	return p;
}

static void ring_open(struct ring *r, unsigned entries)
{
	memset(r, 0, sizeof(*r));
	r->p.flags = IORING_SETUP_CLAMP;
	r->fd = syscall(SYS_io_uring_setup, entries, &r->p);
	if (r->fd < 0)
		die("io_uring_setup");
	r->sq = map_ring(r->fd, r->p.sq_off.array + r->p.sq_entries * 4,
			 IORING_OFF_SQ_RING);
	r->cq = map_ring(r->fd, r->p.cq_off.cqes +
			 r->p.cq_entries * sizeof(struct io_uring_cqe),
			 IORING_OFF_CQ_RING);
	r->sqes = map_ring(r->fd, r->p.sq_entries * sizeof(*r->sqes),
			   IORING_OFF_SQES);
}

#define WORD(base, offset) ((uint32_t *)((base) + (offset)))

static void reap(struct ring *r, unsigned count)
{
	uint32_t *head = WORD(r->cq, r->p.cq_off.head);
	uint32_t mask = *WORD(r->cq, r->p.cq_off.ring_mask);
	struct io_uring_cqe *cqes = (void *)(r->cq + r->p.cq_off.cqes);

	while (count--) {
		struct io_uring_cqe *c = &cqes[*head & mask];

		if (c->res != (int)sizeof(struct vhost_msg_v2)) {
			fprintf(stderr, "io_uring write %llu: %d\n",
				(unsigned long long)c->user_data, c->res);
			exit(1);
		}
		__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	}
}

static void submit(struct ring *r, int fd, const struct vhost_msg_v2 *messages,
		   unsigned count, int linked)
{
	uint32_t *tail = WORD(r->sq, r->p.sq_off.tail), at = *tail;
	uint32_t mask = *WORD(r->sq, r->p.sq_off.ring_mask);
	uint32_t *array = WORD(r->sq, r->p.sq_off.array);
	unsigned i;

	for (i = 0; i < count; i++, at++) {
		struct io_uring_sqe *e = &r->sqes[at & mask];

		memset(e, 0, sizeof(*e));
		e->opcode = IORING_OP_WRITE;
		e->flags = linked && i + 1 < count ? IOSQE_IO_LINK : 0;
		e->fd = fd;
		e->addr = (uintptr_t)&messages[i];
		e->len = sizeof(messages[i]);
		e->user_data = i;
		array[at & mask] = at & mask;
	}
	__atomic_store_n(tail, at, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, r->fd, count, count,
		    IORING_ENTER_GETEVENTS, NULL, 0) != (long)count)
		die("io_uring_enter");
	reap(r, count);
}

static void uring_all(struct ring *r, int fd, const struct vhost_msg_v2 *messages,
		      unsigned count, int linked)
{
	while (count) {
		unsigned n = count < r->p.sq_entries ? count : r->p.sq_entries;

		submit(r, fd, messages, n, linked);
		messages += n;
		count -= n;
	}
}

/* ------------------------------------------------------------------------ */

static int open_device(const char *path)
{
	uint64_t features;
	int fd = open(path, O_RDWR);

	if (fd < 0)
		die(path);
	if (ioctl(fd, VHOST_GET_BACKEND_FEATURES, &features) ||
	    ioctl(fd, VHOST_SET_BACKEND_FEATURES, &features))
		die("backend features");
	if (ioctl(fd, VHOST_SET_OWNER))
		die("VHOST_SET_OWNER");
	return fd;
}

static uint8_t *memory(uint64_t size)
{
	uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("mmap");
	madvise(p, size, MADV_NOHUGEPAGE);
	memset(p, 1, size);
	return p;
}

int main(int argc, char **argv)
{
	const char *how = argc > 4 ? argv[4] : "write";
	const struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };
	unsigned count, repeat, i;
	struct vhost_msg_v2 *messages;
	struct ring ring;
	uint8_t *p;
	int fd;

	if (argc < 4) {
		fprintf(stderr, "usage: iotlb_burst DEV MESSAGES REPEAT [write|linked|unlinked]\n");
		return 2;
	}
	count = strtoul(argv[2], NULL, 0);
	repeat = strtoul(argv[3], NULL, 0);
	setrlimit(RLIMIT_MEMLOCK, &all);
	fd = open_device(argv[1]);
	p = memory(count * PAGE);
	messages = calloc(count, sizeof(*messages));
	if (!messages)
		die("calloc");
	for (i = 0; i < count; i++)
		messages[i] = message(VHOST_IOTLB_UPDATE, IOVA + 2 * i * PAGE,
				      PAGE, (uintptr_t)p + i * PAGE,
				      VHOST_ACCESS_RW);
	if (strcmp(how, "write"))
		ring_open(&ring, 1024);
	while (repeat--) {
		int64_t begin, end;

		put(fd, message(VHOST_IOTLB_BATCH_BEGIN, 0, 0, 0, 0));
		begin = now_ns();
		if (!strcmp(how, "write"))
			write_all(fd, messages, count);
		else
			uring_all(&ring, fd, messages, count,
				  !strcmp(how, "linked"));
		end = now_ns();
		for (i = 0; i < count; i++)
			put(fd, message(VHOST_IOTLB_INVALIDATE,
					messages[i].iotlb.iova, PAGE, 0, 0));
		put(fd, message(VHOST_IOTLB_BATCH_END, 0, 0, 0, 0));
		printf("%lld\n", (long long)(end - begin));
	}
	return 0;
}
