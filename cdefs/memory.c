/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>

#include "memory_access.h"
#include "ring_access.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

uint8_t *memory_hva(const struct memory_map *m, uint64_t gpa, uint64_t size)
{
	uint32_t found;
	const struct memory_region *r = search_region(m, &found, gpa);

	if (!r || size > r->size - (gpa - r->gpa))
		return NULL;
	return r->hva + (gpa - r->gpa);
}

uint8_t *memory_part(const struct memory_map *m, uint64_t gpa, uint64_t *size)
{
	uint32_t found;
	const struct memory_region *r = search_region(m, &found, gpa);

	if (!r)
		return NULL;
	if (*size > r->size - (gpa - r->gpa))
		*size = r->size - (gpa - r->gpa);
	return r->hva + (gpa - r->gpa);
}

int memory_read(const struct memory_map *m, uint64_t gpa, void *to, uint64_t size)
{
	uint8_t *at = to;

	while (size) {
		uint64_t part = size;
		const uint8_t *from = memory_part(m, gpa, &part);

		if (!from)
			return -1;
		memcpy(at, from, part);
		at += part;
		gpa += part;
		size -= part;
	}
	return 0;
}

void memory_mark(const struct memory_map *m, uint64_t gpa, uint64_t size)
{
	uint32_t found;

	while (size) {
		const struct memory_region *r = search_region(m, &found, gpa);
		uint64_t *dirty, part;

		if (!r)
			return;
		part = r->size - (gpa - r->gpa);
		part = size < part ? size : part;
		dirty = dirty_log_of(r);
		if (dirty)
			mark_pages(r, dirty, gpa, part);
		gpa += part;
		size -= part;
	}
}

/* ---------------------------------------------------------------------- */

uint8_t *map_memory(int fd, uint64_t offset, uint64_t size, uint64_t align,
		    int *error)
{
	const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE :
				   MAP_SHARED;
	uint8_t *reserved, *aligned, *mapped;

	*error = 0;
	reserved = mmap(NULL, size + align, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (reserved == MAP_FAILED) {
		*error = errno;
		return NULL;
	}
	aligned = (uint8_t *)(((uintptr_t)reserved + align - 1) & ~(align - 1));
	mapped = mmap(aligned, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED,
		      fd, (off_t)offset);
	if (mapped == MAP_FAILED) {
		*error = errno;
		munmap(reserved, size + align);
		return NULL;
	}
	if (aligned > reserved)
		munmap(reserved, aligned - reserved);
	munmap(aligned + size, align - (aligned - reserved));
	return mapped;
}

/*
 * Only files of tmpfs and hugetlbfs have seals. fstatfs would ask the file
 * system, and one in user space answers when it likes (fuse_statfs).
 */
int is_memory_file(int fd)
{
	if (fcntl(fd, F_GET_SEALS) >= 0)
		return 1;
	return errno == EINVAL ? 0 : -errno;
}

int unmap_memory(uint8_t *address, uint64_t size)
{
	return munmap(address, size) ? errno : 0;
}

int advise_huge(uint8_t *address, uint64_t size)
{
	return madvise(address, size, MADV_HUGEPAGE) ? errno : 0;
}

int keep_from_children(uint8_t *address, uint64_t size)
{
	return madvise(address, size, MADV_DONTFORK) ? errno : 0;
}

int populate(uint8_t *address, uint64_t size)
{
	int r;

	do
		r = madvise(address, size, MADV_POPULATE_WRITE) ? errno : 0;
	while (r == EINTR);
	return r;
}

uint64_t pagemap_runs(const uint64_t *entries, uint64_t count)
{
	const uint64_t present = 1ULL << 63;
	const uint64_t frame_mask = (1ULL << 55) - 1;
	uint64_t runs = 0, previous = 0, i;

	for (i = 0; i < count; i++) {
		uint64_t frame = entries[i] & frame_mask;

		if (!(entries[i] & present) || !frame)
			return 0;
		if (frame != previous + 1)
			runs++;
		previous = frame;
	}
	return runs;
}
