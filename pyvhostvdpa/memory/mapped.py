# SPDX-License-Identifier: MIT
"""Memory that is mapped into this process: made here, or in a file of another process.

What a device may touch is a shared memfd: parents that translate to user
addresses silently skip private memory
(drivers/vhost/vdpa.c:vhost_vdpa_va_map). Only a guest's memory whose devices
are all known to pin it is private. It is physically contiguous where
the kernel can give that, because a pinning parent needs one IOTLB entry per
contiguous run and kernels limit the entries.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from typing import Any, NewType

from .._cdefs import ffi, lib
from ..base.closing import Closing
from ..base.errors import DeviceClosed, MissingFeature
from . import hugepages
from .available import from_pool
from .pinned import HUGE_PAGE, PAGE_SIZE

Hva = NewType("Hva", int)
"""Address in this process."""

ProgressCallback = Callable[[int], None]
"""Called with the bytes that were allocated since the last call."""

_POPULATE_STEP = 64 << 20
_ENTRIES = 1 << 15
"""Pages of which the frame numbers are read at a time: 256 KiB."""


class MappedMemory(Closing):
    """``size`` bytes mapped into this process; subclasses decide which file they map."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._address: Any = ffi.NULL

    def _map_file(self, name: str, flags: int, align: int) -> None:
        """Map a memfd; ``flags`` choose its pages."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | flags)
        try:
            os.ftruncate(fd, self.size)
            self._map(align, fd)
        finally:
            os.close(fd)

    def _map(self, align: int, fd: int = -1) -> None:
        """Map a file, or private memory without one."""
        error = ffi.new("int *")
        self._address = lib.map_memory(fd, 0, self.size, align, error)
        if self._address == ffi.NULL:
            raise MissingFeature(f"cannot map {self.size} bytes of memory: {os.strerror(error[0])}")

    def _check_populated(self, failed: int) -> None:
        if failed:
            raise MissingFeature(
                f"cannot allocate {self.size} bytes of memory: {os.strerror(failed)}",
                hint="use a smaller guest, or free memory",
            )

    @property
    def buffer(self) -> memoryview:
        """The memory's bytes. Rings must not be touched through it."""
        return memoryview(ffi.buffer(ffi.cast("char *", self.hva), self.size))

    @property
    def hva(self) -> Hva:
        """Where the memory starts in this process."""
        if self._address == ffi.NULL:
            raise DeviceClosed("memory used after close()")
        return Hva(int(ffi.cast("uintptr_t", self._address)))

    @property
    def lost(self) -> int:
        """Bytes that were gone when they were accessed: only another process can do that to what it shares."""
        return 0

    def populate(self, progress: ProgressCallback = lambda done: None) -> None:
        """Allocate every page now; :class:`MissingFeature` if the machine does not have that much memory."""
        start = ffi.cast("uint8_t *", self.hva)
        for done in range(0, self.size, _POPULATE_STEP):
            step = min(_POPULATE_STEP, self.size - done)
            self._check_populated(lib.populate(start + done, step))
            progress(step)

    def runs(self, offset: int = 0, size: int | None = None) -> int:
        """Return the physically contiguous runs of all or a part, 0 if this process may not know (needs root)."""
        return physical_runs(self.hva + offset, self.size - offset if size is None else size)

    def close(self) -> None:
        """Unmap. If a device has it, unmap it there first. Idempotent."""
        if self._address != ffi.NULL:
            address, self._address = self._address, ffi.NULL
            lib.unmap_memory(address, self.size)


class SharedMemory(MappedMemory):
    """A memfd mapped into this process, populated, 2 MiB aligned.

    ``size`` in bytes is rounded up to a page; ``progress`` is called with
    the bytes of each step that was allocated. Raises :class:`MissingFeature`
    if the machine does not have that much memory.
    """

    def __init__(self, name: str, size: int, progress: ProgressCallback = lambda done: None) -> None:
        super().__init__(-(-size // PAGE_SIZE) * PAGE_SIZE)
        pooled = from_pool(self.size)
        self.base_pages = not pooled and not hugepages.in_files()
        """Whether the kernel gave it no pages of other sizes when it was made."""
        # the pool needs a flag; memory that becomes contiguous on advice needs none
        self._map_file(name, os.MFD_HUGETLB if pooled else 0, HUGE_PAGE)
        lib.advise_huge(self._address, self.size)
        try:
            self.populate(progress)
        except BaseException:
            self.close()
            raise


class PrivateMemory(MappedMemory):
    """Memory of this process alone, populated, 2 MiB aligned, in huge pages where the kernel can give them.

    For devices that pin what they are given: a parent that works on user
    addresses skips it without a word. The kernel knows of each huge page of
    it whether it was written (mm/memory.c:wp_huge_pmd), which of a file's it
    knows page by page only. Child processes do not have it. Raises what :class:`SharedMemory` raises.
    """

    def __init__(self, size: int, progress: ProgressCallback = lambda done: None) -> None:
        super().__init__(-(-size // PAGE_SIZE) * PAGE_SIZE)
        self._map(HUGE_PAGE)
        lib.advise_huge(self._address, self.size)
        try:
            # a page that is pinned would be copied by a fork, and the device keep the old one
            self._check_populated(lib.keep_from_children(self._address, self.size))
            self.populate(progress)
        except BaseException:
            self.close()
            raise


def unusable_as_memory(fd: int) -> str:
    """Return why the file of a descriptor cannot be guest memory, "" if it can: tmpfs, memfd or hugetlbfs."""
    kind = lib.is_memory_file(fd)
    if kind > 0:
        return ""
    return os.strerror(-kind) if kind else "it is neither tmpfs nor hugetlbfs"


class FileMemory(MappedMemory):
    """``size`` bytes of a memory file from ``offset`` on, mapped shared: a memfd handed over by another process.

    The descriptor stays the caller's and may be closed afterwards. Untouched pages
    are not allocated before :meth:`populate`. Raises :class:`MissingFeature`
    if the file is not memory (tmpfs, memfd or hugetlbfs), is shorter than
    that, or cannot be mapped; ValueError if ``offset`` or ``size`` are not
    whole pages. Where its owner makes the file shorter (:attr:`sealed` says
    that it cannot), what is beyond the new end reads as zeros here, and :attr:`lost`
    counts it; without the guard the process would be ended by SIGBUS.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        super().__init__(size)
        if size <= 0 or offset < 0 or size % PAGE_SIZE or offset % PAGE_SIZE:
            raise ValueError(f"{size:#x} bytes at offset {offset:#x} are not whole pages of {PAGE_SIZE} bytes")
        if why := unusable_as_memory(fd):
            raise MissingFeature(
                f"descriptor {fd} cannot be guest memory: {why}",
                hint="share a memfd, or a file in /dev/shm or in hugetlbfs",
            )
        status = os.fstat(fd)
        if offset + size > status.st_size:
            raise MissingFeature(
                f"descriptor {fd} has {status.st_size:#x} bytes; guest memory would reach to {offset + size:#x}"
            )
        self.sealed = cannot_shrink(fd)
        """Whether the kernel keeps the file from becoming shorter."""
        # hugetlbfs maps whole pages of its own size only, and other files get huge pages only where
        # the address is as far from the start of one as the offset is
        self._mapping = FileMapping(fd, offset, size, max(status.st_blksize, HUGE_PAGE))
        self._address = self._mapping.address
        # for pages that are allocated from here on; EINVAL where the file has huge pages of its own
        lib.advise_huge(self._mapping.start, self._mapping.mapped)

    @property
    def lost(self) -> int:
        """Bytes that were accessed here after the file had become shorter; they were read as zeros."""
        return self._mapping.lost

    def close(self) -> None:
        """Unmap; see :meth:`MappedMemory.close`."""
        self._address = ffi.NULL
        self._mapping.close()


class FileMapping:
    """``size`` bytes of a memory file from ``offset`` on, mapped shared in whole pages of ``page`` bytes.

    Guarded: a file's owner may make it shorter, and one of huge pages may be out of them where it was given a hole,
    sealed or not (``cdefs/lost_memory.c``). Raises :class:`MissingFeature` if
    it cannot be mapped or guarded.
    """

    def __init__(self, fd: int, offset: int, size: int, page: int) -> None:
        skip = offset % page
        self.mapped = -(-(skip + size) // page) * page
        """Bytes that are mapped, from :attr:`start` on."""
        error = ffi.new("int *")
        self.start = lib.map_memory(fd, offset - skip, self.mapped, page, error)
        if self.start == ffi.NULL:
            raise MissingFeature(f"cannot map {size:#x} bytes of descriptor {fd}: {os.strerror(error[0])}")
        self.address = self.start + skip
        """Where the bytes from ``offset`` on are."""
        self._guard = self._guarded(fd)

    def _guarded(self, fd: int) -> int:
        guard: int = lib.guard_memory(self.start, self.mapped, os.fstat(fd).st_blksize)
        if guard < 0:
            lib.unmap_memory(self.start, self.mapped)
            raise MissingFeature(
                f"descriptor {fd}: memory of other processes cannot be guarded: {os.strerror(-guard)}",
                hint="attach fewer regions in one process",
            )
        return guard

    @property
    def lost(self) -> int:
        """Bytes of pages that were gone when they were accessed, and were replaced by zeros."""
        return int(lib.lost_memory(self._guard)) if self._guard >= 0 else 0

    def close(self) -> None:
        """Unmap. Idempotent."""
        if self.start != ffi.NULL:
            start, self.start = self.start, ffi.NULL
            guard, self._guard = self._guard, -1
            if guard >= 0:
                lib.unguard_memory(guard)
            lib.unmap_memory(start, self.mapped)


def cannot_shrink(fd: int) -> bool:
    """Whether the kernel keeps a file from becoming shorter (fcntl(2), F_SEAL_SHRINK)."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        # EINVAL: a file that cannot be sealed
        return False


def physical_runs(hva: int, size: int) -> int:
    """Count physically contiguous runs of populated memory; 0 if the frame numbers are hidden.

    Takes a buffer of some size, whatever ``size`` is.
    """
    first, last = hva // PAGE_SIZE, -(-(hva + size) // PAGE_SIZE)
    runs = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for at in range(first, last, _ENTRIES):
            # the last page of the part before is looked at again: a run may continue behind it
            begin = max(first, at - 1)
            entries = os.pread(pagemap.fileno(), (min(at + _ENTRIES, last) - begin) * 8, begin * 8)
            found: int = lib.pagemap_runs(ffi.cast("uint64_t *", ffi.from_buffer(entries)), len(entries) // 8)
            if not found:
                return 0
            runs += found - (begin < at)
    return runs
