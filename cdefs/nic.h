/* SPDX-License-Identifier: MIT */
/*
 * The synthetic guest: its NIC, the driver side of one RX/TX pair with its
 * traffic, and its CPU. Plain declarations, as in ring.h.
 */

#define NIC_WINDOW 65536	/* distinguishable sequence numbers */
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
	uint16_t tx_descs;		/* descriptors per TX frame: 1, or 2 (separate header) */
	uint32_t features;		/* SVQ_F_... the driver negotiated */
	uint64_t tx_table_gpa;		/* with SVQ_F_INDIRECT: 32 bytes a slot */
	struct vring_desc *tx_tables;
	uint64_t rx_gpa, tx_gpa;	/* buffers, buffer_size each */
	uint8_t *rx_hva, *tx_hva;
	uint32_t buffer_size;
	uint32_t header;		/* bytes of virtio_net_hdr; some features make it longer */
	uint32_t frame_size;		/* Ethernet frame, without virtio_net_hdr */
	uint32_t window;		/* frames in flight at most */
	uint32_t flow;			/* identifies the pair */
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
	int inside;			/* a thread works on the rings */
	int quit;
};

/* Fill the rings: descriptor tables, RX buffers posted; nothing sent yet. */
void nic_start(struct nic_pair *p);
/* Notify both queues, RX first: after every start of a device. */
void nic_kick(const struct nic_pair *p);
/* Send and receive until stop is set or deadline (CLOCK_MONOTONIC, ns) has passed. */
void nic_run(struct nic_pair *p, int64_t deadline);
/* The same again and again; while stop is set it waits. Until nics_end(). */
void nic_serve(struct nic_pair *p);
/* Have these pairs only receive from now on. A thread that is at work may send what it is about to. */
void nics_send_no_more(struct nic_pair **pairs, uint32_t count);
/* Afterwards: whether all frames that were sent have arrived, and no thread is about to send more. */
int nics_have_all(struct nic_pair **pairs, uint32_t count);
/* Ask the threads that serve these pairs to leave the rings alone. */
void nics_tell(struct nic_pair **pairs, uint32_t count);
/* The same, and wait until they are outside. */
void nics_stop(struct nic_pair **pairs, uint32_t count);
/* Let them continue. */
void nics_go(struct nic_pair **pairs, uint32_t count);
/* Stop them, and let nic_serve() return: soon, and without another look at an eventfd. */
void nics_end(struct nic_pair **pairs, uint32_t count);
/* Restart the count of gaps. */
void nic_clear_gaps(struct nic_pair *p);
/*
 * Begin and end a window, at this time (CLOCK_MONOTONIC, ns), while nic_run()
 * may run in another thread. Beginning one again forgets what it held.
 */
void nic_begin_window(struct nic_pair *p, uint32_t number, int64_t now);
void nic_end_window(struct nic_pair *p, uint32_t number, int64_t now);

/* The same of several pairs. */
void nics_begin_window(struct nic_pair **pairs, uint32_t count, uint32_t number,
		       int64_t now);
void nics_end_window(struct nic_pair **pairs, uint32_t count, uint32_t number,
		     int64_t now);
/* Move every time of the account by ns; what is beyond REST_MAX_TIME becomes that. */
void nics_shift_clock(struct nic_pair **pairs, uint32_t count, int64_t ns);

/* ---------------------------------------------------------------------- */
/* What changes while the guest runs, on its way to another host            */

#define REST_MAX_TIME 2305843009213693952	/* ns: two such times can be subtracted in 64 bits */

/* Why it was refused. Where two queues can be meant, RX has this number and TX the next. */
#define REST_SHORT 1		/* it ends too early or too late */
#define REST_FAR_APART 2	/* indices that differ by more than the ring */
#define REST_INDICES 4		/* the ring in memory has others */
#define REST_HEADS 6		/* the same, of the heads between them */
#define REST_DRIVER 8		/* the driver has others than its ring */
#define REST_SENDING 10
#define REST_RECEIVED 11	/* more received than sent */
#define REST_COUNTERS 12
#define REST_TIME 13
#define REST_FREE 14		/* TX slots that are not slots of the ring */
#define REST_SLOTS 15		/* more TX slots than the ring has */
#define REST_GAPS 16
#define REST_SEEN 17		/* runs that are not those of a bitmap */

/* Bytes that the rest of a pair takes at most, with rings of these sizes. */
uint64_t nic_rest_room(uint32_t rx, uint32_t tx);
/*
 * Write it for pairs whose driver is stopped and whose rings are not written:
 * returns the bytes, or -1 if a ring of pair *wrong has indices that differ by
 * more than the ring.
 */
int64_t nic_put_rest(struct nic_pair **pairs, uint32_t count, uint8_t *to,
		     uint64_t room, uint32_t *wrong);
/*
 * Whether drivers of these pairs can resume from it, and whether it fits the
 * rings in memory: 0, or REST_... of pair *wrong.
 */
int nic_check_rest(struct nic_pair **pairs, uint32_t count, const uint8_t *from,
		   uint64_t length, uint32_t *wrong);
/* Resume from a state that nic_check_rest() accepted. */
void nic_apply_rest(struct nic_pair **pairs, uint32_t count, const uint8_t *from,
		    uint64_t length);

/* ---------------------------------------------------------------------- */
/* The CPU                                                                 */

/* Writes whole pages of area in turn, rate of them a second. */
struct guest_writer {
	uint8_t *area;
	uint64_t pages;
	uint64_t rate;
	uint64_t written;	/* so far; page written % pages comes next */
	int wake;		/* eventfd that ends a wait */
	int stop;
	int inside;
};

/* Write until stop is set or deadline (CLOCK_MONOTONIC, ns) has passed. */
void guest_writer_run(struct guest_writer *w, int64_t deadline);
/* Set stop and wait until it is between two pages; guest_writer_run() returns soon. */
void guest_writer_stop(struct guest_writer *w);
/* Count the pages that do not hold what was written there last. */
uint64_t guest_writer_check(const struct guest_writer *w);
