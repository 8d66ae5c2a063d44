/* SPDX-License-Identifier: MIT */
/*
 * A driver of one split ring that follows every order, also those that no
 * driver should get: for trying what a device makes of it. Nothing here waits
 * for a device that has stopped, unless a deadline says for how long.
 */

/* Descriptors below are in the byte order of this machine. */
struct trial_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

struct trial_used {
	uint32_t id;
	uint32_t len;
};

struct trial_queue {
	struct vring ring;
	int kick, call;		/* eventfds */
	uint16_t avail;		/* heads published */
	uint16_t used;		/* used elements taken */
};

/* Empty the ring; both indices begin at base. */
void trial_begin(struct trial_queue *q, uint16_t base);
/* Write count descriptors into a table, at index and behind it. */
void trial_write(struct vring_desc *table, uint32_t index,
		 const struct trial_desc *descs, uint32_t count);
/* Put heads on the avail ring and publish them. No notification. */
void trial_publish(struct trial_queue *q, const uint16_t *heads, uint32_t count);
/* Write the avail index without anything in front of it. */
void trial_set_avail(struct trial_queue *q, uint16_t index);
/* Write the flags of the avail ring. */
void trial_set_flags(struct trial_queue *q, uint16_t flags);
/* With VIRTIO_F_EVENT_IDX: the used index that the driver wants to hear of. */
void trial_set_used_event(struct trial_queue *q, uint16_t index);
/* With VIRTIO_F_EVENT_IDX: the avail index that the device wants to hear of. */
uint16_t trial_avail_event(const struct trial_queue *q);
/* The used index and the flags of the used ring as they stand. */
uint16_t trial_used_index(const struct trial_queue *q);
uint16_t trial_used_flags(const struct trial_queue *q);
/* Notify the device. */
void trial_kick(struct trial_queue *q);
/*
 * Wait until deadline (CLOCK_MONOTONIC, ns) for count used elements and copy
 * them. Returns how many came, or -1 if the index moved by more than was
 * published.
 */
int trial_collect(struct trial_queue *q, struct trial_used *to, uint32_t count,
		  int64_t deadline);
