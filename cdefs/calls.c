/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "gate.h"
#include "ring_access.h"
#include "cdefs.h"

uint32_t calls_run(int fd, struct prepared_call *calls, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		struct prepared_call *c = &calls[i];

		c->begin = now_ns();
		c->result = ioctl(fd, c->request, (void *)(uintptr_t)c->argument);
		if (c->result < 0)
			c->result = -errno;
		c->end = now_ns();
		if (c->result < 0)
			break;
	}
	return i;
}

/* Which of the rings that the device worked on itself holds no such base; all are marked. */
static uint32_t job_leave(const struct device_job *j)
{
	uint32_t i, held = j->passed_count;

	for (i = j->passed_count; i--;) {
		const struct vring *r = &j->passed[i];
		const uint16_t base = (uint16_t)*j->reported[i];

		if (!rings_hold_bases(r, 1, &base))
			held = i;
		memory_mark(j->memory, j->passed_used[i],
			    offsetof(struct vring_used, ring) +
				    r->num * sizeof(struct vring_used_elem) +
				    sizeof(uint16_t));
	}
	return held;
}

static void job_take_over(struct device_job *j)
{
	j->in_order = rings_in_order(j->passed, j->passed_count, j->passed_starts,
				     j->settle);
	if (j->in_order < j->passed_count)
		return;
	svq_threads_stop(j->threads, j->thread_count);
	svqs_take_over(j->shadows, j->shadow_count, j->left);
	j->held = job_leave(j);
}

static void job_do(struct device_job *j)
{
	uint32_t i;

	j->begin = now_ns();
	for (i = 0; i < j->ring_count; i++) {
		vring_remember(&j->rings[i], &j->starts[i]);
		*j->bases[i] = j->starts[i].used_idx;
	}
	if (j->control)
		ctrl_guest_start(j->control);
	j->done = calls_run(j->fd, j->calls, j->count);
	if (j->done == j->count)
		job_take_over(j);
	j->end = now_ns();
}

int jobs_fine(const struct device_job *jobs, uint32_t count)
{
	uint32_t i, k;

	for (i = 0; i < count; i++) {
		/* out of order, none is held */
		if (jobs[i].done < jobs[i].count ||
		    jobs[i].held < jobs[i].passed_count)
			return 0;
		for (k = 0; k < jobs[i].shadow_count; k++)
			if (jobs[i].shadows[k]->broken)
				return 0;
	}
	return 1;
}

/* See svq_republish() for what takes most of it: the heads of a ring. */
void __attribute__((noinline)) jobs_prepare(void)
{
	volatile char room[sizeof(uint16_t) * RING_MAX + (1 << 13)];
	size_t at;

	for (at = 0; at < sizeof(room); at += 1 << 12)
		room[at] = 0;
}

void jobs_run(struct device_job *jobs, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		job_do(&jobs[i]);
}

/* ---------------------------------------------------------------------- */

struct crew {
	int round;		/* futex: a new one has begun */
	int left;		/* futex: jobs of it that are not done */
	int quit;
	int ready;		/* futex: threads that have all that they need */
	int ahead;		/* threads that wait for no other program */
	int alone;		/* there is one CPU for all of them */
	uint64_t next;		/* of the round: its number, its jobs, the next of them */
	struct device_job *jobs;
	uint32_t threads;
	pthread_t thread[];
};

/*
 * A thread that is late for a round finds another number in front
 * of the next job, and takes nothing. The number of jobs is in the same word: a
 * late thread must not hold the last index of its round against the next one's
 * count.
 */
static void take_jobs(struct crew *c, uint32_t round)
{
	uint64_t next = __atomic_load_n(&c->next, __ATOMIC_ACQUIRE);

	while (next >> 32 == round && (uint16_t)next < (uint16_t)(next >> 16)) {
		if (!__atomic_compare_exchange_n(&c->next, &next, next + 1, 0,
						 __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			continue;
		job_do(&c->jobs[(uint16_t)next]);
		if (!__atomic_sub_fetch(&c->left, 1, __ATOMIC_ACQ_REL))
			futex_wake(&c->left);
		next = __atomic_load_n(&c->next, __ATOMIC_ACQUIRE);
	}
}

static int is_ahead(void)
{
	const int policy = sched_getscheduler(0) & ~SCHED_RESET_ON_FORK;

	return policy == SCHED_FIFO || policy == SCHED_RR;
}

/*
 * A guest stands still while there are jobs: a thread that is woken must not
 * wait until others have had their turn. Without the right to it (CAP_SYS_NICE,
 * RLIMIT_RTPRIO) the thread stays as it is, and the answer is 0. One whose
 * maker is ahead of others is so from the beginning, and on its level.
 */
static int do_first(void)
{
	const struct sched_param lowest = {
		.sched_priority = sched_get_priority_min(SCHED_FIFO),
	};

	return is_ahead() || !pthread_setschedparam(pthread_self(), SCHED_FIFO, &lowest);
}

static void *crew_member(void *crew)
{
	struct crew *c = crew;
	int seen = 0;

	jobs_prepare();
	__atomic_add_fetch(&c->ahead, do_first(), __ATOMIC_RELAXED);
	__atomic_add_fetch(&c->ready, 1, __ATOMIC_RELEASE);
	futex_wake(&c->ready);
	while (!is_set(&c->quit)) {
		const int round = is_set(&c->round);

		if (round == seen) {
			futex_wait(&c->round, seen);
			continue;
		}
		seen = round;
		take_jobs(c, (uint32_t)round);
	}
	return NULL;
}

static int one_cpu(void)
{
	cpu_set_t allowed;

	return !sched_getaffinity(0, sizeof(allowed), &allowed) && CPU_COUNT(&allowed) == 1;
}

void *crew_make(uint32_t threads)
{
	struct crew *c = calloc(1, sizeof(*c) + threads * sizeof(c->thread[0]));
	sigset_t all, before;
	int ready;

	if (!c)
		return NULL;
	/* signals are for the threads that the interpreter knows; an access that fails is this thread's own */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	while (c->threads < threads &&
	       !pthread_create(&c->thread[c->threads], NULL, crew_member, c))
		c->threads++;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	/* on a busy CPU a thread may begin long after it was made */
	while ((uint32_t)(ready = is_set(&c->ready)) < c->threads)
		futex_wait(&c->ready, ready);
	c->alone = one_cpu();
	return c;
}

uint32_t crew_threads(const void *crew)
{
	const struct crew *c = crew;

	return c ? c->threads : 0;
}

int crew_is_ahead(void *crew)
{
	const struct crew *c = crew;

	return c && c->threads && (uint32_t)is_set(&c->ahead) == c->threads;
}

/*
 * On one CPU a thread of the same class waits until its caller sleeps: let it
 * make its request now, and sleep in it, while the caller does something else.
 */
static void let_them_begin(struct crew *c)
{
	if (c->alone && crew_is_ahead(c) && is_ahead())
		sched_yield();
}

static int has_no_use(const struct crew *c, uint32_t count)
{
	return !c || !c->threads || !count || count > UINT16_MAX;
}

void crew_begin(void *crew, struct device_job *jobs, uint32_t count)
{
	struct crew *c = crew;
	uint32_t round;

	if (has_no_use(c, count))
		return;
	round = (uint32_t)is_set(&c->round) + 1;
	c->jobs = jobs;
	__atomic_store_n(&c->left, (int)count, __ATOMIC_RELAXED);
	__atomic_store_n(&c->next, (uint64_t)round << 32 | (uint64_t)count << 16,
			 __ATOMIC_RELEASE);
	__atomic_store_n(&c->round, (int)round, __ATOMIC_SEQ_CST);
	futex_wake(&c->round);
	let_them_begin(c);
}

void crew_wait(void *crew, struct device_job *jobs, uint32_t count)
{
	struct crew *c = crew;
	int left;

	if (has_no_use(c, count)) {
		jobs_run(jobs, count);
		return;
	}
	if (c->jobs != jobs)
		crew_begin(crew, jobs, count);
	take_jobs(c, (uint32_t)is_set(&c->round));
	while ((left = is_set(&c->left)))
		futex_wait(&c->left, left);
	c->jobs = NULL;
}

void crew_run(void *crew, struct device_job *jobs, uint32_t count)
{
	if (count < 2) {
		jobs_run(jobs, count);
		return;
	}
	crew_begin(crew, jobs, count);
	crew_wait(crew, jobs, count);
}

void crew_end(void *crew)
{
	struct crew *c = crew;
	uint32_t i;

	if (!c)
		return;
	__atomic_store_n(&c->quit, 1, __ATOMIC_SEQ_CST);
	__atomic_fetch_add(&c->round, 1, __ATOMIC_SEQ_CST);
	futex_wake(&c->round);
	for (i = 0; i < c->threads; i++)
		pthread_join(c->thread[i], NULL);
	free(c);
}

/* ---------------------------------------------------------------------- */

void rings_remember(const struct vring *rings, uint32_t count,
		    struct vring_start *starts)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		vring_remember(&rings[i], &starts[i]);
}

uint32_t rings_in_order(const struct vring *rings, uint32_t count,
			const struct vring_start *starts, int64_t settle)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		if (!vring_in_order(&rings[i], starts ? &starts[i] : NULL,
				    now_ns() + settle))
			break;
	return i;
}

uint32_t rings_hold_bases(const struct vring *rings, uint32_t count,
			  const uint16_t *bases)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		uint16_t avail, used, taken;

		vring_indices(&rings[i], &avail, &used);
		taken = bases[i] - used;
		if (taken > rings[i].num || (uint16_t)(avail - used) < taken)
			break;
	}
	return i;
}
