# SPDX-License-Identifier: MIT
"""Stop to run: the time in which the guest is paused, read from the trace.

It begins when the guest is paused and ends when the last data queue runs at
the destination, over all devices. Both sides are on one clock if they are on
one machine; :class:`StopToRun` is for a trace that has both. What lies in
between is listed by phase, so that a reader sees where the time goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..base.uapi import Status
from .phases import DEST_START, DT2
from .recorder import DeviceTrace, Event, Trace

PAUSE = "gap.pause"
"""The guest's CPUs are stopped."""
COLLECT = "gap.collect"
"""Which pages were written since the last round."""
LAST_ROUND = "gap.last_round"
"""These pages are sent."""
STATE = "gap.state"
"""The state of guest and devices is encoded and sent."""
LOAD = "gap.load"
"""It is loaded at the destination."""
HAND_OVER = "gap.hand_over"
"""READY goes to the source, GO comes back."""
START = DEST_START

ORDER = (PAUSE, *DT2, COLLECT, LAST_ROUND, STATE, LOAD, HAND_OVER, START)
"""Every phase of the gap, in order."""
BETWEEN = "between"

_SUSPEND, _RESUME, _STATUS = "VHOST_VDPA_SUSPEND", "VHOST_VDPA_RESUME", "VHOST_VDPA_SET_STATUS"
_ENABLE = "VHOST_VDPA_SET_VRING_ENABLE"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the gap. Times are CLOCK_MONOTONIC in nanoseconds."""

    phase: str
    begin: int
    end: int

    @property
    def ms(self) -> float:
        """Its length."""
        return (self.end - self.begin) / 1e6


@dataclass(frozen=True, slots=True)
class StopToRun:
    """The whole gap in pieces that follow on each other, in order of time."""

    pieces: tuple[Piece, ...]

    @property
    def ms(self) -> float:
        """Its length, which is the sum of all pieces."""
        return sum(piece.ms for piece in self.pieces)

    def by_phase(self) -> dict[str, float]:
        """Return milliseconds by phase, those that did not occur left out."""
        found: dict[str, float] = {}
        for piece in self.pieces:
            found[piece.phase] = found.get(piece.phase, 0.0) + piece.ms
        return found


class step:  # noqa: N801
    """Record a block as a step of the gap: one note as long as the block, also if that raises."""

    __slots__ = ("_begin", "_phase", "_trace")

    def __init__(self, trace: DeviceTrace, phase: str) -> None:
        self._trace, self._phase = trace, phase

    def __enter__(self) -> None:
        self._begin = time.monotonic_ns()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._trace.record(self._begin, time.monotonic_ns(), self._phase, {}, None, self._phase)


def steps(events: Sequence[Event]) -> list[Piece]:
    """Return the steps of the last gap that a trace has, in order of phases; of one side, if it has only that."""
    begin = max((event.t_begin for event in events if event.phase == PAUSE), default=0)
    found = []
    for phase in ORDER:
        of_phase = [event for event in events if event.phase == phase and event.t_begin >= begin]
        ends = [event.t_end for event in of_phase if phase != START or sets_running(event)]
        if ends:
            found.append(Piece(phase, min(event.t_begin for event in of_phase), max(ends)))
    return found


def join(pieces: Sequence[Piece]) -> StopToRun | None:
    """Return a gap from its steps, of both sides or of one; None without any. What is between them is a piece too."""
    if not pieces:
        return None
    at, end = pieces[0].begin, max(piece.end for piece in pieces)
    joined = []
    for piece in sorted(pieces, key=lambda each: each.begin):
        first, last = max(at, piece.begin), max(at, piece.end)
        if first > at:
            joined.append(Piece(BETWEEN, at, first))
        if last > first:
            joined.append(Piece(piece.phase, first, last))
        at = last
    assert at == end
    return StopToRun(tuple(joined))


def stop_to_run(pieces: Sequence[Piece]) -> StopToRun | None:
    """Return the whole gap; None if the guest was not paused, or no queue came to run behind that."""
    phases = {piece.phase for piece in pieces}
    return join(pieces) if {PAUSE, START} <= phases else None


def sets_running(event: Event) -> bool:
    """Whether a call makes a queue run: RESUME, DRIVER_OK, or making it ready behind that."""
    if event.result is None or event.result < 0:
        return False
    if event.event == _STATUS:
        return bool(int(event.fields["status"]) & Status.DRIVER_OK)
    return event.event == _RESUME or (event.event == _ENABLE and bool(event.fields["num"]))


def taken(trace: Trace, phases: Sequence[str], of: Callable[[Event], bool]) -> float:
    """Return the ms that some calls of phases took, of the device for which that was the longest."""
    by_device: dict[str, int] = {}
    for event in trace.events:
        if event.phase in phases and of(event):
            by_device[event.device] = by_device.get(event.device, 0) + event.t_end - event.t_begin
    return max(by_device.values(), default=0) / 1e6


def suspends(event: Event) -> bool:
    """Whether a call suspends a device."""
    return event.event == _SUSPEND


def to_dict(gap: StopToRun | None) -> dict[str, Any]:
    """Return the fields of a report for JSON: the length in ms (null if unknown) and the parts."""
    return {
        "stop_to_run_ms": None if gap is None else round(gap.ms, 3),
        "stop_to_run_parts_ms": None if gap is None else {name: round(ms, 3) for name, ms in gap.by_phase().items()},
    }


def to_numbers(pieces: Sequence[Piece]) -> list[list[int | str]]:
    """Return steps for JSON, so that the other side's can be joined with them: phase, begin and end in ns."""
    return [[piece.phase, piece.begin, piece.end] for piece in pieces]


def from_numbers(numbers: Sequence[Sequence[Any]]) -> list[Piece]:
    """Return what :func:`to_numbers` made."""
    return [Piece(str(phase), int(begin), int(end)) for phase, begin, end in numbers]
