/* SPDX-License-Identifier: MIT */
/*
 * Relays single-descriptor elements both ways in bursts of 64, for a tool
 * that counts the instructions of relay_forward and relay_return:
 *
 *   valgrind --tool=callgrind --toggle-collect=relay_forward \
 *            --toggle-collect=relay_return ./relay_bench REGIONS BURSTS [used]
 *
 * With "used" descriptors are the guest's own and only rings are relayed, and
 * each element is one that the device writes, as receive buffers are.
 */
#include "svq_model.h"

#define BURST 64

__attribute__((noinline)) uint32_t relay_forward(struct svq *q)
{
	return svq_forward(q);
}

__attribute__((noinline)) uint32_t relay_return(struct svq *q)
{
	return svq_return(q);
}

int main(int argc, char **argv)
{
	uint32_t regions = argc > 1 ? strtoul(argv[1], NULL, 0) : 4;
	uint32_t bursts = argc > 2 ? strtoul(argv[2], NULL, 0) : 1000;
	const int shared = argc > 3 && !strcmp(argv[3], "used");
	struct model m;
	struct svq *q = &m.q;
	uint16_t avail = 0, taken = 0;
	uint32_t b, i, next = 1;

	model_init(&m, 256, regions, 0, 0);
	if (shared)
		model_share(&m);
	for (b = 0; b < bursts; b++) {
		for (i = 0; i < BURST; i++, avail++) {
			/* as traffic does: the next buffer is anywhere */
			uint32_t r = (next = next * 1664525 + 1013904223) % 4093 % regions;

			q->guest.desc[avail % 256] = (struct vring_desc){
				.addr = m.regions[r].gpa + 0xa0000 + (i << 11),
				.len = 1500,
				.flags = shared || i & 1 ? VRING_DESC_F_WRITE : 0,
			};
			q->guest.avail->ring[avail % 256] = avail % 256;
		}
		q->guest.avail->idx = avail;
		if (relay_forward(q) != BURST)
			return 1;
		for (i = 0; i < BURST; i++, taken++)
			q->device.used->ring[taken % 256] = (struct vring_used_elem){
				q->device.avail->ring[taken % 256], 1500
			};
		q->device.used->idx = taken;
		if (relay_return(q) != BURST)
			return 2;
	}
	printf("%u\n", bursts * BURST);
	model_free(&m);
	return q->broken;
}
