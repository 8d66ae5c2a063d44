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
        """Return the seconds that sending ``left`` takes at ``bandwidth`` bytes a second; None if that is not known."""
        count = left.bytes
        if not count:
            return 0.0
        return count / bandwidth if bandwidth else None

    def done(self, left: PageSet, bandwidth: float | None) -> bool:
        """Tell whether what is left can be sent within the downtime, so that the guest may be stopped."""
        seconds = self.estimate(left, bandwidth)
        return seconds is not None and seconds <= self.downtime

    def gave_up(self, left: PageSet) -> bool:
        """Note what a round left; tell whether ``patience`` rounds in a row left no less than the best before them."""
        count = left.bytes
        if self.best is None or count < self.best:
            self.best, self.fruitless = count, 0
        else:
            self.fruitless += 1
        return self.fruitless >= self.patience
