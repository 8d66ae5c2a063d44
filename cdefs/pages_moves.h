/* SPDX-License-Identifier: MIT */
/* What sending and receiving guest pages have in common: what a page of zeros is, and how a move waits. */
#include "memory_access.h"
#include "ring_access.h"
#include "cdefs.h"

static inline int is_zero(const uint8_t *page)
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
 * Wait for the socket, the user, or a time; MOVE_AGAIN unless it shall end.
 * Nothing has moved since moved_at.
 */
static inline int wait_for(int fd, short events, int cancel, int64_t until,
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

static inline int is_cancelled(int cancel)
{
	struct pollfd polled = { cancel, POLLIN, 0 };

	return cancel >= 0 && poll(&polled, 1, 0) > 0;
}
