/* SPDX-License-Identifier: MIT */
/*
 * The synthetic guest for the exchange (handover.h): its sections are those of
 * vhost-vdpa help migration, GUEST (2) and the rest of a device (4).
 */

struct nic_rest {
	struct nic_pair **pairs;
	uint32_t count;
	struct ctrl_driver *control;	/* NULL without a control queue */
};

struct guest_rest {
	struct nic_rest *nics;
	uint32_t count;
	/* the CPU that writes; NULL without one */
	const struct guest_writer *writer;
	uint64_t writer_gpa;
	/* where that of a guest which arrives may write: in memory, outside of what its NICs use */
	const struct memory_map *memory;
	const struct page_run *used;
	uint32_t used_count;
	uint32_t page_size;	/* of what such a CPU writes at a time */
	int writer_comes;	/* the guest's section that was looked at last has one */
};

#define WRITER_MAX_RATE 4294967296	/* pages per second */

/*
 * See struct guest_sections; writing memory needs a thread, which is made by
 * others. A guest is a struct guest_rest. What its control
 * queue has set is as the outline has it: another state is not written in this
 * way, and does not fit.
 */
int64_t guest_put(void *guest, uint32_t number, uint8_t *to, uint64_t room);
int guest_fits(void *guest, uint32_t number, const uint8_t *from, uint64_t length);
void guest_take(void *guest, uint32_t number, const uint8_t *from, uint64_t length);
