/* SPDX-License-Identifier: MIT */
/*
 * Page tables that are moved away from a mapping (mremap(2), MREMAP_DONTUNMAP).
 * The mapping keeps its file, and gets a page back in its tables when it is
 * used. So these show what was used since, and a look at them takes as long as
 * there is of that, not as long as there is memory. The moved ones keep their
 * write protection where the userfaultfd asks for the event of a move
 * (mm/userfaultfd.c:mremap_userfaultfd_prep()), which the kernel then waits
 * for somebody to read.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "memory_access.h"
#include "ring_access.h"
#include "cdefs.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4 /* Linux 5.7; of files 5.13 */
#endif
#define UFFD_MESSAGE 32
/* what a PUD entry maps: moved in one step if both addresses are as far into one */
#define WHOLE (1ULL << 30)

uint8_t *aside_reserve(const uint8_t *start, uint64_t size)
{
	const uint64_t into = (uintptr_t)start % WHOLE;
	uint8_t *reserved, *aside;
	uint64_t before;

	reserved = mmap(NULL, size + WHOLE, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (reserved == MAP_FAILED)
		return NULL;
	before = (into - (uintptr_t)reserved % WHOLE) % WHOLE;
	aside = reserved + before;
	if (before)
		munmap(reserved, before);
	munmap(aside + size, WHOLE - before);
	return aside;
}

int lock_used(uint8_t *start, uint64_t size)
{
	/* 1 is MLOCK_ONFAULT */
	return syscall(SYS_mlock2, start, size, 1) ? errno : 0;
}

int unlock_used(uint8_t *start, uint64_t size)
{
	return munlock(start, size) ? errno : 0;
}

struct reader {
	int uffd, end;
};

static void *read_event(void *argument)
{
	const struct reader *r = argument;
	struct pollfd fds[] = {
		{ .fd = r->end, .events = POLLIN },
		{ .fd = r->uffd, .events = POLLIN },
	};
	uint8_t message[UFFD_MESSAGE];

	for (;;) {
		if (poll(fds, 2, -1) > 0 && fds[0].revents)
			return NULL;
		/* EAGAIN: a process that shares the descriptor was first */
		if (read(r->uffd, message, sizeof(message)) < 0 && errno != EAGAIN && errno != EINTR)
			return NULL;
	}
}

int aside_move(int uffd, uint8_t *start, uint64_t size, uint8_t *aside, int *unlocked)
{
	struct reader r = { .uffd = uffd };
	const uint64_t ended = 1;
	sigset_t all, before;
	pthread_t thread;
	int error;

	r.end = eventfd(0, EFD_CLOEXEC);
	if (r.end < 0)
		return errno;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&thread, NULL, read_event, &r);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error) {
		if (mremap(start, size, size,
			   MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
			   aside) == MAP_FAILED)
			error = errno;
		else
			/* at once: what is used before could be swapped out unseen */
			*unlocked = lock_used(start, size);
		while (write(r.end, &ended, sizeof(ended)) < 0 && errno == EINTR)
			;
		pthread_join(thread, NULL);
	}
	close(r.end);
	return error;
}
