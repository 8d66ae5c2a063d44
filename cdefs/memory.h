/* SPDX-License-Identifier: MIT */
/*
 * Guest memory for the C loops, and memory of this process. Plain declarations,
 * as in ring.h.
 */

/* A piece of guest memory: where the guest, this process and the device see it. */
struct memory_region {
	uint64_t gpa;
	uint64_t size;
	uint64_t iova;
	uint8_t *hva;
	uint64_t *dirty;	/* one bit per 4 KiB page, or NULL */
};

/* Sorted by gpa, no overlap. With no regions nothing is guest memory. */
struct memory_map {
	uint32_t count;
	struct memory_region *regions;
};

/* Map a guest range to the process: the pointer, or NULL if it is not one range of guest memory. */
uint8_t *memory_hva(const struct memory_map *m, uint64_t gpa, uint64_t size);
/* The same for as much of the range as lies in the first region; *size is cut to that. */
uint8_t *memory_part(const struct memory_map *m, uint64_t gpa, uint64_t *size);
/* Copy out of guest memory, across regions: 0, or -1 if some of it is not guest memory. */
int memory_read(const struct memory_map *m, uint64_t gpa, void *to, uint64_t size);
/* Mark a range as written, across regions, in those that have a log; what is not guest memory is left out. */
void memory_mark(const struct memory_map *m, uint64_t gpa, uint64_t size);

/*
 * Map size bytes of fd from offset on, shared, or private memory where fd is
 * -1, at an address that is a multiple of align (a power of two). NULL and
 * *error = errno on failure.
 */
uint8_t *map_memory(int fd, uint64_t offset, uint64_t size, uint64_t align,
		    int *error);
/*
 * Whether a file is memory (tmpfs, memfd, hugetlbfs): 1, 0, or -errno. A page of
 * another file system may fault for as long as its server likes.
 */
int is_memory_file(int fd);
int unmap_memory(uint8_t *address, uint64_t size);
/* Ask for huge pages; 0 or errno. */
int advise_huge(uint8_t *address, uint64_t size);
/* Keep memory from child processes; 0 or errno. */
int keep_from_children(uint8_t *address, uint64_t size);
/* Allocate every page now; 0 or errno. */
int populate(uint8_t *address, uint64_t size);
/*
 * Count runs of consecutive page frames in /proc/self/pagemap entries.
 * Returns 0 if a page is absent or its frame number is hidden.
 */
uint64_t pagemap_runs(const uint64_t *entries, uint64_t count);
