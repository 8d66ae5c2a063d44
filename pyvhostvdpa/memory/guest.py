# SPDX-License-Identifier: MIT
"""Guest memory: which regions it has, what the C loops know of them, and which pages were written."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NewType, Self

from .._cdefs import ffi, lib
from ..base.closing import Closing
from ..base.errors import MissingFeature
from . import pinned
from .available import from_pool
from .mapped import FileMemory, Hva, MappedMemory, PrivateMemory, ProgressCallback, SharedMemory

Gpa = NewType("Gpa", int)
"""Guest physical address."""

PAGE_SIZE = pinned.PAGE_SIZE
GUEST_PAGE: int = lib.GUEST_PAGE
"""What dirty pages are counted in, on every machine."""
HUGE_PAGE = pinned.HUGE_PAGE
DEFAULT_GPA = Gpa(1 << 30)
"""Where the synthetic guest's RAM starts. Not 0: some devices take IOVA 0 for no address."""


def check_available(size: int, copies: int = 1) -> None:
    """Raise :class:`MissingFeature` if ``size`` bytes are unavailable now, ``copies`` times; the limit is named.

    The machine's memory, cgroups and the pool of huge pages count (:mod:`pyvhostvdpa.memory.available`).
    """
    from_pool(size, copies)


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
    """A piece of guest memory in a file of another process: ``size`` bytes at ``offset`` of ``fd``, from ``gpa`` on.

    ``fd`` is a memory file (memfd, tmpfs or hugetlbfs), as vhost-user's
    SET_MEM_TABLE passes it.
    """

    gpa: int
    size: int
    fd: int
    offset: int = 0


def _check_sizes(layout: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError if a region (GPA, bytes) is not one of at least a byte within 64 bits."""
    for gpa, size in layout:
        if size <= 0 or gpa < 0 or gpa + size >= 1 << 64:
            raise ValueError(f"{size} bytes at {gpa:#x} cannot be guest memory")


def _check_layout(layout: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError if regions (GPA, bytes), sorted and in whole pages, cannot be guest memory."""
    _check_sizes(layout)
    for (gpa, size), (following, _) in pairwise(layout):
        if gpa + size > following:
            raise ValueError(f"guest memory regions overlap at {following:#x}")
    for gpa, _ in layout:
        if gpa % PAGE_SIZE:
            raise ValueError(f"guest memory at {gpa:#x} does not start on a page of {PAGE_SIZE} bytes")


def _map_each(pieces: Iterable[tuple[Gpa, Callable[[], MappedMemory]]]) -> list[Region]:
    """Map every region, or no region if one cannot be mapped."""
    mapped: list[Region] = []
    try:
        for gpa, make in pieces:
            mapped.append(Region(gpa, make()))
    except BaseException:
        for region in mapped:
            region.memory.close()
        raise
    return mapped


def _new_log(region: Region) -> Any:
    return ffi.new("uint64_t[]", bitmap_words(region.size))


def _ram(size: int, progress: ProgressCallback, private: bool) -> MappedMemory:
    if private and not from_pool(size, private=True):
        return PrivateMemory(size, progress)
    return SharedMemory("guest-ram", size, progress)


class GuestMemory(Closing):
    """The guest's RAM: regions by GPA, mapped here, described for the C loops.

    ``layout`` is (GPA, bytes) of each region, in any order and from GPA 0 on;
    sizes are rounded up to pages. ``progress`` is called while pages are
    allocated, with the bytes allocated since its last call. ``private`` if all
    devices that get it are known to pin memory
    (:attr:`~pyvhostvdpa.chardev.iotlb.Limits.private`): finding the pages that
    were written takes a small part of the time then (:class:`PrivateMemory`).
    Raises ValueError if there is no region, if one does not start on a page,
    or if regions overlap; :class:`~pyvhostvdpa.MissingFeature` if the machine
    does not have that much memory.
    """

    def __init__(
        self,
        layout: Sequence[tuple[Gpa, int]],
        progress: ProgressCallback = lambda done: None,
        private: bool = False,
    ) -> None:
        given = sorted(layout)
        if not given:
            raise ValueError("guest memory has no regions")
        _check_sizes(given)
        ordered = [(gpa, -(-size // PAGE_SIZE) * PAGE_SIZE) for gpa, size in given]
        _check_layout(ordered)
        check_available(sum(size for _, size in ordered))
        self._begin()
        self.private = private
        self.include(_map_each((gpa, partial(_ram, size, progress, private)) for gpa, size in ordered))

    private = False
    """Whether it may be given to devices only that pin memory."""

    def _begin(self) -> None:
        self.regions: list[Region] = []
        """By GPA; another list once regions come or go."""
        self.changing = threading.Lock()
        """Held while regions come or go; a thread that goes through the dirty log meanwhile holds it too."""
        self.devices = 0
        """To how many devices it is attached."""
        self._dirty: list[Any] = []
        self._marking = False
        self._translations: weakref.WeakSet[Translation] = weakref.WeakSet()
        self.c_map = ffi.new("struct memory_map *")
        self._describe()

    @classmethod
    def from_files(cls, regions: Iterable[FileRegion], populate: bool = True) -> Self:
        """Return guest memory that another process shares, mapped here.

        ``regions`` are its pieces; their descriptors stay the caller's.
        Closing unmaps here and nowhere else. With ``populate`` every page is
        allocated, as a device that pins pages does anyway
        (drivers/vhost/vdpa.c:vhost_vdpa_pa_map): only then is it known
        in advance how many entries of the device's IOTLB a map takes. A device
        that works on user addresses does not need it. Raises ValueError for
        regions that overlap or do not start on a page, and
        :class:`~pyvhostvdpa.MissingFeature` as :class:`FileMemory` does.
        """
        memory = cls.empty()
        memory.include(memory.map_files(regions, populate))
        if not memory.regions:
            raise ValueError("guest memory has no regions")
        return memory

    @classmethod
    def empty(cls) -> Self:
        """Return guest memory that has no regions yet: :meth:`VdpaNetDevice.add_memory` is for what comes later."""
        memory = cls.__new__(cls)
        memory._begin()
        return memory

    def map_files(self, regions: Iterable[FileRegion], populate: bool = True) -> list[Region]:
        """Map more ``regions`` that another process shares, not as guest memory yet: :meth:`include` makes them that.

        With ``populate`` every page is allocated. Raises what
        :meth:`from_files` does, also for regions that overlap existing ones.
        """
        ordered = sorted(regions, key=lambda each: each.gpa)
        there = [(region.gpa, region.size) for region in self.regions]
        _check_layout(sorted([*there, *((each.gpa, each.size) for each in ordered)]))
        mapped = _map_each((Gpa(each.gpa), partial(FileMemory, each.fd, each.offset, each.size)) for each in ordered)
        if populate:
            try:
                for region in mapped:
                    region.memory.populate()
            except BaseException:
                for region in mapped:
                    region.memory.close()
                raise
        return mapped

    def include(self, regions: Iterable[Region]) -> None:
        """Make ``regions`` part of guest memory, which closes them in the end. No C loop may be using the map.

        Raises :class:`~pyvhostvdpa.MissingFeature` while a device has guest
        memory translated.
        """
        self._change([*self.regions, *regions])

    def exclude(self, regions: Iterable[Region]) -> None:
        """Remove ``regions`` from guest memory; the caller closes them. No C loop may be using the map.

        Raises :class:`~pyvhostvdpa.MissingFeature` as :meth:`include` does.
        """
        gone = {region.gpa for region in regions}
        self._change([region for region in self.regions if region.gpa not in gone])

    def _change(self, regions: list[Region]) -> None:
        if self._translations:
            raise MissingFeature("regions of guest memory cannot come or go while a device has it translated")
        with self.changing:
            logs = {region.gpa: bits for region, bits in zip(self.regions, self._dirty, strict=False)}
            self.regions = sorted(regions, key=lambda region: region.gpa)
            if self._dirty or self._marking:
                self._dirty = [logs[r.gpa] if r.gpa in logs else _new_log(r) for r in self.regions]
            self._describe()

    def _describe(self) -> None:
        """Describe the regions to the C loops. A search reads a first region, also in an empty list."""
        slots = ffi.new("struct memory_region[]", max(len(self.regions), 1))
        for slot, region in zip(slots, self.regions, strict=False):
            slot.gpa = slot.iova = region.gpa
            slot.size = region.size
            slot.hva = ffi.cast("uint8_t *", region.memory.hva)
        self._c_regions = slots
        self.c_map.count, self.c_map.regions = len(self.regions), slots
        if self._marking:
            self._share_dirty_log(slots)

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self.regions)

    def hva(self, gpa: int, size: int = 1) -> Hva:
        """Return the address in this process at which ``size`` bytes at ``gpa`` are mapped.

        Raises ValueError if they are not one piece of guest memory.
        """
        pointer = lib.memory_hva(self.c_map, gpa, size)
        if pointer == ffi.NULL:
            raise ValueError(f"{gpa:#x}+{size:#x} is not guest memory")
        return Hva(int(ffi.cast("uintptr_t", pointer)))

    @property
    def lost(self) -> int:
        """Bytes that were accessed here after their owner had made the file shorter: they were read as zeros."""
        return sum(region.memory.lost for region in self.regions)

    def start_dirty_log(self) -> None:
        """Mark from now on which pages (:data:`GUEST_PAGE`) a device wrote through shadow virtqueues."""
        if not self._dirty:
            self._dirty = [_new_log(region) for region in self.regions]
        self._marking = True
        for bits in self._dirty:
            ffi.memmove(bits, bytes(ffi.sizeof(bits)), ffi.sizeof(bits))
        self._share_dirty_log(self._c_regions)
        for translation in self._translations:
            self._share_dirty_log(translation.c_regions)

    def stop_dirty_log(self) -> None:
        """Mark no more. Relays may run: the log's memory stays."""
        self._marking = False
        for slots in (self._c_regions, *(translation.c_regions for translation in self._translations)):
            for slot in slots:
                slot.dirty = ffi.NULL

    @property
    def dirty_log(self) -> list[Any]:
        """The bitmaps since :meth:`start_dirty_log`, one per region, for the C loops that empty them; none before."""
        return self._dirty

    def _share_dirty_log(self, slots: Any) -> None:
        for slot, bits in zip(slots, self._dirty, strict=False):
            slot.dirty = bits

    def translate(self, iovas: Sequence[int]) -> Translation:
        """Return this memory as a device sees it that has its regions at ``iovas``; it shares the dirty log."""
        translation = Translation(self.c_map, iovas)
        self._translations.add(translation)
        return translation

    def mark_all(self) -> None:
        """Mark every page in the dirty log: what the device writes is unknown. Nothing without a log."""
        for region in self.regions:
            lib.memory_mark(self.c_map, region.gpa, region.size)

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
