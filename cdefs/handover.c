/* SPDX-License-Identifier: MIT */
/*
 * Both sides look at what has arrived before they take it (MSG_PEEK): what is
 * not exactly what belongs there stays in the socket, for code that knows
 * every other case.
 */
#define _GNU_SOURCE
#include <sys/socket.h>

#include "ring_access.h"
#include "cdefs.h"

/* ---------------------------------------------------------------------- */
/* Frames                                                                  */

struct head {
	uint32_t type, count;
	uint64_t length, sum;
};

static struct head head_at(const uint8_t *at)
{
	struct head h;

	memcpy(&h, at, sizeof(h));
	h.type = le32toh(h.type);
	h.count = le32toh(h.count);
	h.length = le64toh(h.length);
	h.sum = le64toh(h.sum);
	return h;
}

/* Put a head in front of a payload that is there already. */
static void put_head(uint8_t *at, uint32_t type, uint32_t count, uint64_t length)
{
	const struct head h = {
		htole32(type), htole32(count), htole64(length),
		htole64(stream_sum(at + FRAME_HEADER, length)),
	};

	memcpy(at, &h, sizeof(h));
}

/* Whether a whole frame of that type and number is in front of end, its sum right. */
static int is_frame(const uint8_t *at, const uint8_t *end, uint32_t type,
		    uint32_t count)
{
	struct head h;

	if (end - at < FRAME_HEADER)
		return 0;
	h = head_at(at);
	return h.type == type && h.count == count &&
	       h.length <= (uint64_t)(end - at) - FRAME_HEADER &&
	       h.sum == stream_sum(at + FRAME_HEADER, h.length);
}

static const uint8_t *behind(const uint8_t *at)
{
	return at + FRAME_HEADER + head_at(at).length;
}

/* ---------------------------------------------------------------------- */
/* The socket                                                              */

/* Whether the socket is readable by then; not if it was cancelled, or a signal came. */
static int await(int fd, int cancel, int64_t until)
{
	struct pollfd polled[] = { { fd, POLLIN, 0 }, { cancel, POLLIN, 0 } };

	/* what is here came first: it may be GO, and then it is too late to cancel */
	return poll(polled, 2, poll_timeout(until)) > 0 && polled[0].revents == POLLIN;
}

/*
 * Whether the user cancelled, or a signal comes now: Python has to hear of it
 * first. Of one that came before this Python hears when the exchange is over.
 */
static int is_interrupted(int cancel)
{
	struct pollfd polled = { cancel, POLLIN, 0 };

	return poll(&polled, 1, 0) != 0;
}

/* Copy bytes that have arrived, without taking them. Returns their number, 0 at the end and for an error as well. */
static uint64_t look(int fd, uint8_t *to, uint64_t room)
{
	const ssize_t n = recv(fd, to, room, MSG_PEEK | MSG_DONTWAIT);

	return n > 0 ? (uint64_t)n : 0;
}

/*
 * Take bytes that look() has returned. What counts is the copy that was looked
 * at: a sender on this machine may still write into what it has sent
 * (sendfile() and vmsplice() pass pages), so that a second copy may be another.
 */
static int take(int fd, uint64_t length)
{
	uint8_t away[1 << 14];

	while (length) {
		const uint64_t part = length < sizeof(away) ? length : sizeof(away);
		const ssize_t n = recv(fd, away, part, MSG_DONTWAIT);

		if (n <= 0)
			return 0;
		length -= (uint64_t)n;
	}
	return 1;
}

/* Send without waiting for room; returns the bytes that the socket has taken. */
static uint64_t push(int fd, const uint8_t *from, uint64_t length)
{
	const ssize_t n = send(fd, from, length, MSG_NOSIGNAL | MSG_DONTWAIT);

	return n > 0 ? (uint64_t)n : 0;
}

/* ---------------------------------------------------------------------- */
/* The source                                                              */

static uint64_t put_frame(const struct leaving *l, uint64_t at, uint32_t type,
			  uint32_t number, uint32_t count)
{
	int64_t length = 0;

	if (l->room - at < FRAME_HEADER)
		return 0;
	if (type != FRAME_FINAL)
		length = l->guest->put(l->guest->of, number,
				       l->frames + at + FRAME_HEADER,
				       l->room - at - FRAME_HEADER);
	if (length < 0)
		return 0;
	put_head(l->frames + at, type, count, (uint64_t)length);
	return at + FRAME_HEADER + (uint64_t)length;
}

/* The bytes of all frames of the state; 0 if they cannot be written in this way. */
static uint64_t put_state(const struct leaving *l)
{
	const uint32_t count = l->guest->count;
	uint64_t at = put_frame(l, 0, FRAME_GUEST, count, 0);
	uint32_t i;

	for (i = 0; at && i < count; i++)
		at = put_frame(l, at, FRAME_REST, i, i);
	return at ? put_frame(l, at, FRAME_FINAL, 0, 0) : 0;
}

static int take_ready(struct leaving *l)
{
	uint8_t found[FRAME_HEADER];
	const uint64_t n = look(l->fd, found, sizeof(found));

	/* one with a hash is longer */
	return is_frame(found, found + n, FRAME_READY, 0) &&
	       take(l->fd, sizeof(found));
}

void leave(struct leaving *l)
{
	l->result = LEAVE_NOTHING;
	l->sent = 0;
	l->begin = now_ns();
	l->length = put_state(l);
	if (!l->length || is_interrupted(l->cancel))
		return;
	l->sent = push(l->fd, l->frames, l->length);
	l->end = now_ns();
	l->result = l->sent == l->length ? LEAVE_SENT : LEAVE_SENDING;
}

void leave_await(struct leaving *l)
{
	if (l->result == LEAVE_SENT &&
	    await(l->fd, l->cancel, now_ns() + HANDOVER_WAIT_NS) && take_ready(l))
		l->result = LEAVE_READY;
}

uint64_t leave_give(struct leaving *l)
{
	const uint64_t clock = htole64((uint64_t)now_ns());
	uint64_t sent;

	memcpy(l->go + FRAME_HEADER, &clock, sizeof(clock));
	put_head(l->go, FRAME_GO, 0, sizeof(clock));
	sent = push(l->fd, l->go, sizeof(l->go));
	if (sent == sizeof(l->go))
		/* the other side is at work now: it has the CPU */
		await(l->fd, -1, now_ns() + HANDOVER_WAIT_NS);
	return sent;
}

/* ---------------------------------------------------------------------- */
/* The destination                                                         */

/* Bytes of the frames from GUEST to FINAL, all whole and fitting; 0 if it is anything else. */
static uint64_t fitting_state(const struct arriving *a, uint64_t n)
{
	const struct guest_sections *g = a->guest;
	const uint8_t *at = a->frames, *end = a->frames + n;
	uint32_t i;

	if (!is_frame(at, end, FRAME_GUEST, 0) ||
	    !g->fits(g->of, g->count, at + FRAME_HEADER, head_at(at).length))
		return 0;
	at = behind(at);
	for (i = 0; i < g->count; i++, at = behind(at))
		if (!is_frame(at, end, FRAME_REST, i) ||
		    !g->fits(g->of, i, at + FRAME_HEADER, head_at(at).length))
			return 0;
	if (!is_frame(at, end, FRAME_FINAL, 0) || head_at(at).length)
		return 0;
	return (uint64_t)(behind(at) - a->frames);
}

static void take_state(const struct arriving *a)
{
	const struct guest_sections *g = a->guest;
	const uint8_t *at = a->frames;
	uint32_t i;

	g->take(g->of, g->count, at + FRAME_HEADER, head_at(at).length);
	for (i = 0; i < g->count; i++) {
		at = behind(at);
		g->take(g->of, i, at + FRAME_HEADER, head_at(at).length);
	}
}

static int answers_are_right(const struct arriving *a)
{
	uint32_t i;

	for (i = 0; i < a->answer_count; i++) {
		const struct expected_answer *e = &a->answers[i];

		jobs_run(e->job, 1);
		if (!jobs_fine(e->job, 1) || memcmp(e->found, e->expected, e->length))
			return 0;
	}
	return 1;
}

static int take_go(struct arriving *a)
{
	uint8_t found[32];
	const uint64_t n = look(a->fd, found, sizeof(found));
	uint64_t clock;

	if (!is_frame(found, found + n, FRAME_GO, 0) ||
	    head_at(found).length != sizeof(clock) || !take(a->fd, sizeof(found)))
		return 0;
	memcpy(&clock, found + FRAME_HEADER, sizeof(clock));
	a->clock = (int64_t)le64toh(clock);
	a->go_at = now_ns();
	return 1;
}

int arrive_look(struct arriving *a)
{
	a->result = ARRIVE_NOTHING;
	a->sent = a->length = 0;
	if (!await(a->fd, a->cancel, now_ns() + HANDOVER_WAIT_NS))
		return 0;
	a->begin = now_ns();
	a->length = fitting_state(a, look(a->fd, a->frames, a->room));
	return a->length != 0;
}

void arrive(struct arriving *a)
{
	if (!take(a->fd, a->length))
		return;
	take_state(a);
	a->result = ARRIVE_LOADED;
	if (!answers_are_right(a) || is_interrupted(a->cancel))
		return;
	a->end = a->ready_begin = now_ns();
	a->sent = push(a->fd, a->ready, sizeof(a->ready));
	a->result = a->sent == sizeof(a->ready) ? ARRIVE_READY : ARRIVE_ANSWERING;
	if (a->result == ARRIVE_READY &&
	    await(a->fd, a->cancel, a->ready_begin + HANDOVER_WAIT_NS) && take_go(a))
		a->result = ARRIVE_GIVEN;
}
