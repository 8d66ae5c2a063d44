/* SPDX-License-Identifier: MIT */
/*
 * A split ring as it is mapped in this process, and what its two indices and
 * its slots show.
 *
 * Plain declarations: build.py gives this file both to the compiler and to
 * cffi's parser.
 */

/* One split ring as it is mapped in this process. */
struct vring {
	uint16_t num;		/* a power of two */
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
};

/* Both indices of a ring as they stand. */
void vring_indices(const struct vring *ring, uint16_t *avail, uint16_t *used);
/* What the slots of a ring held when a device was started on it. */
struct vring_start {
	uint16_t used_idx;
	uint16_t *avail;	/* num heads */
	struct vring_used_elem *used;	/* num */
};

/* Remember a ring into start, whose arrays have room for it, before a device is started on it. */
void vring_remember(const struct vring *ring, struct vring_start *start);
/*
 * Whether a stopped device has used what it was given in the order in which it
 * was given, if the rings still show it: slots that the driver has not
 * written again match, and no head is open twice. Slots from before start that
 * have not been written since are left out; with start NULL every slot counts.
 * A driver that runs writes slots before it publishes them, so what does not
 * match is looked at again until deadline (CLOCK_MONOTONIC, ns).
 */
int vring_in_order(const struct vring *ring, const struct vring_start *start,
		   int64_t deadline);

/*
 * Copy the heads that a ring's driver has made available and that are not
 * used yet, oldest first, into heads[num]. Returns their number, or -1 if the
 * indices differ by more than the ring.
 */
int vring_open_heads(const struct vring *ring, uint16_t *heads);
