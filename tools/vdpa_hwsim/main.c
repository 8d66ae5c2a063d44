// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The module, its parameters, and the management device that makes and deletes
 * vDPA devices.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/random.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <uapi/linux/vdpa.h>
#include <uapi/linux/vhost_types.h>
#include <uapi/linux/virtio_ids.h>

#include "compat.h"
#include "cost.h"
#include "ctrl.h"
#include "debugfs.h"
#include "device.h"
#include "map.h"
#include "ops.h"
#include "tx.h"
#include "vq.h"
#include "wire.h"

static struct hwsim_options defaults = {
	.nas = 2,
	.ring_max = HWSIM_DEF_RING,
	.inflight_us = 20000,
	.mem_scale = 1,
	.scale_min = SZ_2M,
	.heavy_min = SZ_64M,
	.suspend = true,
	.resume = true,
	.enable_after_driver_ok = true,
	.desc_asid = true,
	.persist = true,
	.clean_map = true,
	.vq_size = true,
	.filter = true,
};
static char *cost_profile = "none";
static ulong extra_features;

#define HWSIM_PARAM(name, type, text) \
	module_param_named(name, defaults.name, type, 0644); \
	MODULE_PARM_DESC(name, text)

HWSIM_PARAM(nas, uint, "Number of address spaces (default 2, as mlx5_vdpa)");
HWSIM_PARAM(single_group, bool, "All queues and descriptors in one group");
HWSIM_PARAM(dma_map, bool, "Offer dma_map and dma_unmap instead of set_map");
HWSIM_PARAM(identity, bool, "Without maps an IOVA is a physical address (virtio_vdpa needs that)");
HWSIM_PARAM(suspend, bool, "Offer SUSPEND (default Y)");
HWSIM_PARAM(resume, bool, "Offer RESUME (default Y)");
HWSIM_PARAM(enable_after_driver_ok, bool, "Offer ENABLE_AFTER_DRIVER_OK (default Y)");
HWSIM_PARAM(desc_asid, bool, "Offer DESC_ASID (default Y)");
HWSIM_PARAM(persist, bool, "Offer IOTLB_PERSIST (default Y)");
HWSIM_PARAM(clean_map, bool, "Drop maps at a reset that asks for it, as since 6.7 (default Y)");
HWSIM_PARAM(vq_size, bool, "Answer GET_VRING_SIZE (default Y; mlx5_vdpa does not)");
HWSIM_PARAM(ring_max, uint, "Largest ring (default 256, at most 32768)");
HWSIM_PARAM(doorbell_us, uint, "Doorbell pages, polled this often (default 0: none)");
HWSIM_PARAM(base_avail, bool, "A ring's base is its avail index, not its used index");
HWSIM_PARAM(inflight, uint, "Descriptors held back on each data queue (default 0, at most 256)");
HWSIM_PARAM(inflight_us, uint, "How long they are held back if nothing follows (default 20000)");
HWSIM_PARAM(reorder, bool, "Take held descriptors out of order");
HWSIM_PARAM(resume_cvq, bool, "RESUME makes the control queue ready again (mlx5_vdpa's does not)");
HWSIM_PARAM(indirect_in_data, bool, "Indirect tables are reached through the data group");
HWSIM_PARAM(filter, bool, "Filter what is received by MAC and VLAN (default Y)");
HWSIM_PARAM(wire, bool, "Wire each device to the next instead of looping back");
HWSIM_PARAM(mem_scale, uint, "Charge guest memory this many times (default 1)");
HWSIM_PARAM(scale_min, ulong, "Bytes from which on a piece is guest memory (default 2 MiB)");
HWSIM_PARAM(heavy_min, ulong, "Bytes from which on a set_map counts as heavy (default 64 MiB)");
module_param(cost_profile, charp, 0644);
MODULE_PARM_DESC(cost_profile, "none (default), series-2023 or mlx5-2025");
module_param(extra_features, ulong, 0644);
MODULE_PARM_DESC(extra_features, "Feature bits to offer beside those mlx5_vdpa offers");

/* What mlx5_vdpa offers on a ConnectX-6 Dx (get_supported_features()). */
#define HWSIM_FEATURES \
	(BIT_ULL(VIRTIO_NET_F_CSUM) | BIT_ULL(VIRTIO_NET_F_GUEST_CSUM) | \
	 BIT_ULL(VIRTIO_NET_F_HOST_TSO4) | BIT_ULL(VIRTIO_NET_F_HOST_TSO6) | \
	 BIT_ULL(VIRTIO_NET_F_MTU) | BIT_ULL(VIRTIO_NET_F_MAC) | \
	 BIT_ULL(VIRTIO_NET_F_STATUS) | BIT_ULL(VIRTIO_NET_F_CTRL_VQ) | \
	 BIT_ULL(VIRTIO_NET_F_CTRL_VLAN) | BIT_ULL(VIRTIO_NET_F_MQ) | \
	 BIT_ULL(VIRTIO_NET_F_CTRL_MAC_ADDR) | BIT_ULL(VIRTIO_F_VERSION_1) | \
	 BIT_ULL(VIRTIO_F_ACCESS_PLATFORM))

/* What works beyond that, on request. */
#define HWSIM_MORE_FEATURES \
	(BIT_ULL(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) | BIT_ULL(VIRTIO_NET_F_GUEST_TSO4) | \
	 BIT_ULL(VIRTIO_NET_F_GUEST_TSO6) | BIT_ULL(VIRTIO_NET_F_GUEST_ECN) | \
	 BIT_ULL(VIRTIO_NET_F_GUEST_UFO) | BIT_ULL(VIRTIO_NET_F_MRG_RXBUF) | \
	 BIT_ULL(VIRTIO_NET_F_CTRL_RX) | BIT_ULL(VIRTIO_NET_F_CTRL_RX_EXTRA) | \
	 BIT_ULL(VIRTIO_NET_F_GUEST_ANNOUNCE) | BIT_ULL(VIRTIO_NET_F_RSS) | \
	 BIT_ULL(VIRTIO_NET_F_HASH_REPORT) | BIT_ULL(VIRTIO_RING_F_INDIRECT_DESC) | \
	 BIT_ULL(VIRTIO_RING_F_EVENT_IDX) | BIT_ULL(VIRTIO_F_ANY_LAYOUT) | \
	 BIT_ULL(VIRTIO_F_RING_RESET))

/* What is asked of one device. Parameters may be written at any time, so they are read once. */
struct request {
	struct hwsim_options opt;
	const struct hwsim_profile *profile;
	u64 features;
};

static void read_parameters(struct request *asked, const struct vdpa_dev_set_config *add)
{
	kernel_param_lock(THIS_MODULE);
	asked->opt = defaults;
	asked->profile = hwsim_cost_find(cost_profile);
	asked->features = HWSIM_FEATURES | (extra_features & HWSIM_MORE_FEATURES);
	kernel_param_unlock(THIS_MODULE);
	if (add->mask & BIT_ULL(VDPA_ATTR_DEV_FEATURES))
		asked->features = add->device_features;
}

static int check_options(const struct hwsim_options *opt)
{
	if (!opt->nas || opt->nas > HWSIM_MAX_NAS || opt->inflight > HWSIM_MAX_INFLIGHT ||
	    !is_power_of_2(opt->ring_max) || opt->ring_max > HWSIM_MAX_RING ||
	    !opt->mem_scale || opt->mem_scale > SZ_4K || !opt->scale_min ||
	    opt->doorbell_us > USEC_PER_SEC) {
		pr_err("a parameter is out of range\n");
		return -EINVAL;
	}
	return 0;
}

/* The last reference is gone, or dev_add() failed half-way. */
static void hwsim_free(struct vdpa_device *vdpa)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	hwsim_tx_free(dev);
	hwsim_as_free(dev);
	hwsim_vqs_free(dev);
	kfree(dev->cvq_buf);
}

/* vhost-vdpa offers a backend feature if the operation behind it is there. */
static void choose_ops(struct hwsim_dev *dev)
{
	const struct hwsim_options *opt = &dev->opt;
	struct vdpa_config_ops *ops = &dev->ops;

	*ops = hwsim_ops;
	ops->free = hwsim_free;
	if (opt->dma_map) {
		ops->set_map = NULL;
	} else {
		ops->dma_map = NULL;
		ops->dma_unmap = NULL;
	}
	if (!opt->suspend)
		ops->suspend = NULL;
	if (!opt->resume)
		ops->resume = NULL;
	if (!opt->desc_asid)
		ops->get_vq_desc_group = NULL;
	if (!opt->persist)
		ops->reset_map = NULL;
	if (!opt->clean_map)
		ops->compat_reset = NULL;
	if (!opt->vq_size)
		ops->get_vq_size = NULL;
	if (!opt->doorbell_us)
		ops->get_vq_notification = NULL;
	dev->vdpa.config = ops;
}

static int check_features(u64 features)
{
	u64 needed = BIT_ULL(VIRTIO_F_VERSION_1) | BIT_ULL(VIRTIO_F_ACCESS_PLATFORM);

	if (features & ~(HWSIM_FEATURES | HWSIM_MORE_FEATURES))
		return -EINVAL;
	/* As mlx5_vdpa_dev_add(). */
	return (features & needed) == needed ? 0 : -EOPNOTSUPP;
}

static int check(const struct request *asked, const struct vdpa_dev_set_config *add)
{
	int err = check_options(&asked->opt);

	if (err)
		return err;
	if (!asked->profile)
		return -EINVAL;
	if ((add->mask & BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MAX_VQP)) &&
	    add->net.max_vq_pairs > HWSIM_MAX_PAIRS)
		return -EINVAL;
	return check_features(asked->features);
}

static void init_config(struct hwsim_dev *dev, const struct vdpa_dev_set_config *add)
{
	struct virtio_net_config *config = &dev->config;
	u16 mtu = ETH_DATA_LEN;

	if (add->mask & BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MACADDR))
		memcpy(config->mac, add->net.mac, ETH_ALEN);
	else
		eth_random_addr(config->mac);
	if (add->mask & BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MTU))
		mtu = add->net.mtu;
	config->mtu = (__force __virtio16)cpu_to_le16(mtu);
	config->status = (__force __virtio16)cpu_to_le16(VIRTIO_NET_S_LINK_UP);
	config->max_virtqueue_pairs = (__force __virtio16)cpu_to_le16(dev->npairs);
	config->rss_max_key_size = HWSIM_RSS_KEY;
	config->rss_max_indirection_table_length = cpu_to_le16(HWSIM_RSS_TABLE);
	config->supported_hash_types =
		cpu_to_le32(VIRTIO_NET_RSS_HASH_TYPE_IPv4 | VIRTIO_NET_RSS_HASH_TYPE_TCPv4 |
			    VIRTIO_NET_RSS_HASH_TYPE_UDPv4 | VIRTIO_NET_RSS_HASH_TYPE_IPv6 |
			    VIRTIO_NET_RSS_HASH_TYPE_TCPv6 | VIRTIO_NET_RSS_HASH_TYPE_UDPv6);
}

/* Everything but what vdpa_alloc_device() does; on an error hwsim_free() has the rest. */
static int init_device(struct hwsim_dev *dev, const struct request *asked,
		       const struct vdpa_dev_set_config *add)
{
	int err;

	mutex_init(&dev->ctl);
	init_rwsem(&dev->dp);
	spin_lock_init(&dev->fault_lock);
	INIT_LIST_HEAD(&dev->node);
	INIT_WORK(&dev->cvq_work, hwsim_cvq_work);
	INIT_WORK(&dev->doorbell_work, hwsim_doorbell_work);
	INIT_WORK(&dev->wake_work, hwsim_wake_work);
	dev->npairs = add->mask & BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MAX_VQP) ?
		      add->net.max_vq_pairs : 1;
	dev->features = asked->features;
	hwsim_cost_set_profile(dev, asked->profile);
	init_config(dev, add);
	hwsim_ctrl_reset(dev);
	hwsim_update_cvq_index(dev);

	dev->cvq_buf = kmalloc(HWSIM_MAX_CTRL, GFP_KERNEL);
	if (!dev->cvq_buf)
		return -ENOMEM;
	err = hwsim_vqs_init(dev);
	if (!err)
		err = hwsim_as_init(dev);
	if (!err)
		err = hwsim_tx_init(dev);
	return err;
}

static struct device *hwsim_root;

static int hwsim_dev_add(struct vdpa_mgmt_dev *mgmt, const char *name,
			 const struct vdpa_dev_set_config *add)
{
	struct request asked;
	struct hwsim_dev *dev;
	int err;

	read_parameters(&asked, add);
	err = check(&asked, add);
	if (err)
		return err;

	dev = hwsim_vdpa_alloc(struct hwsim_dev, vdpa, hwsim_root, &hwsim_ops,
			       asked.opt.single_group ? 1 : HWSIM_NGROUPS, asked.opt.nas, name);
	if (IS_ERR(dev))
		return PTR_ERR(dev);
	dev->opt = asked.opt;
	choose_ops(dev);
	err = init_device(dev, &asked, add);
	if (err)
		goto put;
	dev->vdpa.mdev = mgmt;
	hwsim_set_dma_dev(&dev->vdpa, &dev->vdpa.dev);
	if (dev->precreate)
		err = hwsim_cost_create_vqs(dev);
	if (err)
		goto put;

	/* Else rmmod waits for the holder of the device, and all of vdpa's netlink for rmmod. */
	__module_get(THIS_MODULE);
	hwsim_wire_add(dev);
	err = _vdpa_register_device(&dev->vdpa, 2 * dev->npairs + 1);
	if (err)
		goto unwire;
	hwsim_debugfs_add(dev);
	return 0;

unwire:
	hwsim_wire_del(dev);
	module_put(THIS_MODULE);
put:
	put_device(&dev->vdpa.dev);
	return err;
}

/*
 * module_put() is not too early: vdpa_mgmtdev_unregister(), without which the
 * module does not go, waits for the lock that is held around this.
 */
static void hwsim_dev_del(struct vdpa_mgmt_dev *mgmt, struct vdpa_device *vdpa)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);

	hwsim_debugfs_del(dev);
	hwsim_wire_del(dev);
	get_device(&vdpa->dev);
	_vdpa_unregister_device(vdpa);
	/* The driver that was bound to it has reset it, unless that went wrong. */
	dev->ops.reset(vdpa);
	put_device(&vdpa->dev);
	module_put(THIS_MODULE);
}

/* mlx5_vdpa_set_attr() */
static int hwsim_dev_set_attr(struct vdpa_mgmt_dev *mgmt, struct vdpa_device *vdpa,
			      const struct vdpa_dev_set_config *set)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	int err = 0;

	if (!(set->mask & BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MACADDR)))
		return -EOPNOTSUPP;
	hwsim_change(dev);
	if (dev->status & VIRTIO_CONFIG_S_DRIVER_OK)
		err = -EBUSY;
	else
		memcpy(dev->config.mac, set->net.mac, ETH_ALEN);
	hwsim_changed(dev);
	return err;
}

static const struct vdpa_mgmtdev_ops hwsim_mgmt_ops = {
	.dev_add = hwsim_dev_add,
	.dev_del = hwsim_dev_del,
	.dev_set_attr = hwsim_dev_set_attr,
};

static struct virtio_device_id hwsim_ids[] = {
	{ VIRTIO_ID_NET, VIRTIO_DEV_ANY_ID },
	{ 0 },
};

static struct vdpa_mgmt_dev hwsim_mgmt = {
	.ops = &hwsim_mgmt_ops,
	.id_table = hwsim_ids,
	.config_attr_mask = BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MACADDR) |
			    BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MTU) |
			    BIT_ULL(VDPA_ATTR_DEV_NET_CFG_MAX_VQP) |
			    BIT_ULL(VDPA_ATTR_DEV_FEATURES),
	.supported_features = HWSIM_FEATURES | HWSIM_MORE_FEATURES,
	.max_supported_vqs = 2 * HWSIM_MAX_PAIRS + 1,
};

static int __init hwsim_init(void)
{
	int err;

	hwsim_root = root_device_register(HWSIM_NAME);
	if (IS_ERR(hwsim_root))
		return PTR_ERR(hwsim_root);
	hwsim_debugfs_init();
	hwsim_mgmt.device = hwsim_root;
	err = vdpa_mgmtdev_register(&hwsim_mgmt);
	if (err) {
		hwsim_debugfs_exit();
		root_device_unregister(hwsim_root);
	}
	return err;
}
module_init(hwsim_init);

static void __exit hwsim_exit(void)
{
	vdpa_mgmtdev_unregister(&hwsim_mgmt);
	hwsim_debugfs_exit();
	root_device_unregister(hwsim_root);
}
module_exit(hwsim_exit);

MODULE_DESCRIPTION("vDPA network device without hardware: descriptor groups, faults and costs");
MODULE_LICENSE("Dual MIT/GPL");
