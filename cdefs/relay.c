/* SPDX-License-Identifier: MIT */
#include "ring_access.h"

static uint32_t relay_round(struct relay *r)
{
	uint32_t moved = 0, i;

	for (i = 0; i < r->count; i++)
		moved += svq_return(r->queues[i]);
	for (i = 0; i < r->count; i++)
		moved += svq_forward(r->queues[i]);
	r->rounds++;
	return moved;
}

static int count_broken(const struct relay *r)
{
	int n = 0;
	uint32_t i;

	for (i = 0; i < r->count; i++)
		n += r->queues[i]->broken != SVQ_OK;
	return n;
}

/* A guest learns by its config interrupt that it has to look at the device's status. */
static void tell_of_broken(struct relay *r)
{
	const int broken = count_broken(r);

	if (broken > r->broken)
		eventfd_raise(r->config_call);
	r->broken = broken;
}

static int ended(const struct relay *r, int64_t deadline)
{
	return __atomic_load_n(&r->stop, __ATOMIC_ACQUIRE) ||
	       now_ns() >= deadline;
}

static void want_notifications(struct relay *r, int on)
{
	uint32_t i;

	for (i = 0; i < r->count; i++)
		svq_want_notifications(r->queues[i], on);
	full_barrier();
}

static void wait_for_notification(struct relay *r, int64_t deadline)
{
	struct pollfd *p = r->pollfds;
	uint32_t i, n = 2 * r->count;

	for (i = 0; i < r->count; i++) {
		const struct svq *q = r->queues[i];

		/* poll() passes over negative descriptors */
		p[2 * i].fd = q->broken ? -1 : q->guest_kick;
		p[2 * i + 1].fd = q->broken ? -1 : q->device_call;
	}
	p[n].fd = r->wake;
	for (i = 0; i <= n; i++)
		p[i].events = POLLIN;
	r->sleeps++;
	if (poll(p, n + 1, poll_timeout(deadline)) <= 0)
		return;
	for (i = 0; i <= n; i++) {
		if (p[i].revents & (POLLNVAL | POLLERR) && i < n)
			r->queues[i / 2]->broken = SVQ_BAD_EVENTFD;
		else if (p[i].revents & POLLIN)
			eventfd_clear(p[i].fd);
	}
}

/* Relay as long as there is work, and busy_poll longer. */
static void relay_busily(struct relay *r, int64_t deadline)
{
	int64_t idle_since = 0;

	while (!ended(r, deadline)) {
		const uint32_t moved = relay_round(r);

		tell_of_broken(r);
		if (moved) {
			idle_since = 0;
			continue;
		}
		if (!r->busy_poll)
			return;
		if (!idle_since)
			idle_since = now_ns();
		else if (now_ns() - idle_since >= r->busy_poll)
			return;
	}
}

int relay_run(struct relay *r, int64_t deadline)
{
	for (;;) {
		want_notifications(r, 0);
		relay_busily(r, deadline);
		want_notifications(r, 1);
		if (ended(r, deadline))
			return count_broken(r);
		/* what came before the notifications were asked for */
		if (relay_round(r))
			continue;
		tell_of_broken(r);
		wait_for_notification(r, deadline);
	}
}
