/* SPDX-License-Identifier: MIT */
/*
 * A shadow queue that relays rings and no descriptors, for a device that finds
 * guest memory at the guest's own addresses. It fetches descriptors from the
 * guest's table; separate are its avail ring and its used ring. Each index is
 * the guest's on both sides, a slot of one ring is that slot of the other.
 *
 * Why not the used ring alone: the avail ring's flags, or the used_event in
 * it, show a device whether its notification is wanted. The
 * guest's speak for the guest, which waits for its own used ring, and that is
 * behind. A device that obeys them says nothing of what it completed while the
 * guest was polling; the guest finds nothing in its ring, asks for an interrupt
 * and sleeps, and so does the relay. Only a timer would end that, so that a
 * short one costs an idle CPU and a long one latency. A separate avail ring
 * costs two bytes per element, and both sides are asked for notifications as
 * svq_thread.c does for all queues, which is exact.
 */
#ifndef USED_RELAY_H
#define USED_RELAY_H

#include "cdefs.h"

/* What svq.h says of svq_start() and so on, for a queue with given_at that is not broken. */
void used_relay_start(struct svq *q, uint16_t used_idx);
uint32_t used_relay_forward(struct svq *q);
uint32_t used_relay_return(struct svq *q);
uint16_t used_relay_in_flight(const struct svq *q, uint16_t *heads);
void used_relay_memory_changed(struct svq *q);
int used_relay_reaches(const struct svq *q, uint64_t gpa, uint64_t size);

#endif
