# SPDX-License-Identifier: MIT
"""What the kernel reports by itself, so that a server sleeps: changes of guest memory's files, a device that failed."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable
from contextlib import suppress

from ..base.eventfds import close_all

_IN_MODIFY = 0x2
"""linux/inotify.h: raised by write, by truncate, and by fallocate, which is how memory is discarded (fs/open.c)."""
_PUNCH = 0x1 | 0x2
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE (linux/falloc.h)."""
_PAGE = 4096
_ROOM = 4096


class FileNotices:
    """An event for each change of some files that is not a store into mapped memory, if the kernel reports them."""

    def __init__(self) -> None:
        self._fd = -1
        self._watches: set[int] = set()
        with suppress(OSError):
            # here no guest waits for it
            reports_memfds()

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that are readable once there was a change; none where changes are not reported."""
        return () if self._fd < 0 else (self._fd,)

    def watch(self, files: Iterable[int]) -> None:
        """Watch these files, descriptors that stay the caller's, and no others any more.

        Nothing is watched if one of them cannot be.
        """
        descriptors = tuple(files)
        try:
            reported = bool(descriptors) and (reports_memfds() or not any(_is_memfd(fd) for fd in descriptors))
            if reported and self._fd < 0:
                self._fd = _open()
            # the same number for a file that is watched already
            now = {_add(self._fd, fd) for fd in descriptors} if reported else set()
        except OSError:
            # at a limit on open files, or without /proc, memory is looked at periodically: no reason to refuse it
            now = set()
        if not now:
            self.close()
        for gone in self._watches - now:
            _libc().inotify_rm_watch(self._fd, gone)
        self._watches = now

    def drain(self) -> None:
        """Forget the changes so far."""
        with suppress(BlockingIOError):
            while self._fd >= 0 and os.read(self._fd, _ROOM):
                pass

    def close(self) -> None:
        """Watch nothing. Idempotent.

        It takes some 10 ms: the kernel waits until no event is under way (fsnotify_wait_marks_destroyed() in
        fs/notify/mark.c).
        """
        fd, self._fd = self._fd, -1
        self._watches.clear()
        close_all([fd])


class FailureNotice:
    """The configuration interrupt of a device, which it raises when it sets NEEDS_RESET (virtio 1.3, 2.1.2)."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.given = False
        """Whether the device has it; a reset may take it away, so each start does."""

    def give(self) -> None:
        """Raise it here: there is another reason to ask the device."""
        os.eventfd_write(self.fd, 1)

    def drain(self) -> bool:
        """Return whether it was raised since the last call."""
        with suppress(BlockingIOError):
            return os.eventfd_read(self.fd) > 0
        return False

    def close(self) -> None:
        """Close it. Idempotent."""
        fd, self.fd = self.fd, -1
        close_all([fd])


@functools.cache
def reports_memfds() -> bool:
    """Return whether this kernel reports changes of files that were made without a name; tried on one.

    Linux 6.14 and later do not: their descriptors have FMODE_NONOTIFY (alloc_file_pseudo() in fs/file_table.c).
    OSError if it could not be tried, as at a limit on open files; it is tried again then.
    """
    file = os.memfd_create("notices")
    notices = -1
    try:
        os.truncate(file, _PAGE)
        notices = _open()
        _add(notices, file)
        fallocate = _libc().fallocate
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if fallocate(file, _PUNCH, 0, _PAGE) < 0:
            raise OSError(ctypes.get_errno(), "fallocate")
        try:
            return bool(os.read(notices, _ROOM))
        except BlockingIOError:
            return False
    finally:
        os.close(file)
        if notices >= 0:
            os.close(notices)


def _is_memfd(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")


def _open() -> int:
    """Return a descriptor that reports changes of files; OSError if there is none."""
    notices = int(_libc().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    if notices < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    return notices


def _add(notices: int, fd: int) -> int:
    """Have a file's changes reported, and return the number of the watch; OSError if it cannot be watched."""
    # of a file without a name as well: the link leads to the inode
    watch = int(_libc().inotify_add_watch(notices, f"/proc/self/fd/{fd}".encode(), _IN_MODIFY))
    if watch < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch")
    return watch


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
