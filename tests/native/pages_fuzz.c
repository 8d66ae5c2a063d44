/* SPDX-License-Identifier: MIT */
/*
 * Arbitrary frames against the receiver of guest pages, and arbitrary sets
 * through sender and receiver, to be built with ASan and UBSan. What a frame
 * must do is worked out a second time, plainly: it is refused and nothing is
 * written, or exactly its pages are.
 *
 *   pages_fuzz COUNT [SEED]
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "ring_access.h"
#include "cdefs.h"
#include "check.h"

#define REGIONS 3
#define REGION_PAGES 70
#define REGION ((uint64_t)REGION_PAGES * GUEST_PAGE)
#define WORDS 2
#define PAYLOAD (FRAME_RUNS * FRAME_RUN_BYTES + FRAME_DATA)
#define OTHER 7

static uint64_t state, accepted;

static uint64_t any(void)
{
	return xorshift(&state) >> 8;
}

static uint64_t below(uint64_t n)
{
	return any() % n;
}

/* ---------------------------------------------------------------------- */

/* The first two regions touch, the third does not. */
static const uint64_t base[REGIONS] = { 0x40000000, 0x40000000 + REGION,
					0x80000000 };

struct guest {
	struct memory_region regions[REGIONS];
	struct memory_map map;
};

/* Memory around which no access is possible: the sanitizers do not see stores that go past the cache. */
static uint8_t *between_guards(void)
{
	uint8_t *all = mmap(NULL, REGION + 2 * GUEST_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(all != MAP_FAILED);
	CHECK(!mprotect(all + GUEST_PAGE, REGION, PROT_READ | PROT_WRITE));
	return all + GUEST_PAGE;
}

static void guest_init(struct guest *g)
{
	uint32_t i;

	for (i = 0; i < REGIONS; i++) {
		g->regions[i] = (struct memory_region){
			.gpa = base[i],
			.size = REGION,
			.hva = between_guards(),
		};
		memset(g->regions[i].hva, 0x5a, REGION);
	}
	g->map = (struct memory_map){ REGIONS, g->regions };
}

static void guest_free(struct guest *g)
{
	uint32_t i;

	for (i = 0; i < REGIONS; i++)
		munmap((uint8_t *)g->regions[i].hva - GUEST_PAGE, REGION + 2 * GUEST_PAGE);
}

static void check_same(const struct guest *a, const struct guest *b)
{
	uint32_t i;

	for (i = 0; i < REGIONS; i++)
		CHECK(!memcmp(a->regions[i].hva, b->regions[i].hva, REGION));
}

/* ---------------------------------------------------------------------- */

struct frame {
	uint32_t type, count;
	uint64_t length, sum;
	uint8_t *payload;	/* as long as length, or shorter where that is refused */
	uint64_t room;
};

static struct page_run any_run(void)
{
	struct page_run run = { base[below(REGIONS)], GUEST_PAGE };

	run.gpa += below(REGION_PAGES + 2) * GUEST_PAGE;
	run.length *= 1 + below(below(8) ? 4 : REGION_PAGES + 2);
	switch (below(40)) {
	case 0:
		run.gpa = any() << below(30);
		break;
	case 1:
		run.length = any() << below(30);
		break;
	case 2:
		run.gpa += below(GUEST_PAGE);
		break;
	case 3:
		run.length -= below(GUEST_PAGE);
		break;
	case 4:
		run.length = 0;
		break;
	case 5:
		run.length = -run.gpa;
		break;
	}
	return run;
}

static void make_frame(struct frame *f)
{
	struct page_run runs[FRAME_RUNS + 1];
	uint64_t data = 0, i;

	f->type = below(3) ? FRAME_PAGES : FRAME_ZERO;
	f->count = (uint32_t)(below(20) ? below(6) : below(FRAME_RUNS + 2));
	for (i = 0; i < f->count; i++) {
		runs[i] = any_run();
		data += runs[i].length;
	}
	if (f->type == FRAME_ZERO || data > 64 * GUEST_PAGE)
		data = f->type == FRAME_ZERO ? 0 : GUEST_PAGE;
	f->length = f->count * FRAME_RUN_BYTES + data;
	if (!below(12))
		f->length += below(2 * GUEST_PAGE) - GUEST_PAGE;
	if (!below(12) && f->length > GUEST_PAGE)
		f->length += (below(3) - 1) * GUEST_PAGE;
	if (!below(60))
		f->length = any() << below(30);
	f->room = f->length < PAYLOAD ? f->length : PAYLOAD;
	f->payload = malloc(f->room + !f->room);
	CHECK(f->payload);
	for (i = 0; i < f->room; i++)
		f->payload[i] = (uint8_t)any();
	data = f->count * FRAME_RUN_BYTES;
	memcpy(f->payload, runs, data < f->room ? data : f->room);
	f->sum = stream_sum(f->payload, f->room);
	if (!below(20) && f->room)
		f->payload[below(f->room)] ^= (uint8_t)(1 << below(8));
}

static int run_fits(const struct page_run *run)
{
	const __uint128_t end = (__uint128_t)run->gpa + run->length;
	uint32_t i;

	if (!run->length || run->length % GUEST_PAGE || run->gpa % GUEST_PAGE)
		return 0;
	for (i = 0; i < REGIONS; i++)
		if (run->gpa >= base[i] && end <= base[i] + REGION)
			return 1;
	return 0;
}

/* Whether a frame is right. */
static int is_right(const struct frame *f)
{
	const uint64_t table = (uint64_t)f->count * FRAME_RUN_BYTES;
	__uint128_t total = 0;
	struct page_run run;
	uint32_t i;

	if (!f->count || f->count > FRAME_RUNS || f->length < table)
		return 0;
	if (f->type == FRAME_ZERO && f->length != table)
		return 0;
	if (f->length - table > FRAME_DATA)
		return 0;
	if (stream_sum(f->payload, f->length) != f->sum)
		return 0;
	for (i = 0; i < f->count; i++) {
		memcpy(&run, f->payload + i * FRAME_RUN_BYTES, sizeof(run));
		if (!run_fits(&run))
			return 0;
		total += run.length;
	}
	return f->type == FRAME_ZERO ? total <= FRAME_ZEROS :
				       total && total == f->length - table;
}

static void apply(struct guest *g, const struct frame *f)
{
	const uint8_t *data = f->payload + f->count * FRAME_RUN_BYTES;
	struct page_run run;
	uint32_t i, k;

	for (i = 0; i < f->count; i++) {
		memcpy(&run, f->payload + i * FRAME_RUN_BYTES, sizeof(run));
		for (k = 0; k < REGIONS; k++) {
			uint8_t *to = g->regions[k].hva + (run.gpa - base[k]);

			if (run.gpa < base[k] || run.gpa >= base[k] + REGION)
				continue;
			if (f->type == FRAME_ZERO) {
				memset(to, 0, run.length);
			} else {
				memcpy(to, data, run.length);
				data += run.length;
			}
		}
	}
}

/* The payload, the whole frame again, and the header of another one. */
static uint8_t *stream_of(const struct frame *f, uint64_t *size)
{
	const struct { uint32_t type, count; uint64_t length, sum; } header[2] = {
		{ f->type, f->count, f->length, f->sum }, { OTHER, 0, 0, 0 }
	};
	uint8_t *stream;

	*size = 2 * f->length + sizeof(header);
	stream = malloc(*size);
	CHECK(stream);
	memcpy(stream, f->payload, f->length);
	memcpy(stream + f->length, &header[0], sizeof(header[0]));
	memcpy(stream + f->length + sizeof(header[0]), f->payload, f->length);
	memcpy(stream + *size - sizeof(header[1]), &header[1], sizeof(header[1]));
	return stream;
}

/* Feed a socket in pieces. The other frame's header must be left in it. */
static int through_socket(struct page_receiver *r, const struct frame *f)
{
	uint64_t size, sent = 0;
	uint8_t *stream = stream_of(f, &size);
	int ends[2], result;
	char byte[FRAME_HEADER + 1];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	r->cancel = -1;
	r->got = FRAME_HEADER;
	r->stall = NSEC_PER_SEC;
	r->moved_at = now_ns();
	result = pages_expect(r);
	if (result == MOVE_DONE)
		result = MOVE_AGAIN;
	while (result == MOVE_AGAIN) {
		uint64_t part = below(8) ? 1 + below(30000) : size;

		if (part > size - sent)
			part = size - sent;
		CHECK(send(ends[0], stream + sent, part, 0) == (ssize_t)part);
		sent += part;
		result = pages_receive(r, ends[1], now_ns() + (int64_t)below(2) * 1000000);
	}
	if (result == MOVE_DONE && sent == size && r->bytes > f->length + FRAME_HEADER) {
		CHECK(r->bytes == 2 * (f->length + FRAME_HEADER));
		CHECK(recv(ends[1], byte, sizeof(byte), 0) == FRAME_HEADER);
		CHECK(byte[0] == OTHER);
	}
	close(ends[0]);
	close(ends[1]);
	free(stream);
	return result;
}

/* A buffer that ends where a frame does that may be read. */
static uint8_t *room_for(uint32_t count, uint64_t length)
{
	const uint64_t table = (uint64_t)count * FRAME_RUN_BYTES;
	const int possible = count <= FRAME_RUNS && table <= length;
	uint8_t *room = malloc(possible ? RECEIVER_DATA_AT + length - table : 1);

	CHECK(room);
	return room;
}

static void one_frame(void)
{
	struct page_receiver r = { 0 };
	struct guest real, expected;
	struct frame f;
	int result, right;

	guest_init(&real);
	guest_init(&expected);
	make_frame(&f);
	r.memory = &real.map;
	r.type = f.type;
	r.count = f.count;
	r.length = f.length;
	r.sum = f.sum;
	r.frame = room_for(f.count, f.room);
	if (f.length < 60000 && below(2)) {
		result = through_socket(&r, &f);
	} else {
		result = pages_expect(&r);
		CHECK(result == MOVE_CORRUPT || f.length <= PAYLOAD);
		if (result == MOVE_DONE) {
			memcpy(r.frame + r.at + FRAME_HEADER, f.payload, f.length);
			result = pages_apply(&r);
		}
	}
	free(r.frame);
	right = f.length <= PAYLOAD && is_right(&f);
	CHECK(result == (right ? MOVE_DONE : MOVE_CORRUPT));
	CHECK(right || r.fault);
	accepted += (uint64_t)right;
	if (right)
		apply(&expected, &f);
	check_same(&real, &expected);
	free(f.payload);
	guest_free(&real);
	guest_free(&expected);
}

/* ---------------------------------------------------------------------- */

static void any_memory(struct guest *g, uint64_t bits[REGIONS][WORDS])
{
	uint64_t i, k, w;

	for (i = 0; i < REGIONS; i++) {
		for (w = 0; w < WORDS; w++)
			bits[i][w] = below(3) ? any() << 32 ^ any() : ~0ULL;
		for (k = 0; k < REGION_PAGES; k++) {
			uint8_t *page = g->regions[i].hva + k * GUEST_PAGE;

			memset(page, below(3) ? (int)below(256) : 0, GUEST_PAGE);
			if (!below(4))
				page[below(GUEST_PAGE)] = 1;
		}
	}
}

static void deliver(struct page_receiver *r, const uint8_t *frame, uint32_t bytes)
{
	memcpy(&r->type, frame, 4);
	memcpy(&r->count, frame + 4, 4);
	memcpy(&r->length, frame + 8, 8);
	memcpy(&r->sum, frame + 16, 8);
	CHECK(bytes == FRAME_HEADER + r->length);
	CHECK(pages_expect(r) == MOVE_DONE);
	r->frame = room_for(r->count, r->length);
	memcpy(r->frame + r->at, frame, bytes);
	CHECK(pages_apply(r) == MOVE_DONE);
	free(r->frame);
}

static void one_set(void)
{
	uint64_t bits[REGIONS][WORDS], pages = 0, i, k;
	const uint64_t *set[REGIONS] = { bits[0], bits[1], bits[2] };
	struct page_run zeros[FRAME_RUNS];
	struct page_sender s = { .bits = set, .zeros = zeros, .cancel = -1 };
	struct page_receiver r = { 0 };
	struct guest from, to;
	uint32_t bytes;

	guest_init(&from);
	guest_init(&to);
	any_memory(&from, bits);
	s.memory = &from.map;
	s.frame_pages = (uint32_t)(below(2) ? SENDER_PAGES : 1 + below(SENDER_PAGES));
	s.frame = malloc(SENDER_DATA_AT + s.frame_pages * GUEST_PAGE);
	CHECK(s.frame);
	r.memory = &to.map;
	pages_begin(&s);
	while ((bytes = pages_next(&s))) {
		CHECK(pages_next(&s) == bytes);
		deliver(&r, s.frame + s.begin, bytes);
		s.begin = s.end;
	}
	for (i = 0; i < REGIONS; i++)
		for (k = 0; k < REGION_PAGES; k++) {
			const uint64_t at = k * GUEST_PAGE;

			if (bits[i][k / 64] >> k % 64 & 1) {
				pages++;
				CHECK(!memcmp(to.regions[i].hva + at,
					      from.regions[i].hva + at, GUEST_PAGE));
				continue;
			}
			CHECK(to.regions[i].hva[at] == 0x5a);
			CHECK(!memcmp(to.regions[i].hva + at,
				      to.regions[i].hva + at + 1, GUEST_PAGE - 1));
		}
	CHECK(s.pages + s.zero_pages == pages);
	CHECK(s.pages == r.pages && s.zero_pages == r.zero_pages && s.bytes == r.bytes);
	free(s.frame);
	guest_free(&from);
	guest_free(&to);
}

int main(int argc, char **argv)
{
	const uint64_t count = argc > 1 ? strtoull(argv[1], NULL, 0) : 1000;
	const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	uint64_t i;

	for (i = 0; i < count; i++) {
		state = seed_state(seed + i);
		any();
		if (i % 8)
			one_frame();
		else
			one_set();
	}
	printf("%llu inputs from seed %llu, %llu frames accepted\n",
	       (unsigned long long)count, (unsigned long long)seed,
	       (unsigned long long)accepted);
	return 0;
}
