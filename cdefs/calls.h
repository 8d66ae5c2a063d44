/* SPDX-License-Identifier: MIT */
/* Requests prepared in advance and made one after the other, and steps between two such lists. */

/* One ioctl of a list. */
struct prepared_call {
	uint64_t request;
	uint64_t argument;	/* an address, or 0 for a request without */
	int64_t begin, end;	/* CLOCK_MONOTONIC, ns */
	int32_t result;		/* what ioctl() returned, or -errno */
	uint32_t unused;
};

/* Make them in order until one fails. Returns how many were made without an error. */
uint32_t calls_run(int fd, struct prepared_call *calls, uint32_t count);

/*
 * A list with what belongs to it on either side. Each part is left out where
 * its count is 0.
 */
struct device_job {
	int fd;
	uint32_t count;
	struct prepared_call *calls;
	uint32_t done;			/* calls made without an error */
	/* in front of the calls: rings are remembered, a device resumes rings[i] at *bases[i] */
	uint32_t ring_count;
	const struct vring *rings;
	struct vring_start *starts;
	uint32_t **bases;
	struct ctrl_guest *control;	/* taken up at the guest's used index */
	/*
	 * behind them, if all were made: rings that the device worked on itself,
	 * see rings_in_order(), settle and rings_hold_bases(); *reported[i] is the
	 * base that a call has read. Out of order, nothing is taken over.
	 */
	uint32_t passed_count;
	uint32_t in_order;		/* the first that is not, or passed_count */
	uint32_t held;			/* the first whose base is wrong, or passed_count; 0 out of order */
	const struct vring *passed;
	const struct vring_start *passed_starts;
	uint32_t **reported;
	const uint64_t *passed_used;	/* GPA of each used ring, which is marked dirty in memory */
	const struct memory_map *memory;
	int64_t settle;
	/* behind those: threads are stopped, their queues reclaimed, see svqs_take_over() */
	uint32_t thread_count;
	uint32_t shadow_count;
	struct svq_thread **threads;
	struct svq **shadows;
	uint16_t *left;
	int64_t begin, end;		/* CLOCK_MONOTONIC, ns */
};

/* Whether each of these jobs was done to its end, and left no queue broken or out of order. */
int jobs_fine(const struct device_job *jobs, uint32_t count);
/*
 * In the thread that will do jobs, before: have the pages of its stack that they need. Otherwise the kernel makes them
 * while a guest is paused.
 */
void jobs_prepare(void);
/* Do jobs one after the other. */
void jobs_run(struct device_job *jobs, uint32_t count);

/*
 * Threads that wait for jobs, so that the jobs of several devices are done
 * side by side without a thread being made for it. NULL if none can be had.
 */
void *crew_make(uint32_t threads);
/* How many threads it has. */
uint32_t crew_threads(const void *crew);
/*
 * Whether it has threads, and they run ahead of the normal scheduling class:
 * on one CPU, too, they begin when they are asked to.
 */
int crew_is_ahead(void *crew);
/* Do all jobs, with a crew or (NULL) without; the caller does its share. One at a time. */
void crew_run(void *crew, struct device_job *jobs, uint32_t count);
/*
 * The same in two steps, so that the caller can do something else in between: its share comes with the second, which
 * does all if the first was left out.
 */
void crew_begin(void *crew, struct device_job *jobs, uint32_t count);
void crew_wait(void *crew, struct device_job *jobs, uint32_t count);
void crew_end(void *crew);

/* vring_remember() of each ring. */
void rings_remember(const struct vring *rings, uint32_t count,
		    struct vring_start *starts);
/*
 * vring_in_order() of each ring, since starts (NULL for none); settle ns for
 * each to settle. Returns the first ring that is not in order, or count.
 */
uint32_t rings_in_order(const struct vring *rings, uint32_t count,
			const struct vring_start *starts, int64_t settle);
/*
 * Whether each base that a device reports lies between the used and the avail
 * index of its ring. Returns the first that does not, or count.
 */
uint32_t rings_hold_bases(const struct vring *rings, uint32_t count,
			  const uint16_t *bases);
