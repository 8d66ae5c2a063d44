/* SPDX-License-Identifier: MIT */
/*
 * Shadow virtqueues and the threads that serve them. Python sets them up, calls
 * the loops without the GIL and reads the state they leave behind. Plain
 * declarations, as in ring.h.
 */

/* Why a queue is broken; 0 is a healthy queue. */
#define SVQ_OK 0
#define SVQ_BAD_AVAIL_IDX 1	/* guest: avail.idx moved by more than the ring */
#define SVQ_BAD_HEAD 2		/* guest: head beyond the descriptor table */
#define SVQ_BAD_CHAIN 3		/* guest: next out of range, loop, or longer than the ring */
#define SVQ_BAD_ORDER 4		/* guest: readable descriptor after a writable one */
#define SVQ_BAD_ADDRESS 5	/* guest: buffer outside guest memory */
#define SVQ_ZERO_LENGTH 6	/* guest: descriptor of length 0 */
#define SVQ_BAD_INDIRECT 7	/* guest: indirect table not negotiated, nested, chained or misshapen */
#define SVQ_BAD_USED_IDX 8	/* device: used.idx moved by more than the ring */
#define SVQ_BAD_USED_ID 9	/* device: used id that it was never given */
#define SVQ_BAD_EVENTFD 10	/* an eventfd of the queue cannot be raised or waited for */
#define SVQ_NO_ROOM 11		/* neither: buffers across regions that are not adjacent fill the ring */
#define SVQ_HEAD_TWICE 12	/* guest: head made available again before it was used (relayed used ring) */
#define SVQ_SHARED_DESC 13	/* guest: chains in flight share descriptors (relayed used ring) */

/* Features of the ring, as negotiated; the same on both faces. */
#define SVQ_F_EVENT_IDX 1
#define SVQ_F_INDIRECT 2
#define SVQ_F_PACKED 4	/* another layout; no loop here works on it */

/* A checked piece of a guest buffer, on its way to the device. */
struct svq_piece {
	uint64_t gpa;
	uint64_t iova;
	uint32_t len;
	uint32_t region;	/* as in svq_segment */
	uint32_t flags;
	uint32_t joins;		/* of the same buffer as the piece before it, and right behind that for the device */
};

/* What the SVQ remembers of a descriptor it gave to the device. */
struct svq_segment {
	uint64_t gpa;
	uint32_t len;
	uint32_t region;	/* where it begins: the index, doubled; odd if the device may write */
};

/* A guest chain in flight, indexed by its head in the shadow ring. */
struct svq_element {
	uint16_t segments;	/* 0: not in flight */
	uint16_t tail;
	uint16_t guest_head;
	uint16_t unused;
	uint32_t writable;	/* bytes, at most 2^32 - 1: a used length is no longer */
	uint32_t order;		/* how many elements went to the device before it, mod 2^32 */
};

/* Which region was found last in each of SVQ_SPOTS parts of guest memory: a guess, to be checked. */
#define SVQ_SPOTS 128
struct svq_spots {
	uint64_t shift;			/* a part has 1 << shift bytes */
	const struct memory_region *at[128];
};

/*
 * A queue between the guest's ring and the device's. With given_at the device
 * works on the guest's own descriptor table, device.desc is guest.desc, and
 * only the two other parts of its ring are separate: see used_relay.h.
 * segments, elements, pieces and next are not needed then.
 */
struct svq {
	struct vring guest;
	struct vring device;
	const struct memory_map *memory;
	struct svq_segment *segments;	/* device.num */
	struct svq_element *elements;	/* device.num */
	struct svq_piece *pieces;	/* device.num: a chain while it is checked */
	uint16_t *next;			/* device.num: the free chain; never read from shared memory */
	uint64_t *given_at;		/* device.num, by head: forwarded when the device got it, 0: it has not; or NULL */
	struct svq_spots spots;		/* with given_at */
	int guest_kick, guest_call;	/* eventfds shared with the guest */
	int device_kick, device_call;	/* eventfds shared with the device */
	uint32_t features;		/* SVQ_F_... */
	uint16_t last_avail;		/* next guest avail entry to take */
	uint16_t used_idx;		/* next guest used entry to write */
	uint16_t device_avail;		/* next shadow avail entry to write */
	uint16_t device_used;		/* next shadow used entry to take */
	uint16_t free_head;
	uint16_t free_count;
	uint32_t given;			/* elements given to the device so far, mod 2^32 */
	uint32_t last_region;		/* where the previous translation hit */
	uint64_t avail_gpa, used_gpa;	/* of the guest's rings, for the dirty bitmap */
	int broken;			/* SVQ_... */
	int spans;			/* a chain had pieces that reach into several regions */
	uint64_t forwarded, returned, kicks, calls, stalls, clamped;
};

/*
 * Clear the shadow ring and take up the guest's where the device left it: at
 * its used index.
 */
void svq_start(struct svq *q);
/* Guest avail -> device avail. Returns the elements moved; see q->broken. */
uint32_t svq_forward(struct svq *q);
/* Device used -> guest used. Returns the elements moved; see q->broken. */
uint32_t svq_return(struct svq *q);
/* Ask both sides for notifications, or spare them while the ring is polled. */
void svq_want_notifications(struct svq *q, int on);
/* Guest heads in flight, oldest first, into heads[device.num]. */
uint16_t svq_in_flight(const struct svq *q, uint16_t *heads);
/*
 * Hand the heads in flight back: write them again in front of last_avail in
 * the guest's avail ring, and return the base from which a device finds
 * exactly those and then what the guest added since.
 */
uint16_t svq_republish(struct svq *q);
/*
 * All of that for queues whose device is suspended: return what it has used,
 * and return what is in flight to the guest's ring. bases[i] is what
 * svq_republish() returned, of a queue that is not broken.
 */
void svqs_take_over(struct svq **queues, uint32_t count, uint16_t *bases);

/* Whether the device has a buffer that lies in a range of guest memory. */
int svq_reaches(const struct svq *q, uint64_t gpa, uint64_t size);
/* Follow guest memory whose regions have changed: what is in flight knows its region by number. */
void svq_memory_changed(struct svq *q);

/* Several SVQs served by one thread, in array order (put RX before TX). */
struct svq_thread {
	uint32_t count;
	struct svq **queues;
	int epoll;			/* an epoll of this thread alone, which has wake and ticks already */
	int ticks;			/* ticks_open(): when to look for eventfds that were closed, or -1 */
	int watched;			/* it has the queues' eventfds, which stay the same */
	int wake;			/* eventfd that ends a wait */
	int config_call;		/* eventfd to raise when a queue breaks, or -1 */
	int stop;			/* set by another thread */
	int inside;			/* a thread works on the rings */
	int quit;
	int broken;			/* queues found broken so far */
	int forgotten;			/* of them, those whose eventfds are not waited for any more */
	int64_t busy_poll;		/* ns to keep looking before it sleeps */
	uint64_t rounds, sleeps;
};

/* A timer that is readable each second, for an edge-triggered epoll: the descriptor, or -errno. */
int ticks_open(void);
/*
 * Relay until stop is set or deadline (CLOCK_MONOTONIC, ns) has passed. A
 * queue that breaks is left alone, the others continue. Returns the number of
 * broken queues.
 */
int svq_thread_run(struct svq_thread *t, int64_t deadline);
/* The same again and again; while stop is set it waits. Until svq_thread_end(). */
void svq_thread_serve(struct svq_thread *t);
/* Keep the threads that serve these queues from the rings; they are outside when this returns. */
void svq_threads_stop(struct svq_thread **threads, uint32_t count);
/* Stop a thread, and let svq_thread_serve() return: soon, and without another look at an eventfd. */
void svq_thread_end(struct svq_thread *t);
