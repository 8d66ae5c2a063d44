/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_STATS_H
#define HWSIM_STATS_H

#include "hwsim.h"

extern const char * const hwsim_op_names[HWSIM_NOPS];
extern const char * const hwsim_vq_counter_names[HWSIM_VQ_NCOUNTERS];
extern const char * const hwsim_counter_names[HWSIM_NCOUNTERS];
void hwsim_stats_reset(struct hwsim_dev *dev);
int hwsim_vendor_vq_stats(struct vdpa_device *vdpa, u16 index, struct sk_buff *msg,
			  struct netlink_ext_ack *extack);

#endif /* HWSIM_STATS_H */
