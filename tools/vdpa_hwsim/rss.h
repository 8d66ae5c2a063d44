/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_RSS_H
#define HWSIM_RSS_H

#include "hwsim.h"

struct hwsim_hash {
	u32 value;
	u16 type;		/* VIRTIO_NET_HASH_REPORT_* */
};

struct hwsim_hash hwsim_hash(const struct hwsim_dev *dev, const void *frame, size_t len);
unsigned int hwsim_steer(const struct hwsim_dev *dev, unsigned int pair,
			 const struct hwsim_hash *hash);

#endif /* HWSIM_RSS_H */
