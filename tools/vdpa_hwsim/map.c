// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * Address spaces: what IOVAs mean to the device, and copying through them.
 *
 * A device with DMA is kept from memory it was not given by its own tables. We
 * copy with the CPU, so two things differ from a hardware driver:
 *
 * - vhost-vdpa unpins pages at IOTLB_INVALIDATE but tells the parent only
 *   afterwards, in a batch possibly much later. Until then our tables still
 *   name them. Hence every mapped page has a reference of our own, dropped when
 *   the tables that name it are gone: nobody else's memory is ever written.
 *
 * - A new table is made beside the old one and put in its place at the end, so
 *   that the data path needs the lock only for the exchange; mlx5_vdpa builds
 *   its new MR before it touches the old one too (mlx5_vdpa_create_mr()).
 */
#include <linux/highmem.h>
#include <linux/ioport.h>
#include <linux/mm.h>

#include "hwsim.h"

/* vhost-vdpa limits its own trees; this only keeps a broken caller from filling memory. */
#define HWSIM_MAX_ENTRIES	(1U << 20)

/* Kept in vhost_iotlb_map.opaque: does this entry hold references to its pages? */
#define HWSIM_REFS		((void *)1)

/* vhost_iotlb_itree_first() takes a plain tree, hence no const here. */
static struct vhost_iotlb_map *first_entry(struct vhost_iotlb *map)
{
	return vhost_iotlb_itree_first(map, 0, U64_MAX);
}

static struct vhost_iotlb_map *next_entry(struct vhost_iotlb_map *entry)
{
	return vhost_iotlb_itree_next(entry, 0, U64_MAX);
}

/*
 * One reference for each folio the entry touches. Folios that are referenced or
 * pinned are not split, so the walks at the beginning and the end agree.
 */
static void entry_refs(const struct vhost_iotlb_map *entry, bool get)
{
	unsigned long pfn = PHYS_PFN(entry->addr);
	unsigned long last = PHYS_PFN(entry->addr + entry->size - 1);

	while (pfn <= last) {
		struct folio *folio = page_folio(pfn_to_page(pfn));
		unsigned long next = folio_pfn(folio) + folio_nr_pages(folio);

		if (get)
			folio_get(folio);
		else
			folio_put(folio);
		pfn = next;
	}
}

static void drop_entry(struct vhost_iotlb *map, struct vhost_iotlb_map *entry)
{
	if (entry->opaque == HWSIM_REFS)
		entry_refs(entry, false);
	vhost_iotlb_map_free(map, entry);
}

static void drop_map(struct vhost_iotlb *map)
{
	struct vhost_iotlb_map *entry;

	if (!map)
		return;
	while ((entry = first_entry(map)))
		drop_entry(map, entry);
	vhost_iotlb_free(map);
}

/* The state no one has mapped anything in. */
static struct vhost_iotlb *default_map(const struct hwsim_dev *dev)
{
	struct vhost_iotlb *map = vhost_iotlb_alloc(HWSIM_MAX_ENTRIES, 0);

	if (map && dev->opt.identity &&
	    vhost_iotlb_add_range(map, 0, U64_MAX, 0, VHOST_MAP_RW)) {
		drop_map(map);
		return NULL;
	}
	return map;
}

/* Only for entries without references: is there ordinary memory behind it? */
static bool identity_valid(u64 pa)
{
	return pfn_valid(PHYS_PFN(pa)) && page_is_ram(PHYS_PFN(pa));
}

/*
 * Make a table like @tree. References are moved over from the entries it has in
 * common with the present table, which is why a small change beside the guest's
 * memory does not cost a walk over all of its pages.
 */
static struct vhost_iotlb *copy_map(struct hwsim_as *as, struct vhost_iotlb *tree)
{
	struct vhost_iotlb *map = vhost_iotlb_alloc(HWSIM_MAX_ENTRIES, 0);
	struct vhost_iotlb_map *entry, *old;

	if (!map)
		return NULL;
	for (entry = first_entry(tree); entry; entry = next_entry(entry)) {
		if (vhost_iotlb_add_range(map, entry->start, entry->last, entry->addr,
					  entry->perm)) {
			drop_map(map);
			return NULL;
		}
	}
	/* From here on nothing fails. */
	for (entry = first_entry(map); entry; entry = next_entry(entry)) {
		old = vhost_iotlb_itree_first(as->map, entry->start, entry->last);
		if (old && old->opaque == HWSIM_REFS && old->start == entry->start &&
		    old->last == entry->last && old->addr == entry->addr)
			old->opaque = NULL;
		else
			entry_refs(entry, true);
		entry->opaque = HWSIM_REFS;
	}
	return map;
}

static void replace_map(struct hwsim_dev *dev, unsigned int asid, struct vhost_iotlb *map)
{
	struct vhost_iotlb *old;

	down_write(&dev->dp);
	old = dev->as[asid].map;
	dev->as[asid].map = map;
	up_write(&dev->dp);
	drop_map(old);
}

int hwsim_as_init(struct hwsim_dev *dev)
{
	unsigned int i;

	dev->as = kcalloc(dev->opt.nas, sizeof(*dev->as), GFP_KERNEL);
	if (!dev->as)
		return -ENOMEM;
	for (i = 0; i < dev->opt.nas; i++) {
		dev->as[i].map = default_map(dev);
		if (!dev->as[i].map)
			return -ENOMEM;
	}
	return 0;
}

void hwsim_as_free(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; dev->as && i < dev->opt.nas; i++)
		drop_map(dev->as[i].map);
	kfree(dev->as);
}

static int clean_as(struct hwsim_dev *dev, unsigned int asid)
{
	struct vhost_iotlb *map = default_map(dev);

	if (!map)
		return -ENOMEM;
	replace_map(dev, asid, map);
	return 0;
}

/* Back to the default everywhere; ctl held and the data path at rest. */
void hwsim_as_clean(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->opt.nas; i++)
		clean_as(dev, i);
}

/* Another user than the one whose trees were given before. */
void hwsim_as_forget(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->opt.nas; i++)
		dev->as[i].given = 0;
}

int hwsim_set_map(struct vdpa_device *vdpa, unsigned int asid, struct vhost_iotlb *iotlb)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_map_cost cost;
	struct vhost_iotlb *map;
	struct hwsim_op op, heavy;
	int err = 0;

	if (asid >= dev->opt.nas)
		return -EINVAL;

	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_SET_MAP);
	heavy = op;
	heavy.id = HWSIM_OP_SET_MAP_HEAVY;
	hwsim_cost_set_map(dev, &dev->as[asid], iotlb, &cost);

	/* As when an MR cannot be made: the former one stays (set_map_data()). */
	if (hwsim_fail(dev, HWSIM_FAIL_SET_MAP)) {
		err = -EIO;
		goto out;
	}
	map = copy_map(&dev->as[asid], iotlb);
	if (!map) {
		err = -ENOMEM;
		goto out;
	}
	/* The real device forwards while pages are (un)pinned and the new MR is made... */
	hwsim_op_charge(&op, cost.pin + cost.build);
	/* ...and does not while its queues change over (mlx5_vdpa_change_map()). */
	if (cost.swap) {
		hwsim_freeze(dev, true);
		hwsim_op_charge(&op, cost.swap);
	}
	replace_map(dev, asid, map);
	if (cost.swap)
		hwsim_freeze(dev, false);
out:
	if (cost.heavy) {
		heavy.charged = op.charged;
		hwsim_op_end(&heavy, err);
	}
	hwsim_op_end(&op, err);
	mutex_unlock(&dev->ctl);
	return err;
}

/* vhost-vdpa has seen to it that nothing overlaps, but does not know of our default. */
static int add_entry(struct vhost_iotlb *map, u64 iova, u64 size, u64 pa, u32 perm)
{
	struct vhost_iotlb_map *entry = first_entry(map);
	int err;

	while (entry && entry->opaque != HWSIM_REFS) {
		drop_entry(map, entry);
		entry = first_entry(map);
	}
	err = vhost_iotlb_add_range(map, iova, iova + size - 1, pa, perm);
	if (err)
		return err;
	entry = vhost_iotlb_itree_first(map, iova, iova + size - 1);
	entry_refs(entry, true);
	entry->opaque = HWSIM_REFS;
	return 0;
}

int hwsim_dma_map(struct vdpa_device *vdpa, unsigned int asid, u64 iova, u64 size,
		  u64 pa, u32 perm, void *opaque)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_op op;
	int err;

	if (asid >= dev->opt.nas)
		return -EINVAL;

	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_DMA_MAP);
	hwsim_op_charge(&op, dev->cost[HWSIM_COST_SET_MAP_ENTRY] +
			hwsim_cost_bytes(dev, HWSIM_COST_MAP_GIB, size));
	hwsim_count(dev, HWSIM_MAP_ENTRIES, 1);
	hwsim_count(dev, HWSIM_MAP_PAGES, PFN_UP(size));

	down_write(&dev->dp);
	if (hwsim_fail(dev, HWSIM_FAIL_SET_MAP))
		err = -EIO;
	else
		err = add_entry(dev->as[asid].map, iova, size, pa, perm);
	up_write(&dev->dp);

	hwsim_op_end(&op, err);
	mutex_unlock(&dev->ctl);
	return err;
}

int hwsim_dma_unmap(struct vdpa_device *vdpa, unsigned int asid, u64 iova, u64 size)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct vhost_iotlb_map *entry;
	struct hwsim_op op;

	if (asid >= dev->opt.nas)
		return -EINVAL;

	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_DMA_UNMAP);
	hwsim_op_charge(&op, hwsim_cost_bytes(dev, HWSIM_COST_UNMAP_GIB, size));
	hwsim_count(dev, HWSIM_UNMAP_PAGES, PFN_UP(size));

	down_write(&dev->dp);
	while ((entry = vhost_iotlb_itree_first(dev->as[asid].map, iova, iova + size - 1)))
		drop_entry(dev->as[asid].map, entry);
	up_write(&dev->dp);

	hwsim_op_end(&op, 0);
	mutex_unlock(&dev->ctl);
	return 0;
}

int hwsim_reset_map(struct vdpa_device *vdpa, unsigned int asid)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_op op;
	int err;

	if (asid >= dev->opt.nas)
		return -EINVAL;

	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_RESET_MAP);
	/* vhost-vdpa has unpinned everything (vhost_vdpa_remove_as()). */
	hwsim_op_charge(&op, hwsim_cost_bytes(dev, HWSIM_COST_UNMAP_GIB, dev->as[asid].given));
	hwsim_count(dev, HWSIM_UNMAP_PAGES, PFN_UP(dev->as[asid].given));
	dev->as[asid].given = 0;
	err = clean_as(dev, asid);
	hwsim_op_end(&op, err);
	mutex_unlock(&dev->ctl);
	return err;
}

/* Physical address of @iova, and in @len how much follows it in the same page. */
static int translate(struct hwsim_dev *dev, unsigned int asid, u64 iova, u32 perm,
		     u64 *pa, size_t *len)
{
	struct vhost_iotlb_map *entry;

	entry = vhost_iotlb_itree_first(dev->as[asid].map, iova, iova);
	if (!entry || (entry->perm & perm) != perm)
		return -EFAULT;
	*pa = entry->addr + (iova - entry->start);
	if (entry->opaque != HWSIM_REFS && !identity_valid(*pa))
		return -EFAULT;
	*len = min_t(u64, *len, entry->last - iova + 1);
	*len = min_t(size_t, *len, PAGE_SIZE - offset_in_page(*pa));
	return 0;
}

/* Copy to (@write) or from @iova; dp held. */
int hwsim_copy(struct hwsim_dev *dev, unsigned int asid, u64 iova, void *buf, size_t len,
	       bool write)
{
	u32 perm = write ? VHOST_MAP_WO : VHOST_MAP_RO;

	if (len && iova + len - 1 < iova)
		return -EFAULT;

	while (len) {
		size_t n = len;
		void *page;
		u64 pa;

		if (translate(dev, asid, iova, perm, &pa, &n))
			return -EFAULT;
		page = kmap_local_page(pfn_to_page(PHYS_PFN(pa)));
		if (write)
			memcpy(page + offset_in_page(pa), buf, n);
		else
			memcpy(buf, page + offset_in_page(pa), n);
		kunmap_local(page);
		buf += n;
		iova += n;
		len -= n;
	}
	return 0;
}

/*
 * The ring's own 16-bit words are shared with a running driver, so they are
 * moved in one piece. An odd address cannot be, and no driver has one.
 */
static __le16 *map16(struct hwsim_dev *dev, unsigned int asid, u64 iova, u32 perm)
{
	size_t len = sizeof(__le16);
	u64 pa;

	if (translate(dev, asid, iova, perm, &pa, &len) || (pa & 1))
		return NULL;
	return kmap_local_page(pfn_to_page(PHYS_PFN(pa))) + offset_in_page(pa);
}

int hwsim_read16(struct hwsim_dev *dev, unsigned int asid, u64 iova, u16 *value)
{
	__le16 *p = map16(dev, asid, iova, VHOST_MAP_RO);

	if (!p)
		return -EFAULT;
	*value = le16_to_cpu(READ_ONCE(*p));
	kunmap_local(p);
	return 0;
}

int hwsim_write16(struct hwsim_dev *dev, unsigned int asid, u64 iova, u16 value)
{
	__le16 *p = map16(dev, asid, iova, VHOST_MAP_WO);

	if (!p)
		return -EFAULT;
	WRITE_ONCE(*p, cpu_to_le16(value));
	kunmap_local(p);
	return 0;
}
