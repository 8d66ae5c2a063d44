# SPDX-License-Identifier: MIT
"""Calls of a ring for a front-end that takes them from a pipe or a socket, as User Mode Linux does from a socket.

It is interrupted by SIGIO, which an eventfd does not send. A device of vhost-vdpa raises nothing but an eventfd, so it
gets one, and what it raises is passed on from here: the only code of a server that runs while traffic flows.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

from ..base.closing import Closing
from ..base.eventfds import close_all

_GRACE = 1.0


def streams(fd: int) -> bool:
    """Whether a descriptor is a pipe without a name or a socket, by what /proc calls it.

    Neither a file system nor the pipe is asked: the one may not answer, the other's lock may be held by its writer
    (pipe_fcntl() and pipe_write() in fs/pipe.c).
    """
    return os.readlink(f"/proc/self/fd/{fd}").startswith(("pipe:[", "socket:["))


def raise_if_possible(fd: int) -> None:
    """Raise an eventfd, or write what it would be given into a pipe or a socket.

    The front-end chose it: it may be full, closed at the other end, or not for writing.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if any(event & select.POLLOUT for _, event in poll.poll(0)):
        with suppress(OSError):
            os.eventfd_write(fd, 1)


class PipedCalls(Closing):
    """Passes on into a pipe or a socket what a device raises, in a thread. It owns the pipe, also if it is not made.

    A thread for each: the front-end can have another process hold a pipe's lock for as long as it likes (pipe_write()
    in fs/pipe.c), and then only its own ring stands still.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._raised = -1
        self._ends = False
        try:
            self._raised = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=self._run, name="piped-calls", daemon=True)
            self._thread.start()
        except BaseException:
            close_all([self._raised, pipe])
            raise

    def eventfd(self) -> int:
        """Return a new descriptor of the eventfd that a device is to raise."""
        return os.dup(self._raised)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._raised, select.POLLIN)
        try:
            while not self._ends:
                poll.poll()
                with suppress(BlockingIOError):
                    os.eventfd_read(self._raised)
                # one that is full is readable already
                raise_if_possible(self._pipe)
        finally:
            close_all([self._raised, self._pipe])

    def close(self) -> None:
        """Pass on what is left, which is one call at least, and end. Idempotent."""
        if self._ends:
            return
        self._ends = True
        os.eventfd_write(self._raised, 1)
        self._thread.join(_GRACE)
