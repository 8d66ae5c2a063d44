/* SPDX-License-Identifier: MIT */
/*
 * What both ends of the wire do: numbered frames with their account, a numbered byte stream, time, lines of JSON.
 * The guest (guest.c) sends and checks answers, the peer (peer.c) checks and answers.
 */
#ifndef LABVM_TRAFFIC_H
#define LABVM_TRAFFIC_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define UDP_PORT 7001
#define TCP_PORT 7002
#define FRAME_MAGIC 0x56444d31u
#define NUMBERS (1u << 22)
#define GAPS 64
#define FRAME_MAX 1472

struct frame {
	uint32_t magic;
	uint32_t sum;
	uint64_t number;
	uint8_t fill[FRAME_MAX - 16];
};

struct gap {
	uint64_t begin_ns;
	uint64_t ns;
};

/* The account of a numbered stream. Times are CLOCK_MONOTONIC of the machine that keeps it. */
struct account {
	uint8_t seen[NUMBERS / 8];
	uint64_t received, duplicated, reordered, corrupted, highest;
	uint64_t last_ns, longest_ns, longest_begin_ns;
	struct gap gaps[GAPS]; /* the longest ones */
	unsigned int gap_count;
};

static inline uint64_t now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint32_t sum_of(const void *data, size_t length, uint32_t sum)
{
	const uint8_t *byte = data;

	while (length--)
		sum = (sum ^ *byte++) * 16777619u;
	return sum;
}

static inline void frame_fill(struct frame *frame, uint64_t number, size_t length)
{
	size_t fill = length - offsetof(struct frame, fill);

	frame->magic = FRAME_MAGIC;
	frame->number = number;
	for (size_t i = 0; i < fill; i++)
		frame->fill[i] = (uint8_t)(number + i);
	frame->sum = sum_of(&frame->number, sizeof(frame->number) + fill, 2166136261u);
}

/* Keep a gap if it is one of the longest. */
static inline void account_gap(struct account *account, struct gap gap)
{
	struct gap *shortest = account->gaps;

	if (account->gap_count < GAPS) {
		account->gaps[account->gap_count++] = gap;
		return;
	}
	for (unsigned int i = 1; i < GAPS; i++)
		if (account->gaps[i].ns < shortest->ns)
			shortest = &account->gaps[i];
	if (gap.ns > shortest->ns)
		*shortest = gap;
}

/* Enter a frame that arrived into the account. */
static inline void account_add(struct account *account, const struct frame *frame, size_t length, uint64_t at_ns)
{
	uint64_t number;

	if (length < offsetof(struct frame, fill) || frame->magic != FRAME_MAGIC ||
	    frame->sum != sum_of(&frame->number, length - offsetof(struct frame, number), 2166136261u) ||
	    frame->number >= NUMBERS) {
		account->corrupted++;
		return;
	}
	number = frame->number;
	if (account->seen[number / 8] & (1u << number % 8))
		account->duplicated++;
	else if (account->received && number < account->highest)
		account->reordered++;
	account->seen[number / 8] |= (uint8_t)(1u << number % 8);
	if (number > account->highest)
		account->highest = number;
	if (account->received++ && at_ns > account->last_ns) {
		uint64_t gap = at_ns - account->last_ns;

		if (gap > account->longest_ns) {
			account->longest_ns = gap;
			account->longest_begin_ns = account->last_ns;
		}
		account_gap(account, (struct gap){account->last_ns, gap});
	}
	account->last_ns = at_ns;
}

/* How many of the first `end` numbers never arrived. */
static inline uint64_t account_lost(const struct account *account, uint64_t end)
{
	uint64_t different = account->received - account->duplicated;

	return end > different ? end - different : 0;
}

/* A line that is put together piece by piece, and what a full console has not taken of those before it. */
struct line {
	char text[6144];
	size_t length;
	size_t done;
};

__attribute__((format(printf, 2, 3))) static inline void line_add(struct line *line, const char *format, ...)
{
	va_list arguments;
	int added;

	va_start(arguments, format);
	added = vsnprintf(line->text + line->length, sizeof(line->text) - line->length, format, arguments);
	va_end(arguments);
	if (added > 0)
		line->length += (size_t)added;
	if (line->length >= sizeof(line->text))
		line->length = sizeof(line->text) - 1;
}

static inline void line_account(struct line *line, const struct account *account, uint64_t end)
{
	line_add(line, "\"received\":%llu,\"lost\":%llu,\"duplicated\":%llu,\"reordered\":%llu,\"corrupted\":%llu,",
		 (unsigned long long)account->received, (unsigned long long)account_lost(account, end),
		 (unsigned long long)account->duplicated, (unsigned long long)account->reordered,
		 (unsigned long long)account->corrupted);
	line_add(line, "\"longest_gap_ns\":%llu,\"longest_gap_begin_ns\":%llu",
		 (unsigned long long)account->longest_ns, (unsigned long long)account->longest_begin_ns);
}

/* A guest leaves these out: each character costs its emulated console some microseconds. */
static inline void line_gaps(struct line *line, const struct account *account)
{
	line_add(line, ",\"gaps\":[");
	for (unsigned int i = 0; i < account->gap_count; i++)
		line_add(line, "%s[%llu,%llu]", i ? "," : "", (unsigned long long)account->gaps[i].begin_ns,
			 (unsigned long long)account->gaps[i].ns);
	line_add(line, "]");
}

/* Write what can be written without waiting. */
static inline void line_flush(struct line *line)
{
	while (line->done < line->length) {
		ssize_t written = write(1, line->text + line->done, line->length - line->done);

		if (written < 0)
			break;
		line->done += (size_t)written;
	}
	line->length -= line->done;
	memmove(line->text, line->text + line->done, line->length);
	line->done = 0;
}

static inline void line_write(struct line *line)
{
	/* also of one that was too long */
	if (line->length == sizeof(line->text) - 1)
		line->length--;
	line_add(line, "\n");
	line_flush(line);
}

/* Whether so much more has room. */
static inline int line_takes(const struct line *line, size_t length)
{
	return line->length + length < sizeof(line->text);
}

/* The numbered byte stream: byte n of it is a function of n, so that any loss or repetition shows. */
static inline uint8_t stream_byte(uint64_t position)
{
	return (uint8_t)(position ^ position >> 8 ^ position >> 16);
}

static inline void stream_fill(uint8_t *data, size_t length, uint64_t position)
{
	for (size_t i = 0; i < length; i++)
		data[i] = stream_byte(position + i);
}

static inline uint64_t stream_wrong(const uint8_t *data, size_t length, uint64_t position)
{
	uint64_t wrong = 0;

	for (size_t i = 0; i < length; i++)
		wrong += data[i] != stream_byte(position + i);
	return wrong;
}

#endif
