// SPDX-License-Identifier: MIT
/*
 * Lets a tracer with a small buffer hand over the processor's extended state.
 *
 * The kernel takes an extended state (NT_X86_XSTATE) only whole: PTRACE_SETREGSET with fewer bytes than the machine's
 * state has is EFAULT (xstateregs_set()). User Mode Linux before 6.13 keeps 2,696 bytes of it, which is all that there
 * was before AMX, and panics where that is not enough. Preloaded, this takes the rest from the traced process itself:
 * what the tracer does not know of stays as it is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#define LARGEST (1 << 16)

typedef long (*tracer)(enum __ptrace_request, pid_t, void *, void *);

static tracer next;

__attribute__((constructor)) static void find_next(void)
{
    next = (tracer)dlsym(RTLD_NEXT, "ptrace");
}

static long read_state(pid_t pid, struct iovec *whole)
{
    return next(PTRACE_GETREGSET, pid, (void *)NT_X86_XSTATE, whole);
}

static long exchange(enum __ptrace_request request, pid_t pid, struct iovec *part)
{
    static char state[LARGEST];
    struct iovec whole = {.iov_base = state, .iov_len = sizeof(state)};
    size_t known;

    if (read_state(pid, &whole) < 0)
        return -1;
    known = part->iov_len < whole.iov_len ? part->iov_len : whole.iov_len;
    if (request == PTRACE_GETREGSET) {
        memcpy(part->iov_base, state, known);
        part->iov_len = known;
        return 0;
    }
    memcpy(state, part->iov_base, known);
    return next(PTRACE_SETREGSET, pid, (void *)NT_X86_XSTATE, &whole);
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    pid_t pid;
    void *address, *data;

    va_start(arguments, request);
    pid = va_arg(arguments, pid_t);
    address = va_arg(arguments, void *);
    data = va_arg(arguments, void *);
    va_end(arguments);
    if (address == (void *)NT_X86_XSTATE && (request == PTRACE_GETREGSET || request == PTRACE_SETREGSET))
        return exchange(request, pid, data);
    return next(request, pid, address, data);
}
