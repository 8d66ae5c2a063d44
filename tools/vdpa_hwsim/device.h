/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_DEVICE_H
#define HWSIM_DEVICE_H

#include <linux/sched.h>

#include "hwsim.h"

/*
 * The priority of the threads of the data path: low, since a NIC takes no CPU
 * from its host, and here the driver, the guest and what is measured need the
 * same. Not the lowest, since no program on its host makes a NIC wait for long.
 */
#define HWSIM_DATA_NICE	10

void hwsim_freeze(struct hwsim_dev *dev, bool frozen);
void hwsim_change(struct hwsim_dev *dev);
void hwsim_changed(struct hwsim_dev *dev);
void hwsim_set_peer(struct hwsim_dev *dev, struct hwsim_dev *peer);
void hwsim_look_at_pair(struct hwsim_pair *pair);
void hwsim_look_at_data(struct hwsim_dev *dev);
void hwsim_wake_work(struct work_struct *work);
void hwsim_config_changed(struct hwsim_dev *dev);
void hwsim_update_cvq_index(struct hwsim_dev *dev);
void hwsim_fault(struct hwsim_dev *dev, const struct hwsim_vq *vq, const char *what);

#endif /* HWSIM_DEVICE_H */
