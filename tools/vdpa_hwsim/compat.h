/* SPDX-License-Identifier: (MIT OR GPL-2.0) */
/*
 * The only place that knows that one kernel's API is not another's. What is
 * here is chosen by tests on the headers themselves, made in Kbuild.
 */
#ifndef HWSIM_COMPAT_H
#define HWSIM_COMPAT_H

#include <linux/vdpa.h>

#ifdef HWSIM_HAVE_VIRTIO_MAP
/* Newer parents may bring mapping operations of their own; NULL asks for the DMA API. */
#define hwsim_vdpa_alloc(type, member, parent, ops, ngroups, nas, name) \
	vdpa_alloc_device(type, member, parent, ops, NULL, ngroups, nas, name, false)

static inline void hwsim_set_dma_dev(struct vdpa_device *vdpa, struct device *dma_dev)
{
	vdpa->vmap.dma_dev = dma_dev;
}
#else
#define hwsim_vdpa_alloc(type, member, parent, ops, ngroups, nas, name) \
	vdpa_alloc_device(type, member, parent, ops, ngroups, nas, name, false)

static inline void hwsim_set_dma_dev(struct vdpa_device *vdpa, struct device *dma_dev)
{
	vdpa->dma_dev = dma_dev;
}
#endif

#endif /* HWSIM_COMPAT_H */
