# SPDX-License-Identifier: MIT
"""Whether a device does anything about the work it has."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..memory.guest import GuestMemory
from .layout import GuestQueue, indices


class StallDetector:
    """Watches queues of a guest whose device has to complete what it is given, in passthrough as while shadowed."""

    def __init__(self, queues: Sequence[GuestQueue], memory: GuestMemory) -> None:
        self._queues = tuple(queues)
        self._memory = memory
        self._moved: dict[int, tuple[int, float]] = {}
        """Used index and when it was first seen, by queue index."""

    def stalled(self) -> dict[int, float]:
        """Return for how many observed seconds each queue with work has not moved."""
        now, stalled = time.monotonic(), {}
        for queue in self._queues:
            avail, used = indices(queue, self._memory)
            last, since = self._moved.get(queue.index, (None, now))
            if used != last or avail == used:
                since = now
            self._moved[queue.index] = used, since
            if now > since:
                stalled[queue.index] = now - since
        return stalled
