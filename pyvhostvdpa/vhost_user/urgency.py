# SPDX-License-Identifier: MIT
"""A guest that moves waits for some thirty messages, one after the other: for that time its back-end goes first.

On a busy CPU each of them could otherwise take as long as the turn of another
thread. A front-end decides how many messages there are, and what they are, so
the time that can be had in this way is bounded, and mapping memory, which may
take seconds, is done like anything else.
"""

from __future__ import annotations

import time

from ..base.closing import Closing
from ..base.scheduling import AheadOfOthers

BUDGET = 0.25
"""Seconds of CPU time at most that the thread may go first at a stretch."""
SHARE = 0.025
"""Of the time that passes, the part by which what was used of the budget comes back."""
_WORTHWHILE = 0.1
"""The part of the budget that has to be there to begin."""


class Urgency(Closing):
    """Has its thread run ahead of others as long as a guest moves, within the budget. Used by that thread only."""

    def __init__(self) -> None:
        self._ahead = AheadOfOthers()
        self.urgent = False
        """Whether the thread goes first now, if the system allows that."""
        self._left = BUDGET
        self._at = self._used = 0.0
        """When it was counted last, and the CPU time of the thread then."""

    def look(self, moves: bool) -> None:
        """Begin, go on, or end; called after each message."""
        if not moves:
            if self.urgent:
                self.close()
            return
        if self.urgent:
            self.count()
            return
        now = time.monotonic()
        self._left = min(BUDGET, self._left + (now - self._at) * SHARE)
        self._at = now
        if self._left >= _WORTHWHILE * BUDGET:
            self.urgent, self._used = True, time.thread_time()
            self._ahead.begin()

    def count(self) -> None:
        """Count what was used, and end if that was all; called before each wait, whatever was done since the last."""
        if not self.urgent:
            return
        used = time.thread_time()
        self._left -= used - self._used
        self._used = used
        if self._left <= 0:
            self._end()

    def close(self) -> None:
        """Be like others. Idempotent."""
        if self.urgent:
            self.count()
        if self.urgent:
            self._end()

    def _end(self) -> None:
        self.urgent, self._at = False, time.monotonic()
        self._ahead.close()
