/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_MAP_H
#define HWSIM_MAP_H

#include "hwsim.h"

int hwsim_as_init(struct hwsim_dev *dev);
void hwsim_as_free(struct hwsim_dev *dev);
int hwsim_as_clean(struct hwsim_dev *dev);
void hwsim_as_forget(struct hwsim_dev *dev);
unsigned int hwsim_as_referenced(const struct hwsim_as *as);
int hwsim_set_map(struct vdpa_device *vdpa, unsigned int asid, struct vhost_iotlb *iotlb);
int hwsim_dma_map(struct vdpa_device *vdpa, unsigned int asid, u64 iova, u64 size,
		  u64 pa, u32 perm, void *opaque);
int hwsim_dma_unmap(struct vdpa_device *vdpa, unsigned int asid, u64 iova, u64 size);
int hwsim_reset_map(struct vdpa_device *vdpa, unsigned int asid);
int hwsim_copy(struct hwsim_dev *dev, unsigned int asid, u64 iova, void *buf, size_t len,
	       bool write);
int hwsim_read16(struct hwsim_dev *dev, unsigned int asid, u64 iova, u16 *value);
int hwsim_write16(struct hwsim_dev *dev, unsigned int asid, u64 iova, u16 value);

#endif /* HWSIM_MAP_H */
