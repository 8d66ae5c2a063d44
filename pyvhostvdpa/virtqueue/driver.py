# SPDX-License-Identifier: MIT
"""The guest's side of virtqueues: where a driver puts its rings in its memory."""

from __future__ import annotations

import os

from ..errors import MissingFeature
from ..memory import PAGE_SIZE, GuestMemory
from .layout import GuestQueue, SplitLayout


class GuestArena:
    """Hands out guest memory, upwards from the start of its first region."""

    def __init__(self, memory: GuestMemory) -> None:
        region = memory.regions[0]
        self._next: int = region.gpa
        self._end: int = region.end

    def take(self, size: int, at: int | None = None) -> int:
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
    desc = arena.take(layout.size)
    return GuestQueue(
        index=index,
        num=num,
        desc=desc,
        avail=desc + layout.avail_offset,
        used=desc + layout.driver_area,
        kick=os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
        call=os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
    )
