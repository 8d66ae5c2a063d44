# SPDX-License-Identifier: MIT
"""Guest memory, addresses, and where in the device's address space things go.

Everything a device may touch is a shared memfd: parents that translate to
user addresses silently skip private memory
(drivers/vhost/vdpa.c:vhost_vdpa_va_map). It is physically contiguous where
the kernel can give that, because a pinning parent needs one IOTLB entry per
contiguous run and kernels limit the entries.
"""

from __future__ import annotations

import fcntl
import os
import resource
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NewType, Self

from .._cdefs import ffi, lib
from ..base.closing import Closing
from ..base.errors import DeviceClosed, MapRejected, MissingFeature
from . import pinned
from .available import from_pool
from .pinned import pinned_bytes

Gpa = NewType("Gpa", int)
"""Guest physical address."""
Hva = NewType("Hva", int)
"""Address in this process."""
Iova = NewType("Iova", int)
"""Address as the device sees it, in one address space."""

PAGE_SIZE = pinned.PAGE_SIZE
GUEST_PAGE: int = lib.GUEST_PAGE
"""What dirty pages are counted in, on every machine."""
HUGE_PAGE = pinned.HUGE_PAGE
DEFAULT_GPA = Gpa(1 << 30)
"""Where the synthetic guest's RAM starts. Not 0: some devices take IOVA 0 for no address."""


ProgressCallback = Callable[[int], None]

_POPULATE_STEP = 64 << 20
_ENTRIES = 1 << 15
"""Pages of which the frame numbers are read at a time: 256 KiB."""


class MappedMemory(Closing):
    """``size`` bytes mapped into this process; what they are mapped of is for those who derive from it."""

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
        """The memory's bytes. Rings are not to be touched through it."""
        return memoryview(ffi.buffer(ffi.cast("char *", self.hva), self.size))

    @property
    def hva(self) -> Hva:
        """Where the memory starts in this process."""
        if self._address == ffi.NULL:
            raise DeviceClosed("memory used after close()")
        return Hva(int(ffi.cast("uintptr_t", self._address)))

    def populate(self, progress: ProgressCallback = lambda done: None) -> None:
        """Allocate every page now; :class:`MissingFeature` if the machine has not that much memory."""
        start = ffi.cast("uint8_t *", self.hva)
        for done in range(0, self.size, _POPULATE_STEP):
            step = min(_POPULATE_STEP, self.size - done)
            self._check_populated(lib.populate(start + done, step))
            progress(step)

    def runs(self, offset: int = 0, size: int | None = None) -> int:
        """Return the physically contiguous runs of all or a part, 0 if this process may not know (needs root)."""
        return physical_runs(self.hva + offset, self.size - offset if size is None else size)

    def close(self) -> None:
        """Unmap. Whoever gave it to a device has to unmap it there first. Twice is no error."""
        if self._address != ffi.NULL:
            address, self._address = self._address, ffi.NULL
            lib.unmap_memory(address, self.size)


class SharedMemory(MappedMemory):
    """A memfd mapped into this process, populated, 2 MiB aligned.

    ``size`` in bytes is rounded up to a page; ``progress`` is called with
    the bytes of each step that was allocated. Raises :class:`MissingFeature`
    if the machine has not that much memory.
    """

    def __init__(self, name: str, size: int, progress: ProgressCallback = lambda done: None) -> None:
        super().__init__(-(-size // PAGE_SIZE) * PAGE_SIZE)
        # the pool needs a flag; memory that becomes contiguous on advice needs none
        self._map_file(name, os.MFD_HUGETLB if from_pool(self.size) else 0, HUGE_PAGE)
        lib.advise_huge(self._address, self.size)
        try:
            self.populate(progress)
        except BaseException:
            self.close()
            raise


class FileMemory(MappedMemory):
    """``size`` bytes of a memory file from ``offset`` on, mapped shared: a memfd handed over by another process.

    The descriptor stays the caller's and may be closed afterwards. Pages that
    nobody has touched are not allocated before :meth:`populate`. Raises :class:`MissingFeature`
    if the file is not memory (tmpfs, memfd or hugetlbfs), is shorter than
    that, or cannot be mapped; ValueError if ``offset`` or ``size`` are not
    whole pages. A file that its owner can shrink ends this process with
    SIGBUS when it does: see :attr:`sealed`.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        super().__init__(size)
        if size <= 0 or offset < 0 or size % PAGE_SIZE or offset % PAGE_SIZE:
            raise ValueError(f"{size:#x} bytes at offset {offset:#x} are not whole pages of {PAGE_SIZE} bytes")
        kind = lib.is_memory_file(fd)
        if kind <= 0:
            why = os.strerror(-kind) if kind else "it is neither tmpfs nor hugetlbfs"
            raise MissingFeature(
                f"descriptor {fd} cannot be guest memory: {why}",
                hint="share a memfd, or a file in /dev/shm or in hugetlbfs",
            )
        status = os.fstat(fd)
        if offset + size > status.st_size:
            raise MissingFeature(
                f"descriptor {fd} has {status.st_size:#x} bytes; guest memory would reach to {offset + size:#x}"
            )
        self.sealed = _cannot_shrink(fd)
        """Whether the kernel keeps the file from becoming shorter."""
        # hugetlbfs maps whole pages of its own size only, and other files get huge pages only where
        # the address is as far from the start of one as the offset is
        page = max(status.st_blksize, HUGE_PAGE)
        self._skip = offset % page
        self._mapped = -(-(self._skip + size) // page) * page
        error = ffi.new("int *")
        self._address = lib.map_memory(fd, offset - self._skip, self._mapped, page, error)
        if self._address == ffi.NULL:
            raise MissingFeature(f"cannot map {size:#x} bytes of descriptor {fd}: {os.strerror(error[0])}")
        # for pages that are allocated from here on; EINVAL where the file has huge pages of its own
        lib.advise_huge(self._address, self._mapped)

    @property
    def hva(self) -> Hva:
        """Where the memory starts in this process."""
        return Hva(super().hva + self._skip)

    def close(self) -> None:
        """Unmap; see :meth:`MappedMemory.close`."""
        if self._address != ffi.NULL:
            address, self._address = self._address, ffi.NULL
            lib.unmap_memory(address, self._mapped)


def _cannot_shrink(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        # EINVAL: a file that cannot be sealed
        return False


def check_available(size: int, copies: int = 1) -> None:
    """Raise :class:`MissingFeature` if ``size`` bytes are not to be had now, ``copies`` times; the limit is named.

    The machine's memory, cgroups and the pool of huge pages count (:mod:`pyvhostvdpa.memory.available`).
    """
    from_pool(size, copies)


def physical_runs(hva: int, size: int) -> int:
    """Count physically contiguous runs of populated memory; 0 if the frame numbers are hidden.

    Takes a buffer of some size, whatever ``size`` is.
    """
    first, last = hva // PAGE_SIZE, -(-(hva + size) // PAGE_SIZE)
    runs = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for at in range(first, last, _ENTRIES):
            # the last page of the part before is looked at again: a run may go on behind it
            begin = max(first, at - 1)
            entries = os.pread(pagemap.fileno(), (min(at + _ENTRIES, last) - begin) * 8, begin * 8)
            found: int = lib.pagemap_runs(ffi.cast("uint64_t *", ffi.from_buffer(entries)), len(entries) // 8)
            if not found:
                return 0
            runs += found - (begin < at)
    return runs


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of guest memory."""

    gpa: Gpa
    memory: MappedMemory

    @property
    def size(self) -> int:
        """Bytes."""
        return self.memory.size

    @property
    def end(self) -> Gpa:
        """The first address behind it."""
        return Gpa(self.gpa + self.memory.size)


class Translation:
    """Guest memory at other addresses than the guest's: what the C loops put into a device's descriptors."""

    def __init__(self, c_map: Any, iovas: Sequence[int]) -> None:
        if len(iovas) != c_map.count:
            raise ValueError(f"{len(iovas)} addresses for {c_map.count} regions of guest memory")
        self.c_regions = ffi.new("struct memory_region[]", [c_map.regions[i] for i in range(c_map.count)])
        self.c_map = ffi.new("struct memory_map *", {"count": c_map.count, "regions": self.c_regions})
        for slot, iova in zip(self.c_regions, iovas, strict=True):
            slot.iova = iova


def bitmap_words(size: int) -> int:
    """Return the 64-bit words of a bitmap with a bit for each guest page of ``size`` bytes."""
    return -(-size // (GUEST_PAGE * 64))


@dataclass(frozen=True, slots=True)
class FileRegion:
    """A piece of guest memory in a file of another process: ``size`` bytes at ``offset`` of ``fd``, from ``gpa`` on."""

    gpa: int
    size: int
    fd: int
    offset: int = 0


def _check_layout(layout: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError if regions (GPA, bytes), sorted and in whole pages, cannot be guest memory."""
    if not layout:
        raise ValueError("guest memory has no regions")
    for gpa, size in layout:
        if size <= 0 or gpa < 0 or gpa + size >= 1 << 64:
            raise ValueError(f"{size:#x} bytes at {gpa:#x} cannot be guest memory")
    for (gpa, size), (following, _) in pairwise(layout):
        if gpa + size > following:
            raise ValueError(f"guest memory regions overlap at {following:#x}")
    for gpa, _ in layout:
        if gpa % PAGE_SIZE:
            raise ValueError(f"guest memory at {gpa:#x} does not start on a page of {PAGE_SIZE} bytes")


class GuestMemory(Closing):
    """The guest's RAM: regions by GPA, mapped here, described for the C loops.

    ``layout`` is (GPA, bytes) of each region, in any order and from GPA 0 on;
    sizes are rounded up to pages. Raises ValueError if there is none, if one
    does not start on a page, or if regions overlap; :class:`MissingFeature`
    if the machine has not that much memory.
    """

    def __init__(self, layout: Sequence[tuple[Gpa, int]], progress: ProgressCallback = lambda done: None) -> None:
        ordered = [(gpa, -(-size // PAGE_SIZE) * PAGE_SIZE) for gpa, size in sorted(layout)]
        _check_layout(ordered)
        check_available(sum(size for _, size in ordered))
        self._take((gpa, partial(SharedMemory, "guest-ram", size, progress)) for gpa, size in ordered)

    @classmethod
    def from_files(cls, regions: Iterable[FileRegion], populate: bool = True) -> Self:
        """Map guest memory that another process shares; see :class:`FileMemory` for what is raised beside ValueError.

        The descriptors stay the caller's. Closing unmaps here and nowhere else.
        With ``populate`` every page is allocated, as a device that pins pages
        does anyway: only then is it known beforehand how many entries of the
        device's IOTLB a map takes. A device that works on user addresses does
        not need it.
        """
        ordered = sorted(regions, key=lambda each: each.gpa)
        _check_layout([(each.gpa, each.size) for each in ordered])
        memory = cls.__new__(cls)
        memory._take((Gpa(each.gpa), partial(FileMemory, each.fd, each.offset, each.size)) for each in ordered)
        if populate:
            try:
                for region in memory.regions:
                    region.memory.populate()
            except BaseException:
                memory.close()
                raise
        return memory

    def _take(self, pieces: Iterable[tuple[Gpa, Callable[[], MappedMemory]]]) -> None:
        """Map every region and describe it for the C loops."""
        self.regions: list[Region] = []
        self._dirty: list[Any] = []
        self._translations: weakref.WeakSet[Translation] = weakref.WeakSet()
        try:
            for gpa, make in pieces:
                self.regions.append(Region(gpa, make()))
        except BaseException:
            self.close()
            raise
        self._c_regions = ffi.new("struct memory_region[]", len(self.regions))
        self.c_map = ffi.new("struct memory_map *", {"count": len(self.regions), "regions": self._c_regions})
        for slot, region in zip(self._c_regions, self.regions, strict=True):
            slot.gpa = slot.iova = region.gpa
            slot.size = region.size
            slot.hva = ffi.cast("uint8_t *", region.memory.hva)

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self.regions)

    def hva(self, gpa: int, size: int = 1) -> Hva:
        """Return where ``size`` bytes at ``gpa`` are mapped; ValueError if they are not one piece of guest memory."""
        pointer = lib.memory_hva(self.c_map, gpa, size)
        if pointer == ffi.NULL:
            raise ValueError(f"{gpa:#x}+{size:#x} is not guest memory")
        return Hva(int(ffi.cast("uintptr_t", pointer)))

    def start_dirty_log(self) -> None:
        """Mark from now on which pages (:data:`GUEST_PAGE`) a device wrote through shadow virtqueues."""
        if not self._dirty:
            self._dirty = [ffi.new("uint64_t[]", bitmap_words(region.size)) for region in self.regions]
        for bits in self._dirty:
            ffi.memmove(bits, bytes(ffi.sizeof(bits)), ffi.sizeof(bits))
        self._share_dirty_log(self._c_regions)
        for translation in self._translations:
            self._share_dirty_log(translation.c_regions)

    def stop_dirty_log(self) -> None:
        """Mark no more. Relays may run: the log's memory stays."""
        for slots in (self._c_regions, *(translation.c_regions for translation in self._translations)):
            for slot in slots:
                slot.dirty = ffi.NULL

    @property
    def dirty_log(self) -> list[Any]:
        """The bitmaps since :meth:`start_dirty_log`, one a region, for the C loops that empty them; none before."""
        return self._dirty

    def _share_dirty_log(self, slots: Any) -> None:
        for slot, bits in zip(slots, self._dirty, strict=False):
            slot.dirty = bits

    def translate(self, iovas: Sequence[int]) -> Translation:
        """Return this memory as a device sees it that has its regions at ``iovas``; it shares the dirty log."""
        translation = Translation(self.c_map, iovas)
        self._translations.add(translation)
        return translation

    def dirty_pages(self) -> list[Gpa]:
        """Return the pages marked since :meth:`start_dirty_log`, by address."""
        pages = []
        for region, bits in zip(self.regions, self._dirty, strict=False):
            packed = int.from_bytes(ffi.buffer(bits), "little")
            while packed:
                lowest = packed & -packed
                pages.append(Gpa(region.gpa + (lowest.bit_length() - 1) * GUEST_PAGE))
                packed ^= lowest
        return pages

    def close(self) -> None:
        """Unmap all regions."""
        for region in self.regions:
            region.memory.close()


class IovaAllocator:
    """First fit in the holes of one address space.

    ``first`` and ``last`` are the device's IOVA range, both inclusive;
    ``taken`` the ranges (start, size) that are not to be given out. Page 0 never is.
    """

    def __init__(self, first: int, last: int, taken: Iterable[tuple[int, int]] = ()) -> None:
        self._first = max(-(-first // PAGE_SIZE) * PAGE_SIZE, PAGE_SIZE)
        self._last = last
        self._reserved = tuple(taken)
        self._given: dict[int, int] = {}

    def allocate(self, size: int) -> Iova:
        """Return a free page-aligned range of ``size`` bytes, rounded up to pages; MapRejected if there is none."""
        need = -(-size // PAGE_SIZE) * PAGE_SIZE
        at = self._first
        for start, length in sorted((*self._reserved, *self._given.items())):
            if start >= at + need:
                break
            at = max(at, -(-(start + length) // PAGE_SIZE) * PAGE_SIZE)
        if at + need - 1 > self._last:
            raise MapRejected(f"no hole of {need:#x} bytes in the device's IOVA range up to {self._last:#x}")
        self._given[at] = need
        return Iova(at)

    def free(self, iova: int) -> None:
        """Give a range back by its start."""
        del self._given[iova]


def allow_pinning(size: int) -> str:
    """Make room for ``size`` more pinned bytes under RLIMIT_MEMLOCK.

    vhost-vdpa compares with the limit alone, CAP_IPC_LOCK does not help
    (drivers/vhost/vdpa.c:vhost_vdpa_pa_map). Returns what was changed, "" if
    nothing had to be; raises :class:`MapRejected` if it may not be changed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    need = pinned_bytes() + size
    if soft == resource.RLIM_INFINITY or need <= soft:
        return ""
    try:
        raised = hard if hard == resource.RLIM_INFINITY else max(hard, need)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (need, raised))
    except (ValueError, OSError) as e:
        raise MapRejected(
            f"RLIMIT_MEMLOCK is {soft >> 10} KiB; pinning this takes {need >> 10} KiB in all "
            "(each address space and each device counts anew, root is not exempt)",
            hint="ulimit -l unlimited, or LimitMEMLOCK=infinity in the service unit",
        ) from e
    return f"RLIMIT_MEMLOCK raised from {soft >> 10} KiB to {need >> 10} KiB"
