# SPDX-License-Identifier: MIT
"""A guest of which a destination knows before it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..virtqueue.layout import GuestQueue
from .messages import MessageRefused

MAX_RING = 32768
"""Largest ring size of the specification (virtio 1.3, 2.7)."""


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file of guest memory: its name as the kernel shows it, and its bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class ComingRegion:
    """A region of the guest that comes; ``file`` is the number of its file."""

    gpa: int
    size: int
    offset: int
    file: int


@dataclass(frozen=True, slots=True)
class ComingRing:
    """A ring of the guest that comes."""

    index: int
    num: int
    desc: int
    avail: int
    used: int

    def queue(self, kick: int) -> GuestQueue:
        """Return it as a queue that notifies by ``kick`` and is not notified."""
        return GuestQueue(self.index, self.num, self.desc, self.avail, self.used, kick, -1)


@dataclass(frozen=True, slots=True)
class ComingGuest:
    """What a destination can know of a guest before it comes. ``control`` are fields of a control model."""

    features: int
    pairs: int
    files: tuple[MemoryFile, ...]
    regions: tuple[ComingRegion, ...]
    rings: tuple[ComingRing, ...]
    control: dict[str, Any] | None


def check(guest: ComingGuest, max_pairs: int) -> None:
    """Raise :class:`MessageRefused` unless a guest's rings are what a front-end could set up on a device."""
    indices = [ring.index for ring in guest.rings]
    if indices != list(range(len(indices))) or len(indices) % 2 or len(indices) > 2 * max_pairs:
        raise MessageRefused(f"the guest has the rings {indices}, the device has {max_pairs} queue pairs")
    if not 0 < guest.pairs <= len(indices) // 2:
        raise MessageRefused(f"the guest uses {guest.pairs} queue pairs of {len(indices)} rings")
    for ring in guest.rings:
        if not 0 < ring.num <= MAX_RING or ring.num & (ring.num - 1):
            raise MessageRefused(f"the guest's ring {ring.index} has {ring.num} entries, which is not a power of two")
        if ring.desc % 16 or ring.avail % 2 or ring.used % 4:
            raise MessageRefused(f"the guest's ring {ring.index} is not aligned (virtio 1.3, 2.7)")
