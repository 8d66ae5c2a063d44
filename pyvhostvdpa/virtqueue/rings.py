# SPDX-License-Identifier: MIT
"""All rings of a guest's NIC at once: what is asked of each while the guest is paused, C asks of all in one go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._cdefs import ffi, lib
from ..memory.guest import GuestMemory
from .layout import SETTLE_NS, GuestQueue, map_queue


class GuestRings:
    """The rings of ``queues``, mapped once. ValueError as :func:`~pyvhostvdpa.virtqueue.layout.map_queue`."""

    def __init__(self, queues: Sequence[GuestQueue], memory: GuestMemory) -> None:
        self.queues = tuple(queues)
        self._memory = memory
        count = len(self.queues)
        self._rings = ffi.new("struct vring[]", count)
        self._starts = ffi.new("struct vring_start[]", count)
        self._bases = ffi.new("uint16_t[]", count)
        self._slots = []
        self._remembered = False
        for ring, start, queue in zip(self._rings, self._starts, self.queues, strict=True):
            map_queue(ring, queue, memory)
            slots = ffi.new("uint16_t[]", queue.num), ffi.new("struct vring_used_elem[]", queue.num)
            start.avail, start.used = slots
            self._slots.append(slots)

    def remember(self) -> list[int]:
        """Remember what every ring holds, before a device is started; return their used indices, in the queues' order.

        See :class:`~pyvhostvdpa.virtqueue.layout.RingStart`.
        """
        lib.rings_remember(self._rings, len(self.queues), self._starts)
        self._remembered = True
        return [int(start.used_idx) for start in self._starts]

    def fill(self, job: Any, bases: Sequence[Any]) -> None:
        """Have a ``struct device_job`` do what :meth:`remember` does, and put each used index where ``bases`` point."""
        self._into: Any = ffi.new("uint32_t *[]", bases)
        job.ring_count, job.rings, job.starts, job.bases = len(bases), self._rings, self._starts, self._into

    def fill_stop(self, job: Any, reported: Sequence[Any]) -> None:
        """Have a ``struct device_job`` look at these rings behind its calls, which read the bases into ``reported``.

        Of rings that a device has worked on itself while others were relayed: whether it kept order, whether each
        base can be true; and their used rings are marked dirty.
        """
        self._from: Any = ffi.new("uint32_t *[]", reported)
        self._used: Any = ffi.new("uint64_t[]", [queue.used for queue in self.queues])
        job.passed_count, job.passed, job.reported = len(reported), self._rings, self._from
        job.passed_starts = self._starts if self._remembered else ffi.NULL
        job.passed_used, job.memory, job.settle = self._used, self._memory.c_map, SETTLE_NS

    def done(self) -> None:
        """Know that the job of :meth:`fill` was done."""
        self._remembered = True

    def out_of_order(self) -> GuestQueue | None:
        """Return the first queue that a stopped device has not used in order since it was started, None for none.

        See :func:`~pyvhostvdpa.virtqueue.layout.in_order`.
        """
        starts = self._starts if self._remembered else ffi.NULL
        wrong: int = lib.rings_in_order(self._rings, len(self.queues), starts, SETTLE_NS)
        return self.queues[wrong] if wrong < len(self.queues) else None

    def hold(self, bases: Sequence[int]) -> bool:
        """Whether the bases that a device reports lie between used and avail index of each ring."""
        count = len(self.queues)
        self._bases[0:count] = bases
        return bool(lib.rings_hold_bases(self._rings, count, self._bases) == count)
