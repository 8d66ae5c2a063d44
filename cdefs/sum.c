/* SPDX-License-Identifier: MIT */
/*
 * A 64-bit checksum as fast as memory is read. Eight lanes hide the latency of
 * the multiplication. A lane's step is invertible in the word it takes in, so
 * one changed word never goes unnoticed; the rotation brings high bits down to
 * where the next multiplication spreads them.
 */
#include "ring_access.h"
#include "cdefs.h"

#define BLOCK 64
#define ODD 0x9e3779b97f4a7c15ULL	/* 2^64 / golden ratio */
#define ODD_2 0xd6e8feb86659fd93ULL
#define AHEAD 4096	/* bytes: the CPU by itself asks memory for fewer at a time */

struct lanes {
	uint64_t a, b, c, d, e, f, g, h;
};

static inline uint64_t step(uint64_t lane, uint64_t word)
{
	lane ^= le64toh(word);
	return (lane << 29 | lane >> 35) * ODD;
}

static inline uint64_t step_at(uint64_t lane, const uint8_t *at)
{
	uint64_t word;

	memcpy(&word, at, sizeof(word));
	return step(lane, word);
}

static inline void take_block(struct lanes *l, const uint8_t *at)
{
	l->a = step_at(l->a, at);
	l->b = step_at(l->b, at + 8);
	l->c = step_at(l->c, at + 16);
	l->d = step_at(l->d, at + 24);
	l->e = step_at(l->e, at + 32);
	l->f = step_at(l->f, at + 40);
	l->g = step_at(l->g, at + 48);
	l->h = step_at(l->h, at + 56);
}

typedef uint64_t word_pair __attribute__((vector_size(16), aligned(8), may_alias));

/*
 * The guest writes meanwhile: each word is read once, and what is summed is
 * the copy. In pairs that takes half the loads and stores, which beside the
 * sum are what the CPU is short of, the more so where two threads share a core.
 */
static inline void copy_block(struct lanes *l, uint8_t *to, const uint8_t *from)
{
	const volatile word_pair *pair = (const volatile word_pair *)from;
	word_pair *copy = (word_pair *)to;

	copy[0] = pair[0];
	copy[1] = pair[1];
	copy[2] = pair[2];
	copy[3] = pair[3];
	__asm__ volatile("" ::: "memory");
	take_block(l, to);
}

static inline uint64_t scramble(uint64_t v)
{
	v ^= v >> 32;
	v *= ODD_2;
	v ^= v >> 29;
	v *= ODD_2;
	return v ^ v >> 32;
}

static uint64_t finish(const uint64_t *lane, uint64_t length)
{
	uint64_t sum = length, k;

	for (k = 0; k < SUM_LANES; k++)
		sum = scramble(sum ^ lane[k]);
	return sum;
}

/* The lanes in the order in which the next words fall to them. */
static struct lanes take_lanes(const struct running_sum *s)
{
	uint64_t in_turn[SUM_LANES], k;
	struct lanes l;

	for (k = 0; k < SUM_LANES; k++)
		in_turn[k] = s->lane[(s->length / 8 + k) % SUM_LANES];
	memcpy(&l, in_turn, sizeof(l));
	return l;
}

/* Whole blocks were taken in, so the order is the same. */
static void put_lanes(struct running_sum *s, const struct lanes *l, uint64_t length)
{
	uint64_t in_turn[SUM_LANES], k;

	memcpy(in_turn, l, sizeof(in_turn));
	for (k = 0; k < SUM_LANES; k++)
		s->lane[(s->length / 8 + k) % SUM_LANES] = in_turn[k];
	s->length += length;
}

void sum_begin(struct running_sum *s)
{
	uint64_t k;

	s->length = 0;
	for (k = 0; k < SUM_LANES; k++)
		s->lane[k] = ODD * (k + 1);
}

void sum_words(struct running_sum *s, const uint8_t *bytes, uint64_t length)
{
	const uint64_t end = s->length + length;

	for (; s->length < end; s->length += 8, bytes += 8) {
		uint64_t *lane = &s->lane[s->length / 8 % SUM_LANES];

		*lane = step_at(*lane, bytes);
	}
}

void sum_copy(struct running_sum *s, uint8_t *to, const uint8_t *from, uint64_t length)
{
	struct lanes l = take_lanes(s);
	uint64_t page, at;

	for (page = 0; page < length; page += GUEST_PAGE) {
		/* who gathers the next frame looks at the first words of its pages */
		__builtin_prefetch(from + page + SENDER_PAGES * GUEST_PAGE);
		for (at = page; at < length && at < page + GUEST_PAGE; at += BLOCK) {
			__builtin_prefetch(from + at + AHEAD);
			copy_block(&l, to + at, from + at);
		}
	}
	put_lanes(s, &l, length);
}

void sum_blocks(struct running_sum *s, const uint8_t *bytes, uint64_t length)
{
	struct lanes l = take_lanes(s);
	uint64_t at;

	for (at = 0; at < length; at += BLOCK)
		take_block(&l, bytes + at);
	put_lanes(s, &l, length);
}

uint64_t sum_end(struct running_sum *s)
{
	static const uint8_t zeros[BLOCK];
	const uint64_t length = s->length;

	sum_words(s, zeros, -length % BLOCK);
	return finish(s->lane, length);
}

uint64_t stream_sum(const uint8_t *bytes, uint64_t length)
{
	uint8_t last[BLOCK] = { 0 };
	uint64_t left = length;
	struct running_sum s;
	struct lanes l;

	sum_begin(&s);
	l = take_lanes(&s);
	for (; left >= BLOCK; left -= BLOCK, bytes += BLOCK) {
		__builtin_prefetch(bytes + AHEAD);
		take_block(&l, bytes);
	}
	if (left) {
		memcpy(last, bytes, left);
		take_block(&l, last);
	}
	put_lanes(&s, &l, 0);
	return finish(s.lane, length);
}
