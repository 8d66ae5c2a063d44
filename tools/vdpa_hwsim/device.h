/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_DEVICE_H
#define HWSIM_DEVICE_H

#include "hwsim.h"

void hwsim_freeze(struct hwsim_dev *dev, bool frozen);
void hwsim_look_at_data(struct hwsim_dev *dev);
void hwsim_config_changed(struct hwsim_dev *dev);
void hwsim_update_cvq_index(struct hwsim_dev *dev);
void hwsim_fault(struct hwsim_dev *dev, const struct hwsim_vq *vq, const char *what);

#endif /* HWSIM_DEVICE_H */
