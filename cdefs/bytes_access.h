/* SPDX-License-Identifier: MIT */
/*
 * Numbers as they are on a stream, little-endian and without padding, into a
 * buffer of limited size and out of one that is not trusted.
 */
#ifndef BYTES_ACCESS_H
#define BYTES_ACCESS_H

#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct out {
	uint8_t *at;
	uint8_t *end;		/* nothing is written beyond */
};

static inline void put(struct out *o, const void *bytes, size_t length)
{
	if (length > (size_t)(o->end - o->at)) {
		o->end = o->at;
		return;
	}
	memcpy(o->at, bytes, length);
	o->at += length;
}

static inline void put16(struct out *o, uint16_t v)
{
	v = htole16(v);
	put(o, &v, sizeof(v));
}

static inline void put32(struct out *o, uint32_t v)
{
	v = htole32(v);
	put(o, &v, sizeof(v));
}

static inline void put64(struct out *o, uint64_t v)
{
	v = htole64(v);
	put(o, &v, sizeof(v));
}

struct in {
	const uint8_t *at;
	const uint8_t *end;
	int short_of;		/* it ended too early */
};

static inline const uint8_t *get(struct in *i, size_t length)
{
	const uint8_t *at = i->at;

	if (length > (size_t)(i->end - i->at)) {
		i->short_of = 1;
		return NULL;
	}
	i->at += length;
	return at;
}

static inline uint16_t get16(struct in *i)
{
	const uint8_t *at = get(i, 2);
	uint16_t v = 0;

	if (at)
		memcpy(&v, at, sizeof(v));
	return le16toh(v);
}

static inline uint32_t get32(struct in *i)
{
	const uint8_t *at = get(i, 4);
	uint32_t v = 0;

	if (at)
		memcpy(&v, at, sizeof(v));
	return le32toh(v);
}

static inline uint64_t get64(struct in *i)
{
	const uint8_t *at = get(i, 8);
	uint64_t v = 0;

	if (at)
		memcpy(&v, at, sizeof(v));
	return le64toh(v);
}

#endif
