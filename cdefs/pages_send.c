/* SPDX-License-Identifier: MIT */
/*
 * Guest pages to a stream.
 *
 * The guest writes while its pages are sent, so a frame is made of a copy: its
 * checksum and its bytes are of the same moment. Frames are kept so small that
 * the copy stays in the CPU's cache.
 */
#define _GNU_SOURCE
#include <sys/socket.h>

#include "pages_moves.h"

#define ASKED_EVERY 16 /* frames */
#define GRACE_NS 1000000000LL	/* without a byte, until cancelling does not wait for a frame's end */
#define PAGES_AHEAD 8
#define CREDIT_NS 50000000LL	/* time not used for sending that the limit lets one make up for */

static void store32(uint8_t *at, uint32_t v)
{
	v = htole32(v);
	memcpy(at, &v, sizeof(v));
}

static void store64(uint8_t *at, uint64_t v)
{
	v = htole64(v);
	memcpy(at, &v, sizeof(v));
}

/* What goes into one frame. */
struct gathered {
	uint32_t runs, pages;
	struct page_run run[SENDER_PAGES];
};

/* Add a page to runs. A run does not cross regions. */
static void add_page(struct page_run *runs, uint32_t *count,
		    const struct memory_region *region, uint64_t gpa)
{
	struct page_run *last = *count ? &runs[*count - 1] : NULL;

	if (last && gpa != region->gpa && last->gpa + last->length == gpa) {
		last->length += GUEST_PAGE;
		return;
	}
	runs[(*count)++] = (struct page_run){ gpa, GUEST_PAGE };
}

/* The region of the next page of the set, whose index is moved to it; NULL at the end. */
static const struct memory_region *find_page(struct page_sender *s)
{
	for (; s->region < s->memory->count; s->region++, s->page = 0) {
		const struct memory_region *r = &s->memory->regions[s->region];
		const uint64_t *bits = s->bits[s->region];
		const uint64_t words = (r->size / GUEST_PAGE + 63) / 64;

		while (s->page < r->size / GUEST_PAGE) {
			uint64_t word = bits[s->page / 64] >> (s->page % 64);

			if (word) {
				s->page += (uint64_t)__builtin_ctzll(word);
				if (s->page < r->size / GUEST_PAGE)
					return r;
			} else {
				s->page = 64 * next_marked(bits, s->page / 64 + 1,
							       words);
			}
		}
	}
	return NULL;
}

static void gather(struct page_sender *s, struct gathered *g)
{
	const struct memory_region *r;

	g->runs = g->pages = 0;
	while (g->pages < s->frame_pages && s->zero_runs < FRAME_RUNS &&
	       s->zeros_left && (r = find_page(s))) {
		const uint64_t offset = s->page++ * GUEST_PAGE;
		const uint8_t *page = r->hva + offset;

		/* several pages ahead, so that memory answers all of them at once; a prefetch never faults */
		__builtin_prefetch(page + PAGES_AHEAD * GUEST_PAGE);
		if (is_zero(page)) {
			add_page(s->zeros, &s->zero_runs, r, r->gpa + offset);
			s->zeros_left -= GUEST_PAGE;
			s->zero_pages++;
			continue;
		}
		add_page(g->run, &g->runs, r, r->gpa + offset);
		g->pages++;
	}
	s->pages += g->pages;
}

/* Copy pages and bring them into the frame's sum. */
static void copy_runs(const struct page_sender *s, const struct gathered *g,
		      struct running_sum *sum)
{
	uint8_t *to = s->frame + SENDER_DATA_AT;
	uint32_t i;

	for (i = 0; i < g->runs; i++) {
		const struct page_run run = g->run[i];

		sum_copy(sum, to, memory_hva(s->memory, run.gpa, run.length), run.length);
		to += run.length;
	}
}

/*
 * Put a frame together. Header and runs end where pages begin; runs of zeros
 * have none behind them, and may need their room.
 */
static void make_frame(struct page_sender *s, uint32_t type,
		       const struct page_run *runs, uint32_t count,
		       const struct gathered *g)
{
	const uint32_t table = count * FRAME_RUN_BYTES;
	const uint32_t length = table + g->pages * GUEST_PAGE;
	uint8_t *payload = s->frame + (g->pages ? SENDER_DATA_AT - table : FRAME_HEADER);
	struct running_sum sum;
	uint32_t i;

	for (i = 0; i < count; i++) {
		store64(payload + i * FRAME_RUN_BYTES, runs[i].gpa);
		store64(payload + i * FRAME_RUN_BYTES + 8, runs[i].length);
	}
	sum_begin(&sum);
	sum_words(&sum, payload, table);
	copy_runs(s, g, &sum);
	store32(payload - FRAME_HEADER, type);
	store32(payload - FRAME_HEADER + 4, count);
	store64(payload - FRAME_HEADER + 8, length);
	store64(payload - FRAME_HEADER + 16, sum_end(&sum));
	s->first = s->begin = (uint32_t)(payload - FRAME_HEADER - s->frame);
	s->end = s->begin + FRAME_HEADER + length;
	s->bytes += FRAME_HEADER + length;
}

void pages_begin(struct page_sender *s)
{
	s->first = s->begin = s->end = 0;
	s->region = 0;
	s->page = 0;
	s->zero_runs = 0;
	s->zeros_left = FRAME_ZEROS;
	s->pages = s->zero_pages = s->bytes = 0;
	s->error = 0;
	s->moved_at = now_ns();
}

/* Give a frame its time, so that the limit is kept on average. */
static void reckon(struct page_sender *s, uint32_t bytes)
{
	const int64_t now = now_ns();

	if (!s->limit)
		return;
	if (s->due < now - CREDIT_NS)
		s->due = now - CREDIT_NS;
	s->due += (int64_t)((double)bytes * NSEC_PER_SEC / (double)s->limit);
}

uint32_t pages_next(struct page_sender *s)
{
	struct gathered g;

	if (s->begin < s->end)
		return s->end - s->begin;
	gather(s, &g);
	if (g.runs) {
		make_frame(s, FRAME_PAGES, g.run, g.runs, &g);
	} else if (s->zero_runs) {
		make_frame(s, FRAME_ZERO, s->zeros, s->zero_runs, &g);
		s->zero_runs = 0;
		s->zeros_left = FRAME_ZEROS;
	}
	reckon(s, s->end - s->begin);
	return s->end - s->begin;
}

static int send_frame(struct page_sender *s, int fd, int64_t deadline)
{
	while (s->begin < s->end) {
		ssize_t n = send(fd, s->frame + s->begin, s->end - s->begin,
				 MSG_NOSIGNAL | MSG_DONTWAIT);
		int r;

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno != EAGAIN) {
			s->error = errno;
			return MOVE_BROKEN;
		}
		if (n > 0) {
			s->begin += (uint32_t)n;
			s->moved_at = now_ns();
			if (s->begin == s->end)
				break;
		}
		r = wait_for(fd, POLLOUT, s->cancel, deadline, s->moved_at, s->stall);
		if (r == MOVE_CANCELLED && s->begin > s->first &&
		    now_ns() - s->moved_at < GRACE_NS) {
			/* behind this frame, however soon the next one could go */
			s->cancelled = 1;
			r = wait_for(fd, POLLOUT, -1, deadline, s->moved_at, s->stall);
		}
		if (r != MOVE_AGAIN)
			return r;
		if (now_ns() >= deadline)
			return MOVE_AGAIN;
	}
	return MOVE_DONE;
}

int pages_pause(struct page_sender *s, int64_t deadline)
{
	while (s->begin == s->end && s->due > now_ns()) {
		int r = wait_for(-1, 0, s->cancel,
				 s->due < deadline ? s->due : deadline, 0, 0);

		if (r != MOVE_AGAIN || now_ns() >= deadline)
			return r;
		s->moved_at = now_ns();
	}
	return MOVE_DONE;
}

int pages_send(struct page_sender *s, int fd, int64_t deadline)
{
	int r;

	s->unasked = 0;
	do {
		/* also if no frame ever has to wait; each look is a system call */
		if (s->begin == s->end &&
		    (s->cancelled || (s->unasked++ % ASKED_EVERY == 0 && is_cancelled(s->cancel))))
			return MOVE_CANCELLED;
		r = pages_pause(s, deadline);
		if (r != MOVE_DONE)
			return r;
		if (s->begin == s->end)
			s->moved_at = now_ns();
		if (!pages_next(s))
			return MOVE_DONE;
		r = send_frame(s, fd, deadline);
	} while (r == MOVE_DONE && now_ns() < deadline);
	return r == MOVE_DONE ? MOVE_AGAIN : r;
}
