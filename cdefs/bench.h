/* SPDX-License-Identifier: MIT */
/* What benchmarks need of C: memory in a chosen order, single frames, repeated requests. */

/*
 * Allocate pages of a mapping now, in the given order: order holds their
 * numbers. 0 or errno.
 */
int populate_in_order(uint8_t *address, uint64_t page, const uint32_t *order,
		      uint32_t count);
/* Ask for small pages only; 0 or errno. */
int advise_small(uint8_t *address, uint64_t size);

/* A place in a frame's life, as the device and as this process see it. */
struct touch_place {
	uint64_t iova;
	uint8_t *hva;
};

/* The driver of one RX and one TX queue with one frame in flight. */
struct touch {
	struct vring rx, tx;
	int rx_kick, rx_call, tx_kick, tx_call;
	uint16_t rx_avail, rx_used, tx_avail, tx_used;
	uint16_t ahead;		/* receive buffers that the device has beside the frame's own */
	uint32_t apart;		/* bytes from one receive buffer to the next; 0: all are the same */
	uint64_t seq;
	int64_t took;		/* ns from the kick to the return of the frame, 0 if it is away */
};

/* Empty both rings and begin at 0. */
void touch_start(struct touch *t);

#define TOUCH_SENT 1	/* the device finished with the frame's descriptors */
#define TOUCH_BACK 2	/* the frame came back, every byte of it */
#define TOUCH_NONSENSE 4	/* a ring holds what no device writes */
/*
 * Send a frame of size bytes (60 to TOUCH_MAX) from one place and receive it
 * at the other. Waits until deadline (CLOCK_MONOTONIC, ns) for the sending,
 * and after it no longer than grace ns for the frame. Returns TOUCH_... bits.
 */
#define TOUCH_MAX 1514
int touch_frame(struct touch *t, const struct touch_place *from,
		const struct touch_place *to, uint32_t size, int64_t deadline,
		int64_t grace);

/*
 * Make the same request count times with a fresh copy of its argument (size
 * bytes, at most 64), and write down how long each took. Returns how many
 * were made; *error is the errno of the one that failed.
 */
uint32_t ioctl_repeat(int fd, uint64_t request, const uint8_t *argument,
		      uint32_t size, uint32_t count, int64_t *took,
		      int *error);
