/* SPDX-License-Identifier: MIT */
/*
 * Arbitrary guests against the control queue that we serve, and arbitrary
 * devices against the one that we drive, to be built with ASan and UBSan. No
 * command may reach beyond its buffer or guest memory, nor be answered twice.
 * fuzz.h says how to run it.
 */
#define MODEL_REGION 0x8000ULL
#define MODEL_USED 0x2000
#include "svq_model.h"
#include "fuzz.h"

#define REGIONS 3
#define NUM 8
#define BUFFER 600	/* less than a guest can offer */

struct world {
	struct model m;
	struct ctrl_guest guest;
	struct ctrl_driver driver;
	uint8_t *buffer;
	uint8_t *rings;
	int taken;	/* a command without its answer */
};

static void init(struct world *w, uint32_t kind)
{
	uint8_t *rings;

	memset(w, 0, sizeof(*w));
	model_memory(&w->m, REGIONS, kind >> 4 & 3);
	rings = w->m.regions[0].hva;
	w->guest = (struct ctrl_guest){
		.ring = { NUM, (void *)rings, (void *)(rings + 16 * NUM),
			  (void *)(rings + MODEL_USED) },
		.memory = &w->m.map,
		.features = kind >> 2 & 3,
		.used_gpa = MODEL_BASE + MODEL_USED,
		.call = -1,
	};
	w->guest.ring.avail->idx = w->guest.ring.used->idx =
		kind & 0x80 ? 0xfffe : 0;
	ctrl_guest_start(&w->guest);
	/* no byte of slack: what reaches beyond is seen */
	w->buffer = malloc(BUFFER);
	rings = w->rings = model_alloc(8192);
	w->driver = (struct ctrl_driver){
		.ring = { NUM, (void *)rings, (void *)(rings + 16 * NUM),
			  (void *)(rings + 4096) },
		.features = kind >> 2 & 1,
		.kick = -1,
		.call = -1,
	};
	ctrl_driver_start(&w->driver);
}

static void take_command(struct world *w)
{
	struct ctrl_guest *g = &w->guest;
	const uint16_t before = g->last_avail;
	uint32_t i, length;

	if (w->taken) /* one at a time */
		return;
	length = ctrl_guest_pop(g, w->buffer, BUFFER);
	CHECK(g->last_avail == (uint16_t)(before + !!length));
	CHECK(!length || !g->broken);
	w->taken = !!length;
	if (!length)
		return;
	for (i = 0; i < REGIONS; i++)
		if ((uintptr_t)g->ack - (uintptr_t)w->m.regions[i].hva <
		    MODEL_REGION)
			return;
	CHECK(!"the answer is not in guest memory");
}

static void answer(struct world *w, uint8_t ack)
{
	struct ctrl_guest *g = &w->guest;
	const uint16_t used = g->used_idx;

	if (!w->taken)
		return;
	ctrl_guest_answer(g, ack);
	w->taken = 0;
	CHECK(g->used_idx == (uint16_t)(used + 1));
	CHECK(g->used_idx == g->last_avail);
}

static void drive(struct world *w, uint32_t what)
{
	struct ctrl_driver *d = &w->driver;
	const uint16_t open = d->open;

	switch (what & 3) {
	case 0:
		if (ctrl_driver_add(d, 0x1000, 1 + what, 0x2000) < 0)
			CHECK(2 * (open + 1) > NUM);
		else
			CHECK(d->open == open + 1);
		break;
	case 1:
		ctrl_driver_kick(d);
		break;
	case 2: /* a device that answers, or claims to have answered */
		d->ring.used->idx += what >> 2 & 1 ? 1 : what >> 3;
		break;
	default:
		CHECK(ctrl_driver_wait(d, 0) <= open);
		CHECK(d->open <= open);
	}
}

static void step(struct world *w, struct input *in)
{
	struct ctrl_guest *g = &w->guest;
	uint32_t op = take(in, 1);

	switch (op % 9) {
	case 0:
	case 1:
	case 2:
		write_desc(in, &w->m, &g->ring, 65537);
		break;
	case 3:
	case 4: /* a guest that publishes */
		publish(in, &g->ring);
		break;
	case 5: /* and one that does as it likes */
		g->ring.avail->idx = (uint16_t)take(in, 2);
		g->ring.avail->ring[NUM] = (uint16_t)take(in, 1);
		break;
	case 6:
		take_command(w);
		break;
	case 7:
		answer(w, op & 0x40 ? 1 : 0);
		break;
	default:
		drive(w, take(in, 1));
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	struct world w;

	init(&w, take(&in, 1));
	while (in.left)
		step(&w, &in);
	model_free_memory(&w.m);
	free(w.buffer);
	free(w.rings);
	return 0;
}
