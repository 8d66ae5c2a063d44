# SPDX-License-Identifier: MIT
"""The memory that a device has: what the front-end shares, and what was taken before the front-end gave it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from .device import Device
from .discard import HoleWatch
from .memory import FrontEndMemory, SharedRegion


class DeviceMemory:
    """Keeps the device's memory what the front-end's is. Errors are the device's; it is left as it was then."""

    def __init__(self, device: Device, shared: FrontEndMemory) -> None:
        self._device = device
        self.shared = shared
        self._early: dict[int, SharedRegion] = {}
        self._early_files: dict[tuple[int, int], int] = {}
        self._lacking: set[int] = set()
        """GPAs of shared regions that the device could not be given back: :meth:`complete` tries again."""
        self._holes = HoleWatch()
        self._noticed = 0
        """Bytes that were found to be discarded since watching began, and have not been reported yet."""
        self._noticed_before = 0
        """The same, from before it began again: a hole that is still there is found again."""
        self.discarded = 0
        """Bytes that were discarded while the device had them."""
        self.ready = False
        """Whether all was taken early and is still there: a start has nothing to map then."""
        self.before_mapping: Callable[[], None] = lambda: None
        """Called before the device is given memory or loses it, which takes long."""

    @property
    def pins(self) -> bool:
        """Whether the device works on pinned pages, so that memory must not be discarded; also if that is unknown."""
        return self._device.target.iotlb.limits.pinned is not False

    @property
    def watched(self) -> bool:
        """Whether :meth:`lost` has something to look at."""
        return self.pins and bool(self._early_files or self.shared.files)

    @property
    def has_to_be_looked_at(self) -> bool:
        """Whether :meth:`lost` has to be called periodically: the kernel does not report holes."""
        return self.watched and not self._holes.notified

    @property
    def notices(self) -> tuple[int, ...]:
        """Descriptors that are readable once :meth:`lost` has something to look at."""
        return self._holes.notices.fds if self.watched else ()

    def _files(self) -> Mapping[tuple[int, int], int]:
        return {**self._early_files, **self.shared.files}

    def lost(self) -> int:
        """Return the bytes that were discarded since the last look."""
        found = max(self._noticed_before, self._noticed + self._look())
        self._noticed = self._noticed_before = 0
        self.discarded += found
        return found

    def _look(self) -> int:
        return self._holes.look(self._files()) if self.watched else 0

    def _watch_files(self) -> None:
        ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for region in [*self._early.values(), *self.shared.regions]:
            ranges.setdefault(region.file, []).append((region.offset, region.offset + region.size))
        self._holes.begin(self._files(), ranges)
        self._noticed_before, self._noticed = max(self._noticed_before, self._noticed), 0

    # -- what the front-end says -----------------------------------------------------

    def change(self, gone: Sequence[SharedRegion], added: Sequence[tuple[SharedRegion, int]]) -> None:
        """Take regions away and add others, each with the descriptor of its file, which stays the caller's."""
        # a hole that was punched since the last look must not be lost in the new count
        self._noticed += self._look()
        try:
            self._change(gone, added)
        finally:
            self.shared.drop_unused()
            self._holes.forget_others(self._files())

    def _change(self, gone: Sequence[SharedRegion], added: Sequence[tuple[SharedRegion, int]]) -> None:
        if gone:
            self._take_away(gone)
            for region in gone:
                self.shared.remove(region)
                self._lacking.discard(region.gpa)
        for region, fd in added:
            self.shared.hold(region, fd)
        new = [(region, fd) for region, fd in added if not self._is_early(region)]
        if new:
            self.ready = False
            # the device may have something else there
            self._drop_overlapping([region for region, _ in new])
            self.before_mapping()
            self._device.add_memory([region.file_region(fd) for region, fd in new])
        for region, _ in added:
            self._early.pop(region.gpa, None)
            self.shared.add(region)
        if gone or new:
            self._watch_files()

    def drop(self) -> None:
        """Take everything away."""
        self.drop_early()
        if self.shared.regions:
            self.change(self.shared.regions, ())
        self._noticed = self._noticed_before = 0

    def map_again(self) -> None:
        """Take everything away and give it back: pages that were discarded are others now.

        If it cannot be given back the device has none of it until :meth:`complete`.
        """
        self.drop_early()
        regions = self.shared.regions
        self._take_away(regions)
        self._lacking = {region.gpa for region in regions}
        self.complete()

    def complete(self) -> None:
        """Give the device what it lacks of the shared regions since :meth:`map_again` failed."""
        if not self._lacking:
            return
        files = self.shared.files
        lacking = [region for region in self.shared.regions if region.gpa in self._lacking]
        self.before_mapping()
        self._device.add_memory([region.file_region(files[region.file]) for region in lacking])
        self._lacking.clear()
        self._watch_files()

    def _take_away(self, regions: Sequence[SharedRegion]) -> None:
        there = [(region.gpa, region.size) for region in regions if region.gpa not in self._lacking]
        if there:
            self.ready = False
            self.before_mapping()
            self._device.remove_memory(there)

    # -- what is taken before ----------------------------------------------------------

    def take_early(self, regions: Sequence[SharedRegion], files: Mapping[tuple[int, int], int]) -> None:
        """Map regions now which the front-end will share; ``files``, by device and inode, stay the caller's."""
        for key, fd in files.items():
            self._early_files[key] = os.dup(fd)
        self.before_mapping()
        self._device.add_memory([region.file_region(files[region.file]) for region in regions])
        self._early = {region.gpa: region for region in regions}
        self._device.map_memory()
        self.ready = True
        self._watch_files()

    @property
    def unclaimed(self) -> int:
        """Bytes that were taken early, and have not been shared since."""
        return sum(region.size for region in self._early.values())

    def drop_early(self) -> None:
        """Take away what was taken early and has not been shared."""
        if self._early:
            self.ready = False
            self.before_mapping()
            self._device.remove_memory([(region.gpa, region.size) for region in self._early.values()])
            self._early.clear()
        files, self._early_files = self._early_files, {}
        for fd in files.values():
            os.close(fd)
        self._holes.forget_others(self._files())

    def _is_early(self, region: SharedRegion) -> bool:
        taken = self._early.get(region.gpa)
        same = taken and (taken.size, taken.offset, taken.file) == (region.size, region.offset, region.file)
        return bool(same)

    def _drop_overlapping(self, regions: Sequence[SharedRegion]) -> None:
        for region in regions:
            if any(region.gpa < each.end and each.gpa < region.end for each in self._early.values()):
                self.drop_early()
                return
