/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_WIRE_H
#define HWSIM_WIRE_H

#include "hwsim.h"

void hwsim_wire_add(struct hwsim_dev *dev);
void hwsim_wire_del(struct hwsim_dev *dev);
int hwsim_wire_connect(struct hwsim_dev *dev, const char *name);
void hwsim_wire_show(struct hwsim_dev *dev, char *buf, size_t len);
bool hwsim_wire_send(struct hwsim_dev *dev, unsigned int pair, const void *frame, size_t len,
		     bool csum_ok);

#endif /* HWSIM_WIRE_H */
