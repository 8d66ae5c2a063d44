/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_CTRL_H
#define HWSIM_CTRL_H

#include "hwsim.h"

void hwsim_ctrl_reset(struct hwsim_dev *dev);
void hwsim_cvq_work(struct work_struct *work);
bool hwsim_accepts(const struct hwsim_dev *dev, const void *frame, size_t len);

#endif /* HWSIM_CTRL_H */
