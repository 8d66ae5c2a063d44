# SPDX-License-Identifier: MIT
"""Which guest pages were written since they were sent.

Two sources, because neither sees everything. Shadow virtqueues mark the
buffers that the device may write (its DMA goes past the page tables of this process);
the kernel remembers what went through those page tables: the guest's CPU and
the device model. A device in passthrough is seen by neither: start the
tracker when all devices are in shadow mode.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .._cdefs import ffi, lib
from ..base.errors import MissingFeature, VhostVdpaError
from ..base.eventfds import close_all
from ..device.together import together
from ..memory.aside import TablesAside, address
from ..memory.guest import GUEST_PAGE, PAGE_SIZE, Gpa, GuestMemory, Region, bitmap_words

_PAGEMAP = "/proc/self/pagemap"
_CLEAR_REFS = "/proc/self/clear_refs"
_CLEAR_SOFT_DIRTY = b"4"
_ENTRY = 8
_ENTRIES = 1 << 16
_SCAN_ALIGN = 64 * GUEST_PAGE
"""Bytes of memory that a word of a bitmap stands for."""
_SCAN_MIN = 1 << 30
"""Bytes that are worth a thread of their own: asking takes half a millisecond."""
_SCAN_HUGE_MIN = 64 << 30
"""The same of private memory."""


class PageSet:
    """A set of guest pages of :data:`~pyvhostvdpa.memory.guest.GUEST_PAGE` bytes, a bit each."""

    def __init__(self, memory: GuestMemory) -> None:
        self._ranges = [(region.gpa, region.size) for region in memory.regions]
        self.bits: list[Any] = [ffi.new("uint64_t[]", bitmap_words(size)) for _, size in self._ranges]

    @classmethod
    def all(cls, memory: GuestMemory) -> Self:
        """Return the set of all pages of a guest."""
        pages = cls(memory)
        for gpa, size in pages._ranges:
            pages.add(gpa, size)
        return pages

    @property
    def count(self) -> int:
        """Pages in the set."""
        return sum(int(lib.pages_count(bits, len(bits))) for bits in self.bits)

    @property
    def bytes(self) -> int:
        """Bytes of guest memory in the set."""
        return self.count * GUEST_PAGE

    def common(self, other: PageSet) -> int:
        """Return how many pages are in another set of the same guest memory too."""
        return sum(int(lib.pages_common(a, b, len(a))) for a, b in zip(self.bits, other.bits, strict=True))

    def add(self, gpa: int, size: int = GUEST_PAGE) -> None:
        """Add the pages that ``size`` bytes at ``gpa`` touch; ValueError if that is not one piece of guest memory."""
        for (start, length), bits in zip(self._ranges, self.bits, strict=True):
            if start <= gpa < start + length and 0 < size <= start + length - gpa:
                first = (gpa - start) // GUEST_PAGE
                lib.pages_mark(bits, first, (gpa - start + size - 1) // GUEST_PAGE - first + 1)
                return
        raise ValueError(f"{gpa:#x}+{size:#x} is not guest memory")

    def update(self, other: PageSet) -> None:
        """Add the pages of another set of the same guest memory."""
        if self._ranges != other._ranges:
            raise ValueError("sets of pages of different guest memory")
        for bits, more in zip(self.bits, other.bits, strict=True):
            lib.pages_add(bits, more, len(bits))

    def __or__(self, other: PageSet) -> PageSet:
        union = PageSet.__new__(PageSet)
        union._ranges = self._ranges
        union.bits = [ffi.new("uint64_t[]", len(bits)) for bits in self.bits]
        union.update(self)
        union.update(other)
        return union

    def __contains__(self, gpa: object) -> bool:
        return isinstance(gpa, int) and any(
            start <= gpa < start + length and bool(bits[(gpa - start) // GUEST_PAGE // 64] & _bit(gpa - start))
            for (start, length), bits in zip(self._ranges, self.bits, strict=True)
        )

    def __iter__(self) -> Iterator[Gpa]:
        """Yield the pages by address: for looking at, not for moving them."""
        for (start, _), bits in zip(self._ranges, self.bits, strict=True):
            for index, word in enumerate(bits):
                left = int(word)
                while left:
                    lowest = left & -left
                    yield Gpa(start + (index * 64 + lowest.bit_length() - 1) * GUEST_PAGE)
                    left ^= lowest

    def __repr__(self) -> str:
        return f"<PageSet of {self.count} pages>"


def _bit(offset: int) -> int:
    return 1 << (offset // GUEST_PAGE % 64)


class Interface(Enum):
    """How the kernel reports which pages were written."""

    PAGEMAP_SCAN = "PAGEMAP_SCAN"
    """ioctl on /proc/self/pagemap over memory that a userfaultfd write-protects without a listener (WP_ASYNC)."""
    SOFT_DIRTY = "soft-dirty"
    """Bit 55 of /proc/self/pagemap, cleared through /proc/self/clear_refs."""


def probe_interface() -> Interface:
    """Return the best interface that works here; :class:`MissingFeature` if none does."""
    uffd = lib.written_open()
    if uffd >= 0:
        os.close(uffd)
        if _scans():
            return Interface.PAGEMAP_SCAN
    if _soft_dirty_works():
        return Interface.SOFT_DIRTY
    raise MissingFeature(
        "this kernel does not report which pages of guest memory were written: userfaultfd with WP_ASYNC "
        f"({os.strerror(-uffd) if uffd < 0 else 'there, but PAGEMAP_SCAN is not'}), and no soft-dirty bits",
        hint="a kernel with CONFIG_PTE_MARKER_UFFD_WP and PAGEMAP_SCAN, or with CONFIG_MEM_SOFT_DIRTY; "
        "in a container, allow userfaultfd in its seccomp profile",
    )


def _scans() -> bool:
    with open(_PAGEMAP, "rb", buffering=0) as pagemap:
        # an interval of one page that is not watched: only whether the request is known is asked
        page = ffi.new("uint8_t[]", 2 * PAGE_SIZE)
        start = -(-int(ffi.cast("uintptr_t", page)) // PAGE_SIZE) * PAGE_SIZE
        bits = ffi.new("uint64_t[]", max(1, PAGE_SIZE // GUEST_PAGE))
        answer: int = lib.written_collect(pagemap.fileno(), ffi.cast("uint8_t *", start), PAGE_SIZE, bits)
    return answer in (0, errno.EPERM)


def _soft_dirty_works() -> bool:
    """Return whether a page is not soft-dirty after clearing and is after writing it."""
    page = ffi.new("uint8_t[]", 2 * PAGE_SIZE)
    at = -(-int(ffi.cast("uintptr_t", page)) // PAGE_SIZE) * PAGE_SIZE
    try:
        page[PAGE_SIZE] = 1
        Path(_CLEAR_REFS).write_bytes(_CLEAR_SOFT_DIRTY)
        clean = _soft_dirty(at)
        ffi.cast("uint8_t *", at)[0] = 1
        return not clean and _soft_dirty(at)
    except OSError:
        return False


def _soft_dirty(address: int) -> bool:
    with open(_PAGEMAP, "rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE_SIZE * _ENTRY)
        return bool(int.from_bytes(pagemap.read(_ENTRY), "little") >> 55 & 1)


class DirtyTracker:
    """What is written to guest memory, from :meth:`start` on, each page reported once per :meth:`collect`.

    ``interface`` is the kernel's best unless given. Raises
    :class:`MissingFeature` without one.
    """

    def __init__(self, memory: GuestMemory, interface: Interface | None = None) -> None:
        self.interface = interface or probe_interface()
        self.written_by_devices = PageSet(memory)
        """Of what the last :meth:`collect` returned, the pages that devices were seen to write."""
        self._memory = memory
        # the C library reads a file for it
        self._cpus = os.cpu_count() or 1
        self._uffd = -1
        self._pagemap: int | None = None
        self._aside: TablesAside | None = None

    @property
    def atomic(self) -> bool:
        """Whether :meth:`collect` may be called while the guest's CPU runs.

        Soft-dirty bits are read and cleared in two steps: what is written in
        between is lost, so the guest must be paused for both.
        """
        return self.interface is Interface.PAGEMAP_SCAN

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._pagemap is not None

    def start(self) -> None:
        """Watch all guest memory from now on. Earlier writes are not reported."""
        _check("membarrier", lib.pages_barrier_prepare())
        self._pagemap = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._memory.start_dirty_log()
            if self.interface is Interface.PAGEMAP_SCAN:
                self._watch()
            else:
                Path(_CLEAR_REFS).write_bytes(_CLEAR_SOFT_DIRTY)
        except BaseException:
            self.stop()
            raise

    def _watch(self) -> None:
        self._uffd = lib.written_open()
        if self._uffd < 0:
            _check("userfaultfd", -self._uffd)
        for region in self._memory.regions:
            _check("userfaultfd write protection", lib.written_watch(self._uffd, address(region), region.size))

    def collect(self) -> PageSet:
        """Return what was written since the last time; see :attr:`atomic`."""
        pages = PageSet(self._memory)
        self.written_by_devices = PageSet(self._memory)
        self.drain_into(pages, self.written_by_devices)
        self.scan_into(pages)
        return pages

    def drain_into(self, pages: PageSet, by_devices: PageSet) -> None:
        """Add to ``pages`` and to ``by_devices`` what devices wrote: relays and control queues mark it."""
        if self._pagemap is None:
            raise VhostVdpaError("the dirty tracker was not started")
        for bits, log, seen in zip(pages.bits, self._memory.dirty_log, by_devices.bits, strict=True):
            lib.pages_drain(bits, seen, log, len(bits))
        _check("membarrier", lib.pages_barrier())

    def scan_into(self, pages: PageSet) -> None:
        """Add to ``pages`` what was written through page tables: by the guest's CPU, and by relays."""
        if self._pagemap is None:
            raise VhostVdpaError("the dirty tracker was not started")
        if self.interface is Interface.PAGEMAP_SCAN:
            self._scan(pages)
            return
        for region, bits in zip(self._memory.regions, pages.bits, strict=True):
            self._read_soft_dirty(region, bits)
        Path(_CLEAR_REFS).write_bytes(_CLEAR_SOFT_DIRTY)

    def look_at_used(self, pages: PageSet) -> Any | None:
        """Let :meth:`collect` and :meth:`scan_into` look at those pages only that are used from now on, if that works.

        They take no longer for more memory then (:mod:`pyvhostvdpa.memory.aside`). To ``pages`` is added what was
        written until now, which takes as long as a look before. What is only read between this and the next look is
        reported too, once. Returns guest memory as C is to read it, so that nothing counts as used by that; None if
        nothing has changed. Raises :class:`MissingFeature` if the tracker cannot be used any more.
        """
        if self._pagemap is None or self._aside is not None or self.interface is not Interface.PAGEMAP_SCAN:
            return None
        with suppress(MissingFeature):
            self._aside = TablesAside(self._memory, self._uffd)
        if self._aside is None:
            return None
        self._aside.move()
        self._scan_all(pages, self._aside.moved)
        return self._aside.read_through() if self._aside.moved else None

    def _scan(self, pages: PageSet) -> None:
        """Ask the kernel for what was written."""
        used = self._aside.moved if self._aside else {}
        for region, bits in zip(self._memory.regions, pages.bits, strict=True):
            if region in used:
                found = lib.written_collect_used(self._pagemap, address(region), region.size, bits)
                _check("PAGEMAP_SCAN", found)
        self._scan_all(pages, {region: address(region) for region in self._memory.regions if region not in used})

    def _scan_all(self, pages: PageSet, regions: Mapping[Region, Any]) -> None:
        """Look at all page tables of ``regions``, which are there; of a large memory in parts, on all CPUs at once."""
        # of private memory the kernel knows huge pages: a thread takes longer to be made than it has to look
        least = _SCAN_HUGE_MIN if self._memory.private else _SCAN_MIN
        size = sum(region.size for region in regions)
        step = size if size <= least else max(least, -(-size // self._cpus // _SCAN_ALIGN) * _SCAN_ALIGN)
        parts = [
            partial(self._scan_part, regions[region] + offset, min(step, region.size - offset), bits, offset)
            for region, bits in zip(self._memory.regions, pages.bits, strict=True)
            if region in regions
            for offset in range(0, region.size, step)
        ]
        together(parts, at_most=self._cpus if size > least else 1)

    def _scan_part(self, at: Any, size: int, bits: Any, offset: int) -> None:
        # parts begin at a word of the bitmap, so that no two threads write the same one
        _check("PAGEMAP_SCAN", lib.written_collect(self._pagemap, at, size, bits + offset // _SCAN_ALIGN))

    def _read_soft_dirty(self, region: Region, bits: Any) -> None:
        assert self._pagemap is not None
        each = PAGE_SIZE // GUEST_PAGE
        first, count = region.memory.hva // PAGE_SIZE, region.size // PAGE_SIZE
        for done in range(0, count, _ENTRIES):
            entries = os.pread(self._pagemap, min(_ENTRIES, count - done) * _ENTRY, (first + done) * _ENTRY)
            words = ffi.from_buffer("uint64_t[]", entries)
            lib.written_soft_dirty(words, len(words), each, bits, done * each)

    def stop(self) -> None:
        """Watch no more. Idempotent."""
        self._memory.stop_dirty_log()
        fds = (self._uffd, -1 if self._pagemap is None else self._pagemap)
        self._uffd, self._pagemap = -1, None
        aside, self._aside = self._aside, None
        close_all(fds)
        if aside is not None:
            aside.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _check(what: str, error: int) -> None:
    if error:
        raise MissingFeature(f"{what}: {os.strerror(error)}: cannot track which pages of guest memory are written")
