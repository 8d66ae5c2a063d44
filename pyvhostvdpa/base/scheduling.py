# SPDX-License-Identifier: MIT
"""Which threads a CPU goes to first, while a guest is stopped."""

from __future__ import annotations

import os
from contextlib import suppress

from .closing import Closing


class AheadOfOthers(Closing):
    """Between :meth:`begin` and :meth:`close` this thread runs ahead of those of the normal scheduling class.

    For the time that a guest is paused, where the process may have such a
    thread (sched(7), SCHED_FIFO): on a busy CPU it would wait for the slice of
    another to end each time that it has slept. Threads that are made meanwhile
    are of the normal class. Both are called in the same thread. One that runs
    ahead of others anyway stays as it is.
    """

    _ALREADY = (os.SCHED_FIFO, os.SCHED_RR, 6)
    """The last is SCHED_DEADLINE, which the os module does not name."""

    def __init__(self) -> None:
        self._before: tuple[int, os.sched_param] | None = None

    def begin(self) -> None:
        """Go ahead, if that is allowed."""
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        if before[0] & ~os.SCHED_RESET_ON_FORK in self._ALREADY:
            return
        with suppress(OSError):
            lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO))
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, lowest)
            self._before = before

    def close(self) -> None:
        """Be as before. Idempotent.

        Without CAP_SYS_NICE the kernel does not take back SCHED_RESET_ON_FORK (kernel/sched/syscalls.c,
        user_check_sched_setscheduler()), so it stays then; the policy does not.
        """
        before, self._before = self._before, None
        if before is None:
            return
        policy, parameters = before
        for kept in (policy, policy | os.SCHED_RESET_ON_FORK):
            with suppress(OSError):
                os.sched_setscheduler(0, kept, parameters)
                return
