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
 * none. In this header since a call to another file costs a shadow virtqueue 15
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

/* *hint is below m->count and becomes the index of the found region */
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

/* Whether a page is marked that was written before this looks. */
static inline int is_marked(const uint64_t *dirty, uint64_t page)
{
	/* written first, looked at then; see pages_barrier for the CPU's part */
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&dirty[page / 64], __ATOMIC_RELAXED) >> page % 64 & 1;
}

/*
 * The log of a region, or NULL. It may end at any time, but keeps its memory:
 * code that marks pages loads it once.
 */
static inline uint64_t *dirty_log_of(const struct memory_region *r)
{
	return __atomic_load_n(&r->dirty, __ATOMIC_RELAXED);
}

static inline uint64_t look_at(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* The next word from i on that has a bit set, or words: most of a bitmap is empty. */
static inline uint64_t next_marked(const uint64_t *bits, uint64_t i, uint64_t words)
{
	for (; i + 8 <= words; i += 8) {
		const uint64_t *b = bits + i;

		if (look_at(b) | look_at(b + 1) | look_at(b + 2) | look_at(b + 3) |
		    look_at(b + 4) | look_at(b + 5) | look_at(b + 6) | look_at(b + 7))
			break;
	}
	while (i < words && !look_at(bits + i))
		i++;
	return i;
}

#endif
