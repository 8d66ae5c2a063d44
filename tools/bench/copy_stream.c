/* SPDX-License-Identifier: MIT */
/*
 * Copies memory from one process to another over a Unix stream socket, as
 * plainly as C can: the measure for what moves guest memory.
 *
 *   copy_stream sum BYTES CHUNK TWO_CPUS       each chunk with its stream_sum, checked
 *   copy_stream sendfile BYTES CHUNK TWO_CPUS  by sendfile, nothing computed
 *
 * Both memories are shared memfds, populated in advance, no page of zeros.
 * Sender and receiver share a CPU; with TWO_CPUS, not 0, each has one.
 * For each line on standard input all of it is copied, and the seconds are
 * printed that it took by the clock, then those of CPU that sender and
 * receiver spent.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "ring_access.h"
#include "cdefs.h"

struct header {
	uint64_t offset, length, sum;
};

static void check(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

/* Stay on the first CPU that there is, or on the one after so many. */
static void stay(int others)
{
	cpu_set_t all, one;
	int cpu = 0;

	check(!sched_getaffinity(0, sizeof(all), &all), "sched_getaffinity");
	for (; !CPU_ISSET(cpu, &all) || others--; cpu++)
		check(cpu < CPU_SETSIZE, "a CPU for each");
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	check(!sched_setaffinity(0, sizeof(one), &one), "sched_setaffinity");
}

static uint8_t *memory(uint64_t size, int *fd)
{
	uint8_t *at;

	*fd = memfd_create("copy", MFD_CLOEXEC);
	check(*fd >= 0 && !ftruncate(*fd, (off_t)size), "memfd");
	at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
		  *fd, 0);
	check(at != MAP_FAILED, "mmap");
	return at;
}

static void put(int fd, const void *from, uint64_t size, int flags)
{
	while (size) {
		ssize_t n = send(fd, from, size, flags);

		check(n > 0, "send");
		from = (const uint8_t *)from + n;
		size -= (uint64_t)n;
	}
}

static void get(int fd, void *to, uint64_t size)
{
	while (size) {
		ssize_t n = recv(fd, to, size, MSG_WAITALL);

		check(n > 0, "recv");
		to = (uint8_t *)to + n;
		size -= (uint64_t)n;
	}
}

static void send_sums(int fd, const uint8_t *from, uint64_t size, uint64_t chunk)
{
	struct header h = { 0, 0, 0 };

	for (; h.offset < size; h.offset += h.length) {
		h.length = size - h.offset < chunk ? size - h.offset : chunk;
		h.sum = stream_sum(from + h.offset, h.length);
		put(fd, &h, sizeof(h), MSG_MORE);
		put(fd, from + h.offset, h.length, 0);
	}
}

static void receive_sums(int fd, uint8_t *to, uint64_t size)
{
	struct header h;
	uint64_t done;

	for (done = 0; done < size; done += h.length) {
		get(fd, &h, sizeof(h));
		get(fd, to + h.offset, h.length);
		if (stream_sum(to + h.offset, h.length) != h.sum) {
			fprintf(stderr, "checksum\n");
			exit(1);
		}
	}
}

static void send_file(int fd, int from, uint64_t size, uint64_t chunk)
{
	off_t at = 0;

	while ((uint64_t)at < size)
		check(sendfile(fd, from, &at, chunk) > 0, "sendfile");
}

static double cpu_seconds(void)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	return u.ru_utime.tv_sec + u.ru_stime.tv_sec +
	       (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void receive_round(int fd, uint8_t *to, int sums, uint64_t size, uint64_t chunk)
{
	double cpu = cpu_seconds();
	uint64_t i;

	if (sums)
		receive_sums(fd, to, size);
	else
		for (i = 0; i < size; i += chunk)
			get(fd, to + i, size - i < chunk ? size - i : chunk);
	cpu = cpu_seconds() - cpu;
	put(fd, &cpu, sizeof(cpu), 0);
}

static void receive(int fd, int sums, uint64_t size, uint64_t chunk)
{
	uint8_t *to = memory(size, &(int){ 0 });
	char byte = 1;

	put(fd, &byte, sizeof(byte), 0);
	while (recv(fd, &byte, sizeof(byte), MSG_PEEK) > 0)
		receive_round(fd, to, sums, size, chunk);
}

static void send_round(int fd, int sums, int memfd, const uint8_t *from,
		       uint64_t size, uint64_t chunk)
{
	const double cpu = cpu_seconds();
	const int64_t begin = now_ns();
	double receiver;
	int64_t end;

	if (sums)
		send_sums(fd, from, size, chunk);
	else
		send_file(fd, memfd, size, chunk);
	get(fd, &receiver, sizeof(receiver));
	end = now_ns();
	printf("%.6f %.6f %.6f\n", (double)(end - begin) / 1e9,
	       cpu_seconds() - cpu, receiver);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	const int sums = argc == 5 && !strcmp(argv[1], "sum");
	uint64_t size, chunk, i;
	uint8_t *from, ready;
	int ends[2], fd;

	if (argc != 5 || (!sums && strcmp(argv[1], "sendfile"))) {
		fprintf(stderr, "usage: %s sum|sendfile BYTES CHUNK TWO_CPUS\n", argv[0]);
		return 2;
	}
	size = strtoull(argv[2], NULL, 0);
	chunk = strtoull(argv[3], NULL, 0);
	check(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
	if (!fork()) {
		close(ends[0]);
		stay(atoi(argv[4]) != 0);
		receive(ends[1], sums, size, chunk);
		return 0;
	}
	close(ends[1]);
	stay(0);
	from = memory(size, &fd);
	for (i = 0; i + 8 <= size; i += 8)
		*(uint64_t *)(from + i) = (i + 1) * 0x9e3779b97f4a7c15ULL;
	get(ends[0], &ready, sizeof(ready));
	while (getchar() == '\n')
		send_round(ends[0], sums, fd, from, size, chunk);
	close(ends[0]);
	wait(NULL);
	return 0;
}
