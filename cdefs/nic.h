/* SPDX-License-Identifier: MIT */
/*
 * The synthetic guest: its NIC, the driver side of one RX/TX pair with its
 * traffic, and its CPU. Plain declarations, as in ring.h.
 */

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
/* The CPU                                                                 */

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
