# SPDX-License-Identifier: MIT
"""Shadow virtqueues: this process's rings between the guest's and the device's.

A thread moves elements guest avail -> shadow avail -> device and device used
-> shadow used -> guest used, so that this process knows every buffer that
the device wrote. The guest sees its old ring continue, the device a new one that
starts at 0.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import QueueBroken
from ..base.eventfds import close_all, open_eventfds
from ..memory.guest import GuestMemory, Translation
from .layout import GuestQueue, fill_vring, map_queue, ring_layout
from .serving import RingServer, ServingOptions, TakeOver

__all__ = ["ServingOptions", "ShadowThread", "ShadowThreads", "ShadowVirtqueue", "reason"]

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
    "SVQ_BAD_EVENTFD": "an eventfd of this queue was closed while its thread was using it, or cannot be waited for",
    "SVQ_NO_ROOM": "a chain does not fit the shadow ring: its buffers cross regions not adjacent for the device",
    "SVQ_HEAD_TWICE": "guest: head made available again before it was used",
    "SVQ_SHARED_DESC": "guest: descriptor in several chains at the same time",
}


def reason(code: int) -> str:
    """Return why a queue is broken, by the C loops' code; "" for a healthy one."""
    for name, text in _REASONS.items():
        if getattr(lib, name) == code:
            return text
    return ""


class ShadowVirtqueue:
    """One shadowed queue: the guest's ring on one face, the shadow ring on the other.

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
        self.kick, self.call = open_eventfds(2)
        self._memory = translation or memory
        q: Any = ffi.new("struct svq *")
        self.c = q
        map_queue(q.guest, queue, memory)
        fill_vring(q.device, queue.num, area, area + layout.avail_offset, area + layout.driver_area)
        q.memory = self._memory.c_map
        self._reserve(queue.num)
        q.guest_kick, q.guest_call = queue.kick, queue.call
        q.device_kick, q.device_call = self.kick, self.call
        q.avail_gpa, q.used_gpa = queue.avail, queue.used
        q.features = features
        lib.svq_start(q)

    def _reserve(self, num: int) -> None:
        """Get what C needs for ``num`` descriptors."""
        self._kept: tuple[Any, ...] = tuple(
            ffi.new(f"{kind}[]", num)
            for kind in ("struct svq_segment", "struct svq_element", "struct svq_piece", "uint16_t")
        )
        self.c.segments, self.c.elements, self.c.pieces, self.c.next = self._kept

    @property
    def through(self) -> bool:
        """Whether the device works on the guest's own ring: it does not."""
        return False

    @property
    def base(self) -> int:
        """From where the device starts."""
        return 0

    def addresses(self, driver: int, device: int) -> tuple[int, int, int]:
        """Where the device finds descriptors, avail and used ring if our areas are at these IOVAs."""
        return driver, driver + self.layout.avail_offset, device

    def take_up(self) -> None:
        """Start again: the shadow ring empty, the guest's read on from where its used index stands now."""
        lib.svq_start(self.c)

    def reaches(self, gpa: int, size: int) -> bool:
        """Whether the device has a buffer of the guest in this range; the queue must not be served meanwhile."""
        return bool(lib.svq_reaches(self.c, gpa, size))

    def memory_changed(self) -> None:
        """Find the regions of in-flight buffers again; the queue must not be served meanwhile."""
        lib.svq_memory_changed(self.c)

    def notify_by(self, queue: GuestQueue) -> None:
        """Use the eventfds of ``queue``, the same ring, on the guest's face; it must not be served meanwhile."""
        self.queue = queue
        self.c.guest_kick, self.c.guest_call = queue.kick, queue.call

    @property
    def broken(self) -> str:
        """Why the queue is broken; "" while it is healthy."""
        return reason(self.c.broken)

    @property
    def in_flight(self) -> list[int]:
        """The guest's heads that the device has and has not used, oldest first."""
        heads = ffi.new("uint16_t[]", self.queue.num)
        count: int = lib.svq_in_flight(self.c, heads)
        return list(heads[0:count])

    def drain(self) -> None:
        """Hand the guest what a suspended device has used; :class:`QueueBroken` if that is invalid."""
        while lib.svq_return(self.c):
            pass
        if self.c.broken:
            raise QueueBroken(f"virtqueue {self.queue.index}: {self.broken}")

    def republish(self) -> int:
        """Write the heads in flight into the guest's avail ring again; the base from which a device finds them."""
        base: int = lib.svq_republish(self.c)
        return base

    def statistics(self) -> dict[str, int]:
        """Return the counters of this queue."""
        names = ("forwarded", "returned", "kicks", "calls", "stalls", "clamped")
        return {name: int(getattr(self.c, name)) for name in names}

    def close(self) -> None:
        """Close the eventfds of the device's face."""
        fds, self.kick, self.call = (self.kick, self.call), -1, -1
        close_all(fds)


class ShadowThread:
    """A thread that serves shadow virtqueues, in the given order.

    The order matters to a network device, which drops a frame for which it has
    no buffer: with receive queues first, what the guest posted before it sent
    gets there first.
    ``busy_poll`` is for how many seconds it keeps looking when there is
    nothing to do, before it asks for notifications and sleeps; ``config_call``
    is an eventfd to raise when a queue breaks, or -1.
    """

    def __init__(self, queues: Sequence[ShadowVirtqueue], busy_poll: float = 0.0, config_call: int = -1) -> None:
        self._queues = list(queues)
        self._epoll = select.epoll()
        self._wake = self._ticks = -1
        try:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._epoll.register(self._wake, select.EPOLLIN)
            self._ticks = lib.ticks_open()
            if self._ticks < 0:
                raise OSError(-self._ticks, os.strerror(-self._ticks))
            self._epoll.register(self._ticks, select.EPOLLIN | select.EPOLLET)
        except OSError:
            self._epoll.close()
            close_all([self._wake, self._ticks])
            raise
        self._array = ffi.new("struct svq *[]", [q.c for q in self._queues])
        own = {"count": len(self._queues), "queues": self._array, "epoll": self._epoll.fileno(), "wake": self._wake}
        self._c: Any = ffi.new("struct svq_thread *", {**own, "ticks": self._ticks})
        self._c.busy_poll = int(busy_poll * 1e9)
        self._c.config_call = config_call
        self._thread = threading.Thread(target=self._run, name="svq-thread", daemon=True)

    @property
    def c(self) -> Any:
        """The ``struct svq_thread``."""
        return self._c

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def _run(self) -> None:
        lib.svq_thread_serve(self._c)

    @property
    def running(self) -> bool:
        """Whether the thread serves its queues."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread. The queues keep their state."""
        if self._wake >= 0:
            lib.svq_thread_end(self._c)
        if self._thread.is_alive():
            self._thread.join()
        fds, self._wake, self._ticks = (self._wake, self._ticks), -1, -1
        self._epoll.close()
        close_all(fds)


class ShadowThreads:
    """Threads for the queues of one device: ``together`` in a row stay in one thread, these groups are spread."""

    def __init__(
        self, queues: Sequence[RingServer], options: ServingOptions, config_call: int = -1, together: int = 1
    ) -> None:
        shadows = [queue for queue in queues if isinstance(queue, ShadowVirtqueue)]
        if len(shadows) != len(queues):
            raise TypeError("these threads serve shadow virtqueues only")
        groups = [shadows[i : i + together] for i in range(0, len(shadows), together)]
        count = max(1, min(options.threads, len(groups)))
        shares = [[queue for group in groups[k::count] for queue in group] for k in range(count)]
        self._shadows = shadows
        self._threads: list[ShadowThread] = []
        try:
            for share in shares:
                self._threads.append(ShadowThread(share, options.busy_poll, config_call))
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Start every thread."""
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether all of them serve their queues."""
        return all(thread.running for thread in self._threads)

    def stop(self) -> None:
        """End every thread. The queues keep their state."""
        for thread in self._threads:
            thread.stop()

    def prepare_take_over(self) -> TakeOver | None:
        """Return what stops these threads and takes their queues over in one go."""
        return _TakeOver(self._shadows, self._threads)


class _TakeOver:
    def __init__(self, shadows: Sequence[ShadowVirtqueue], threads: Sequence[ShadowThread]) -> None:
        # C gets to them by pointers, which keep nothing
        self._shadows, self._kept = list(shadows), list(threads)
        self._threads: Any = ffi.new("struct svq_thread *[]", [thread.c for thread in threads])
        self._queues: Any = ffi.new("struct svq *[]", [shadow.c for shadow in shadows])
        self._bases: Any = ffi.new("uint16_t[]", len(shadows))

    def fill(self, job: Any) -> None:
        job.threads, job.thread_count = self._threads, len(self._threads)
        job.shadows, job.shadow_count, job.left = self._queues, len(self._queues), self._bases

    def broken(self) -> str:
        for shadow in self._shadows:
            if shadow.c.broken:
                return f"virtqueue {shadow.queue.index}: {shadow.broken}"
        return ""

    def bases(self) -> list[int]:
        return list(ffi.unpack(self._bases, len(self._shadows)))
