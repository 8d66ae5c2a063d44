/* SPDX-License-Identifier: MIT */
/*
 * Control queues: a few commands, so each is copied whole. Plain declarations,
 * as in ring.h.
 */

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
 * there is no command or the queue is broken, more than size if it did not fit.
 */
uint32_t ctrl_guest_pop(struct ctrl_guest *g, uint8_t *buffer, uint32_t size);
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
