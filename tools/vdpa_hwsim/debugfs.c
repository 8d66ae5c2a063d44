// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * /sys/kernel/debug/vdpa_hwsim/DEVICE/: what the device is doing and how it is
 * set, one key=value per line, and the knobs for costs, faults, link and wire.
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "cost.h"
#include "debugfs.h"
#include "device.h"
#include "map.h"
#include "stats.h"
#include "wire.h"

static struct dentry *hwsim_debugfs;

static const char * const cost_names[HWSIM_NCOSTS] = {
	[HWSIM_COST_SET_MAP] = "set_map_ns",
	[HWSIM_COST_SET_MAP_ENTRY] = "set_map_entry_ns",
	[HWSIM_COST_SET_MAP_GIB] = "set_map_gib_ns",
	[HWSIM_COST_SET_MAP_HOLE_GIB] = "set_map_hole_gib_ns",
	[HWSIM_COST_MAP_GIB] = "map_gib_ns",
	[HWSIM_COST_UNMAP_GIB] = "unmap_gib_ns",
	[HWSIM_COST_VQ_CREATE] = "vq_create_ns",
	[HWSIM_COST_VQ_DESTROY] = "vq_destroy_ns",
	[HWSIM_COST_SUSPEND] = "suspend_ns",
	[HWSIM_COST_SUSPEND_VQ] = "suspend_vq_ns",
	[HWSIM_COST_RESUME] = "resume_ns",
	[HWSIM_COST_RESUME_VQ] = "resume_vq_ns",
	[HWSIM_COST_RESET] = "reset_ns",
	[HWSIM_COST_CVQ] = "cvq_ns",
};

static const char * const fail_names[HWSIM_NFAILS] = {
	[HWSIM_FAIL_SET_MAP] = "fail_set_map",
	[HWSIM_FAIL_CLEAN_MAP] = "fail_clean_map",
	[HWSIM_FAIL_SUSPEND] = "fail_suspend",
	[HWSIM_FAIL_RESUME] = "fail_resume",
	[HWSIM_FAIL_VQ_CREATE] = "fail_vq_create",
	[HWSIM_FAIL_USED_ID] = "corrupt_used_id",
	[HWSIM_FAIL_USED_LEN] = "corrupt_used_len",
};

static const char * const flaw_names[HWSIM_NFLAWS] = {
	[HWSIM_FLAW_STALL] = "stall",
	[HWSIM_FLAW_CVQ_MUTE] = "cvq_mute",
	[HWSIM_LIE_PERSIST] = "lie_persist",
	[HWSIM_LIE_SUSPEND] = "lie_suspend",
	[HWSIM_LIE_RESUME] = "lie_resume",
	[HWSIM_LIE_DESC_ASID] = "lie_desc_asid",
	[HWSIM_LIE_ENABLE] = "lie_enable",
	[HWSIM_FLAW_NO_CALL] = "no_call",
	[HWSIM_FLAW_CALL_ALWAYS] = "call_always",
	[HWSIM_FLAW_NO_CONFIG_CALL] = "no_config_call",
	[HWSIM_FLAW_CONFIG_CALL] = "config_call",
	[HWSIM_FLAW_KEEP_ASID] = "keep_asid",
	[HWSIM_FLAW_KEEP_READY] = "keep_ready",
	[HWSIM_FLAW_KEEP_BASE] = "keep_base",
	[HWSIM_FLAW_KEEP_STATUS] = "keep_status",
	[HWSIM_FLAW_KEEP_CTRL] = "keep_ctrl",
	[HWSIM_FLAW_KEEP_FAULT] = "keep_fault",
	[HWSIM_FLAW_IGNORE_PERM] = "ignore_perm",
	[HWSIM_FLAW_STALE_MAP] = "stale_map",
	[HWSIM_FLAW_ONE_AS] = "one_as",
	[HWSIM_FLAW_CORRUPT] = "corrupt_frame",
	[HWSIM_FLAW_BEYOND] = "write_beyond",
	[HWSIM_FLAW_SHORT_LEN] = "short_len",
	[HWSIM_FLAW_TX_LEN] = "tx_len",
	[HWSIM_FLAW_NUM_BUFFERS] = "num_buffers",
	[HWSIM_FLAW_JUNK_HEADER] = "junk_header",
	[HWSIM_FLAW_LOSE] = "lose_frames",
	[HWSIM_FLAW_CVQ_OK] = "cvq_ok",
	[HWSIM_FLAW_CVQ_ERR] = "cvq_err",
	[HWSIM_FLAW_CVQ_LEN] = "cvq_len",
	[HWSIM_FLAW_CVQ_LONG] = "cvq_long",
	[HWSIM_FLAW_CVQ_HALF] = "cvq_half",
	[HWSIM_FLAW_CVQ_SUSPENDED] = "cvq_suspended",
	[HWSIM_FLAW_SUSPENDED_STATUS] = "suspended_status",
	[HWSIM_FLAW_WAKE_STATUS] = "wake_by_status",
	[HWSIM_FLAW_WAKE_ENABLE] = "wake_by_enable",
	[HWSIM_FLAW_WAKE_KICK] = "wake_by_kick",
	[HWSIM_FLAW_BASE_OFF] = "base_off",
	[HWSIM_FLAW_BASE_MOVES] = "base_moves",
	[HWSIM_FLAW_RESUME_AT_0] = "resume_at_0",
	[HWSIM_FLAW_EARLY] = "early",
	[HWSIM_FLAW_NOT_READY] = "not_ready",
	[HWSIM_FLAW_NO_FEATURES_OK] = "no_features_ok",
	[HWSIM_FLAW_NO_DRIVER_OK] = "no_driver_ok",
	[HWSIM_FLAW_FEATURES_MOVE] = "features_move",
	[HWSIM_FLAW_CONFIG_MOVES] = "config_moves",
	[HWSIM_FLAW_BAD_GROUP] = "bad_group",
	[HWSIM_FLAW_NUM_IGNORED] = "num_ignored",
	[HWSIM_FLAW_ADDR_KEPT] = "addr_kept",
	[HWSIM_FLAW_EVENT_IGNORED] = "event_ignored",
	[HWSIM_FLAW_INDIRECT_FIRST] = "indirect_first",
	[HWSIM_FLAW_CHAIN_FIRST] = "chain_first",
	[HWSIM_FLAW_ALL_PAIRS] = "all_pairs",
	[HWSIM_FLAW_USED_TWICE] = "used_twice",
	[HWSIM_FLAW_SIZE_BEYOND] = "size_beyond",
	[HWSIM_FLAW_RINGS_IN_1] = "rings_in_1",
};

static void show_macs(struct seq_file *s, const char *key, const u8 (*macs)[ETH_ALEN], u32 n)
{
	u32 i;

	seq_printf(s, "%s=", key);
	if (n > HWSIM_MAX_MACS)
		seq_puts(s, "all");
	for (i = 0; n <= HWSIM_MAX_MACS && i < n; i++)
		seq_printf(s, "%s%pM", i ? "," : "", macs[i]);
	seq_putc(s, '\n');
}

static void show_ctrl(struct seq_file *s, const struct hwsim_dev *dev)
{
	const struct hwsim_ctrl *ctrl = &dev->ctrl;
	const struct hwsim_rss *rss = &ctrl->rss;
	unsigned int i;

	seq_printf(s, "mac=%pM\n", dev->config.mac);
	seq_printf(s, "link=%d\n", !!(dev->config.status &
				      (__force __virtio16)cpu_to_le16(VIRTIO_NET_S_LINK_UP)));
	seq_printf(s, "announce=%d\n", !!(dev->config.status &
					  (__force __virtio16)cpu_to_le16(VIRTIO_NET_S_ANNOUNCE)));
	seq_printf(s, "pairs=%u\n", ctrl->pairs);
	seq_printf(s, "promisc=%d\nallmulti=%d\nalluni=%d\nnomulti=%d\nnouni=%d\nnobcast=%d\n",
		   ctrl->promisc, ctrl->allmulti, ctrl->alluni, ctrl->nomulti, ctrl->nouni,
		   ctrl->nobcast);
	show_macs(s, "mac_table_uni", ctrl->uni, ctrl->nuni);
	show_macs(s, "mac_table_multi", ctrl->multi, ctrl->nmulti);
	seq_printf(s, "vlans=%*pbl\n", 4096, ctrl->vlans);
	seq_printf(s, "guest_offloads=0x%llx\n", ctrl->offloads);
	seq_printf(s, "rss_hash_types=0x%x\nrss_unclassified=%u\nrss_max_tx_vq=%u\nrss_table=",
		   rss->hash_types, rss->unclassified, rss->max_tx_vq);
	for (i = 0; i < rss->table_len; i++)
		seq_printf(s, "%s%u", i ? "," : "", rss->table[i]);
	seq_printf(s, "\nrss_key=%*phN\n", rss->key_len, rss->key);
}

static void show_maps(struct seq_file *s, const struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->opt.nas; i++) {
		struct vhost_iotlb *map = dev->as[i].map;
		struct vhost_iotlb_map *entry = vhost_iotlb_itree_first(map, 0, U64_MAX);
		u64 bytes = 0;

		for (; entry; entry = vhost_iotlb_itree_next(entry, 0, U64_MAX))
			bytes += entry->size;
		seq_printf(s, "as%u.entries=%u\nas%u.referenced=%u\nas%u.bytes=%llu\n", i,
			   map->nmaps, i, hwsim_as_referenced(&dev->as[i]), i, bytes);
		seq_printf(s, "as%u.given=%llu\nas%u.guest=%llu\n", i, dev->as[i].given, i,
			   dev->as[i].guest_bytes);
	}
}

static void show_vqs(struct seq_file *s, struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->vdpa.nvqs; i++) {
		const struct hwsim_vq *vq = &dev->vqs[i];

		seq_printf(s, "vq%u.ready=%d\nvq%u.num=%u\nvq%u.avail=%u\nvq%u.used=%u\n", i,
			   vq->ready, i, vq->num, i, vq->next_avail, i, vq->next_used);
		seq_printf(s, "vq%u.held=%u\n", i, vq->nheld);
	}
}

static int state_show(struct seq_file *s, void *unused)
{
	struct hwsim_dev *dev = s->private;
	char peer[32];

	hwsim_wire_show(dev, peer, sizeof(peer));
	down_read(&dev->dp);
	seq_printf(s, "status=0x%02x\n", dev->ops.get_status(&dev->vdpa));
	seq_printf(s, "suspended=%d\n", dev->suspended);
	seq_printf(s, "frozen=%d\n", dev->frozen);
	spin_lock(&dev->fault_lock);
	seq_printf(s, "fault=%s\n", test_bit(0, &dev->needs_reset) ? dev->fault : "");
	spin_unlock(&dev->fault_lock);
	seq_printf(s, "features=0x%llx\n", dev->features);
	seq_printf(s, "driver_features=0x%llx\n", dev->driver_features);
	seq_printf(s, "generation=%u\n", dev->generation);
	seq_printf(s, "max_pairs=%u\n", dev->npairs);
	seq_printf(s, "cvq_index=%u\n", dev->cvq_index);
	seq_printf(s, "asid.data=%u\nasid.cvq=%u\nasid.desc=%u\n", dev->asid[HWSIM_GROUP_DATA],
		   dev->asid[HWSIM_GROUP_CVQ], dev->asid[HWSIM_GROUP_DESC]);
	seq_printf(s, "peer=%s\n", peer);
	show_ctrl(s, dev);
	show_maps(s, dev);
	show_vqs(s, dev);
	up_read(&dev->dp);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(state);

static int stats_show(struct seq_file *s, void *unused)
{
	struct hwsim_dev *dev = s->private;
	unsigned int i, j;

	for (i = 0; i < HWSIM_NOPS; i++) {
		struct hwsim_op_counter *op = &dev->op[i];
		const char *name = hwsim_op_names[i];

		seq_printf(s, "%s=%lld\n%s_errors=%lld\n%s_ns=%lld\n%s_charged_ns=%lld\n",
			   name, atomic64_read(&op->count), name, atomic64_read(&op->errors),
			   name, atomic64_read(&op->time_ns), name,
			   atomic64_read(&op->charged_ns));
	}
	for (i = 0; i < HWSIM_NCOUNTERS; i++)
		seq_printf(s, "%s=%lld\n", hwsim_counter_names[i],
			   atomic64_read(&dev->counter[i]));
	for (i = 0; i < dev->vdpa.nvqs; i++)
		for (j = 0; j < HWSIM_VQ_NCOUNTERS; j++)
			seq_printf(s, "vq%u.%s=%lld\n", i, hwsim_vq_counter_names[j],
				   atomic64_read(&dev->vqs[i].counter[j]));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

static int reset_stats_set(void *data, u64 value)
{
	hwsim_stats_reset(data);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(reset_stats_fops, NULL, reset_stats_set, "%llu\n");

static void set_config_status(struct hwsim_dev *dev, u16 bit, bool on)
{
	__virtio16 mask = (__force __virtio16)cpu_to_le16(bit);

	hwsim_change(dev);
	if (on)
		dev->config.status |= mask;
	else
		dev->config.status &= ~mask;
	hwsim_config_changed(dev);
	hwsim_changed(dev);
}

static int link_set(void *data, u64 up)
{
	set_config_status(data, VIRTIO_NET_S_LINK_UP, up);
	return 0;
}

static int link_get(void *data, u64 *up)
{
	struct hwsim_dev *dev = data;

	down_read(&dev->dp);
	*up = !!(dev->config.status & (__force __virtio16)cpu_to_le16(VIRTIO_NET_S_LINK_UP));
	up_read(&dev->dp);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(link_fops, link_get, link_set, "%llu\n");

/* Ask the driver to announce itself; it answers on the control queue, which clears the bit. */
static int announce_set(void *data, u64 value)
{
	struct hwsim_dev *dev = data;

	if (!hwsim_has(dev, VIRTIO_NET_F_GUEST_ANNOUNCE))
		return -EOPNOTSUPP;
	set_config_status(dev, VIRTIO_NET_S_ANNOUNCE, true);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(announce_fops, NULL, announce_set, "%llu\n");

/* A line of text, as short as names are. */
static ssize_t get_line(char *line, size_t size, const char __user *buf, size_t len)
{
	if (len >= size)
		return -EINVAL;
	if (copy_from_user(line, buf, len))
		return -EFAULT;
	line[len] = '\0';
	strim(line);
	return len;
}

static ssize_t peer_write(struct file *file, const char __user *buf, size_t len, loff_t *pos)
{
	char line[64];
	ssize_t ret = get_line(line, sizeof(line), buf, len);
	int err;

	if (ret < 0)
		return ret;
	err = hwsim_wire_connect(file->private_data, line);
	return err ? err : ret;
}

static ssize_t peer_read(struct file *file, char __user *buf, size_t len, loff_t *pos)
{
	char line[64];

	hwsim_wire_show(file->private_data, line, sizeof(line) - 1);
	strcat(line, "\n");
	return simple_read_from_buffer(buf, len, pos, line, strlen(line));
}

static const struct file_operations peer_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = peer_read,
	.write = peer_write,
};

static ssize_t profile_write(struct file *file, const char __user *buf, size_t len, loff_t *pos)
{
	struct hwsim_dev *dev = file->private_data;
	const struct hwsim_profile *profile;
	char line[64];
	ssize_t ret = get_line(line, sizeof(line), buf, len);

	if (ret < 0)
		return ret;
	profile = hwsim_cost_find(line);
	if (!profile)
		return -EINVAL;
	mutex_lock(&dev->ctl);
	hwsim_cost_set_profile(dev, profile);
	mutex_unlock(&dev->ctl);
	return ret;
}

static ssize_t profile_read(struct file *file, char __user *buf, size_t len, loff_t *pos)
{
	char line[64];

	snprintf(line, sizeof(line), "%s\n", hwsim_cost_profile(file->private_data));
	return simple_read_from_buffer(buf, len, pos, line, strlen(line));
}

static const struct file_operations profile_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = profile_read,
	.write = profile_write,
};

static void add_cost(struct hwsim_dev *dev)
{
	struct dentry *dir = debugfs_create_dir("cost", dev->debugfs);
	unsigned int i;

	debugfs_create_file("profile", 0600, dir, dev, &profile_fops);
	for (i = 0; i < HWSIM_NCOSTS; i++)
		debugfs_create_u64(cost_names[i], 0600, dir, &dev->cost[i]);
	debugfs_create_u32("mem_scale", 0600, dir, &dev->opt.mem_scale);
	debugfs_create_bool("precreate", 0600, dir, &dev->precreate);
	debugfs_create_bool("map_rebuilds_vqs", 0600, dir, &dev->map_rebuilds_vqs);
}

static void add_fault(struct hwsim_dev *dev)
{
	struct dentry *dir = debugfs_create_dir("fault", dev->debugfs);
	unsigned int i;

	for (i = 0; i < HWSIM_NFAILS; i++)
		debugfs_create_atomic_t(fail_names[i], 0600, dir, &dev->fail[i]);
	for (i = 0; i < HWSIM_NFLAWS; i++)
		debugfs_create_bool(flaw_names[i], 0600, dir, &dev->flaw[i]);
}

void hwsim_debugfs_add(struct hwsim_dev *dev)
{
	dev->debugfs = debugfs_create_dir(dev_name(&dev->vdpa.dev), hwsim_debugfs);
	debugfs_create_file("state", 0400, dev->debugfs, dev, &state_fops);
	debugfs_create_file("stats", 0400, dev->debugfs, dev, &stats_fops);
	debugfs_create_file("reset_stats", 0200, dev->debugfs, dev, &reset_stats_fops);
	debugfs_create_file("link", 0600, dev->debugfs, dev, &link_fops);
	debugfs_create_file("announce", 0200, dev->debugfs, dev, &announce_fops);
	debugfs_create_file("peer", 0600, dev->debugfs, dev, &peer_fops);
	debugfs_create_bool("reorder", 0600, dev->debugfs, &dev->opt.reorder);
	add_cost(dev);
	add_fault(dev);
}

void hwsim_debugfs_del(struct hwsim_dev *dev)
{
	debugfs_remove(dev->debugfs);
}

void hwsim_debugfs_init(void)
{
	hwsim_debugfs = debugfs_create_dir(HWSIM_NAME, NULL);
}

void hwsim_debugfs_exit(void)
{
	debugfs_remove(hwsim_debugfs);
}
