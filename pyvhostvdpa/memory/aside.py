# SPDX-License-Identifier: MIT
"""Page tables of guest memory that were moved aside, so that those in its place show only what was used since.

A look at what was written goes through all page tables: half a millisecond or more for each GiB of a file's memory, of
which the kernel knows each page. That is too long while a guest is paused. Without page tables a mapping keeps what is
in it, since that belongs to the file, and each page comes back when it is used (mm/memory.c:do_fault()).
"""

from __future__ import annotations

import os
from typing import Any

from .._cdefs import ffi, lib
from ..base import sysfs
from ..base.closing import Closing
from ..base.errors import MissingFeature
from . import hugepages
from .guest import GuestMemory, Region
from .mapped import SharedMemory

_SWAPS = "/proc/swaps"
_STATUS = "/proc/self/status"
_MIN = 64 << 20
"""Bytes of memory from which on a look at all of its page tables takes longer than to make some of them anew."""


def _swap_is_used() -> bool:
    """Return whether the kernel may swap, also where it does not say."""
    lines = (sysfs.read(_SWAPS) or "unknown\nunknown").splitlines()
    return len(lines) > 1


def _is_locked() -> bool:
    """Return whether memory of this process is locked (mlock(2)): what is moved aside would not be any more."""
    sizes = [line.split()[1] for line in (sysfs.read(_STATUS) or "VmLck: ?").splitlines() if line.startswith("VmLck:")]
    return sizes != ["0"]


class TablesAside(Closing):
    """The page tables of the regions of ``memory``, moved aside by :meth:`move`.

    ``uffd`` write-protects the memory (``lib.written_watch``), and goes on with both. Raises
    :class:`MissingFeature` where that would be no gain or not safe: little memory; memory that is not a file's of this
    process, or may get pages of other sizes; memory that is locked; swap, where this process may not lock memory
    (mlock(2)), since a page that is swapped out leaves the page tables. :meth:`close` gives the addresses back; close
    ``uffd`` first.
    """

    def __init__(self, memory: GuestMemory, uffd: int) -> None:
        if memory.size < _MIN:
            raise MissingFeature(f"{memory.size >> 20} MiB of memory have few page tables")
        if not all(isinstance(region.memory, SharedMemory) and region.memory.base_pages for region in memory.regions):
            raise MissingFeature("guest memory is not a file of this process in base pages")
        if hugepages.in_files():
            raise MissingFeature("the kernel gives files in memory huge pages")
        if _is_locked():
            raise MissingFeature("memory of this process is locked")
        self._memory, self._uffd = memory, uffd
        self._reserved: dict[Region, Any] = {}
        self._locked: list[Region] = []
        try:
            for region in memory.regions:
                self._reserve(region)
        except BaseException:
            self.close()
            raise
        self.moved: dict[Region, Any] = {}
        """Where the page tables of regions are."""

    def _reserve(self, region: Region) -> None:
        aside = lib.aside_reserve(address(region), region.size)
        if aside == ffi.NULL:
            raise MissingFeature(f"no {region.size >> 20} MiB of addresses are left")
        self._reserved[region] = aside
        # whether it may be locked is seen where nothing is yet: there is no way back once page tables are moved
        if not lib.lock_used(aside, region.size):
            lib.unlock_used(aside, region.size)
        elif _swap_is_used():
            raise MissingFeature("memory may be swapped out, and this process may not lock it")

    def move(self) -> None:
        """Move the page tables of each region, as long as the kernel can (Linux 5.13).

        Raises :class:`MissingFeature` if what is moved turns out to be swappable: written pages may be missed then.
        """
        unlocked = ffi.new("int *")
        for region in self._memory.regions:
            aside = self._reserved[region]
            if lib.aside_move(self._uffd, address(region), region.size, aside, unlocked):
                # the kernel may have given the addresses to somebody else
                del self._reserved[region]
                return
            self.moved[region] = aside
            if not unlocked[0]:
                self._locked.append(region)
            elif _swap_is_used():
                raise MissingFeature(f"cannot lock guest memory: {os.strerror(unlocked[0])}")

    def read_through(self) -> Any:
        """Return guest memory as C sees it, with the regions that are moved where they are now.

        To read there uses no page of guest memory's own page tables.
        """
        source = self._memory.c_map
        self._c_regions = ffi.new("struct memory_region[]", [source.regions[i] for i in range(source.count)])
        for slot, region in zip(self._c_regions, self._memory.regions, strict=True):
            slot.hva = self.moved.get(region, slot.hva)
        return ffi.new("struct memory_map *", {"count": source.count, "regions": self._c_regions})

    def close(self) -> None:
        """Give the addresses back, and let memory be swapped again. Idempotent; it takes longer for more memory."""
        locked, self._locked = self._locked, []
        for region in locked:
            lib.unlock_used(address(region), region.size)
        reserved, self._reserved = self._reserved, {}
        for region, aside in reserved.items():
            lib.unmap_memory(aside, region.size)


def address(region: Region) -> Any:
    """Return where a region starts, for C."""
    return ffi.cast("uint8_t *", region.memory.hva)
