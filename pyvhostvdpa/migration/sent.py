# SPDX-License-Identifier: MIT
"""What the source knows of a guest that it has sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..memory.guest import GUEST_PAGE
from .pages import RoundStatistics


@dataclass(frozen=True, slots=True)
class LastRound:
    """The round of memory that was sent while the guest was paused.

    Of its ``pages`` the devices were seen to write ``by_device``, and the
    guest's CPU alone ``by_cpu``. ``ms`` is what sending took.
    """

    pages: int
    by_device: int
    by_cpu: int
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "pages": self.pages,
            "by_device": self.by_device,
            "by_cpu": self.by_cpu,
            "mib": round(self.pages * GUEST_PAGE / (1 << 20), 3),
            "ms": round(self.ms, 3),
        }


@dataclass(slots=True)
class SendResult:
    """What sending took. ``hash`` is "" unless it was asked for; ``stopped`` is when, CLOCK_MONOTONIC ns.

    ``switched`` are the paths of the devices that run, or ran, on shadow
    virtqueues, ``halted`` of those that were stopped for good: of them DT1
    and DT2 are known. ``last`` is the round that the guest was paused for,
    None if it stayed.
    """

    id: str = ""
    rounds: list[RoundStatistics] = field(default_factory=list)
    hash: str = ""
    stopped: int = 0
    switched: set[str] = field(default_factory=set)
    halted: set[str] = field(default_factory=set)
    last: LastRound | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "rounds": [
                {"pages": r.pages, "zero_pages": r.zero_pages, "bytes": r.bytes, "seconds": round(r.seconds, 6)}
                for r in self.rounds
            ],
            "last_round": None if self.last is None else self.last.to_dict(),
            "memory_hash": self.hash or None,
        }
