/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_OPS_H
#define HWSIM_OPS_H

#include "hwsim.h"

/* The complete table; each device has a copy without the calls it shall lack. */
extern const struct vdpa_config_ops hwsim_ops;

#endif /* HWSIM_OPS_H */
