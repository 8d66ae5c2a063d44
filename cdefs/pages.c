/* SPDX-License-Identifier: MIT */
/*
 * Guest pages to and from a stream.
 *
 * The guest writes while its pages are sent, so a frame is made of a copy: its
 * checksum and its bytes are of the same moment. The peer is not trusted: a
 * frame is read whole, its sum and all its runs are checked, and only then is
 * guest memory written, so that nothing is written that was not sent.
 *
 * Frames are kept so small that the copy stays in the CPU's cache.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/socket.h>

#include "ring_access.h"
#include "cdefs.h"

#define MOMENT_MS 1
#define SPIN_NS 30000LL
#define YIELD_NS 5000LL	/* more than recv and sched_yield take if nobody else runs */
#define GRACE_NS 1000000000LL	/* without a byte, until cancelling does not wait for a frame's end */
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

static int is_zero(const uint8_t *page)
{
	const uint64_t *word = (const uint64_t *)page;
	const uint64_t *end = word + GUEST_PAGE / sizeof(*word);

	for (; word < end; word += 8)
		if (word[0] | word[1] | word[2] | word[3] | word[4] | word[5] |
		    word[6] | word[7])
			return 0;
	return 1;
}

/*
 * Wait for the socket, the user, or a time; MOVE_AGAIN unless it is to end.
 * moved_at tells since when nothing moved.
 */
static int wait_for(int fd, short events, int cancel, int64_t until,
		    int64_t moved_at, int64_t stall)
{
	struct pollfd polled[2] = { { cancel, POLLIN, 0 }, { fd, events, 0 } };

	poll(polled, fd < 0 ? 1 : 2, poll_timeout(until));
	if (polled[0].revents)
		return MOVE_CANCELLED;
	if (fd >= 0 && !polled[1].revents && now_ns() - moved_at >= stall)
		return MOVE_STALLED;
	return MOVE_AGAIN;
}

static int is_cancelled(int cancel)
{
	struct pollfd polled = { cancel, POLLIN, 0 };

	return cancel >= 0 && poll(&polled, 1, 0) > 0;
}

/* ---------------------------------------------------------------------- */
/* Sending                                                                 */

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

		while (s->page < r->size / GUEST_PAGE) {
			uint64_t word = bits[s->page / 64] >> (s->page % 64);

			if (word) {
				s->page += (uint64_t)__builtin_ctzll(word);
				if (s->page < r->size / GUEST_PAGE)
					return r;
			} else {
				s->page = (s->page / 64 + 1) * 64;
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

		/* a prefetch may miss: it never faults */
		__builtin_prefetch(page + GUEST_PAGE);
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
				return MOVE_DONE;
		}
		r = wait_for(fd, POLLOUT, s->cancel, deadline, s->moved_at, s->stall);
		if (r == MOVE_CANCELLED && s->begin > s->first &&
		    now_ns() - s->moved_at < GRACE_NS)
			r = wait_for(fd, POLLOUT, -1, deadline, s->moved_at, s->stall);
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

	if (s->begin == s->end && is_cancelled(s->cancel))
		return MOVE_CANCELLED;
	do {
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

/* ---------------------------------------------------------------------- */
/* Receiving                                                               */

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

/* A page that is zero already is left alone: writing it could only cost. */
static void clear_pages(uint8_t *to, uint64_t length)
{
	for (; length; length -= GUEST_PAGE, to += GUEST_PAGE)
		if (!is_zero(to))
			memset(to, 0, GUEST_PAGE);
}

static void write_runs(struct page_receiver *r)
{
	const uint8_t *data = r->frame + RECEIVER_DATA_AT;
	uint32_t i;

	for (i = 0; i < r->count; i++) {
		const struct page_run run = run_at(r, i);
		uint8_t *to = memory_hva(r->memory, run.gpa, run.length);

		if (r->type == FRAME_ZERO) {
			clear_pages(to, run.length);
			r->zero_pages += run.length / GUEST_PAGE;
			continue;
		}
		memcpy(to, data, run.length);
		data += run.length;
		r->pages += run.length / GUEST_PAGE;
	}
}

/* The sum of a frame whose runs are right; meanwhile memory is asked for the pages that it will write. */
static uint64_t sum_of_pages(const struct page_receiver *r)
{
	const uint8_t *data = r->frame + RECEIVER_DATA_AT;
	struct running_sum sum;
	uint32_t i;

	sum_begin(&sum);
	sum_words(&sum, r->frame + r->at + FRAME_HEADER,
		  (uint64_t)r->count * FRAME_RUN_BYTES);
	for (i = 0; i < r->count; i++) {
		const struct page_run run = run_at(r, i);

		sum_before_copy(&sum, memory_hva(r->memory, run.gpa, run.length),
				data, run.length);
		data += run.length;
	}
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
	return MOVE_DONE;
}

/*
 * Receive; if nothing is there look again for a while. To wake who sleeps
 * mostly costs the sender more time than the next bytes take to come. Once
 * somebody else wanted this CPU, it is left to him.
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
