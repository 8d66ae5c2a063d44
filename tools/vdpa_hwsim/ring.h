/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
#ifndef HWSIM_RING_H
#define HWSIM_RING_H

#include "hwsim.h"

int hwsim_vq_fetch(struct hwsim_dev *dev, struct hwsim_vq *vq, unsigned int want);
u16 hwsim_vq_take(struct hwsim_dev *dev, struct hwsim_vq *vq);
void hwsim_vq_put_back(struct hwsim_vq *vq, const u16 *heads, unsigned int n);
int hwsim_chain_add(struct hwsim_dev *dev, struct hwsim_vq *vq, u16 head,
		    struct hwsim_chain *chain);
int hwsim_chain_read(struct hwsim_dev *dev, struct hwsim_vq *vq,
		     const struct hwsim_chain *chain, void *buf, size_t len);
int hwsim_chain_write(struct hwsim_dev *dev, struct hwsim_vq *vq,
		      const struct hwsim_chain *chain, u64 offset, const void *buf, size_t len);
int hwsim_vq_complete(struct hwsim_dev *dev, struct hwsim_vq *vq, u16 head, u32 len);
int hwsim_vq_publish(struct hwsim_dev *dev, struct hwsim_vq *vq);
void hwsim_vq_signal(struct hwsim_dev *dev, struct hwsim_vq *vq);

#endif /* HWSIM_RING_H */
