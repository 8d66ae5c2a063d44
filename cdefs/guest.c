/* SPDX-License-Identifier: MIT */
/*
 * What a guest's CPU does to its memory beside driving its NIC: it writes
 * pages at a rate, in turn, each with content that follows from the number of
 * the write, so that every page can be checked at any time.
 */
#include "gate.h"
#include "ring_access.h"
#include "cdefs.h"

#define PAGE 4096
#define TICK_MS 2

static uint64_t word_of(uint64_t number, uint64_t k)
{
	uint64_t h = (number + 1) * 0x9e3779b97f4a7c15ull;

	return (h ^ (h >> 31)) + k * 0xd1b54a32d192ed03ull;
}

static void write_page(struct guest_writer *w)
{
	uint64_t *page = (uint64_t *)(w->area + w->written % w->pages * PAGE);
	uint64_t k;

	for (k = 0; k < PAGE / 8; k++)
		page[k] = word_of(w->written, k);
	/* the page is whole before it counts: a pause comes between pages */
	w->written++;
}

void guest_writer_run(struct guest_writer *w, int64_t deadline)
{
	struct pollfd p = { .fd = w->wake, .events = POLLIN };
	int64_t begin = now_ns(), now = begin;
	uint64_t done = 0;

	while (now < deadline && gate_enter(&w->stop, &w->inside)) {
		/* within one call at most seconds pass: no overflow */
		uint64_t owed = (uint64_t)(now - begin) * w->rate / 1000000000;

		for (; done < owed && !is_set(&w->stop); done++)
			write_page(w);
		gate_leave(&w->stop, &w->inside);
		if (is_set(&w->stop))
			return;
		if (poll(&p, 1, TICK_MS) > 0 && !is_set(&w->stop))
			eventfd_clear(w->wake);
		now = now_ns();
	}
}

void guest_writer_stop(struct guest_writer *w)
{
	gate_close(&w->stop);
	gate_wait(&w->inside);
}

uint64_t guest_writer_check(const struct guest_writer *w)
{
	const uint64_t first = w->written > w->pages ? w->written - w->pages : 0;
	uint64_t number, k, bad = 0;

	for (number = first; number < w->written; number++) {
		const uint64_t *page =
			(const uint64_t *)(w->area + number % w->pages * PAGE);

		for (k = 0; k < PAGE / 8 && page[k] == word_of(number, k); k++)
			;
		bad += k < PAGE / 8;
	}
	return bad;
}
