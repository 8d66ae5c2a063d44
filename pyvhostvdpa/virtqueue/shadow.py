# SPDX-License-Identifier: MIT
"""Shadow virtqueues: rings of ours between the guest's and the device's.

The relay moves elements guest avail -> shadow avail -> device and device used
-> shadow used -> guest used, so that whoever relays knows every buffer that
the device wrote. The guest sees its old ring go on, the device a new one that
starts at 0.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import QueueBroken
from ..memory.guest import GuestMemory, Translation
from .layout import GuestQueue, fill_vring, map_queue, ring_layout
from .serving import RelayOptions, RingServer

__all__ = ["RelayOptions", "ShadowThread", "ShadowThreads", "ShadowVirtqueue", "reason"]

_REASONS = {
    "SVQ_BAD_AVAIL_IDX": "guest: avail.idx moved by more than the ring size",
    "SVQ_BAD_HEAD": "guest: avail entry beyond the descriptor table",
    "SVQ_BAD_CHAIN": "guest: descriptor chain loops, leaves the table or is longer than the ring",
    "SVQ_BAD_ORDER": "guest: device-readable descriptor after a device-writable one",
    "SVQ_BAD_ADDRESS": "guest: buffer outside guest memory",
    "SVQ_ZERO_LENGTH": "guest: descriptor of length 0",
    "SVQ_BAD_INDIRECT": "guest: indirect table that was not negotiated, is nested, chained or misshapen",
    "SVQ_BAD_USED_IDX": "device: used.idx moved by more than the ring size",
    "SVQ_BAD_USED_ID": "device: used id that it was not given",
    "SVQ_BAD_EVENTFD": "an eventfd of the queue was closed under the relay",
    "SVQ_NO_ROOM": "a chain does not fit the shadow ring: its buffers cross regions that are apart for the device",
}

_SLICE_NS = 500_000_000
"""How long the relay stays in C at a time."""


def reason(code: int) -> str:
    """Return why a queue is broken, by the C loops' code; "" for a healthy one."""
    for name, text in _REASONS.items():
        if getattr(lib, name) == code:
            return text
    return ""


class ShadowVirtqueue:
    """One shadowed queue: the guest's ring on one face, ours on the other.

    ``area`` is where the shadow ring lies in this process,
    :attr:`RingLayout.size` bytes. The guest's ring is read on from its used
    index. ``features`` are the ring features negotiated on both
    faces, as the C loops number them (``SVQ_F_*``). ``translation`` is where
    the device has guest memory if that is not IOVA = GPA.
    """

    def __init__(
        self,
        queue: GuestQueue,
        memory: GuestMemory,
        area: int,
        features: int = 0,
        translation: Translation | None = None,
    ) -> None:
        self.queue = queue
        self.area = area
        layout = self.layout = ring_layout(queue.num, features)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._memory = translation or memory
        self._segments = ffi.new("struct svq_segment[]", queue.num)
        self._elements = ffi.new("struct svq_element[]", queue.num)
        self._pieces = ffi.new("struct svq_piece[]", queue.num)
        self._next = ffi.new("uint16_t[]", queue.num)
        q: Any = ffi.new("struct svq *")
        self.c = q
        map_queue(q.guest, queue, memory)
        fill_vring(q.device, queue.num, area, area + layout.avail_offset, area + layout.driver_area)
        q.memory = self._memory.c_map
        q.segments, q.elements, q.pieces, q.next = self._segments, self._elements, self._pieces, self._next
        q.guest_kick, q.guest_call = queue.kick, queue.call
        q.device_kick, q.device_call = self.kick, self.call
        q.avail_gpa, q.used_gpa = queue.avail, queue.used
        q.features = features
        lib.svq_start(q)

    def take_up(self) -> None:
        """Begin anew: the shadow ring empty, the guest's read on from where its used index stands now."""
        lib.svq_start(self.c)

    @property
    def broken(self) -> str:
        """Why the queue was given up; "" while it is healthy."""
        return reason(self.c.broken)

    @property
    def in_flight(self) -> list[int]:
        """The guest's heads that the device has and has not used, oldest first."""
        heads = ffi.new("uint16_t[]", self.queue.num)
        count: int = lib.svq_in_flight(self.c, heads)
        return list(heads[0:count])

    def drain(self) -> None:
        """Hand the guest what a suspended device has used; :class:`QueueBroken` if that is nonsense."""
        while lib.svq_return(self.c):
            pass
        if self.c.broken:
            raise QueueBroken(f"virtqueue {self.queue.index}: {self.broken}")

    def republish(self) -> int:
        """Write the heads in flight into the guest's avail ring again; the base from which a device finds them."""
        base: int = lib.svq_republish(self.c)
        return base

    def statistics(self) -> dict[str, int]:
        """Return the relay's counters for this queue."""
        names = ("forwarded", "returned", "kicks", "calls", "stalls", "clamped")
        return {name: int(getattr(self.c, name)) for name in names}

    def close(self) -> None:
        """Close the eventfds of the device's face."""
        for fd in (self.kick, self.call):
            if fd >= 0:
                os.close(fd)
        self.kick = self.call = -1


class ShadowThread:
    """A thread that serves shadow virtqueues, in the given order: RX before TX.

    The order matters to a device that drops a frame for which it has no RX
    buffer: what the guest posted before it sent gets there first.
    ``busy_poll`` is for how many seconds it goes on looking when there is
    nothing to do, before it asks for notifications and sleeps; ``config_call``
    is an eventfd to raise when a queue breaks, or -1.
    """

    def __init__(self, queues: Sequence[ShadowVirtqueue], busy_poll: float = 0.0, config_call: int = -1) -> None:
        self._queues = list(queues)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        count = len(self._queues)
        self._array = ffi.new("struct svq *[]", [q.c for q in self._queues])
        self._pollfds = ffi.new("uint64_t[]", 2 * count + 1)
        self._c: Any = ffi.new(
            "struct relay *", {"count": count, "queues": self._array, "pollfds": self._pollfds, "wake": self._wake}
        )
        self._c.busy_poll = int(busy_poll * 1e9)
        self._c.config_call = config_call
        self._thread = threading.Thread(target=self._run, name="svq-relay", daemon=True)

    def start(self) -> None:
        """Start relaying."""
        self._thread.start()

    def _run(self) -> None:
        while not self._c.stop:
            lib.relay_run(self._c, time.monotonic_ns() + _SLICE_NS)

    @property
    def running(self) -> bool:
        """Whether the thread serves its queues."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread. The queues keep their state."""
        self._c.stop = 1
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1


class ShadowThreads:
    """Relays for the queues of one device: RX and TX of a pair stay together, pairs are spread over threads."""

    def __init__(self, queues: Sequence[RingServer], options: RelayOptions, config_call: int = -1) -> None:
        shadows = [queue for queue in queues if isinstance(queue, ShadowVirtqueue)]
        if len(shadows) != len(queues):
            raise TypeError("the relay serves shadow virtqueues only")
        pairs = [shadows[i : i + 2] for i in range(0, len(shadows), 2)]
        count = max(1, min(options.threads, len(pairs)))
        shares = [[queue for pair in pairs[k::count] for queue in pair] for k in range(count)]
        self._relays = [ShadowThread(share, options.busy_poll, config_call) for share in shares]

    def start(self) -> None:
        """Start every thread."""
        for relay in self._relays:
            relay.start()

    @property
    def running(self) -> bool:
        """Whether all of them serve their queues."""
        return all(relay.running for relay in self._relays)

    def stop(self) -> None:
        """End every thread. The queues keep their state."""
        for relay in self._relays:
            relay.stop()
