/* SPDX-License-Identifier: MIT */
/*
 * For programs that throw arbitrary things at the C core: a check, and numbers
 * that are the same in every run.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                     \
	do {                                                                 \
		if (!(condition)) {                                          \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__,   \
				#condition);                                 \
			abort();                                             \
		}                                                            \
	} while (0)

/* Where the numbers of one input start. */
static inline uint64_t seed_state(uint64_t seed)
{
	return seed * 0x9e3779b97f4a7c15ULL | 1;
}

static inline uint64_t xorshift(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

#endif
