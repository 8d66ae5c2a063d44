/* SPDX-License-Identifier: MIT */
/*
 * A 64-bit checksum as fast as memory is read. Eight lanes hide the latency of
 * the multiplication. A lane's step is invertible in the word it takes in, so
 * one changed word never goes unnoticed; the rotation brings high bits down to
 * where the next multiplication spreads them.
 */
#include "ring_access.h"
#include "cdefs.h"

#define LANES 8
#define BLOCK 64
#define ODD 0x9e3779b97f4a7c15ULL	/* 2^64 / golden ratio */
#define ODD_2 0xd6e8feb86659fd93ULL

struct lanes {
	uint64_t a, b, c, d, e, f, g, h;
};

static inline uint64_t step(uint64_t lane, uint64_t word)
{
	lane ^= le64toh(word);
	return (lane << 29 | lane >> 35) * ODD;
}

static inline uint64_t word_at(const uint8_t *at)
{
	uint64_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

static inline void take_block(struct lanes *l, const uint8_t *at)
{
	l->a = step(l->a, word_at(at));
	l->b = step(l->b, word_at(at + 8));
	l->c = step(l->c, word_at(at + 16));
	l->d = step(l->d, word_at(at + 24));
	l->e = step(l->e, word_at(at + 32));
	l->f = step(l->f, word_at(at + 40));
	l->g = step(l->g, word_at(at + 48));
	l->h = step(l->h, word_at(at + 56));
}

static inline uint64_t scramble(uint64_t v)
{
	v ^= v >> 32;
	v *= ODD_2;
	v ^= v >> 29;
	v *= ODD_2;
	return v ^ v >> 32;
}

static inline struct lanes begin(void)
{
	return (struct lanes){ ODD,	ODD * 2, ODD * 3, ODD * 4,
			       ODD * 5, ODD * 6, ODD * 7, ODD * 8 };
}

static inline uint64_t end(const struct lanes *l, uint64_t length)
{
	uint64_t sum = scramble(length ^ l->a);

	sum = scramble(sum ^ l->b);
	sum = scramble(sum ^ l->c);
	sum = scramble(sum ^ l->d);
	sum = scramble(sum ^ l->e);
	sum = scramble(sum ^ l->f);
	sum = scramble(sum ^ l->g);
	return scramble(sum ^ l->h);
}

uint64_t stream_sum(const uint8_t *bytes, uint64_t length)
{
	struct lanes l = begin();
	uint64_t left = length;
	uint8_t last[BLOCK] = { 0 };

	for (; left >= BLOCK; left -= BLOCK, bytes += BLOCK)
		take_block(&l, bytes);
	if (left) {
		memcpy(last, bytes, left);
		take_block(&l, last);
	}
	return end(&l, length);
}

/* ---------------------------------------------------------------------- */

void sum_begin(struct sum *s)
{
	const struct lanes l = begin();

	memcpy(s->lane, &l, sizeof(l));
	s->words = 0;
}

static inline uint64_t copy_word(uint64_t lane, uint64_t *to, const uint64_t *from)
{
	const uint64_t word = __atomic_load_n(from, __ATOMIC_RELAXED);

	*to = word;
	return step(lane, word);
}

static inline void copy_block(struct lanes *l, uint64_t *to, const uint64_t *from)
{
	l->a = copy_word(l->a, to, from);
	l->b = copy_word(l->b, to + 1, from + 1);
	l->c = copy_word(l->c, to + 2, from + 2);
	l->d = copy_word(l->d, to + 3, from + 3);
	l->e = copy_word(l->e, to + 4, from + 4);
	l->f = copy_word(l->f, to + 5, from + 5);
	l->g = copy_word(l->g, to + 6, from + 6);
	l->h = copy_word(l->h, to + 7, from + 7);
}

void sum_copy(struct sum *s, uint8_t *to, const uint8_t *from, uint64_t length)
{
	const uint64_t *source = (const uint64_t *)from;
	uint64_t *target = (uint64_t *)to;
	uint64_t left = length / sizeof(*source);
	uint64_t *lane = s->lane;
	struct lanes l;

	for (; left && s->words % LANES; left--, s->words++)
		lane[s->words % LANES] =
			copy_word(lane[s->words % LANES], target++, source++);
	memcpy(&l, lane, sizeof(l));
	s->words += left;
	for (; left >= LANES; left -= LANES, target += LANES, source += LANES)
		copy_block(&l, target, source);
	memcpy(lane, &l, sizeof(l));
	for (; left; left--, lane++)
		*lane = copy_word(*lane, target++, source++);
}

uint64_t sum_end(const struct sum *s)
{
	struct sum last = *s;
	struct lanes l;

	/* what misses in the last block counts as zero */
	for (; last.words % LANES; last.words++)
		last.lane[last.words % LANES] = step(last.lane[last.words % LANES], 0);
	memcpy(&l, last.lane, sizeof(l));
	return end(&l, s->words * sizeof(uint64_t));
}
