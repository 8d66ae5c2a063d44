/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_VQ_H
#define HWSIM_VQ_H

#include "hwsim.h"

int hwsim_set_vq_address(struct vdpa_device *vdpa, u16 index, u64 desc, u64 driver, u64 device);
void hwsim_set_vq_num(struct vdpa_device *vdpa, u16 index, u32 num);
void hwsim_kick_vq(struct vdpa_device *vdpa, u16 index);
void hwsim_set_vq_cb(struct vdpa_device *vdpa, u16 index, struct vdpa_callback *cb);
void hwsim_set_vq_ready(struct vdpa_device *vdpa, u16 index, bool ready);
bool hwsim_get_vq_ready(struct vdpa_device *vdpa, u16 index);
int hwsim_set_vq_state(struct vdpa_device *vdpa, u16 index, const struct vdpa_vq_state *state);
int hwsim_get_vq_state(struct vdpa_device *vdpa, u16 index, struct vdpa_vq_state *state);
u16 hwsim_get_vq_size(struct vdpa_device *vdpa, u16 index);
u32 hwsim_get_vq_align(struct vdpa_device *vdpa);
u32 hwsim_get_vq_group(struct vdpa_device *vdpa, u16 index);
u32 hwsim_get_vq_desc_group(struct vdpa_device *vdpa, u16 index);
int hwsim_set_group_asid(struct vdpa_device *vdpa, unsigned int group, unsigned int asid);
struct vdpa_notification_area hwsim_get_vq_notification(struct vdpa_device *vdpa, u16 index);
void hwsim_doorbell_work(struct work_struct *work);
int hwsim_vqs_init(struct hwsim_dev *dev);
void hwsim_vqs_free(struct hwsim_dev *dev);
void hwsim_reset_vq(struct hwsim_dev *dev, struct hwsim_vq *vq);

#endif /* HWSIM_VQ_H */
