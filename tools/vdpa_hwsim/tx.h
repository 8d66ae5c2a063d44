/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_TX_H
#define HWSIM_TX_H

#include "hwsim.h"

int hwsim_tx_init(struct hwsim_dev *dev);
void hwsim_tx_free(struct hwsim_dev *dev);

#endif /* HWSIM_TX_H */
