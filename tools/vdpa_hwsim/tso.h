/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_TSO_H
#define HWSIM_TSO_H

#include "hwsim.h"

struct hwsim_tso {
	size_t l3, l4, headers, payload;	/* where they begin; lengths */
	u16 size;
	bool v6;
	unsigned int segs;
};

bool hwsim_tso_parse(const struct hwsim_dev *dev, const struct virtio_net_hdr *hdr,
		     const u8 *frame, size_t len, struct hwsim_tso *tso);
size_t hwsim_tso_segment(const struct hwsim_tso *tso, const u8 *frame, unsigned int i, u8 *out);

#endif /* HWSIM_TSO_H */
