# SPDX-License-Identifier: MIT
"""When pre-copy has done what it can."""

from __future__ import annotations

from dataclasses import dataclass

from .dirty import PageSet


@dataclass
class Convergence:
    """When pre-copy has done what it can: ``downtime`` in seconds, ``patience`` in rounds without progress."""

    downtime: float
    patience: int = 5
    best: int | None = None
    fruitless: int = 0

    def estimate(self, left: PageSet, bandwidth: float | None) -> float | None:
        """Return the seconds that sending ``left`` takes at ``bandwidth`` bytes per second; None if unknown."""
        count = left.bytes
        if not count:
            return 0.0
        return count / bandwidth if bandwidth else None

    def words(self, left: PageSet, bandwidth: float | None, measured: bool) -> str:
        """Return for people how long sending ``left`` takes.

        ``measured`` is whether ``bandwidth`` comes from rounds of pages with
        content. Without such a round it is only a lower limit: most of the
        time went into finding pages of zeros, and an estimate by it was 50
        times too long.
        """
        seconds = self.estimate(left, bandwidth)
        if seconds is None or (not measured and seconds > self.downtime):
            return "how long that takes to send is not known yet"
        return f"{duration(seconds)} to send" if measured or not seconds else f"at most {duration(seconds)} to send"

    def done(self, left: PageSet, bandwidth: float | None) -> bool:
        """Return whether the remaining pages can be sent within the downtime, so that the guest may be stopped."""
        return self.fits(left.bytes, bandwidth)

    def fits(self, size: int, bandwidth: float | None) -> bool:
        """Return whether so many bytes can be sent within the downtime."""
        return not size or (bool(bandwidth) and size / (bandwidth or 1) <= self.downtime)

    def diverges(self, left: PageSet, written: int | None = None) -> bool:
        """Note the rest of a round; return whether ``patience`` rounds in a row left no less than the best before.

        ``written`` is how many bytes of it are known to be written, if that is less.
        """
        count = left.bytes if written is None else written
        if self.best is None or count < self.best:
            self.best, self.fruitless = count, 0
        else:
            self.fruitless += 1
        return self.fruitless >= self.patience


def duration(seconds: float) -> str:
    """Return a time for people: ms up to two seconds, then seconds, minutes from five on, hours from three on."""
    if seconds < 2:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 300:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:,.0f} h"
