# SPDX-License-Identifier: MIT
"""The guest's side of virtqueues: where a driver puts its rings in its memory."""

from __future__ import annotations

import os

from ..base.errors import MissingFeature
from ..base.eventfds import open_eventfds
from ..memory.guest import PAGE_SIZE, GuestMemory
from ..virtqueue.layout import GuestQueue, SplitLayout


class GuestArena:
    """Hands out guest memory, upwards from ``start``: the largest region, or ``size`` bytes from ``start`` on."""

    def __init__(self, memory: GuestMemory, start: int | None = None, size: int | None = None) -> None:
        region = max(memory.regions, key=lambda each: each.size)
        self.start: int = region.gpa if start is None else start
        self._next: int = self.start
        self._end: int = region.end if size is None else self.start + size

    @property
    def size(self) -> int:
        """Bytes in all, taken or not."""
        return self._end - self.start

    def allocate(self, size: int, at: int | None = None) -> int:
        """Return the GPA of ``size`` bytes on a page, behind what was taken and not below ``at``."""
        start = max(self._next, -(-(at or 0) // PAGE_SIZE) * PAGE_SIZE)
        end = start + -(-size // PAGE_SIZE) * PAGE_SIZE
        if end > self._end:
            raise MissingFeature(f"guest memory is too small: {size} bytes do not fit behind {start:#x}")
        self._next = end
        return start


def place_queue(arena: GuestArena, index: int, num: int) -> GuestQueue:
    """Give a virtqueue its rings and eventfds as a guest's driver would."""
    layout = SplitLayout(num)
    desc = arena.allocate(layout.size)
    return queue_at(index, num, desc, desc + layout.avail_offset, desc + layout.driver_area)


def queue_at(index: int, num: int, desc: int, avail: int, used: int) -> GuestQueue:
    """Return a virtqueue that lies at these GPAs, with eventfds of its own."""
    kick, call = open_eventfds(2)
    return GuestQueue(index=index, num=num, desc=desc, avail=avail, used=used, kick=kick, call=call)


def close_queue(queue: GuestQueue) -> None:
    """Close the eventfds of a queue that has its own."""
    os.close(queue.kick)
    os.close(queue.call)
