/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_DEBUGFS_H
#define HWSIM_DEBUGFS_H

#include "hwsim.h"

void hwsim_debugfs_init(void);
void hwsim_debugfs_exit(void);
void hwsim_debugfs_add(struct hwsim_dev *dev);
void hwsim_debugfs_del(struct hwsim_dev *dev);

#endif /* HWSIM_DEBUGFS_H */
