// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * Address spaces: what IOVAs mean to the device, and copying through them.
 *
 * A device with DMA is kept from memory it was not given by its own tables. We
 * copy with the CPU, so two things differ from a hardware driver:
 *
 * - vhost-vdpa unpins pages at IOTLB_INVALIDATE but calls the parent only
 *   afterwards, in a batch possibly much later. Until then our tables still
 *   name them. Hence every mapped page has a reference of our own, dropped when
 *   the tables that name it are gone: no foreign memory is ever written.
 *
 * - A new table is made beside the old one and put in its place at the end, so
 *   that the data path needs the lock only for the exchange; mlx5_vdpa builds
 *   its new MR before it touches the old one too (mlx5_vdpa_create_mr()).
 */
#include <linux/highmem.h>
#include <linux/ioport.h>
#include <linux/mm.h>

#include "cost.h"
#include "device.h"
#include "map.h"

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

/* The same pages at the same place in @map, with references to them; or NULL. */
static struct vhost_iotlb_map *twin(struct vhost_iotlb *map, const struct vhost_iotlb_map *entry)
{
	struct vhost_iotlb_map *other = vhost_iotlb_itree_first(map, entry->start, entry->last);

	if (other && other->opaque == HWSIM_REFS && other->start == entry->start &&
	    other->last == entry->last && other->addr == entry->addr)
		return other;
	return NULL;
}

/*
 * Make a table like @tree. Entries that it has in common with the present table
 * get no references: they are handed those of the present one when that is no
 * longer in use (hand_over()). That is why a small change beside the guest's memory
 * does not cost a walk over all of its pages. The present table is only looked at,
 * because the data path still uses it.
 */
static struct vhost_iotlb *copy_map(struct hwsim_as *as, struct vhost_iotlb *tree)
{
	struct vhost_iotlb *map = vhost_iotlb_alloc(HWSIM_MAX_ENTRIES, 0);
	struct vhost_iotlb_map *entry;

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
		if (!twin(as->map, entry))
			entry_refs(entry, true);
		entry->opaque = HWSIM_REFS;
	}
	return map;
}

/* @old is out of use: the references that copy_map() counted on are the new table's now. */
static void hand_over(struct vhost_iotlb *old, struct vhost_iotlb *map)
{
	struct vhost_iotlb_map *entry;

	for (entry = first_entry(old); entry; entry = next_entry(entry))
		if (entry->opaque == HWSIM_REFS && twin(map, entry))
			entry->opaque = NULL;
}

/* ctl held since @map was made. */
static void replace_map(struct hwsim_dev *dev, unsigned int asid, struct vhost_iotlb *map)
{
	struct vhost_iotlb *old;

	hwsim_change(dev);
	old = dev->as[asid].map;
	dev->as[asid].map = map;
	hwsim_changed(dev);
	hand_over(old, map);
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

	for (i = 0; dev->as && i < dev->opt.nas; i++) {
		drop_map(dev->as[i].map);
		vhost_iotlb_free(dev->as[i].guest);
	}
	kfree(dev->as);
}

static int clean_as(struct hwsim_dev *dev, unsigned int asid)
{
	struct vhost_iotlb *map;

	if (hwsim_fail(dev, HWSIM_FAIL_CLEAN_MAP))
		return -EIO;
	map = default_map(dev);
	if (!map)
		return -ENOMEM;
	replace_map(dev, asid, map);
	return 0;
}

/* Back to the default everywhere, where that is possible; ctl held and the data path at rest. */
int hwsim_as_clean(struct hwsim_dev *dev)
{
	unsigned int i;
	int err = 0;

	for (i = 0; i < dev->opt.nas; i++)
		err = clean_as(dev, i) ?: err;
	return err;
}

/* Another user than the one whose trees were given before. */
void hwsim_as_forget(struct hwsim_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->opt.nas; i++)
		hwsim_cost_forget(dev, &dev->as[i]);
}

/* The device does not forward while its queues change over (mlx5_vdpa_change_map()). */
static void change_map(struct hwsim_dev *dev, unsigned int asid, struct vhost_iotlb *map,
		       u64 swap, struct hwsim_op *op)
{
	if (swap) {
		hwsim_freeze(dev, true);
		hwsim_op_charge(op, swap);
	}
	replace_map(dev, asid, map);
	if (swap)
		hwsim_freeze(dev, false);
}

int hwsim_set_map(struct vdpa_device *vdpa, unsigned int asid, struct vhost_iotlb *iotlb)
{
	struct hwsim_dev *dev = hwsim_from(vdpa);
	struct hwsim_map_cost cost;
	struct vhost_iotlb *map = NULL;
	struct hwsim_op op, heavy;
	int err = 0;

	if (asid >= dev->opt.nas)
		return -EINVAL;

	mutex_lock(&dev->ctl);
	hwsim_op_begin(&op, dev, HWSIM_OP_SET_MAP);
	heavy = op;
	heavy.id = HWSIM_OP_SET_MAP_HEAVY;
	err = hwsim_cost_set_map(dev, &dev->as[asid], iotlb, &cost);
	if (err)
		goto end;

	/* As when an MR cannot be made: the former one stays (set_map_data()). */
	if (hwsim_fail(dev, HWSIM_FAIL_SET_MAP)) {
		err = -EIO;
	} else if (!hwsim_flawed(dev, HWSIM_FLAW_STALE_MAP) || !hwsim_live(dev)) {
		map = copy_map(&dev->as[asid], iotlb);
		err = map ? 0 : -ENOMEM;
	}
	/*
	 * The real device forwards while pages are (un)pinned, which vhost-vdpa has
	 * done whatever becomes of the MR, and while that is made.
	 */
	hwsim_op_charge(&op, cost.pin + (map ? cost.build : 0));
	if (map)
		change_map(dev, asid, map, cost.swap, &op);
	if (cost.heavy) {
		heavy.charged = op.charged;
		hwsim_op_end(&heavy, err);
	}
end:
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
			hwsim_cost_run(dev, HWSIM_COST_MAP_GIB, &dev->as[asid].mapped,
				       iova, size));
	hwsim_count(dev, HWSIM_MAP_ENTRIES, 1);
	hwsim_count(dev, HWSIM_MAP_PAGES, PFN_UP(size));

	hwsim_change(dev);
	if (hwsim_fail(dev, HWSIM_FAIL_SET_MAP))
		err = -EIO;
	else
		err = add_entry(dev->as[asid].map, iova, size, pa, perm);
	hwsim_changed(dev);

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
	hwsim_op_charge(&op, hwsim_cost_run(dev, HWSIM_COST_UNMAP_GIB, &dev->as[asid].unmapped,
					    iova, size));
	hwsim_count(dev, HWSIM_UNMAP_PAGES, PFN_UP(size));

	hwsim_change(dev);
	while ((entry = vhost_iotlb_itree_first(dev->as[asid].map, iova, iova + size - 1)))
		drop_entry(dev->as[asid].map, entry);
	hwsim_changed(dev);

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
	hwsim_count(dev, HWSIM_UNMAP_PAGES, PFN_UP(dev->as[asid].given));
	hwsim_op_charge(&op, hwsim_cost_forget(dev, &dev->as[asid]));
	err = clean_as(dev, asid);
	hwsim_op_end(&op, err);
	mutex_unlock(&dev->ctl);
	return err;
}

/* Entries whose pages are held; dp held. */
unsigned int hwsim_as_referenced(const struct hwsim_as *as)
{
	struct vhost_iotlb_map *entry;
	unsigned int n = 0;

	for (entry = first_entry(as->map); entry; entry = next_entry(entry))
		n += entry->opaque == HWSIM_REFS;
	return n;
}

/* Physical address of @iova, and in @len how much follows it in the same page. */
static int translate(struct hwsim_dev *dev, unsigned int asid, u64 iova, u32 perm,
		     u64 *pa, size_t *len)
{
	struct vhost_iotlb_map *entry;

	entry = vhost_iotlb_itree_first(dev->as[asid].map, iova, iova);
	if (entry && hwsim_flawed(dev, HWSIM_FLAW_IGNORE_PERM))
		perm = 0;
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
