/* SPDX-License-Identifier: MIT */
#include "gate.h"
#include "ring_access.h"

static uint32_t serve_round(struct svq_thread *t)
{
	uint32_t moved = 0, i;

	/* the thread that stops it waits for it */
	for (i = 0; i < t->count && !is_set(&t->stop); i++)
		moved += svq_return(t->queues[i]);
	for (i = 0; i < t->count && !is_set(&t->stop); i++)
		moved += svq_forward(t->queues[i]);
	t->rounds++;
	return moved;
}

static int count_broken(const struct svq_thread *t)
{
	int n = 0;
	uint32_t i;

	for (i = 0; i < t->count; i++)
		n += t->queues[i]->broken != SVQ_OK;
	return n;
}

/* A guest learns by its config interrupt that it has to look at the device's status. */
static void tell_of_broken(struct svq_thread *t)
{
	const int broken = count_broken(t);

	if (broken > t->broken)
		eventfd_raise(t->config_call);
	t->broken = broken;
}

static int ended(const struct svq_thread *t, int64_t deadline)
{
	return __atomic_load_n(&t->stop, __ATOMIC_ACQUIRE) ||
	       now_ns() >= deadline;
}

static void want_notifications(struct svq_thread *t, int on)
{
	uint32_t i;

	for (i = 0; i < t->count; i++)
		svq_want_notifications(t->queues[i], on);
	full_barrier();
}

/* Whether it may continue. Otherwise it is outside, also if the gate was opened again meanwhile. */
static int wait_for_notification(struct svq_thread *t, int64_t deadline)
{
	struct pollfd *p = t->pollfds;
	uint32_t i, n = 2 * t->count;
	int ready;

	for (i = 0; i < t->count; i++) {
		const struct svq *q = t->queues[i];

		/* poll() passes over negative descriptors */
		p[2 * i].fd = q->broken ? -1 : q->guest_kick;
		p[2 * i + 1].fd = q->broken ? -1 : q->device_call;
	}
	p[n].fd = t->wake;
	for (i = 0; i <= n; i++)
		p[i].events = POLLIN;
	t->sleeps++;
	gate_leave(&t->stop, &t->inside);
	ready = is_set(&t->stop) ? 0 : poll(p, n + 1, poll_timeout(deadline));
	/* once it is stopped its eventfds may be another's */
	if (!gate_enter(&t->stop, &t->inside))
		return 0;
	for (i = 0; ready > 0 && i <= n; i++) {
		if (p[i].revents & (POLLNVAL | POLLERR) && i < n)
			t->queues[i / 2]->broken = SVQ_BAD_EVENTFD;
		else if (p[i].revents & POLLIN)
			eventfd_clear(p[i].fd);
	}
	return 1;
}

/* Relay as long as there is work, and busy_poll longer. */
static void serve_busily(struct svq_thread *t, int64_t deadline)
{
	int64_t idle_since = 0;

	while (!ended(t, deadline)) {
		const uint32_t moved = serve_round(t);

		tell_of_broken(t);
		if (moved) {
			idle_since = 0;
			continue;
		}
		if (!t->busy_poll)
			return;
		if (!idle_since)
			idle_since = now_ns();
		else if (now_ns() - idle_since >= t->busy_poll)
			return;
	}
}

static int serve_until(struct svq_thread *t, int64_t deadline)
{
	for (;;) {
		want_notifications(t, 0);
		serve_busily(t, deadline);
		want_notifications(t, 1);
		if (ended(t, deadline))
			return count_broken(t);
		/* what came before the notifications were asked for */
		if (serve_round(t))
			continue;
		tell_of_broken(t);
		if (!wait_for_notification(t, deadline))
			return count_broken(t);
	}
}

int svq_thread_run(struct svq_thread *t, int64_t deadline)
{
	int broken;

	if (!gate_enter(&t->stop, &t->inside))
		return count_broken(t);
	broken = serve_until(t, deadline);
	gate_leave(&t->stop, &t->inside);
	return broken;
}

void svq_thread_serve(struct svq_thread *t)
{
	while (!is_set(&t->quit)) {
		svq_thread_run(t, INT64_MAX);
		gate_stay(&t->stop, &t->quit);
	}
}

void svq_threads_stop(struct svq_thread **threads, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		gate_close(&threads[i]->stop);
	for (i = 0; i < count; i++)
		gate_wait(&threads[i]->inside);
}

void svq_thread_end(struct svq_thread *t)
{
	svq_threads_stop(&t, 1);
	gate_end(&t->stop, &t->quit);
	eventfd_raise(t->wake);
}
