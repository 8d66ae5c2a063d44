# SPDX-License-Identifier: MIT
"""Where the parts of a split virtqueue lie (virtio 1.3, 2.7)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .._cdefs import ffi, lib
from ..base.errors import MissingFeature
from ..memory.guest import PAGE_SIZE, GuestMemory

SETTLE_NS = 200_000_000
"""How long a guest's CPU may take between writing a slot and publishing it."""

MAX_NUM = 32768
"""Largest ring size the specification allows."""


class RingLayout(Protocol):
    """Sizes and offsets of a virtqueue's parts: all that placing and mapping one needs to know of its format."""

    @property
    def num(self) -> int:
        """Descriptors."""

    @property
    def avail_offset(self) -> int:
        """Bytes from the descriptors to the driver area (virtio 1.3, 2.6)."""

    @property
    def driver_area(self) -> int:
        """Bytes that the driver writes, in whole pages."""

    @property
    def device_area(self) -> int:
        """Bytes that the device writes, in whole pages behind the driver's."""

    @property
    def size(self) -> int:
        """Bytes of both areas."""


def ring_layout(num: int, features: int) -> RingLayout:
    """Return the layout of a ring of ``num`` descriptors with the ring features negotiated (``SVQ_F_*``).

    Raises :class:`MissingFeature` for a packed ring, ValueError for a size that is not allowed.
    """
    if features & lib.SVQ_F_PACKED:
        raise MissingFeature("packed rings cannot be shadowed: negotiate without VIRTIO_F_RING_PACKED")
    return SplitLayout(num)


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Sizes and offsets for a ring of ``num`` descriptors, a power of two.

    The driver area is the descriptor table with the avail ring right behind
    it, the device area the used ring; each starts on a page, so that one can
    be mapped read-only and the other read-write.
    """

    num: int

    def __post_init__(self) -> None:
        if not 0 < self.num <= MAX_NUM or self.num & (self.num - 1):
            raise ValueError(f"ring size {self.num} is not a power of two up to {MAX_NUM}")

    @property
    def avail_offset(self) -> int:
        """Bytes from the descriptor table to the avail ring."""
        return 16 * self.num

    @property
    def driver_area(self) -> int:
        """Bytes of descriptor table and avail ring with used_event, in whole pages."""
        return _pages(self.avail_offset + 4 + 2 * self.num + 2)

    @property
    def device_area(self) -> int:
        """Bytes of the used ring with avail_event, in whole pages."""
        return _pages(4 + 8 * self.num + 2)

    @property
    def size(self) -> int:
        """Bytes of both areas."""
        return self.driver_area + self.device_area


def _pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class GuestQueue:
    """A virtqueue as the guest's driver set it up; addresses are GPAs.

    ``kick`` is raised by the guest, ``call`` by the device's side; -1
    for a call that the guest does not want. Descriptors are numbers that are
    used again, so the same object stands for the same two eventfds: a queue
    that got another eventfd is another :class:`GuestQueue`.
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    kick: int
    call: int

    @property
    def parts(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """GPA and bytes of descriptor table, avail ring and used ring."""
        return (self.desc, 16 * self.num), (self.avail, 6 + 2 * self.num), (self.used, 6 + 8 * self.num)

    def same_ring(self, other: GuestQueue) -> bool:
        """Whether this is the same ring, whatever the eventfds are."""
        return self is other or (self.index, self.num, self.desc, self.avail, self.used) == (
            other.index,
            other.num,
            other.desc,
            other.avail,
            other.used,
        )


def same_rings(some: Sequence[GuestQueue], others: Sequence[GuestQueue]) -> bool:
    """Whether these are the same rings, whatever their eventfds are."""
    return len(some) == len(others) and all(a is b or a.same_ring(b) for a, b in zip(some, others, strict=True))


def fill_vring(ring: Any, num: int, desc: int, avail: int, used: int) -> None:
    """Point a C ``struct vring`` at addresses of this process."""
    ring.num = num
    ring.desc = ffi.cast("struct vring_desc *", desc)
    ring.avail = ffi.cast("struct vring_avail *", avail)
    ring.used = ffi.cast("struct vring_used *", used)


def map_queue(ring: Any, queue: GuestQueue, memory: GuestMemory) -> None:
    """Point a C ``struct vring`` at a guest's ring; ValueError if that is not guest memory, or not aligned."""
    if queue.desc % 16 or queue.avail % 2 or queue.used % 4:
        raise ValueError(f"virtqueue {queue.index}: its parts are not aligned (virtio 1.3, 2.7)")
    desc, avail, used = (memory.hva(gpa, size) for gpa, size in queue.parts)
    fill_vring(ring, queue.num, desc, avail, used)


def indices(queue: GuestQueue, memory: GuestMemory) -> tuple[int, int]:
    """Return a guest ring's avail and used index as they stand."""
    ring = ffi.new("struct vring *")
    map_queue(ring, queue, memory)
    avail, used = ffi.new("uint16_t *"), ffi.new("uint16_t *")
    lib.vring_indices(ring, avail, used)
    return int(avail[0]), int(used[0])


class RingStart:
    """What a guest's ring held when a device was started on it: see :func:`in_order`.

    Indices have 16 bits, so a used index alone does not show whether a slot
    was written before the start or 65,536 elements later.
    """

    def __init__(self, queue: GuestQueue, memory: GuestMemory) -> None:
        ring = ffi.new("struct vring *")
        map_queue(ring, queue, memory)
        self._slots = ffi.new("uint16_t[]", queue.num), ffi.new("struct vring_used_elem[]", queue.num)
        self.c = ffi.new("struct vring_start *", {"avail": self._slots[0], "used": self._slots[1]})
        lib.vring_remember(ring, self.c)

    @property
    def used_index(self) -> int:
        """The used index: where a device starts."""
        return int(self.c.used_idx)


def in_order(queue: GuestQueue, memory: GuestMemory, start: RingStart | None) -> bool:
    """Return whether a stopped device has used a ring in order since ``start``.

    Only what the ring still shows is compared. Without a ``start`` every slot
    counts, also those that were used before the device was started.
    """
    ring = ffi.new("struct vring *")
    map_queue(ring, queue, memory)
    remembered = ffi.NULL if start is None else start.c
    return bool(lib.vring_in_order(ring, remembered, time.monotonic_ns() + SETTLE_NS))
