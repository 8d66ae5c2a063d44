# SPDX-License-Identifier: MIT
"""``bench switch``: suspend, resume, reset and start, by the number of queue pairs.

The times are those of the trace: from the first system call of an operation
to the end of its last. The device was seen to move frames after each start
and each resume.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.uapi import BackendFeature
from ..trace.downtime import interval
from .guest import BenchGuest
from .report import device_environment
from .stats import Distribution, summarize

SCHEMA = "pyvhostvdpa/bench-switch/1"
OPERATIONS = ("start", "suspend", "resume", "reset")


@dataclass(frozen=True, slots=True)
class SwitchCost:
    """One operation with one number of pairs; ``calls`` are the system calls that it took."""

    operation: str
    pairs: int
    ns: Distribution
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"operation": self.operation, "pairs": self.pairs, "ns": self.ns.to_dict(), "calls": self.calls}


@dataclass(frozen=True, slots=True)
class SwitchReport:
    """All operations."""

    environment: dict[str, Any]
    costs: list[SwitchCost]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its schema has it."""
        return {"schema": SCHEMA, "switches": [c.to_dict() for c in self.costs], "environment": self.environment}


def all_pairs(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return 1, 2, 4 … up to what a guest can use of the device. Resets it."""
    with BenchGuest(path) as guest:
        most = guest.device.groups.max_pairs
    numbers = [1 << i for i in range(most.bit_length())]
    return tuple(sorted({*(n for n in numbers if n <= most), most}))


def run(
    path: str | os.PathLike[str],
    pairs: Sequence[int] = (),
    repeat: int = 5,
    observer: Callable[[str], None] = lambda words: None,
) -> SwitchReport:
    """Measure, by default with 1, 2, 4 … pairs up to what the device has. It is reset.

    Raises :class:`~pyvhostvdpa.MissingFeature` if it has fewer
    or cannot be suspended, :class:`~pyvhostvdpa.probe.proofs.NotProved` if it does
    not run after a start or a resume.
    """
    costs: list[SwitchCost] = []
    where: dict[str, Any] = {}
    for number in pairs or all_pairs(path):
        with BenchGuest(path, number) as guest:
            where = device_environment(guest.device)
            observer(f"{number} pair{'s' * (number > 1)}, {repeat} times and once to warm up")
            for repetition in range(repeat + 1):
                _once(guest, repetition)
            costs += _costs(guest, repeat)
    return SwitchReport(where, costs)


def _once(guest: BenchGuest, repetition: int) -> None:
    device = guest.device
    with device.trace.in_phase(f"start.{repetition}"):
        guest.start()
    if not repetition:
        guest.use_pairs()
    guest.moves()
    with device.trace.in_phase(f"suspend.{repetition}"):
        device.suspend()
    if BackendFeature.RESUME in device.backend_features:
        with device.trace.in_phase(f"resume.{repetition}"):
            device.resume()
        for queue in guest.nic.queues:
            os.eventfd_write(queue.kick, 1)
        guest.moves()
        device.suspend()
    with device.trace.in_phase(f"reset.{repetition}"):
        device.reset()


def _costs(guest: BenchGuest, repeat: int) -> list[SwitchCost]:
    found = []
    path = guest.device.path
    for operation in OPERATIONS:
        phases = [f"{operation}.{i}" for i in range(1, repeat + 1)]
        spans = [span for phase in phases if (span := interval(guest.trace, path, (phase,)))]
        if spans:
            calls = len(guest.trace.select(path, phases[0]))
            found.append(SwitchCost(operation, guest.pairs, summarize([end - begin for begin, end in spans]), calls))
    return found
