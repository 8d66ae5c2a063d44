# SPDX-License-Identifier: MIT
"""Memory of a device: the guest's, which may come and go, and its own, which lies in the holes between.

Guest memory is at IOVA = GPA in address space 0. The device's own memory (shadow rings,
the control queue) takes IOVAs that no region of the guest has, and gives them
back at a reset. So a region that comes while the device is reset pushes own memory
aside; while own memory is mapped in its way it is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ...base.errors import MapRejected, MissingFeature
from ...memory.guest import HUGE_PAGE, GuestMemory, Region
from ...memory.iova import IovaAllocator
from ...memory.mapped import SharedMemory
from ...virtqueue.layout import GuestQueue, ring_layout
from ..target import GUEST_ASID, State, Target

CONTROL_ROOM = 1 << 20
"""Bytes of our own memory that are kept for the control queue, at its end."""


@dataclass(frozen=True, slots=True)
class Memories:
    """Guest memory, own memory, and where the latter can go in the device's address spaces."""

    guest: GuestMemory
    own: SharedMemory
    holes: IovaAllocator


class Attached(ABC):
    """A device to which guest memory is attached."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.state = State.RESET
        self._memories: Memories | None = None
        self._unmapped = False
        """Whether there are regions of guest memory that are not mapped on the device yet."""
        self._ours: list[tuple[int, int]] = []
        """(ASID, IOVA) of each map of our own memory."""
        self._allocated: list[int] = []
        """IOVAs that were taken for it."""

    @abstractmethod
    def _attached(self) -> None:
        """Do what can be done before a queue runs; guest memory has just been given."""

    def _detach(self) -> None:
        """Take the guest's memory away from a device that is reset."""
        raise self._fixed()

    def _map_regions(self, regions: Sequence[Region]) -> None:
        """Map regions of guest memory in one batch; after a failure no region stays mapped."""
        raise self._fixed()

    def _unmap_regions(self, regions: Sequence[Region]) -> None:
        """Unmap those regions of guest memory that are mapped, in one batch."""
        raise self._fixed()

    @property
    def follows_memory(self) -> bool:
        """Whether regions can come and go once memory is attached."""
        return False

    def _fixed(self) -> MissingFeature:
        return MissingFeature(f"{self.target.path}: {type(self).__name__} keeps guest memory as it was attached")

    # -- attaching -------------------------------------------------------------------

    def attach(self, memory: GuestMemory) -> None:
        """Take the guest's memory, and get memory for shadow rings ready."""
        limits = self.target.iotlb.limits
        self._memories = Memories(
            guest=memory,
            own=SharedMemory("shadow-rings", self._own_size()),
            holes=IovaAllocator(limits.first, limits.last, [(r.gpa, r.size) for r in memory.regions]),
        )
        self._attached()

    def _own_size(self) -> int:
        """Room for every ring at its largest and the control queue, in huge pages: each ring is one physical run."""
        c = self.target.chardev
        rings = c.get_vqs_count() * ring_layout(c.get_vring_num(), self.target.ring_bits).size
        return -(-(rings + CONTROL_ROOM) // HUGE_PAGE) * HUGE_PAGE

    @property
    def attached(self) -> bool:
        """Whether :meth:`attach` was called."""
        return self._memories is not None

    @property
    def memories(self) -> Memories:
        """What :meth:`attach` was given and made; MissingFeature before it."""
        if self._memories is None:
            raise MissingFeature(f"{self.target.path}: attach() guest memory first")
        return self._memories

    # -- regions that come and go -------------------------------------------------------

    def add_regions(self, regions: Sequence[Region]) -> None:
        """Make regions part of guest memory: at once where queues run, else collected for :meth:`map_collected`.

        Nothing is touched if this raises.
        """
        if not self.follows_memory:
            raise self._fixed()
        for region in regions:
            self._check_room(region)
        if self.state is not State.RESET:
            self._map_regions(regions)
        else:
            self._unmapped = True
        with self._threads_paused():
            self.memories.guest.include(regions)
            self._memory_changed()
        for region in regions:
            self.memories.holes.reserve(region.gpa, region.size)

    def _check_room(self, region: Region) -> None:
        limits, space = self.target.iotlb.limits, self.target.iotlb.space(GUEST_ASID)
        what = f"{self.target.path}: guest memory at {region.gpa:#x}-{region.end - 1:#x}"
        if region.gpa < limits.first or region.end - 1 > limits.last:
            raise MapRejected(f"{what} lies outside the device's range {limits.first:#x}-{limits.last:#x}")
        ours = {iova for asid, iova in self._ours if asid == GUEST_ASID}
        for m in space.mappings:
            if m.iova in ours and m.iova < region.end and region.gpa <= m.last:
                raise MapRejected(
                    f"{what} collides with shadow rings at {m.iova:#x}-{m.last:#x}, which the device is using",
                    hint="stop() the device, add the memory and start it again: the shadow rings then get other IOVAs",
                )

    def map_collected(self) -> None:
        """Map what :meth:`add_regions` has collected, in one batch."""
        if self._unmapped:
            mapped = {m.iova for m in self.target.iotlb.space(GUEST_ASID).mappings}
            self._map_regions([region for region in self.memories.guest.regions if region.gpa not in mapped])
            self._unmapped = False

    def remove_regions(self, regions: Sequence[Region]) -> None:
        """Let regions be guest memory no longer; the device has no access to them afterwards.

        MissingFeature if a running queue has its rings or, if known,
        buffers in flight there; nothing is touched then.
        """
        if not self.follows_memory:
            raise self._fixed()
        used = [queue.index for queue in self._known_queues() if any(_lies_in(queue, region) for region in regions)]
        if used and self.state is not State.RESET:
            raise MissingFeature(f"{self.target.path}: virtqueues {used} are running with their rings in that memory")
        if used:
            # the device may be suspended, and have these rings mapped
            self._forget_rings()
        with self._threads_paused():
            self._check_unused(regions)
            try:
                self._unmap_regions(regions)
            except BaseException:
                # what was unmapped is guest memory still
                self._unmapped = True
                raise
            self.memories.guest.exclude(regions)
            self._memory_changed()
        for region in regions:
            self.memories.holes.release(region.gpa, region.size)

    @abstractmethod
    def _known_queues(self) -> Sequence[GuestQueue]:
        """The queues of the last start, whose rings we may look at."""

    @abstractmethod
    def _forget_rings(self) -> None:
        """Reset the device and look at the rings of the last start no more."""

    @contextmanager
    @abstractmethod
    def _threads_paused(self) -> Iterator[None]:
        """Keep our threads off guest memory for the block."""

    @abstractmethod
    def _check_unused(self, regions: Sequence[Region]) -> None:
        """Raise MissingFeature if the device is known to have buffers in these regions."""

    @abstractmethod
    def _memory_changed(self) -> None:
        """Have what serves the rings follow guest memory; our threads are paused."""

    # -- own memory ---------------------------------------------------------------------------

    def _allocate(self, size: int) -> int:
        """Return an IOVA for own memory, free again once the device is reset."""
        iova = self.memories.holes.allocate(size)
        self._allocated.append(iova)
        return iova

    def _drop_own_maps(self) -> None:
        """Unmap the rest of own memory, one batch per address space. What fails is tried again the next time."""
        for asid in sorted({asid for asid, _ in self._ours}):
            space = self.target.iotlb.space(asid)
            mapped = {m.iova: m for m in space.mappings}
            ours = {iova for owner, iova in self._ours if owner == asid and iova in mapped}
            with space.batch() as batch:
                for iova in sorted(ours):
                    batch.unmap(iova, mapped[iova].size)
            self._ours = [(owner, iova) for owner, iova in self._ours if owner != asid]
        allocated, self._allocated = self._allocated, []
        for iova in allocated:
            self.memories.holes.free(iova)


def _lies_in(queue: GuestQueue, region: Region) -> bool:
    return any(gpa < region.end and region.gpa < gpa + size for gpa, size in queue.parts)
