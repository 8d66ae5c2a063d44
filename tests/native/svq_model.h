/* SPDX-License-Identifier: MIT */
/*
 * A shadow virtqueue with a guest and a device in plain memory, for programs
 * that count its instructions or throw arbitrary bytes at it.
 */
#ifndef SVQ_MODEL_H
#define SVQ_MODEL_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cdefs.h"

#define MODEL_BASE 0x40000000ULL
#define MODEL_STRIDE 0x200000ULL
#ifndef MODEL_REGION
#define MODEL_REGION 0x100000ULL
#define MODEL_USED 0x90000
#endif

/* How guest memory lies. */
#define MODEL_ADJACENT 1	/* regions follow each other without a gap */
#define MODEL_TRANSLATED 2	/* the device sees them at other addresses, and in reverse order */
#define MODEL_IOVA 0x700000000000ULL

struct model {
	struct memory_region *regions;
	struct memory_map map;
	uint64_t stride;	/* from one region to the next */
	struct svq q;
	void *shadow;
};

static inline void *model_alloc(size_t size)
{
	void *p = aligned_alloc(4096, (size + 4095) & ~4095UL);

	if (!p)
		abort();
	memset(p, 0, size);
	return p;
}

static inline void model_memory(struct model *m, uint32_t regions, int layout)
{
	uint32_t i;

	m->stride = layout & MODEL_ADJACENT ? MODEL_REGION : MODEL_STRIDE;
	m->regions = model_alloc(regions * sizeof(*m->regions));
	for (i = 0; i < regions; i++) {
		const uint64_t gpa = MODEL_BASE + i * m->stride;

		m->regions[i] = (struct memory_region){
			.gpa = gpa,
			.size = MODEL_REGION,
			.iova = layout & MODEL_TRANSLATED ?
					MODEL_IOVA - i * MODEL_REGION :
					gpa,
			.hva = model_alloc(MODEL_REGION),
			.dirty = model_alloc(MODEL_REGION / 4096 / 8),
		};
	}
	m->map = (struct memory_map){ regions, m->regions };
}

static inline void model_free_memory(struct model *m)
{
	uint32_t i;

	for (i = 0; i < m->map.count; i++) {
		free(m->regions[i].hva);
		free(m->regions[i].dirty);
	}
	free(m->regions);
}

/* Guest rings at the start of region 0. */
static inline void model_init(struct model *m, uint16_t num, uint32_t regions,
			      uint32_t features, int layout)
{
	struct svq *q = &m->q;
	uint8_t *rings, *shadow;

	memset(m, 0, sizeof(*m));
	model_memory(m, regions, layout);
	rings = m->regions[0].hva;
	shadow = m->shadow = model_alloc(16 * num + 8192 + 8 * num + 6 + 4096);
	q->guest = (struct vring){ num, (void *)rings,
				   (void *)(rings + 16 * num),
				   (void *)(rings + MODEL_USED) };
	q->device = (struct vring){ num, (void *)shadow,
				    (void *)(shadow + 16 * num),
				    (void *)(shadow + ((18 * num + 4096) & ~4095)) };
	q->memory = &m->map;
	q->segments = model_alloc(num * sizeof(*q->segments));
	q->elements = model_alloc(num * sizeof(*q->elements));
	q->pieces = model_alloc(num * sizeof(*q->pieces));
	q->next = model_alloc(num * sizeof(*q->next));
	q->features = features;
	q->guest_kick = q->guest_call = q->device_kick = q->device_call = -1;
	q->avail_gpa = MODEL_BASE + 16 * num;
	q->used_gpa = MODEL_BASE + MODEL_USED;
	svq_start(q);
}

/* From now on the device works on the guest's descriptors. */
static inline void model_share(struct model *m)
{
	struct svq *q = &m->q;

	q->device.desc = q->guest.desc;
	q->given_at = model_alloc(q->guest.num * sizeof(*q->given_at));
	svq_start(q);
}

static inline void model_free(struct model *m)
{
	model_free_memory(m);
	free(m->shadow);
	free(m->q.segments);
	free(m->q.elements);
	free(m->q.pieces);
	free(m->q.next);
	free(m->q.given_at);
}

#endif
