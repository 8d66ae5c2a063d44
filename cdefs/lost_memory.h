/* SPDX-License-Identifier: MIT */
/*
 * Memory of files that another process can make shorter, or punch holes into
 * that cannot be filled again (hugetlbfs). An access there is a SIGBUS, which
 * would end this process with all that it serves.
 * Pages that are gone this way are replaced by private ones full of zeros: what
 * was in them is lost to their owner, whoever reads them.
 */

/*
 * Guard size bytes at address, mapped from a file with pages of page bytes at most: a
 * number for the calls below, or -errno. The first call takes SIGBUS over; one
 * that does not concern guarded memory has the effect it had before.
 */
int guard_memory(uint8_t *address, uint64_t size, uint64_t page);
/* End that; before the memory is unmapped. */
void unguard_memory(int number);
/* Bytes that were replaced since the memory is guarded. */
uint64_t lost_memory(int number);
