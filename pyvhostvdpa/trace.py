# SPDX-License-Identifier: MIT
"""What passed through the door, when, and in which phase.

Downtime is computed from these records, never measured by a second clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Event(NamedTuple):
    """One system call. Times are CLOCK_MONOTONIC in nanoseconds."""

    t_begin: int
    t_end: int
    device: str
    phase: str
    event: str
    arguments: str
    result: int
    """What the call returned; a negative errno if it failed."""


class Trace:
    """The record of one or more devices, in order of completion."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def device(self, name: str) -> DeviceTrace:
        """Return the recorder that stamps ``name`` on its events."""
        return DeviceTrace(self, name)

    def select(self, device: str, phase: str) -> list[Event]:
        """Return one device's events of one phase, in order."""
        return [e for e in self.events if e.device == device and e.phase == phase]


class DeviceTrace:
    """One device's recorder, with the phase it is in."""

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace = trace
        self.name = name
        self.phase = ""

    def record(self, t_begin: int, t_end: int, event: str, arguments: str, result: int) -> None:
        """Append one event in the current phase."""
        self._trace.events.append(Event(t_begin, t_end, self.name, self.phase, event, arguments, result))

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Stamp ``phase`` on what is recorded inside the block."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer
