// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * Counters by name, and their way out through "vdpa dev vstats show": of a data
 * queue its own, of the control queue its own and those of the whole device.
 */
#include <net/netlink.h>
#include <uapi/linux/vdpa.h>

#include "stats.h"

const char * const hwsim_op_names[HWSIM_NOPS] = {
	[HWSIM_OP_SET_MAP] = "set_map",
	[HWSIM_OP_SET_MAP_HEAVY] = "set_map_heavy",
	[HWSIM_OP_DMA_MAP] = "dma_map",
	[HWSIM_OP_DMA_UNMAP] = "dma_unmap",
	[HWSIM_OP_RESET_MAP] = "reset_map",
	[HWSIM_OP_GROUP_ASID] = "set_group_asid",
	[HWSIM_OP_DRIVER_OK] = "driver_ok",
	[HWSIM_OP_SUSPEND] = "suspend",
	[HWSIM_OP_RESUME] = "resume",
	[HWSIM_OP_RESET] = "reset",
	[HWSIM_OP_RESET_CLEAN] = "reset_clean_map",
	[HWSIM_OP_VQ_CREATE] = "vq_create",
	[HWSIM_OP_VQ_DESTROY] = "vq_destroy",
	[HWSIM_OP_CVQ] = "cvq_command",
	[HWSIM_OP_CVQ_REFUSED] = "cvq_refused",
};

const char * const hwsim_vq_counter_names[HWSIM_VQ_NCOUNTERS] = {
	[HWSIM_VQ_KICKS] = "kicks",
	[HWSIM_VQ_CALLS] = "calls",
	[HWSIM_VQ_CHAINS] = "chains",
	[HWSIM_VQ_PACKETS] = "packets",
	[HWSIM_VQ_BYTES] = "bytes",
	[HWSIM_VQ_ERRORS] = "errors",
	[HWSIM_VQ_OVERRUNS] = "overruns",
	[HWSIM_VQ_FILTERED] = "filtered",
	[HWSIM_VQ_DOWN] = "down",
};

const char * const hwsim_counter_names[HWSIM_NCOUNTERS] = {
	[HWSIM_MAP_ENTRIES] = "map_entries",
	[HWSIM_MAP_PAGES] = "map_pages",
	[HWSIM_UNMAP_PAGES] = "unmap_pages",
	[HWSIM_FAULTS] = "faults",
	[HWSIM_CONFIG_CALLS] = "config_calls",
};

void hwsim_stats_reset(struct hwsim_dev *dev)
{
	unsigned int i, j;

	for (i = 0; i < HWSIM_NOPS; i++) {
		atomic64_set(&dev->op[i].count, 0);
		atomic64_set(&dev->op[i].errors, 0);
		atomic64_set(&dev->op[i].time_ns, 0);
		atomic64_set(&dev->op[i].charged_ns, 0);
	}
	for (i = 0; i < HWSIM_NCOUNTERS; i++)
		atomic64_set(&dev->counter[i], 0);
	for (i = 0; i < dev->vdpa.nvqs; i++)
		for (j = 0; j < HWSIM_VQ_NCOUNTERS; j++)
			atomic64_set(&dev->vqs[i].counter[j], 0);
}

static int put_counter(struct sk_buff *msg, const char *name, const char *suffix,
		       const atomic64_t *value)
{
	char full[32];

	snprintf(full, sizeof(full), "%s%s", name, suffix);
	if (nla_put_string(msg, VDPA_ATTR_DEV_VENDOR_ATTR_NAME, full) ||
	    nla_put_u64_64bit(msg, VDPA_ATTR_DEV_VENDOR_ATTR_VALUE, atomic64_read(value),
			      VDPA_ATTR_PAD))
		return -EMSGSIZE;
	return 0;
}

static int put_device_counters(struct hwsim_dev *dev, struct sk_buff *msg)
{
	unsigned int i;

	for (i = 0; i < HWSIM_NOPS; i++) {
		const struct hwsim_op_counter *op = &dev->op[i];

		if (put_counter(msg, hwsim_op_names[i], "", &op->count) ||
		    put_counter(msg, hwsim_op_names[i], "_ns", &op->time_ns))
			return -EMSGSIZE;
	}
	for (i = 0; i < HWSIM_NCOUNTERS; i++)
		if (put_counter(msg, hwsim_counter_names[i], "", &dev->counter[i]))
			return -EMSGSIZE;
	return 0;
}

int hwsim_vendor_vq_stats(struct vdpa_device *vdpa, u16 index, struct sk_buff *msg,
			  struct netlink_ext_ack *extack)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	unsigned int i;

	if (index >= vdpa->nvqs) {
		NL_SET_ERR_MSG_MOD(extack, "no such queue");
		return -EINVAL;
	}
	for (i = 0; i < HWSIM_VQ_NCOUNTERS; i++)
		if (put_counter(msg, hwsim_vq_counter_names[i], "", &dev->vqs[index].counter[i]))
			return -EMSGSIZE;
	return hwsim_is_cvq(dev, index) ? put_device_counters(dev, msg) : 0;
}
