/* SPDX-License-Identifier: MIT */
/*
 * Guest pages from a stream.
 *
 * The peer is not trusted: a frame is read whole, its sum and all its runs are
 * checked, and only then is guest memory written, so that nothing is written
 * that was not sent.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/socket.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "pages_moves.h"

#define MOMENT_MS 1
#define SPIN_NS 30000LL
#define YIELD_NS 5000LL	/* more than recv and sched_yield take on an idle CPU */

static uint32_t fetch32(const uint8_t *at)
{
	uint32_t v;

	memcpy(&v, at, sizeof(v));
	return le32toh(v);
}

static uint64_t fetch64(const uint8_t *at)
{
	uint64_t v;

	memcpy(&v, at, sizeof(v));
	return le64toh(v);
}

static int refuse(struct page_receiver *r, int fault)
{
	r->fault = fault;
	return MOVE_CORRUPT;
}

int pages_expect(struct page_receiver *r)
{
	uint64_t table, data;

	if (!r->count || r->count > FRAME_RUNS)
		return refuse(r, FAULT_COUNT);
	table = (uint64_t)r->count * FRAME_RUN_BYTES;
	if (r->length < table)
		return refuse(r, FAULT_LENGTH);
	data = r->length - table;
	/* the pages are aligned, as they are where they go */
	r->at = RECEIVER_DATA_AT - FRAME_HEADER - (uint32_t)table;
	if (r->type == FRAME_ZERO ? data : !data || data % GUEST_PAGE || data > FRAME_DATA)
		return refuse(r, FAULT_LENGTH);
	return MOVE_DONE;
}

static struct page_run run_at(const struct page_receiver *r, uint32_t i)
{
	const uint8_t *at = r->frame + r->at + FRAME_HEADER +
			    i * FRAME_RUN_BYTES;

	return (struct page_run){ fetch64(at), fetch64(at + 8) };
}

static int check_runs(struct page_receiver *r)
{
	const uint64_t data = r->length - (uint64_t)r->count * FRAME_RUN_BYTES;
	const uint64_t most = r->type == FRAME_ZERO ? FRAME_ZEROS : data;
	uint64_t total = 0;
	uint32_t i;

	for (i = 0; i < r->count; i++) {
		const struct page_run run = run_at(r, i);

		r->wrong = run;
		if (!run.length || run.length % GUEST_PAGE || run.gpa % GUEST_PAGE)
			return refuse(r, FAULT_RUN);
		if (!memory_hva(r->memory, run.gpa, run.length))
			return refuse(r, FAULT_ADDRESS);
		if (run.length > most - total)
			return refuse(r, FAULT_LENGTH);
		total += run.length;
	}
	if (r->type == FRAME_PAGES && total != data)
		return refuse(r, FAULT_LENGTH);
	return MOVE_DONE;
}

static void clear_page(uint8_t *to)
{
	/* a page that is zero already is left alone: writing it could only cost */
	if (!is_zero(to))
		memset(to, 0, GUEST_PAGE);
}

/* Make a run of pages zeros. Where memory was zeros before, only those that have had content are looked at. */
static void clear_pages(const struct page_receiver *r, struct page_run run)
{
	uint32_t region;
	const struct memory_region *in = search_region(r->memory, &region, run.gpa);
	const uint64_t first = (run.gpa - in->gpa) / GUEST_PAGE;
	const uint64_t end = first + run.length / GUEST_PAGE;
	uint64_t page;

	for (page = first; page < end; page++) {
		if (r->filled) {
			const uint64_t left = r->filled[region][page / 64] >> (page % 64);

			if (!left) {
				/* on to the next word */
				page |= 63;
				continue;
			}
			page += (uint64_t)__builtin_ctzll(left);
			if (page >= end)
				break;
		}
		clear_page(in->hva + page * GUEST_PAGE);
	}
}

static void note_filled(const struct page_receiver *r, struct page_run run)
{
	uint32_t region;
	const struct memory_region *in = search_region(r->memory, &region, run.gpa);

	mark_pages(in, r->filled[region], run.gpa, run.length);
}

/*
 * Copy pages to where nobody reads them soon. What goes to memory around the
 * cache need not be fetched first, and leaves there what others use.
 */
static void copy_past_cache(uint8_t *to, const uint8_t *from, uint64_t length)
{
#ifdef __SSE2__
	__m128i *out = (__m128i *)to;
	const __m128i *in = (const __m128i *)from;
	const __m128i *end = (const __m128i *)(from + length);

	for (; in < end; in += 4, out += 4) {
		const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
		const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);

		_mm_stream_si128(out, a);
		_mm_stream_si128(out + 1, b);
		_mm_stream_si128(out + 2, c);
		_mm_stream_si128(out + 3, d);
	}
	/* such stores are ordered by nothing else */
	_mm_sfence();
#else
	memcpy(to, from, length);
#endif
}

static void write_runs(struct page_receiver *r)
{
	const uint8_t *data = r->frame + RECEIVER_DATA_AT;
	uint32_t i;

	for (i = 0; i < r->count; i++) {
		const struct page_run run = run_at(r, i);
		uint8_t *to = memory_hva(r->memory, run.gpa, run.length);

		if (r->type == FRAME_ZERO) {
			clear_pages(r, run);
			r->zero_pages += run.length / GUEST_PAGE;
			continue;
		}
		if (r->filled)
			note_filled(r, run);
		copy_past_cache(to, data, run.length);
		data += run.length;
		r->pages += run.length / GUEST_PAGE;
	}
}

/* The sum of a frame whose runs are right. */
static uint64_t sum_of_pages(const struct page_receiver *r)
{
	const uint64_t table = (uint64_t)r->count * FRAME_RUN_BYTES;
	struct running_sum sum;

	sum_begin(&sum);
	sum_words(&sum, r->frame + r->at + FRAME_HEADER, table);
	sum_blocks(&sum, r->frame + RECEIVER_DATA_AT, r->length - table);
	return sum_end(&sum);
}

int pages_apply(struct page_receiver *r)
{
	const int result = check_runs(r);
	const uint64_t sum =
		result == MOVE_DONE && r->type == FRAME_PAGES ?
			sum_of_pages(r) :
			stream_sum(r->frame + r->at + FRAME_HEADER, r->length);

	if (sum != r->sum)
		return refuse(r, FAULT_SUM);
	if (result != MOVE_DONE)
		return result;
	write_runs(r);
	r->bytes += FRAME_HEADER + r->length;
	r->written_at = now_ns();
	return MOVE_DONE;
}

/*
 * Receive; if nothing is there look again for a while. Waking a sleeper
 * mostly costs the sender more time than the next bytes take to come. Once
 * another process wants this CPU, stop looking.
 */
static ssize_t recv_soon(int fd, void *to, uint64_t size, int flags)
{
	int64_t last, now = now_ns();
	const int64_t until = now + SPIN_NS;
	ssize_t n;

	do {
		n = recv(fd, to, size, flags | MSG_DONTWAIT);
		if (n >= 0 || errno != EAGAIN)
			return n;
		last = now;
		sched_yield();
		now = now_ns();
	} while (now < until && now - last < YIELD_NS);
	errno = EAGAIN;
	return n;
}

static int read_frame(struct page_receiver *r, int fd, int64_t deadline)
{
	const uint64_t size = FRAME_HEADER + r->length;

	while (r->got < size) {
		ssize_t n = recv_soon(fd, r->frame + r->at + r->got, size - r->got, 0);
		int result;

		if (n > 0) {
			r->got += (uint64_t)n;
			r->moved_at = now_ns();
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (!n || errno != EAGAIN) {
			r->error = n ? errno : 0;
			return MOVE_BROKEN;
		}
		result = wait_for(fd, POLLIN, r->cancel, deadline, r->moved_at, r->stall);
		if (result != MOVE_AGAIN)
			return result;
		if (now_ns() >= deadline)
			return MOVE_AGAIN;
	}
	return MOVE_DONE;
}

/*
 * Look at the next header if it is there within a moment. One of a page frame
 * is read together with what follows it, any other is left alone.
 */
static int next_header(struct page_receiver *r, int fd)
{
	struct pollfd polled = { fd, POLLIN, 0 };
	uint8_t header[FRAME_HEADER];
	ssize_t n = recv_soon(fd, header, sizeof(header), MSG_PEEK);

	if (n < 0 && errno == EAGAIN && poll(&polled, 1, MOMENT_MS) > 0)
		n = recv(fd, header, sizeof(header), MSG_PEEK | MSG_DONTWAIT);
	if (n != FRAME_HEADER)
		return 0;
	if (fetch32(header) != FRAME_PAGES && fetch32(header) != FRAME_ZERO)
		return 0;
	r->type = fetch32(header);
	r->count = fetch32(header + 4);
	r->length = fetch64(header + 8);
	r->sum = fetch64(header + 16);
	r->got = 0;
	return 1;
}

int pages_receive(struct page_receiver *r, int fd, int64_t deadline)
{
	int result;

	if (is_cancelled(r->cancel))
		return MOVE_CANCELLED;
	do {
		result = read_frame(r, fd, deadline);
		if (result == MOVE_DONE)
			result = pages_apply(r);
		if (result != MOVE_DONE)
			return result;
		if (now_ns() >= deadline || !next_header(r, fd))
			return MOVE_DONE;
		result = pages_expect(r);
	} while (result == MOVE_DONE);
	return result;
}
