# SPDX-License-Identifier: MIT
"""Guest memory as a front-end shares it: regions, whose files they are, and addresses in them.

A region has three addresses: the guest's (GPA), which is the device's as well, the front-end's own, and an offset in a
file. Nothing is mapped here; the device is given what :class:`FrontEndMemory` has checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..memory.guest import PAGE_SIZE, FileRegion
from ..memory.mapped import unusable_as_memory
from .messages import MessageRefused, TableRegion

MAX_SLOTS = 509
"""Regions at most: what GET_MAX_MEM_SLOTS answers. QEMU's machines use no more."""


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """A region that was checked, and the file that it lies in."""

    gpa: int
    size: int
    user: int
    offset: int
    file: tuple[int, int]
    """Device and inode of the file."""

    @property
    def end(self) -> int:
        """The first GPA behind it."""
        return self.gpa + self.size

    def file_region(self, fd: int) -> FileRegion:
        """Return what a device is given of it; ``fd`` is its file."""
        return FileRegion(self.gpa, self.size, fd, self.offset)


@dataclass(frozen=True, slots=True)
class TableChange:
    """What a new memory table changes: regions that go, and regions that come with the number of their descriptor."""

    gone: tuple[SharedRegion, ...]
    added: tuple[tuple[int, SharedRegion], ...]


class FrontEndMemory:
    """The regions that a front-end shares. ``limit`` is how many bytes it may share in all, None for no limit."""

    def __init__(self, limit: int | None = None, slots: int = MAX_SLOTS) -> None:
        self._limit = limit
        self._slots = slots
        self._regions: dict[int, SharedRegion] = {}
        self._repeated: dict[int, int] = {}
        """How often a region was added again, by GPA: older QEMUs add and remove each once for every queue pair."""
        self.files: dict[tuple[int, int], int] = {}
        """A descriptor of each file that regions lie in, by device and inode."""

    @property
    def regions(self) -> list[SharedRegion]:
        """The regions by GPA."""
        return [self._regions[gpa] for gpa in sorted(self._regions)]

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self._regions.values())

    def check_added(self, region: TableRegion, fd: int) -> SharedRegion:
        """Return a region that may be added; :class:`MessageRefused` says why not."""
        shared = _checked(region, fd)
        if not self.has(shared):
            self.check_together([*self._regions.values(), shared])
        return shared

    def has(self, shared: SharedRegion) -> bool:
        """Whether exactly this region is there."""
        return self._regions.get(shared.gpa) == shared

    def repeat(self, shared: SharedRegion) -> None:
        """A region that is there was added again: it is removed by as many removals."""
        self._repeated[shared.gpa] = self._repeated.get(shared.gpa, 0) + 1

    def release(self, shared: SharedRegion) -> bool:
        """Whether a removal is the last one, so that the region goes."""
        left = self._repeated.get(shared.gpa, 0)
        if left:
            self._repeated[shared.gpa] = left - 1
        return not left

    def hold(self, shared: SharedRegion, fd: int) -> None:
        """Take a descriptor of a region's file, before the region is used: that may fail."""
        if shared.file not in self.files:
            self.files[shared.file] = os.dup(fd)

    def add(self, shared: SharedRegion) -> None:
        """Keep a region that was checked, and whose file is held."""
        self._regions[shared.gpa] = shared

    def drop_unused(self) -> None:
        """Close files that were held for regions which did not come."""
        used = {region.file for region in self._regions.values()}
        for file in [each for each in self.files if each not in used]:
            os.close(self.files.pop(file))

    def find(self, region: TableRegion) -> SharedRegion:
        """Return the region to remove; :class:`MessageRefused` if it does not exist."""
        shared = self._regions.get(region.gpa)
        if shared is None or (shared.size, shared.user) != (region.size, region.user):
            raise MessageRefused(f"there is no region of {region.size:#x} bytes at {region.gpa:#x}")
        return shared

    def remove(self, shared: SharedRegion) -> None:
        """Forget a region."""
        del self._regions[shared.gpa]
        self._repeated.pop(shared.gpa, None)
        self.drop_unused()

    def check_table(self, table: Sequence[TableRegion], fds: Sequence[int]) -> TableChange:
        """Return what a whole new table changes; :class:`MessageRefused` if it is not acceptable."""
        wanted = [_checked(region, fd) for region, fd in zip(table, fds, strict=True)]
        self.check_together(wanted)
        kept = set(wanted) & set(self._regions.values())
        gone = tuple(region for region in self.regions if region not in kept)
        return TableChange(gone, tuple((number, region) for number, region in enumerate(wanted) if region not in kept))

    def clear(self) -> None:
        """Forget every region."""
        for region in self.regions:
            self.remove(region)

    def check_together(self, regions: Iterable[SharedRegion]) -> None:
        """Raise :class:`MessageRefused` if regions cannot be all that is shared: too many, too large, overlapping."""
        ordered = sorted(regions, key=lambda each: each.gpa)
        if len(ordered) > self._slots:
            raise MessageRefused(f"guest memory of {len(ordered)} regions; at most {self._slots} are accepted")
        total = sum(region.size for region in ordered)
        if self._limit is not None and total > self._limit:
            raise MessageRefused(
                f"guest memory of {total:#x} bytes; the limit is {self._limit:#x}",
                hint="vhost-vdpa serve --max-memory BYTES sets another limit",
            )
        _check_apart("guest", [(region.gpa, region.size) for region in ordered])
        _check_apart("front-end", sorted((region.user, region.size) for region in ordered))

    def locate(self, address: int, size: int, guest: bool) -> int:
        """Return the GPA of ``size`` bytes at an address of the front-end, or of the guest.

        :class:`MessageRefused` if they do not lie in one region.
        """
        for region in self._regions.values():
            start = region.gpa if guest else region.user
            if start <= address and address + size <= start + region.size:
                return region.gpa + address - start
        raise MessageRefused(f"{size} bytes at {address:#x} do not lie in one region of the shared memory")


def _checked(region: TableRegion, fd: int) -> SharedRegion:
    what = f"region of {region.size:#x} bytes at {region.gpa:#x}"
    if not region.size or any(each % PAGE_SIZE for each in (region.gpa, region.size, region.user, region.offset)):
        raise MessageRefused(f"{what}: its addresses, offset and size must be multiples of {PAGE_SIZE}")
    if why := unusable_as_memory(fd):
        # a file of a file system in user space could hold up the device for as long as it likes
        raise MessageRefused(
            f"{what}: its file cannot be guest memory: {why}",
            hint="-object memory-backend-memfd,share=on, or memory-backend-file in /dev/shm or in hugetlbfs",
        )
    status = os.fstat(fd)
    if region.offset + region.size > status.st_size:
        raise MessageRefused(f"{what}: its file has {status.st_size:#x} bytes, it begins at {region.offset:#x}")
    return SharedRegion(region.gpa, region.size, region.user, region.offset, (status.st_dev, status.st_ino))


def _check_apart(whose: str, ranges: Sequence[tuple[int, int]]) -> None:
    for (start, size), (following, _) in pairwise(ranges):
        if start + size > following:
            raise MessageRefused(f"regions overlap at the {whose} address {following:#x}")
