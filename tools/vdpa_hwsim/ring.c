// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * The device's side of a split virtqueue.
 *
 * Rings (descriptor table, avail, used) are reached through the address space
 * of the queue's descriptor group, buffers through that of its data group: the
 * reason why vringh, which knows one IOTLB for both, is not used.
 *
 * All of it is under the control of the rings' owner and may change at
 * any moment. Every value is read once and checked before use, every loop is
 * bounded by a value of the device. The first thing that cannot be right stops
 * the device (hwsim_fault()); what was fetched by then stays incomplete.
 */
#include <linux/bottom_half.h>
#include <linux/virtio_ring.h>

#include "device.h"
#include "map.h"
#include "ring.h"

static unsigned int data_asid(const struct hwsim_dev *dev, const struct hwsim_vq *vq)
{
	return dev->asid[hwsim_is_cvq(dev, vq->index) ? HWSIM_GROUP_CVQ : HWSIM_GROUP_DATA];
}

static unsigned int ring_asid(const struct hwsim_dev *dev, const struct hwsim_vq *vq)
{
	if (hwsim_flawed(dev, HWSIM_FLAW_RINGS_IN_1) && dev->opt.nas > 1)
		return 1;
	if (!dev->opt.desc_asid || hwsim_flawed(dev, HWSIM_LIE_DESC_ASID))
		return data_asid(dev, vq);
	return dev->asid[hwsim_is_cvq(dev, vq->index) ? HWSIM_GROUP_CVQ : HWSIM_GROUP_DESC];
}

static u64 avail_entry(const struct hwsim_vq *vq, u16 index)
{
	return vq->avail + offsetof(struct vring_avail, ring[index & (vq->num - 1)]);
}

static u64 used_entry(const struct hwsim_vq *vq, u16 index)
{
	return vq->used + offsetof(struct vring_used, ring[index & (vq->num - 1)]);
}

/* Behind the rings' ends: when the other side wants to hear from us, and we from it. */
static u64 used_event(const struct hwsim_vq *vq)
{
	return vq->avail + offsetof(struct vring_avail, ring[vq->num]);
}

static u64 avail_event(const struct hwsim_vq *vq)
{
	return vq->used + offsetof(struct vring_used, ring[vq->num]);
}

static int read_avail(struct hwsim_dev *dev, struct hwsim_vq *vq, u16 *index)
{
	return hwsim_read16(dev, ring_asid(dev, vq),
			    vq->avail + offsetof(struct vring_avail, idx), index);
}

/* Number of heads that can be fetched; asks to be kicked if that is 0. */
static int avail_heads(struct hwsim_dev *dev, struct hwsim_vq *vq)
{
	u16 index, n;

	if (read_avail(dev, vq, &index))
		return -EFAULT;
	if (index == vq->next_avail && hwsim_has(dev, VIRTIO_RING_F_EVENT_IDX) &&
	    !hwsim_flawed(dev, HWSIM_FLAW_EVENT_IGNORED)) {
		if (hwsim_write16(dev, ring_asid(dev, vq), avail_event(vq), vq->next_avail))
			return -EFAULT;
		/* The driver publishes, then looks at avail_event; we the other way round. */
		virt_mb();
		if (read_avail(dev, vq, &index))
			return -EFAULT;
	}
	/* Entries are read after the index that covers them. */
	virt_rmb();
	n = index - vq->next_avail;
	return n > vq->num ? -EINVAL : n;
}

/*
 * See to it that up to @want heads are fetched. Returns how many there are
 * (including those fetched before), or an error after hwsim_fault().
 */
int hwsim_vq_fetch(struct hwsim_dev *dev, struct hwsim_vq *vq, unsigned int want)
{
	int avail;

	want = min_t(unsigned int, want, HWSIM_MAX_HELD);
	if (vq->nheld >= want)
		return vq->nheld;
	avail = avail_heads(dev, vq);
	if (avail < 0) {
		hwsim_fault(dev, vq, avail == -EFAULT ? "avail ring not mapped" :
			    "avail index out of range");
		return avail;
	}
	for (; avail && vq->nheld < want; avail--) {
		u16 head;

		if (hwsim_read16(dev, ring_asid(dev, vq), avail_entry(vq, vq->next_avail),
				 &head)) {
			hwsim_fault(dev, vq, "avail ring not mapped");
			return -EFAULT;
		}
		if (head >= vq->num) {
			hwsim_fault(dev, vq, "avail entry out of range");
			return -EINVAL;
		}
		vq->held[vq->nheld++] = head;
		vq->next_avail++;
	}
	return vq->nheld;
}

/*
 * Take one of the fetched heads: the oldest, or with the reorder option one
 * after the other by position, so that the remaining ones are neither the
 * newest nor in any order, and do not wait for ever.
 */
u16 hwsim_vq_take(struct hwsim_dev *dev, struct hwsim_vq *vq)
{
	unsigned int pos = dev->opt.reorder ? (vq->next_used * 7 + 1) % vq->nheld : 0;
	u16 head = vq->held[pos];

	vq->nheld--;
	memmove(&vq->held[pos], &vq->held[pos + 1], (vq->nheld - pos) * sizeof(vq->held[0]));
	return head;
}

void hwsim_vq_put_back(struct hwsim_vq *vq, const u16 *heads, unsigned int n)
{
	memmove(&vq->held[n], &vq->held[0], vq->nheld * sizeof(vq->held[0]));
	memcpy(&vq->held[0], heads, n * sizeof(vq->held[0]));
	vq->nheld += n;
}

/* A descriptor table: the ring's own, or an indirect one. */
struct table {
	unsigned int asid;
	u64 base;
	u32 num;
};

static const char *enter_indirect(struct hwsim_dev *dev, struct hwsim_vq *vq,
				  const struct vring_desc *desc, struct table *table)
{
	u32 len = le32_to_cpu((__force __le32)desc->len);

	if (!hwsim_has(dev, VIRTIO_RING_F_INDIRECT_DESC))
		return "indirect descriptor not negotiated";
	if (le16_to_cpu((__force __le16)desc->flags) & VRING_DESC_F_NEXT)
		return "indirect descriptor with next";
	if (table->base != vq->desc)
		return "indirect descriptor in an indirect table";
	if (!len || len % sizeof(*desc))
		return "indirect table of odd size";
	/*
	 * The UAPI says that the descriptor group holds the descriptor table,
	 * driver and device areas, and nothing about indirect tables. They are
	 * descriptors, so they are looked for there; or by option with the data.
	 */
	table->asid = dev->opt.indirect_in_data ? data_asid(dev, vq) : ring_asid(dev, vq);
	table->base = le64_to_cpu((__force __le64)desc->addr);
	table->num = len / sizeof(*desc);
	return NULL;
}

static const char *add_segment(struct hwsim_vq *vq, const struct vring_desc *desc, bool write,
			       struct hwsim_chain *chain)
{
	struct hwsim_seg *seg;

	if (chain->nsegs == HWSIM_MAX_SEGS)
		return "chain too long";
	seg = &vq->segs[chain->nsegs++];
	seg->addr = le64_to_cpu((__force __le64)desc->addr);
	seg->len = le32_to_cpu((__force __le32)desc->len);
	seg->write = write;
	if (write)
		chain->in += seg->len;
	else
		chain->out += seg->len;
	return NULL;
}

static const char *walk_chain(struct hwsim_dev *dev, struct hwsim_vq *vq, u16 head,
			      struct hwsim_chain *chain)
{
	struct table table = { .asid = ring_asid(dev, vq), .base = vq->desc, .num = vq->num };
	bool written = false;
	u32 index = head;
	unsigned int i;

	/* One more than segments, for the descriptor that leads to an indirect table. */
	for (i = 0; i <= HWSIM_MAX_SEGS; i++) {
		struct vring_desc desc;
		const char *wrong;
		u16 flags;
		bool write;

		if (index >= table.num)
			return "next descriptor out of range";
		if (hwsim_copy(dev, table.asid, table.base + index * sizeof(desc), &desc,
			       sizeof(desc), false))
			return "descriptor not mapped";
		flags = le16_to_cpu((__force __le16)desc.flags);
		if (flags & VRING_DESC_F_INDIRECT) {
			wrong = enter_indirect(dev, vq, &desc, &table);
			if (wrong)
				return wrong;
			index = 0;
			continue;
		}
		write = flags & VRING_DESC_F_WRITE;
		if (written && !write)
			return "readable descriptor after a writable one";
		written = write;
		wrong = add_segment(vq, &desc, write, chain);
		if (wrong)
			return wrong;
		if (hwsim_flawed(dev, HWSIM_FLAW_CHAIN_FIRST) ||
		    (hwsim_flawed(dev, HWSIM_FLAW_INDIRECT_FIRST) && table.base != vq->desc))
			return NULL;
		if (!(flags & VRING_DESC_F_NEXT))
			return NULL;
		index = le16_to_cpu((__force __le16)desc.next);
	}
	return "chain too long";
}

/* Add the buffers of the chain at @head to @chain. */
int hwsim_chain_add(struct hwsim_dev *dev, struct hwsim_vq *vq, u16 head,
		    struct hwsim_chain *chain)
{
	const char *wrong = walk_chain(dev, vq, head, chain);

	if (!wrong)
		return 0;
	hwsim_fault(dev, vq, wrong);
	return -EINVAL;
}

static int copy_chain(struct hwsim_dev *dev, struct hwsim_vq *vq,
		      const struct hwsim_chain *chain, u64 offset, void *buf, size_t len,
		      bool write)
{
	unsigned int i;

	for (i = 0; len && i < chain->nsegs; i++) {
		const struct hwsim_seg *seg = &vq->segs[i];
		size_t n;

		if (seg->write != write)
			continue;
		if (offset >= seg->len) {
			offset -= seg->len;
			continue;
		}
		n = min_t(u64, len, seg->len - offset);
		if (hwsim_copy(dev, data_asid(dev, vq), seg->addr + offset, buf, n, write)) {
			hwsim_fault(dev, vq, "buffer not mapped");
			return -EFAULT;
		}
		offset = 0;
		buf += n;
		len -= n;
	}
	return len ? -EINVAL : 0;
}

int hwsim_chain_read(struct hwsim_dev *dev, struct hwsim_vq *vq,
		     const struct hwsim_chain *chain, void *buf, size_t len)
{
	return copy_chain(dev, vq, chain, 0, buf, len, false);
}

int hwsim_chain_write(struct hwsim_dev *dev, struct hwsim_vq *vq,
		      const struct hwsim_chain *chain, u64 offset, const void *buf, size_t len)
{
	return copy_chain(dev, vq, chain, offset, (void *)buf, len, true);
}

/* Write a used element. The driver sees it only after hwsim_vq_publish(). */
int hwsim_vq_complete(struct hwsim_dev *dev, struct hwsim_vq *vq, u16 head, u32 len)
{
	struct vring_used_elem elem;
	u32 id = head;

	if (hwsim_fail(dev, HWSIM_FAIL_USED_ID))
		id += vq->num;
	if (hwsim_fail(dev, HWSIM_FAIL_USED_LEN))
		len ^= BIT(24);
	elem.id = (__force __virtio32)cpu_to_le32(id);
	elem.len = (__force __virtio32)cpu_to_le32(len);
	if (hwsim_copy(dev, ring_asid(dev, vq), used_entry(vq, vq->next_used), &elem,
		       sizeof(elem), true)) {
		hwsim_fault(dev, vq, "used ring not mapped");
		return -EFAULT;
	}
	vq->next_used++;
	hwsim_vq_count(vq, HWSIM_VQ_CHAINS, 1);
	return 0;
}

int hwsim_vq_publish(struct hwsim_dev *dev, struct hwsim_vq *vq)
{
	if (hwsim_flawed(dev, HWSIM_FLAW_USED_TWICE))
		vq->next_used++;
	/* Buffers and used elements before the index that hands them over. */
	virt_wmb();
	if (hwsim_write16(dev, ring_asid(dev, vq), vq->used + offsetof(struct vring_used, idx),
			  vq->next_used)) {
		hwsim_fault(dev, vq, "used ring not mapped");
		return -EFAULT;
	}
	return 0;
}

static bool wants_call(struct hwsim_dev *dev, struct hwsim_vq *vq)
{
	u16 old = vq->signalled_used, event, flags;
	bool first = !vq->signalled;

	if (old == vq->next_used)
		return false;
	vq->signalled_used = vq->next_used;
	vq->signalled = true;
	/* The index before what the driver wants to hear of it. */
	virt_mb();
	if (hwsim_has(dev, VIRTIO_RING_F_EVENT_IDX)) {
		if (hwsim_flawed(dev, HWSIM_FLAW_EVENT_IGNORED))
			return false;
		if (hwsim_read16(dev, ring_asid(dev, vq), used_event(vq), &event))
			return true;
		return first || vring_need_event(event, vq->next_used, old);
	}
	if (hwsim_read16(dev, ring_asid(dev, vq),
			 vq->avail + offsetof(struct vring_avail, flags), &flags))
		return true;
	return !(flags & VRING_AVAIL_F_NO_INTERRUPT);
}

/* Interrupt the driver if there is something new and it wants to know. */
void hwsim_vq_signal(struct hwsim_dev *dev, struct hwsim_vq *vq)
{
	if (hwsim_flawed(dev, HWSIM_FLAW_NO_CALL))
		return;
	if (!hwsim_flawed(dev, HWSIM_FLAW_CALL_ALWAYS) && (!vq->ready || !wants_call(dev, vq)))
		return;
	if (!vq->cb.callback)
		return;
	hwsim_vq_count(vq, HWSIM_VQ_CALLS, 1);
	/* virtio_net's callback schedules NAPI, which wants bottom halves to run then. */
	local_bh_disable();
	vq->cb.callback(vq->cb.private);
	local_bh_enable();
}
