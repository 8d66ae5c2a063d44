# SPDX-License-Identifier: MIT
"""A guest that moves waits for some thirty messages, one after the other: for that time its back-end goes first.

On a busy CPU each of them could otherwise take as long as the turn of another
thread. A front-end decides how many messages there are, so the time that can
be had in this way is bounded.
"""

from __future__ import annotations

import time

from ..base.closing import Closing
from ..base.scheduling import AheadOfOthers

BUDGET = 0.25
"""Seconds of CPU time that the thread may go first, in each :data:`PERIOD`."""
PERIOD = 10.0
"""Seconds."""


class Urgency(Closing):
    """Has its thread run ahead of others as long as :meth:`look` is told that a guest moves, within the budget."""

    def __init__(self) -> None:
        self._ahead = AheadOfOthers()
        self.urgent = False
        """Whether the thread goes first now, if the system allows that."""
        self._began = -PERIOD
        self._until = 0.0
        """CPU time of the thread at which the budget is used up."""

    def look(self, moves: bool) -> None:
        """Begin, go on, or end; called by the thread behind each message."""
        if not moves and not self.urgent:
            return
        if moves and not self.urgent and time.monotonic() - self._began >= PERIOD:
            self._began = time.monotonic()
            self._until = time.thread_time() + BUDGET
            self.urgent = True
            self._ahead.begin()
        elif self.urgent and not (moves and time.thread_time() < self._until):
            self.close()

    def close(self) -> None:
        """Be like others. Idempotent."""
        self.urgent = False
        self._ahead.close()
