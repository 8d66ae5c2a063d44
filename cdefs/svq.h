/* SPDX-License-Identifier: MIT */
/*
 * Shadow virtqueues and the relay that serves them. Python sets them up, calls
 * the loops without the GIL and reads the state they leave behind. Plain
 * declarations, as in ring.h.
 */

/* Why a queue was given up; 0 is a healthy queue. */
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
#define SVQ_BAD_EVENTFD 10	/* an eventfd of the queue was closed under the relay */
#define SVQ_NO_ROOM 11		/* nobody: buffers across regions that are apart for the device fill the ring */

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

struct svq {
	struct vring guest;
	struct vring device;
	const struct memory_map *memory;
	struct svq_segment *segments;	/* device.num */
	struct svq_element *elements;	/* device.num */
	struct svq_piece *pieces;	/* device.num: a chain while it is checked */
	uint16_t *next;			/* device.num: the free chain; never read from shared memory */
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

/* Several SVQs served by one thread, in array order (put RX before TX). */
struct relay {
	uint32_t count;
	struct svq **queues;
	void *pollfds;			/* room for 2 * count + 1 struct pollfd */
	int wake;			/* eventfd that ends a wait */
	int config_call;		/* eventfd to raise when a queue breaks, or -1 */
	int stop;			/* set by another thread */
	int broken;			/* queues found broken so far */
	int64_t busy_poll;		/* ns to go on looking before it sleeps */
	uint64_t rounds, sleeps;
};

/*
 * Relay until stop is set or deadline (CLOCK_MONOTONIC, ns) has passed. A
 * queue that breaks is left alone, the others go on. Returns the number of
 * broken queues.
 */
int relay_run(struct relay *r, int64_t deadline);
