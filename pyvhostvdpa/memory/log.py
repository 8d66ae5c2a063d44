# SPDX-License-Identifier: MIT
"""Dirty pages for another process: a bitmap that it shares and empties, as a vhost-user front-end does.

The format is vhost-user's (docs/interop/vhost-user.rst of QEMU, "Migration"):
one bit for each 4 KiB of guest-physical address space from GPA 0 on, page / 8
is the byte and page % 8 the bit. Bits are only ever set, by atomic operations.
"""

from __future__ import annotations

import os
from typing import Any

from .._cdefs import ffi, lib
from ..base.closing import Closing
from ..base.errors import DeviceClosed, KernelError, MissingFeature
from .guest import GUEST_PAGE, GuestMemory, bitmap_words
from .mapped import FileMapping


def log_size(memory: GuestMemory) -> int:
    """Return the bytes that a bitmap needs to have a bit for each page of ``memory``."""
    return bytes_up_to(memory.regions[-1].end) if memory.regions else 0


def bytes_up_to(end: int) -> int:
    """Return the bytes that a bitmap needs to have a bit for each page below ``end``."""
    return (end - 1) // GUEST_PAGE // 8 + 1


class SharedLog(Closing):
    """A bitmap of another process into which the pages marked in ``memory`` go.

    The relay marks pages in the log of :class:`GuestMemory`, as always, and
    :meth:`publish` moves the marks. A mark may arrive late without harm, as
    long as it arrives before the other process looks for the last time: call
    :meth:`publish` as often as its rounds should see something, and once after
    the queues were stopped, before that is reported. ``memory``'s log has one
    reader, so no :class:`~pyvhostvdpa.migration.dirty.DirtyTracker` beside it.

    ``fd`` is a memory file, which stays the caller's, ``offset`` and ``size``
    the bytes of the bitmap in it, as vhost-user's SET_LOG_BASE passes them: a
    bit for each 4 KiB of guest-physical address. Raises
    :class:`~pyvhostvdpa.MissingFeature` if it is not memory, is shorter than
    that, is too small for ``memory``, or cannot be mapped.
    """

    def __init__(self, memory: GuestMemory, fd: int, size: int, offset: int = 0) -> None:
        self.size = size
        self._memory = memory
        kind = lib.is_memory_file(fd)
        if kind <= 0:
            why = os.strerror(-kind) if kind else "it is neither tmpfs nor hugetlbfs"
            raise MissingFeature(f"descriptor {fd} cannot be a dirty bitmap: {why}", hint="share a memfd")
        have, need = os.fstat(fd).st_size, log_size(memory)
        if offset < 0 or size < need or offset + size > have:
            raise MissingFeature(
                f"a dirty bitmap of {size:#x} bytes at offset {offset:#x} of a file of {have:#x} bytes does not do: "
                f"this guest memory needs {need:#x} bytes"
            )
        self._mapping = FileMapping(fd, offset, size, os.fstat(fd).st_blksize)
        self._taken: list[Any] = []
        try:
            _check(lib.pages_barrier_prepare())
            with memory.changing:
                self._room()
        except BaseException:
            self._mapping.close()
            raise

    def publish(self) -> int:
        """Move the pages marked since the last time into the other process's bitmap; return how many.

        Relays may mark pages meanwhile. Does nothing before
        :meth:`GuestMemory.start_dirty_log`. Raises
        :class:`~pyvhostvdpa.DeviceClosed` after :meth:`close`, and
        :class:`~pyvhostvdpa.KernelError` if ``membarrier`` fails.
        """
        if self._mapping.start == ffi.NULL:
            raise DeviceClosed("dirty bitmap used after close()")
        with self._memory.changing:
            taken = self._room()
            for bits, log in zip(taken, self._memory.dirty_log, strict=False):
                ffi.memmove(bits, bytes(ffi.sizeof(bits)), ffi.sizeof(bits))
                lib.pages_drain(bits, ffi.NULL, log, len(bits))
            # a thread that found its page marked has written it by now, so that the other side reads what was written
            _check(lib.pages_barrier())
            moved = 0
            for region, bits in zip(self._memory.regions, taken, strict=True):
                lib.pages_publish(bits, len(bits), region.gpa // GUEST_PAGE, self._mapping.address, self.size)
                moved += lib.pages_count(bits, len(bits))
                ffi.memmove(bits, bytes(ffi.sizeof(bits)), ffi.sizeof(bits))
        return moved

    def _room(self) -> list[Any]:
        """Return a bitmap for each region that there is now; regions may have come or gone since the last time."""
        sizes = [bitmap_words(region.size) for region in self._memory.regions]
        if [len(bits) for bits in self._taken] != sizes:
            self._taken = [ffi.new("uint64_t[]", size) for size in sizes]
        return self._taken

    def close(self) -> None:
        """Unmap the bitmap. Not one bit is set in it afterwards. Idempotent."""
        self._mapping.close()


def _check(error: int) -> None:
    if error:
        raise KernelError(error, "membarrier", "PRIVATE_EXPEDITED")
