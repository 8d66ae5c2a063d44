/* SPDX-License-Identifier: MIT */
/*
 * Which guest pages were written: by shadow virtqueues, which mark them
 * (svq.c, ctrl.c), and through the page tables of this process, which the
 * kernel remembers. What the kernel calls a written page is one whose
 * userfaultfd write protection is gone (fs/proc/task_mmu.c:pagemap_scan_*);
 * with WP_ASYNC the fault removes it without a message to user space.
 *
 * The interface is declared here: a header of the build machine may lack it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "memory_access.h"
#include "ring_access.h"
#include "cdefs.h"

#define UFFD_USER_MODE_ONLY 1
#define UFFD_API 0xaaULL
#define UFFD_FEATURE_EVENT_REMAP (1ULL << 2)
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1ULL << 12)
#define UFFD_FEATURE_WP_ASYNC (1ULL << 15)
#define UFFDIO_REGISTER_MODE_WP (1ULL << 1)
#define UFFDIO_WRITEPROTECT_MODE_WP (1ULL << 0)

struct uffd_api {
	uint64_t api, features, ioctls;
};

struct uffd_register {
	uint64_t start, size, mode, ioctls;
};

struct uffd_writeprotect {
	uint64_t start, size, mode;
};

#define UFFD_IOCTL_API _IOWR(0xaa, 0x3f, struct uffd_api)
#define UFFD_IOCTL_REGISTER _IOWR(0xaa, 0x00, struct uffd_register)
#define UFFD_IOCTL_WRITEPROTECT _IOWR(0xaa, 0x06, struct uffd_writeprotect)

#define PM_SCAN_WP_MATCHING (1ULL << 0)
#define PM_SCAN_CHECK_WPASYNC (1ULL << 1)
#define PAGE_IS_WRITTEN (1ULL << 1)
#define PAGE_IS_PRESENT (1ULL << 3)
#define PAGE_IS_SWAPPED (1ULL << 4)

struct scanned {
	uint64_t start, end, categories;
};

struct scan {
	uint64_t size, flags;
	uint64_t start, end, walk_end;
	uint64_t vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define IOCTL_PAGEMAP_SCAN _IOWR('f', 16, struct scan)
#define SCANNED 512

#define MEMBARRIER_PRIVATE_EXPEDITED (1 << 3)
#define MEMBARRIER_REGISTER_PRIVATE_EXPEDITED (1 << 4)

/* ---------------------------------------------------------------------- */

uint64_t pages_count(const uint64_t *bits, uint64_t words)
{
	uint64_t count = 0, i = 0;

	while ((i = next_marked(bits, i, words)) < words)
		count += (uint64_t)__builtin_popcountll(bits[i++]);
	return count;
}

uint64_t pages_common(const uint64_t *bits, const uint64_t *others, uint64_t words)
{
	uint64_t count = 0, i = 0;

	while ((i = next_marked(bits, i, words)) < words) {
		count += (uint64_t)__builtin_popcountll(bits[i] & others[i]);
		i++;
	}
	return count;
}

void pages_mark(uint64_t *bits, uint64_t first, uint64_t count)
{
	const uint64_t end = first + count;

	while (first < end) {
		const uint64_t bit = first % 64;
		const uint64_t here = end - first < 64 - bit ? end - first : 64 - bit;

		bits[first / 64] |= (here < 64 ? (1ULL << here) - 1 : ~0ULL) << bit;
		first += here;
	}
}

void pages_add(uint64_t *bits, const uint64_t *more, uint64_t words)
{
	uint64_t i;

	for (i = 0; i < words; i++)
		bits[i] |= more[i];
}

void pages_drain(uint64_t *bits, uint64_t *seen, uint64_t *log, uint64_t words)
{
	uint64_t i = 0;

	/* a mark that next_marked() is too early to see is there the next time, or comes behind the barrier */
	while ((i = next_marked(log, i, words)) < words) {
		const uint64_t found =
			__atomic_exchange_n(&log[i], 0, __ATOMIC_SEQ_CST);

		bits[i] |= found;
		if (seen)
			seen[i] |= found;
		i++;
	}
}

uint64_t pages_publish(const uint64_t *bits, uint64_t words, uint64_t first,
		       uint8_t *log, uint64_t size)
{
	uint64_t i, beyond = 0;

	for (i = 0; i < words; i++) {
		uint64_t left = bits[i];

		while (left) {
			const unsigned int bit = (unsigned int)__builtin_ctzll(left);
			const uint64_t page = first + i * 64 + bit;
			const uint64_t byte = (left >> bit) << (page % 8) & 0xff;

			left &= ~(byte >> (page % 8) << bit);
			if (page / 8 < size)
				/* the other side takes bits away: nothing but set them */
				__atomic_fetch_or(&log[page / 8], (uint8_t)byte,
						  __ATOMIC_SEQ_CST);
			else
				beyond += (uint64_t)__builtin_popcountll(byte);
		}
	}
	return beyond;
}

/*
 * A thread that finds its page marked writes nothing, so that its look may
 * overtake what it stored in the page. The other side pays for the order, once
 * a round, by a barrier on every CPU that runs this process.
 */
static int membarrier(int command)
{
	return syscall(SYS_membarrier, command, 0, 0) ? errno : 0;
}

int pages_barrier_prepare(void)
{
	return membarrier(MEMBARRIER_REGISTER_PRIVATE_EXPEDITED);
}

int pages_barrier(void)
{
	return membarrier(MEMBARRIER_PRIVATE_EXPEDITED);
}

/* ---------------------------------------------------------------------- */

int written_open(void)
{
	struct uffd_api api = {
		.api = UFFD_API,
		/* the event is for set_aside.c */
		.features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
			    UFFD_FEATURE_EVENT_REMAP,
	};
	int fd = (int)syscall(SYS_userfaultfd,
			      UFFD_USER_MODE_ONLY | O_CLOEXEC | O_NONBLOCK);
	int error;

	if (fd < 0)
		return -errno;
	if (!ioctl(fd, UFFD_IOCTL_API, &api))
		return fd;
	error = errno;
	close(fd);
	return -error;
}

int written_watch(int uffd, uint8_t *start, uint64_t size)
{
	struct uffd_register reg = {
		.start = (uintptr_t)start,
		.size = size,
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	struct uffd_writeprotect protect = {
		.start = (uintptr_t)start,
		.size = size,
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};

	if (ioctl(uffd, UFFD_IOCTL_REGISTER, &reg))
		return errno;
	while (ioctl(uffd, UFFD_IOCTL_WRITEPROTECT, &protect))
		if (errno != EAGAIN)
			return errno;
	return 0;
}

static int collect(int pagemap, uint8_t *start, uint64_t size, uint64_t *bits,
		   uint64_t any_of)
{
	struct scanned found[SCANNED];
	struct scan scan = {
		.size = sizeof(scan),
		.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
		.start = (uintptr_t)start,
		.end = (uintptr_t)start + size,
		.vec = (uintptr_t)found,
		.vec_len = SCANNED,
		.category_mask = PAGE_IS_WRITTEN,
		.category_anyof_mask = any_of,
		.return_mask = PAGE_IS_WRITTEN | any_of,
	};

	while (scan.start < scan.end) {
		int n = ioctl(pagemap, IOCTL_PAGEMAP_SCAN, &scan), i;

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno;
		for (i = 0; i < n; i++)
			pages_mark(bits,
				   (found[i].start - (uintptr_t)start) / GUEST_PAGE,
				   (found[i].end - found[i].start) / GUEST_PAGE);
		scan.start = scan.walk_end;
	}
	return 0;
}

int written_collect(int pagemap, uint8_t *start, uint64_t size, uint64_t *bits)
{
	return collect(pagemap, start, size, bits, 0);
}

/*
 * A page that has no entry counts as written (pagemap_scan_pmd_entry(), and
 * whole tables that are missing). One that is swapped by its entry is on its
 * way to another place in memory.
 */
int written_collect_used(int pagemap, uint8_t *start, uint64_t size, uint64_t *bits)
{
	return collect(pagemap, start, size, bits, PAGE_IS_PRESENT | PAGE_IS_SWAPPED);
}

void written_soft_dirty(const uint64_t *entries, uint64_t count, uint64_t pages,
			uint64_t *bits, uint64_t first)
{
	const uint64_t present = 1ULL << 63, soft_dirty = 1ULL << 55;
	uint64_t i;

	for (i = 0; i < count; i++)
		if (entries[i] & soft_dirty || !(entries[i] & present))
			pages_mark(bits, first + i * pages, pages);
}
