# SPDX-License-Identifier: MIT
"""All rings of a guest's NIC at once: what is asked of each while the guest stands still, C asks of all in one go."""

from __future__ import annotations

from collections.abc import Sequence

from .._cdefs import ffi, lib
from ..memory.guest import GuestMemory
from .layout import SETTLE_NS, GuestQueue, map_queue


class GuestRings:
    """The rings of ``queues``, mapped once. ValueError as :func:`~pyvhostvdpa.virtqueue.layout.map_queue`."""

    def __init__(self, queues: Sequence[GuestQueue], memory: GuestMemory) -> None:
        self.queues = tuple(queues)
        count = len(self.queues)
        self._rings = ffi.new("struct vring[]", count)
        self._used = ffi.new("uint16_t[]", count)
        self._since = ffi.new("uint16_t[]", count)
        self._bases = ffi.new("uint16_t[]", count)
        for ring, queue in zip(self._rings, self.queues, strict=True):
            map_queue(ring, queue, memory)

    def used(self) -> list[int]:
        """Return the used index of each ring as it stands, in the queues' order."""
        lib.rings_used(self._rings, len(self.queues), self._used)
        return list(self._used)

    def in_order(self, since: Sequence[int]) -> bool:
        """Whether a device that stands still has used every ring in order from these used indices on."""
        count = len(self.queues)
        self._since[0:count] = since
        return bool(lib.rings_in_order(self._rings, count, self._since, SETTLE_NS) == count)

    def hold(self, bases: Sequence[int]) -> bool:
        """Whether the bases that a device reports lie between used and avail index of each ring."""
        count = len(self.queues)
        self._bases[0:count] = bases
        return bool(lib.rings_hold_bases(self._rings, count, self._bases) == count)
