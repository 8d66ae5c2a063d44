/* SPDX-License-Identifier: MIT */
/*
 * How a thread that works on rings is kept from them, without ending it: the
 * stopper sets stop and waits until the thread is outside. A thread that
 * sleeps is outside already, and need not wake up for that.
 */
#ifndef GATE_H
#define GATE_H

#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What stop is while the thread is to stay outside; 0 otherwise. */
#define GATE_CLOSED 1
#define GATE_ENDED 2

static inline void futex_wait(const int *word, int value)
{
	/* whatever ends it, the word is looked at again */
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static inline void futex_wake(const int *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static inline int is_set(const int *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void gate_leave(const int *stop, int *inside)
{
	/* pairs with gate_close() and gate_wait(): one of the two sees the other's store, where acquiring is not enough */
	__atomic_store_n(inside, 0, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(stop, __ATOMIC_SEQ_CST))
		futex_wake(inside);
}

/* Go to work: 0 if that is not wanted. */
static inline int gate_enter(const int *stop, int *inside)
{
	/* pairs with gate_close(): one of the two sees the other's store */
	__atomic_store_n(inside, 1, __ATOMIC_SEQ_CST);
	if (!__atomic_load_n(stop, __ATOMIC_SEQ_CST))
		return 1;
	gate_leave(stop, inside);
	return 0;
}

static inline void gate_close(int *stop)
{
	int open = 0;

	/* one that was closed for good stays so */
	__atomic_compare_exchange_n(stop, &open, GATE_CLOSED, 0,
				    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* What the thread wrote while it was inside is visible afterwards. */
static inline void gate_wait(const int *inside)
{
	while (__atomic_load_n(inside, __ATOMIC_SEQ_CST))
		futex_wait(inside, 1);
}

static inline void gate_open(int *stop)
{
	__atomic_store_n(stop, 0, __ATOMIC_SEQ_CST);
	futex_wake(stop);
}

/* Stay outside until it is opened, or closed for good. */
static inline void gate_stay(const int *stop, const int *quit)
{
	while (is_set(stop) && !is_set(quit))
		futex_wait(stop, GATE_CLOSED);
}

/*
 * Close it for good. A thread that did not see quit yet finds the word it
 * would sleep on changed: a wake-up alone comes too early for it.
 */
static inline void gate_end(int *stop, int *quit)
{
	__atomic_store_n(quit, 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(stop, GATE_ENDED, __ATOMIC_SEQ_CST);
	futex_wake(stop);
}

#endif
