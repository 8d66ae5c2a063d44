/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>

#include "lost_memory.h"

/* A front-end has 509 regions at most (vhost-user), a process some devices. */
#define GUARDED 8192
#define SMALL_PAGE 4096

/* Odd versions are being changed: a signal may come while another thread does that. */
struct guarded {
	_Atomic uint32_t version;
	_Atomic uintptr_t begin;	/* 0: free */
	_Atomic uint64_t size;
	_Atomic uint64_t page;
	_Atomic uint64_t lost;
};

static struct guarded table[GUARDED];
static _Atomic int used;	/* entries behind these were never used */
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;
static bool taken_over;

struct range {
	uintptr_t begin;
	uint64_t size;
	uint64_t page;
};

/* Whether an entry, all of one version, has the address. One that is being changed does not: its memory is not used. */
static bool has(struct guarded *g, uintptr_t address, struct range *r)
{
	uint32_t version;

	do {
		version = atomic_load(&g->version);
		if (version & 1)
			return false;
		r->begin = atomic_load(&g->begin);
		r->size = atomic_load(&g->size);
		r->page = atomic_load(&g->page);
	} while (atomic_load(&g->version) != version);
	return r->begin && address - r->begin < r->size;
}

/* mmap is a plain system call: it may be used where a signal came (Linux, all C libraries of Debian). */
static bool replace(struct guarded *g, uintptr_t begin, uint64_t size)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;

	if (mmap((void *)begin, size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
		return false;
	atomic_fetch_add(&g->lost, size);
	return true;
}

/*
 * Three mappings that can be given up. A process that has more than
 * max_map_count, which splitting one makes possible, gets no other (do_mmap).
 */
static void *_Atomic spare;

static void make_spare(void)
{
	uint8_t *made = mmap(NULL, 3 * SMALL_PAGE, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	void *none = NULL;

	if (made == MAP_FAILED)
		return;
	if (mprotect(made + SMALL_PAGE, SMALL_PAGE, PROT_READ) ||
	    !atomic_compare_exchange_strong(&spare, &none, made))
		munmap(made, 3 * SMALL_PAGE);
}

/* All of it, in one mapping; the ones that it had are free then. */
static bool replace_all(struct guarded *g, const struct range *r)
{
	void *given_up = atomic_exchange(&spare, NULL);
	bool well;

	if (given_up)
		munmap(given_up, 3 * SMALL_PAGE);
	well = replace(g, r->begin, r->size);
	if (well)
		make_spare();
	return well;
}

/* A page; of hugetlbfs, whose mappings cannot be split, a huge one; or all where that is one mapping too many. */
static bool replace_page(struct guarded *g, const struct range *r, uintptr_t address)
{
	return replace(g, address & ~(uintptr_t)(SMALL_PAGE - 1), SMALL_PAGE) ||
	       replace(g, address & ~(uintptr_t)(r->page - 1), r->page) ||
	       replace_all(g, r);
}

static struct guarded *guard_of(uintptr_t address, struct range *r)
{
	int i, n = atomic_load(&used);

	for (i = 0; i < n; i++)
		if (has(&table[i], address, r))
			return &table[i];
	return NULL;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	struct guarded *g = NULL;
	struct range r;

	(void)context;
	/* not a memory error of the machine, nor a signal that was sent */
	if (info->si_code == BUS_ADRERR)
		g = guard_of((uintptr_t)info->si_addr, &r);
	if (!g || !replace_page(g, &r, (uintptr_t)info->si_addr)) {
		sigaction(number, &before, NULL);
		/* an access faults again when this returns; anything else has to be sent again */
		if (info->si_code <= 0)
			raise(number);
	}
	errno = saved;
}

static int take_over(void)
{
	struct sigaction mine = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};

	if (taken_over)
		return 0;
	sigemptyset(&mine.sa_mask);
	if (sigaction(SIGBUS, &mine, &before))
		return -errno;
	taken_over = true;
	make_spare();
	return 0;
}

int guard_memory(uint8_t *address, uint64_t size, uint64_t page)
{
	int i, error;

	pthread_mutex_lock(&changing);
	error = take_over();
	for (i = 0; !error && i < GUARDED && atomic_load(&table[i].begin); i++)
		;
	if (!error && i == GUARDED)
		error = -ENOSPC;
	if (!error) {
		atomic_fetch_add(&table[i].version, 1);
		atomic_store(&table[i].size, size);
		atomic_store(&table[i].page, page);
		atomic_store(&table[i].lost, 0);
		atomic_store(&table[i].begin, (uintptr_t)address);
		atomic_fetch_add(&table[i].version, 1);
		if (i >= atomic_load(&used))
			atomic_store(&used, i + 1);
	}
	pthread_mutex_unlock(&changing);
	return error ? error : i;
}

void unguard_memory(int number)
{
	pthread_mutex_lock(&changing);
	atomic_fetch_add(&table[number].version, 1);
	atomic_store(&table[number].begin, 0);
	atomic_fetch_add(&table[number].version, 1);
	pthread_mutex_unlock(&changing);
}

uint64_t lost_memory(int number)
{
	return atomic_load(&table[number].lost);
}
