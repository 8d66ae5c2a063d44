/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "gate.h"
#include "ring_access.h"

int ticks_open(void)
{
	const struct itimerspec each = { { 1, 0 }, { 1, 0 } };
	const int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	int error;

	if (fd < 0)
		return -errno;
	if (!timerfd_settime(fd, 0, &each, NULL))
		return fd;
	error = errno;
	close(fd);
	return -error;
}

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
	return is_set(&t->stop) || (deadline != INT64_MAX && now_ns() >= deadline);
}

static void want_notifications(struct svq_thread *t, int on)
{
	uint32_t i;

	for (i = 0; i < t->count; i++)
		svq_want_notifications(t->queues[i], on);
	full_barrier();
}

/* 0, or -1 if it cannot be waited for. One that is there stands for all that have the same number. */
static int watch(const struct svq_thread *t, int fd)
{
	/* raised since the last look: nothing has to be read, and a count that stays is nobody's */
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.fd = fd };

	if (fd < 0 || !epoll_ctl(t->epoll, EPOLL_CTL_ADD, fd, &event))
		return 0;
	return errno == EEXIST ? 0 : -1;
}

static void watch_all(struct svq_thread *t)
{
	uint32_t i;

	for (i = 0; i < t->count; i++) {
		struct svq *q = t->queues[i];

		if (!q->broken && (watch(t, q->guest_kick) || watch(t, q->device_call)))
			q->broken = SVQ_BAD_EVENTFD;
	}
	t->watched = 1;
}

/* Nobody can keep a thread awake by a queue that is left alone. */
static void forget_broken(struct svq_thread *t)
{
	uint32_t i;

	for (i = 0; i < t->count; i++) {
		const struct svq *q = t->queues[i];

		if (!q->broken)
			continue;
		/* of one that is not there, or closed, there is nothing to forget */
		epoll_ctl(t->epoll, EPOLL_CTL_DEL, q->guest_kick, NULL);
		epoll_ctl(t->epoll, EPOLL_CTL_DEL, q->device_call, NULL);
	}
	t->forgotten = t->broken;
	/* a number that another queue has too is gone for both */
	t->watched = 0;
}

static int is_open(int fd)
{
	return fd < 0 || fcntl(fd, F_GETFD) >= 0;
}

/* An epoll says nothing of a descriptor that is closed while it is waited for. Whether there is one. */
static int look_for_closed(struct svq_thread *t)
{
	uint32_t i;
	int found = 0;

	for (i = 0; i < t->count; i++) {
		struct svq *q = t->queues[i];

		if (q->broken || (is_open(q->guest_kick) && is_open(q->device_call)))
			continue;
		q->broken = SVQ_BAD_EVENTFD;
		found = 1;
	}
	return found;
}

/* Whether nothing but the tick came, and there is nothing to do: not even what nobody has told of. */
static int only_ticked(struct svq_thread *t, const struct epoll_event *events, int ready)
{
	uint64_t times;
	int ticked = 0, i;

	for (i = 0; i < ready; i++)
		ticked |= events[i].data.fd == t->ticks;
	/* a timer that is not read does not go on (fs/timerfd.c:timerfd_tmrproc()) */
	if (ticked && read(t->ticks, &times, sizeof(times)) < 0)
		ticked = 0;
	return ticked && ready == 1 && !look_for_closed(t) && !serve_round(t);
}

/* Whether it may continue. Otherwise it is outside. */
static int wait_for_notification(struct svq_thread *t, int64_t deadline)
{
	struct epoll_event events[16];
	int ready;

	if (t->forgotten != t->broken)
		forget_broken(t);
	if (!t->watched) {
		watch_all(t);
		/* what was raised before is told by the first wait */
		return 1;
	}
	t->sleeps++;
	do {
		const int timeout = deadline == INT64_MAX ? -1 : poll_timeout(deadline);

		ready = 0;
		gate_leave(&t->stop, &t->inside);
		if (!is_set(&t->stop))
			ready = epoll_wait(t->epoll, events, sizeof(events) / sizeof(*events), timeout);
		/* once it is stopped its eventfds may be another's */
		if (!gate_enter(&t->stop, &t->inside))
			return 0;
	} while (only_ticked(t, events, ready));
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

/* the shortest that the kernel gives (kernel/sched/syscalls.c:__setparam_fair()) */
#define TURN_NS 100000

/* struct sched_attr, which a header of the build machine may lack */
struct scheduling {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

/*
 * Ask for short turns (Linux 6.12): the same share of a CPU, but sooner than
 * the guest's threads that wait for what this one brings. Not for one that
 * has another policy.
 */
static void take_short_turns(void)
{
	struct scheduling s = { .size = sizeof(s) };

	if (syscall(SYS_sched_getattr, 0, &s, sizeof(s), 0) || s.policy)
		return;
	s.runtime = TURN_NS;
	syscall(SYS_sched_setattr, 0, &s, 0);
}

void svq_thread_serve(struct svq_thread *t)
{
	take_short_turns();
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
