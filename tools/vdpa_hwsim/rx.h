/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_RX_H
#define HWSIM_RX_H

#include "hwsim.h"

size_t hwsim_hdr_len(const struct hwsim_dev *dev);
void hwsim_receive(struct hwsim_dev *dev, unsigned int pair, const void *frame, size_t len,
		   bool csum_ok, const struct hwsim_vq *own);

#endif /* HWSIM_RX_H */
