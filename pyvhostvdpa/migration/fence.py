# SPDX-License-Identifier: MIT
"""Until when a side may start the guest by itself, once both sides have all of it.

From FINAL to RUNNING either side may be stopped (SIGSTOP, a suspended host)
while the other finds the stream broken and saves the guest, which is then started
from that file. A side that wakes up after that must not act on what it
read before it was stopped. So each act has a time, and a file can be claimed
only after the other side's time has passed:

- the source resumes by itself only until ``patience + MARGIN`` after it began to
  send FINAL;
- the destination starts the guest until ``patience + 2 * MARGIN`` after it
  sent READY, and holds its file that long: the source's time began earlier;
- the source holds its file until ``patience + 3 * MARGIN`` after it received
  READY: the destination's time began earlier.

A margin covers the start of the devices. Clocks of two hosts are never
compared. A file needs no holding when a Unix socket was closed at the other
end: that process has ended or said what it did.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..base.errors import StreamBroken
from .cancel import Cancel
from .stream import Channel

MARGIN = 5.0
"""Seconds between the last moment of one side and the first of the other."""


def now() -> float:
    """Return seconds of a clock that also counts while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Fence:
    """A time that ends ``seconds`` and ``margins`` margins after it was made."""

    def __init__(self, seconds: float, margins: int) -> None:
        self._end = now() + seconds + margins * MARGIN

    @property
    def left(self) -> float:
        """Seconds that are left, 0 afterwards."""
        return max(0.0, self._end - now())

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return now() >= self._end


def needs_holding(channel: Channel, error: Exception) -> bool:
    """Whether the other side may still start the guest after the stream ended with ``error``.

    A network may break a stream between two processes that are both well; a Unix socket does not.
    """
    return not (channel.local and isinstance(error, StreamBroken))


def hold(fence: Fence, path: Path, other: str, cancel: Cancel, tell: Callable[[str], None]) -> None:
    """Wait until the ``other`` side cannot start the guest any more, or the user says that it has ended."""
    if not fence.passed:
        tell(
            f"saved in {path}. The {other} may still start the guest by itself, for {fence.left:.0f} s more. The file "
            f"can be used after that; or at once, if this process is interrupted (Ctrl-C) because the {other} is known "
            "to have ended"
        )
        # a signal that came before these words was about something else
        cancel.forget()
        cancel.wait(fence.left)
