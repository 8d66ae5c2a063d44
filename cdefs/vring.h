/* SPDX-License-Identifier: MIT */
/*
 * The loops that run per descriptor, per frame and per message. Python sets
 * them up, calls them without the GIL and reads the state they leave behind.
 *
 * build.py gives this file both to the compiler and to cffi's parser, so it
 * holds plain declarations only.
 */

/* One split ring as it is mapped in this process. */
struct vring {
	uint16_t num;		/* a power of two */
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
};

/* A piece of guest memory: where the guest, this process and the device see it. */
struct memory_region {
	uint64_t gpa;
	uint64_t size;
	uint64_t iova;
	uint8_t *hva;
	uint64_t *dirty;	/* one bit per 4 KiB page, or NULL */
};

/* Both indices of a ring as they stand. */
void vring_indices(const struct vring *ring, uint16_t *avail, uint16_t *used);
/*
 * Whether a device that stands still has used what it was given in the order
 * in which it was given, from the used index since on, as far as the rings
 * still show: slots that the driver has not written again match, and no head
 * is open twice. A driver that runs writes slots before it publishes them, so
 * what does not match is looked at again until deadline (CLOCK_MONOTONIC, ns).
 */
int vring_in_order(const struct vring *ring, uint16_t since, int64_t deadline);

/* Sorted by gpa, no overlap. */
struct memory_map {
	uint32_t count;
	struct memory_region *regions;
};

/* ---------------------------------------------------------------------- */
/* Shadow virtqueue                                                        */

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

/* Features of the ring, as negotiated; the same on both faces. */
#define SVQ_F_EVENT_IDX 1
#define SVQ_F_INDIRECT 2

/* A checked piece of a guest buffer, on its way to the device. */
struct svq_piece {
	uint64_t gpa;
	uint64_t iova;
	uint32_t len;
	uint32_t region;	/* as in svq_segment */
	uint32_t flags;
	uint32_t unused;
};

/* What the SVQ remembers of a descriptor it gave to the device. */
struct svq_segment {
	uint64_t gpa;
	uint32_t len;
	uint32_t region;	/* its index, doubled; odd if the device may write */
};

/* A guest chain in flight, indexed by its head in the shadow ring. */
struct svq_element {
	uint16_t segments;	/* 0: not in flight */
	uint16_t tail;
	uint16_t guest_head;
	uint16_t unused;
	uint32_t writable;	/* bytes */
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
	int stalled;			/* the next chain waits for free descriptors */
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
/* Map a guest range to the process: the pointer, or NULL if it is not one range of guest memory. */
uint8_t *memory_hva(const struct memory_map *m, uint64_t gpa, uint64_t size);
/* The same for as much of the range as lies in the first region; *size is cut to that. */
uint8_t *memory_part(const struct memory_map *m, uint64_t gpa, uint64_t *size);
/* Copy out of guest memory, across regions: 0, or -1 if some of it is not guest memory. */
int memory_read(const struct memory_map *m, uint64_t gpa, void *to, uint64_t size);

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

/* ---------------------------------------------------------------------- */
/* Control queue: a few commands, so each is copied whole                  */

/* The guest's control queue, served by us. */
struct ctrl_guest {
	struct vring ring;
	const struct memory_map *memory;
	uint32_t features;	/* SVQ_F_... */
	uint16_t last_avail;
	uint16_t used_idx;
	uint16_t head;		/* the element taken last */
	uint8_t *ack;		/* where its answer goes */
	uint64_t ack_gpa, used_gpa;
	int call;
	int broken;		/* SVQ_... */
};

/* Take up the guest's ring at its used index. */
void ctrl_guest_start(struct ctrl_guest *g);
/*
 * Copy the next command, as it is now, into buffer. Returns its length, 0 if
 * there is none or the queue is broken, more than size if it did not fit.
 */
uint32_t ctrl_guest_take(struct ctrl_guest *g, uint8_t *buffer, uint32_t size);
/* Answer the command taken last. */
void ctrl_guest_answer(struct ctrl_guest *g, uint8_t ack);

/* A control queue that we drive: a command is one readable and one writable descriptor. */
struct ctrl_driver {
	struct vring ring;
	uint32_t features;	/* SVQ_F_... */
	uint16_t avail_idx, used_idx;
	uint16_t open;		/* commands without an answer */
	uint64_t tables_gpa;	/* with SVQ_F_INDIRECT: 32 bytes a command, or 0 */
	struct vring_desc *tables;
	int kick, call;
};

void ctrl_driver_start(struct ctrl_driver *d);
/*
 * Queue a command of size bytes (in an indirect table where there are tables) at address, answered in one byte at ack (both
 * as the device sees them). Returns its slot, or -1 if the ring is full.
 */
int ctrl_driver_add(struct ctrl_driver *d, uint64_t address, uint32_t size,
		    uint64_t ack);
/* Publish what was added. */
void ctrl_driver_kick(struct ctrl_driver *d);
/*
 * Wait until every command is answered or deadline (CLOCK_MONOTONIC, ns) has
 * passed. Returns the commands still open, -1 if the device used what it was
 * not given, -2 if an eventfd was closed.
 */
int ctrl_driver_wait(struct ctrl_driver *d, int64_t deadline);

/* ---------------------------------------------------------------------- */
/* The guest's NIC: driver side of one RX/TX pair, with its traffic        */

#define NIC_WINDOW 65536	/* sequence numbers that are told apart */
#define NIC_GAPS 64

/* A time in which the guest received nothing (CLOCK_MONOTONIC, ns). */
struct nic_gap {
	int64_t begin;
	int64_t end;
};

/*
 * A time of interest, and the longest gap that touches it: among the longest
 * of all there may be none that does.
 */
#define NIC_WINDOWS 2
struct nic_window {
	int64_t begin;			/* 0: not watched */
	int64_t end;			/* 0: not over yet */
	struct nic_gap longest;		/* all 0: none has ended yet */
};

struct nic_pair {
	struct vring rx, tx;
	uint16_t rx_avail, rx_used, tx_avail, tx_used;
	uint16_t tx_free_count;
	uint16_t *tx_free;		/* slots that carry no frame */
	uint16_t tx_descs;		/* descriptors per TX frame: 1, or 2 (header apart) */
	uint32_t features;		/* SVQ_F_... the driver negotiated */
	uint64_t tx_table_gpa;		/* with SVQ_F_INDIRECT: 32 bytes a slot */
	struct vring_desc *tx_tables;
	uint64_t rx_gpa, tx_gpa;	/* buffers, buffer_size each */
	uint8_t *rx_hva, *tx_hva;
	uint32_t buffer_size;
	uint32_t frame_size;		/* Ethernet frame, without virtio_net_hdr */
	uint32_t window;		/* frames in flight at most */
	uint32_t flow;			/* tells pairs apart */
	uint8_t dst[6], src[6];
	int rx_kick, rx_call, tx_kick, tx_call;
	int wake;
	int stop;
	int sending;			/* 0: only receive */
	uint64_t sent, received, duplicated, corrupted, reordered;
	uint64_t highest;		/* 1 + highest sequence number received */
	uint64_t ring_errors;		/* used entries that make no sense */
	int64_t last_rx;		/* ns, 0 before the first frame */
	uint64_t seen[1024];		/* NIC_WINDOW bits */
	struct nic_gap gaps[64];	/* the NIC_GAPS longest */
	struct nic_window windows[2];	/* NIC_WINDOWS of them */
};

/* Fill the rings: descriptor tables, RX buffers posted; nothing sent yet. */
void nic_start(struct nic_pair *p);
/* Notify both queues, RX first: after every start of a device. */
void nic_kick(const struct nic_pair *p);
/* Send and receive until stop is set or deadline (CLOCK_MONOTONIC, ns) has passed. */
void nic_run(struct nic_pair *p, int64_t deadline);
/* Start the count of gaps anew. */
void nic_clear_gaps(struct nic_pair *p);
/*
 * Begin and end a window, at this time (CLOCK_MONOTONIC, ns), while nic_run()
 * may run in another thread. Beginning one again forgets what it held.
 */
void nic_begin_window(struct nic_pair *p, uint32_t number, int64_t now);
void nic_end_window(struct nic_pair *p, uint32_t number, int64_t now);

/* ---------------------------------------------------------------------- */
/* Memory                                                                  */

/*
 * Map size bytes of fd, shared, or private memory where fd is -1, at an address
 * that is a multiple of align (a power of two). NULL and *error = errno on
 * failure.
 */
uint8_t *map_memory(int fd, uint64_t size, uint64_t align, int *error);
int unmap_memory(uint8_t *address, uint64_t size);
/* Ask for huge pages; 0 or errno. */
int advise_huge(uint8_t *address, uint64_t size);
/* Allocate every page now; 0 or errno. */
int populate(uint8_t *address, uint64_t size);
/*
 * Count runs of consecutive page frames in /proc/self/pagemap entries.
 * Returns 0 if a page is absent or its frame number is hidden.
 */
uint64_t pagemap_runs(const uint64_t *entries, uint64_t count);

/* ---------------------------------------------------------------------- */
/* The guest's CPU                                                         */

/* Writes whole pages of area in turn, rate of them a second. */
struct guest_writer {
	uint8_t *area;
	uint64_t pages;
	uint64_t rate;
	uint64_t written;	/* so far; page written % pages comes next */
	int wake;		/* eventfd that ends a wait */
	int stop;
};

/* Write until stop is set or deadline (CLOCK_MONOTONIC, ns) has passed. */
void guest_writer_run(struct guest_writer *w, int64_t deadline);
/* Count the pages that do not hold what was written there last. */
uint64_t guest_writer_check(const struct guest_writer *w);

/*
 * Copy the heads that a ring's driver has made available and that are not
 * used yet, oldest first, into heads[num]. Returns their number, or -1 if the
 * indices are more than the ring apart.
 */
int vring_open_heads(const struct vring *ring, uint16_t *heads);
