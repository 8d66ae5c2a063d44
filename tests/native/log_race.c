/* SPDX-License-Identifier: MIT */
/*
 * A dirty log that another thread ends and starts again while a shadow queue
 * and a control queue mark pages in it: log_race COUNT answers that many
 * elements of each. It ends well or by SIGSEGV, to be built without
 * optimization, so that each load in the source is one.
 */
#include <pthread.h>

#include "svq_model.h"
#include "check.h"

static struct model m;
static uint64_t *log_bits;
static int stop;

static void *toggle(void *unused)
{
	(void)unused;
	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		__atomic_store_n(&m.regions[0].dirty, NULL, __ATOMIC_RELAXED);
		__atomic_store_n(&m.regions[0].dirty, log_bits, __ATOMIC_RELAXED);
	}
	return NULL;
}

static void relay_one(struct svq *q, uint16_t n)
{
	q->guest.desc[0] = (struct vring_desc){
		.addr = MODEL_BASE + 0xa0000, .len = 8, .flags = VRING_DESC_F_WRITE
	};
	q->guest.avail->ring[n % 8] = 0;
	q->guest.avail->idx = n + 1;
	CHECK(svq_forward(q) == 1);
	q->device.used->ring[n % 8].id = q->device.avail->ring[n % 8];
	q->device.used->idx = n + 1;
	CHECK(svq_return(q) == 1);
}

int main(int argc, char **argv)
{
	const uint32_t count = argc > 1 ? strtoul(argv[1], NULL, 0) : 1000000;
	struct ctrl_guest g = { 0 };
	pthread_t thread;
	uint32_t i;

	model_init(&m, 8, 1, 0, 0);
	log_bits = m.regions[0].dirty;
	g.ring = m.q.guest;
	g.memory = &m.map;
	g.call = -1;
	g.ack = m.regions[0].hva + 0xb0000;
	g.ack_gpa = MODEL_BASE + 0xb0000;
	g.used_gpa = m.q.used_gpa;
	CHECK(!pthread_create(&thread, NULL, toggle, NULL));
	for (i = 0; i < count; i++) {
		relay_one(&m.q, (uint16_t)i);
		g.used_idx = (uint16_t)i;
		ctrl_guest_answer(&g, 0);
	}
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	m.regions[0].dirty = log_bits;
	model_free(&m);
	printf("%u elements\n", count);
	return 0;
}
