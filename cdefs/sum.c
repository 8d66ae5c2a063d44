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

struct lanes {
	uint64_t a, b, c, d, e, f, g, h;
};

static inline uint64_t step(uint64_t lane, const uint8_t *at)
{
	uint64_t word;

	memcpy(&word, at, sizeof(word));
	lane ^= le64toh(word);
	return (lane << 29 | lane >> 35) * ODD;
}

static inline void take_block(struct lanes *l, const uint8_t *at)
{
	l->a = step(l->a, at);
	l->b = step(l->b, at + 8);
	l->c = step(l->c, at + 16);
	l->d = step(l->d, at + 24);
	l->e = step(l->e, at + 32);
	l->f = step(l->f, at + 40);
	l->g = step(l->g, at + 48);
	l->h = step(l->h, at + 56);
}

static inline uint64_t scramble(uint64_t v)
{
	v ^= v >> 32;
	v *= ODD_2;
	v ^= v >> 29;
	v *= ODD_2;
	return v ^ v >> 32;
}

uint64_t stream_sum(const uint8_t *bytes, uint64_t length)
{
	struct lanes l = { ODD,	    ODD * 2, ODD * 3, ODD * 4,
			   ODD * 5, ODD * 6, ODD * 7, ODD * 8 };
	uint64_t left = length, sum;
	uint8_t last[BLOCK] = { 0 };

	for (; left >= BLOCK; left -= BLOCK, bytes += BLOCK)
		take_block(&l, bytes);
	if (left) {
		memcpy(last, bytes, left);
		take_block(&l, last);
	}
	sum = scramble(length ^ l.a);
	sum = scramble(sum ^ l.b);
	sum = scramble(sum ^ l.c);
	sum = scramble(sum ^ l.d);
	sum = scramble(sum ^ l.e);
	sum = scramble(sum ^ l.f);
	sum = scramble(sum ^ l.g);
	return scramble(sum ^ l.h);
}
