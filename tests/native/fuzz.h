/* SPDX-License-Identifier: MIT */
/*
 * What a fuzz target needs beside its LLVMFuzzerTestOneInput():
 *
 *   TARGET FILE...          replay inputs
 *   TARGET -r COUNT [SEED]  random ones
 *
 * With clang's -fsanitize=fuzzer and -DLIBFUZZER it is a libFuzzer target.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include "check.h"
#include "svq_model.h"

struct input {
	const uint8_t *data;
	size_t left;
};

static inline uint32_t take(struct input *in, unsigned int bytes)
{
	uint32_t v = 0;

	while (bytes-- && in->left) {
		v = v << 8 | *in->data++;
		in->left--;
	}
	return v;
}

/* Mostly in or around the regions, sometimes anywhere. */
static inline uint64_t some_address(struct input *in, const struct model *m)
{
	uint32_t v = take(in, 3);

	if (v & 0x800000)
		return (uint64_t)take(in, 4) << 16 | v;
	return MODEL_BASE + (v & 3) * m->stride + (v >> 2 & 0xffff) - 0x4000;
}

/* Any descriptor, of a few lengths times factor. */
static inline void write_desc(struct input *in, const struct model *m,
			      const struct vring *ring, uint32_t factor)
{
	struct vring_desc d = {
		.addr = some_address(in, m),
		.len = take(in, 2) * (take(in, 1) & 1 ? 1 : factor),
		.flags = (uint16_t)take(in, 1) & 7,
		.next = (uint16_t)take(in, 1) % (ring->num + 1),
	};
	uint32_t slot = take(in, 1);

	if (slot & 0x80) /* where an indirect table may be */
		memcpy(m->regions[1].hva + (slot & 0x7f) * 16, &d, sizeof(d));
	else
		ring->desc[slot % ring->num] = d;
}

static inline void publish(struct input *in, const struct vring *ring)
{
	ring->avail->ring[ring->avail->idx % ring->num] =
		(uint16_t)take(in, 1) % (ring->num + 1);
	ring->avail->idx++;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#ifndef LIBFUZZER
static int replay(const char *path)
{
	static uint8_t data[1 << 16];
	FILE *f = fopen(path, "rb");
	size_t size;

	if (!f) {
		perror(path);
		return 1;
	}
	size = fread(data, 1, sizeof(data), f);
	fclose(f);
	return LLVMFuzzerTestOneInput(data, size);
}

static int random_inputs(uint64_t count, uint64_t seed)
{
	static uint8_t data[512];
	uint64_t i, k;

	for (i = 0; i < count; i++) {
		uint64_t state = seed_state(seed + i);

		for (k = 0; k < sizeof(data); k++)
			data[k] = (uint8_t)(xorshift(&state) >> 24);
		LLVMFuzzerTestOneInput(data, sizeof(data));
	}
	printf("%llu inputs from seed %llu\n", (unsigned long long)count,
	       (unsigned long long)seed);
	return 0;
}

int main(int argc, char **argv)
{
	int i, bad = 0;

	if (argc > 2 && !strcmp(argv[1], "-r"))
		return random_inputs(strtoull(argv[2], NULL, 0),
				     argc > 3 ? strtoull(argv[3], NULL, 0) : 1);
	for (i = 1; i < argc; i++)
		bad |= replay(argv[i]);
	return bad;
}
#endif

#endif
