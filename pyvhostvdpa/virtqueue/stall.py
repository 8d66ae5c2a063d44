# SPDX-License-Identifier: MIT
"""Whether a device does anything about the work it has."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..memory.guest import GuestMemory
from .layout import GuestQueue, indices


class StallDetector:
    """Watches the transmit queues of a guest, in passthrough as while shadowed.

    A device may leave receive buffers alone for as long as it likes; what it
    is given to send it has to complete.
    """

    def __init__(self, queues: Sequence[GuestQueue], memory: GuestMemory) -> None:
        self._queues = [queue for queue in queues if queue.index % 2]
        self._memory = memory
        self._moved: dict[int, tuple[int, float]] = {}
        """Used index and when it was first seen, by queue index."""

    def standing(self) -> dict[int, float]:
        """Return how many seconds, as far as was looked, each queue with work has not moved."""
        now, standing = time.monotonic(), {}
        for queue in self._queues:
            avail, used = indices(queue, self._memory)
            last, since = self._moved.get(queue.index, (None, now))
            if used != last or avail == used:
                since = now
            self._moved[queue.index] = used, since
            if now > since:
                standing[queue.index] = now - since
        return standing
