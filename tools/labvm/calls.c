/* SPDX-License-Identifier: MIT */
/*
 * A library to preload: writes down every ioctl and every IOTLB message that a program makes on vhost-vdpa devices,
 * with begin, end, arguments and result. The file is mapped, so it is whole even when the program is killed.
 *
 *   VDPA_CALLS=FILE [VDPA_WORK=1] [VDPA_AHEAD=1] LD_PRELOAD=calls.so PROGRAM…
 *
 * With VDPA_WORK it also writes down when the program's first thread was at work: from each return of poll to the next.
 * With VDPA_AHEAD a thread is ahead of all ordinary ones while it makes such a call, so that no other runs between the
 * clock that is read here and the call. It changes how long a call takes: not for figures of the program itself.
 * calls.py reads the file. A record is made when a call begins, so records are in the order of the calls' begin; the
 * record of a call that never returned has the end 0. A record also has how often its thread had to give up the CPU
 * between a moment before the begin and one behind the end: then the begin may be earlier than the call, the end later.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x31534c4c41434456u /* "VDCALLS1" */
#define CAPACITY 262144u
#define DATA 40
#define MANY 0xffff
#define VHOST_TYPE 0xAF
#define MESSAGE_BYTES 72
#define MESSAGE 0 /* the request of a record that is an IOTLB message */
#define WORK 1    /* that of a record that is not a call, but the time between two calls of poll */
#define WITHOUT_ARGUMENT(request) (_IOC_DIR(request) == _IOC_NONE)

struct record {
	uint64_t begin_ns, end_ns;
	uint32_t pid, tid, request;
	uint16_t minor, lost_cpu;
	int32_t result, error;
	uint64_t argument;
	uint8_t in[DATA], out[DATA];
};

struct log {
	uint64_t magic, capacity;
	_Atomic uint64_t count;
	uint8_t rest[sizeof(struct record) - 24];
	struct record record[];
};

_Static_assert(sizeof(struct record) == 128, "calls.py reads records of 128 bytes");

static struct log *log_file;
static int (*real_ioctl)(int, unsigned long, ...);
static ssize_t (*real_write)(int, const void *, size_t);
static int (*real_poll)(struct pollfd *, nfds_t, int);
static int work_wanted, ahead_wanted;
static uint64_t woken_ns;
static _Thread_local uint64_t losses_before;
static _Thread_local int is_ahead;

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("VDPA_CALLS");
	size_t size = sizeof(struct log) + CAPACITY * sizeof(struct record);
	int fd;

	*(void **)&real_ioctl = dlsym(RTLD_NEXT, "ioctl");
	*(void **)&real_write = dlsym(RTLD_NEXT, "write");
	*(void **)&real_poll = dlsym(RTLD_NEXT, "poll");
	work_wanted = getenv("VDPA_WORK") != NULL;
	ahead_wanted = getenv("VDPA_AHEAD") != NULL;
	if (!path)
		return;
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		return;
	if (ftruncate(fd, (off_t)size) == 0) {
		void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

		if (map != MAP_FAILED) {
			log_file = map;
			log_file->magic = MAGIC;
			log_file->capacity = CAPACITY;
		}
	}
	close(fd);
}

static uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

/* How often the thread had to give up the CPU so far. */
static uint64_t cpu_losses(void)
{
	struct rusage usage;

	return getrusage(RUSAGE_THREAD, &usage) ? 0 : (uint64_t)usage.ru_nivcsw;
}

/* The calling thread alone; a thread that has a policy of its own keeps it. */
static void be_ahead(int ahead)
{
	static const struct sched_param first = {.sched_priority = 1}, ordinary = {.sched_priority = 0};

	if (ahead && sched_getscheduler(0) == SCHED_OTHER)
		is_ahead = !sched_setscheduler(0, SCHED_FIFO, &first);
	else if (!ahead && is_ahead)
		is_ahead = sched_setscheduler(0, SCHED_OTHER, &ordinary) != 0;
}

/* vhost ioctls are made on /dev/vhost-net as well, so the device's own name decides. */
static int is_vdpa(const struct stat *status)
{
	static _Atomic unsigned int known;
	unsigned int number = major(status->st_rdev), before;
	char path[64], target[128];
	ssize_t length;

	if (!S_ISCHR(status->st_mode) || !number)
		return 0;
	before = atomic_load(&known);
	if (before)
		return number == before;
	snprintf(path, sizeof(path), "/sys/dev/char/%u:%u", number, minor(status->st_rdev));
	length = readlink(path, target, sizeof(target) - 1);
	if (length <= 0)
		return 0;
	target[length] = 0;
	if (!strstr(target, "/vhost-vdpa-"))
		return 0;
	atomic_store(&known, number);
	return 1;
}

static struct record *record_new(uint32_t request)
{
	uint64_t index = atomic_fetch_add(&log_file->count, 1);
	struct record *record;

	if (index >= CAPACITY)
		return NULL;
	record = &log_file->record[index];
	record->pid = (uint32_t)getpid();
	record->tid = (uint32_t)syscall(SYS_gettid);
	record->request = request;
	return record;
}

static struct record *record_begin(int fd, uint32_t request, uint64_t argument, const void *in, size_t in_length)
{
	struct record *record;
	struct stat status;

	if (!log_file || fstat(fd, &status) < 0 || !is_vdpa(&status))
		return NULL;
	record = record_new(request);
	if (!record)
		return NULL;
	record->minor = (uint16_t)minor(status.st_rdev);
	record->argument = argument;
	if (in)
		memcpy(record->in, in, in_length < DATA ? in_length : DATA);
	if (ahead_wanted)
		be_ahead(1);
	losses_before = cpu_losses();
	record->begin_ns = now();
	return record;
}

static void record_end(struct record *record, long result, const void *out, size_t out_length)
{
	int error = errno;
	uint64_t losses;

	if (!record)
		return;
	record->result = (int32_t)result;
	record->error = result < 0 ? error : 0;
	if (out)
		memcpy(record->out, out, out_length < DATA ? out_length : DATA);
	record->end_ns = now();
	losses = cpu_losses() - losses_before;
	record->lost_cpu = losses < MANY ? (uint16_t)losses : MANY;
	be_ahead(0);
	errno = error;
}

int ioctl(int fd, unsigned long request, ...)
{
	struct record *record = NULL;
	va_list arguments;
	void *argument;
	int result;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (_IOC_TYPE(request) == VHOST_TYPE) {
		const void *in = WITHOUT_ARGUMENT(request) ? NULL : argument;

		record = record_begin(fd, (uint32_t)request, (uintptr_t)argument, in, _IOC_SIZE(request));
	}
	result = real_ioctl(fd, request, argument);
	if (record)
		record_end(record, result, _IOC_DIR(request) & _IOC_READ ? argument : NULL, _IOC_SIZE(request));
	return result;
}

ssize_t write(int fd, const void *data, size_t length)
{
	struct record *record = length == MESSAGE_BYTES ? record_begin(fd, MESSAGE, length, data, length) : NULL;
	ssize_t result = real_write(fd, data, length);

	record_end(record, result, NULL, 0);
	return result;
}

int poll(struct pollfd *watched, nfds_t count, int timeout)
{
	int first = work_wanted && log_file && getpid() == (pid_t)syscall(SYS_gettid), result;
	struct record *record = first && woken_ns ? record_new(WORK) : NULL;

	if (record) {
		record->begin_ns = woken_ns;
		record->end_ns = now();
	}
	result = real_poll(watched, count, timeout);
	if (first)
		woken_ns = now();
	return result;
}
