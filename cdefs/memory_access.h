/* SPDX-License-Identifier: MIT */
/*
 * Guest memory as the loops reach it once per descriptor: the region of an
 * address, and the marks of what was written.
 */
#ifndef MEMORY_ACCESS_H
#define MEMORY_ACCESS_H

#include <stddef.h>

#include "cdefs.h"

#define DIRTY_PAGE_SHIFT 12

/*
 * The region of gpa by bisection, and its number in *hint; NULL if there is
 * none. In this header since a call to another file costs the relay 15
 * instructions per element.
 */
static const struct memory_region *search_region(const struct memory_map *m,
						 uint32_t *hint, uint64_t gpa)
{
	uint32_t low = 0, high = m->count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		const struct memory_region *r = &m->regions[middle];

		if (gpa < r->gpa) {
			high = middle;
		} else if (gpa - r->gpa >= r->size) {
			low = middle + 1;
		} else {
			*hint = middle;
			return r;
		}
	}
	return NULL;
}

/* *hint is below m->count and tells afterwards which region it is */
static inline const struct memory_region *
find_region(const struct memory_map *m, uint32_t *hint, uint64_t gpa)
{
	const struct memory_region *r = &m->regions[*hint];

	if (gpa - r->gpa < r->size)
		return r;
	return search_region(m, hint, gpa);
}

/* Mark what was written into a region; dirty is its log, loaded once. */
static inline void mark_pages(const struct memory_region *r, uint64_t *dirty,
			      uint64_t gpa, uint64_t len)
{
	uint64_t page = (gpa - r->gpa) >> DIRTY_PAGE_SHIFT;
	uint64_t last = (gpa - r->gpa + len - 1) >> DIRTY_PAGE_SHIFT;

	/* written first, looked at then; see pages_barrier for the CPU's part */
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	for (; page <= last; page++) {
		uint64_t *word = &dirty[page / 64];
		uint64_t bit = 1ULL << (page % 64);

		/* most pages are dirty already, and reading is cheaper */
		if (!(__atomic_load_n(word, __ATOMIC_RELAXED) & bit))
			__atomic_fetch_or(word, bit, __ATOMIC_RELAXED);
	}
}

/*
 * The log of a region, or NULL. It may end at any time, but keeps its memory:
 * whoever marks loads it once.
 */
static inline uint64_t *dirty_log_of(const struct memory_region *r)
{
	return __atomic_load_n(&r->dirty, __ATOMIC_RELAXED);
}

#endif
