/* SPDX-License-Identifier: MIT */
/* Requests prepared beforehand and made one after the other; and what lies between two such lists. */

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
