/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_COST_H
#define HWSIM_COST_H

#include "hwsim.h"

struct hwsim_op {
	struct hwsim_dev *dev;
	enum hwsim_op_id id;
	u64 charged;
	ktime_t start;
};

struct hwsim_map_cost {
	u64 pin, build, swap;
	bool heavy;
};

const struct hwsim_profile *hwsim_cost_find(const char *name);
void hwsim_cost_set_profile(struct hwsim_dev *dev, const struct hwsim_profile *profile);
const char *hwsim_cost_profile(const struct hwsim_dev *dev);
void hwsim_op_begin(struct hwsim_op *op, struct hwsim_dev *dev, enum hwsim_op_id id);
void hwsim_op_charge(struct hwsim_op *op, u64 ns);
void hwsim_op_end(struct hwsim_op *op, int err);
u64 hwsim_cost_bytes(const struct hwsim_dev *dev, enum hwsim_cost per_gib, u64 bytes);
u64 hwsim_cost_run(const struct hwsim_dev *dev, enum hwsim_cost per_gib, struct hwsim_run *run,
		   u64 iova, u64 size);
u64 hwsim_cost_forget(const struct hwsim_dev *dev, struct hwsim_as *as);
int hwsim_cost_set_map(struct hwsim_dev *dev, struct hwsim_as *as,
			struct vhost_iotlb *tree, struct hwsim_map_cost *cost);
int hwsim_cost_create_vqs(struct hwsim_dev *dev);
void hwsim_cost_destroy_vqs(struct hwsim_dev *dev);
u64 hwsim_cost_vqs(const struct hwsim_dev *dev, enum hwsim_cost base, enum hwsim_cost per_vq);

#endif /* HWSIM_COST_H */
