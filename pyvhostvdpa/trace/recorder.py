# SPDX-License-Identifier: MIT
"""What passed through the door, when, and in which phase.

Downtime is computed from these records, never measured by a second clock.
Recording is on the way of every call, so it only appends; whatever is for
people is made of the records afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from ..base.uapi import Access, BackendFeature, Status, names

Fields = Mapping[str, int | str]
"""Arguments of a call by name, and what a reading call read."""

_HEX = frozenset({"iova", "size", "uaddr", "desc", "avail", "used", "features", "first", "last"})


def describe(fields: Fields) -> str:
    """Return fields as one line for people: addresses in hex, status and features by their names."""
    return " ".join(_describe(name, value) for name, value in fields.items())


def _describe(name: str, value: int | str) -> str:
    if isinstance(value, str):
        return value if name == "argument" else f"{name}={value}"
    if name == "status":
        return names(Status(value))
    if name == "backend_features":
        return names(BackendFeature(value))
    if name == "perm":
        return f"perm={Access(value).name or 'none'}"
    return f"{name}={value:#x}" if name in _HEX else f"{name}={int(value)}"


class Event(NamedTuple):
    """A system call, or a noted decision. Times are CLOCK_MONOTONIC in nanoseconds."""

    t_begin: int
    t_end: int
    device: str
    phase: str
    event: str
    """``VHOST_…`` for an ioctl, ``IOTLB_…`` for a message, ``burst`` for many; ``open``, ``close``, ``mmap``; a note"""
    fields: Fields
    result: int | None
    """What the call returned; a negative errno if it failed. None for a note."""

    @property
    def arguments(self) -> str:
        """The fields as one line for people."""
        return describe(self.fields)


DEFAULT_LIMIT = 250_000
"""Events that a trace keeps by default, about 90 MB of them."""
_SLACK = 8
"""Room is made for this part of the limit at a time: that looks at every event."""


class Trace:
    """The record of one or more devices, in order of completion.

    It keeps ``limit`` events and up to an eighth more, 0 for none: recording
    is off then, and whatever is computed from the trace is unknown. Beyond
    that the oldest events without a phase are dropped first, then the oldest
    of all, and :attr:`dropped` counts them. Raises ValueError for a negative
    ``limit``.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        if limit < 0:
            raise ValueError(f"a trace of {limit} events")
        self.recorded: list[Event] = []
        self._later: list[Callable[[], Iterable[Event]]] = []
        self.limit = limit
        self.dropped = 0
        """Events that were recorded and are not kept; with ``limit`` 0 nothing is recorded."""
        self.full = limit + limit // _SLACK
        """Events at which room is made for others."""
        self._making_room = threading.Lock()

    @property
    def events(self) -> list[Event]:
        """What was recorded, in order of completion."""
        if self._later:
            later, self._later = self._later, []
            self.extend(event for make in later for event in make())
        return self.recorded

    @events.setter
    def events(self, events: list[Event]) -> None:
        self._later, self.recorded = [], events

    def append(self, event: Event) -> None:
        """Add ``event``; if there are too many, the oldest that belong to no phase go first."""
        self.recorded.append(event)
        if len(self.recorded) > self.full:
            self.make_room()

    def append_later(self, make: Callable[[], Iterable[Event]]) -> None:
        """Add the events that ``make`` returns: they are timed already, and made at the first read."""
        if self.limit:
            self._later.append(make)

    def extend(self, events: Iterable[Event], dropped: int = 0) -> None:
        """Add the ``events`` of another trace, in order of completion; ``dropped`` is how many of them are missing."""
        if not self.limit:
            return
        new = sorted(events, key=lambda event: event.t_end)
        in_order = not self.recorded or not new or self.recorded[-1].t_end <= new[0].t_end
        self.recorded.extend(new)
        # somebody may be waiting, and a trace may be long
        if not in_order:
            self.recorded.sort(key=lambda event: event.t_end)
        self.dropped += dropped
        if len(self.recorded) > self.full:
            self.make_room()

    def make_room(self) -> None:
        """Drop events until ``limit`` are left: the oldest without a phase first, then the oldest of all."""
        # devices are driven by several threads; the one that comes second finds room
        with self._making_room:
            count = len(self.recorded)
            excess = spare = max(0, count - self.limit)
            kept = []
            for event in self.recorded[:count]:
                if spare and not event.phase:
                    spare -= 1
                else:
                    kept.append(event)
            # in one step: others append meanwhile
            self.recorded[:count] = kept[spare:]
            self.dropped += excess

    def device(self, name: str) -> DeviceTrace:
        """Return a recorder that stamps ``name``, a device's path, on its events."""
        return DeviceTrace(self, name)

    def devices(self) -> list[str]:
        """Return the names of the devices, in order of their first event."""
        return list(dict.fromkeys(event.device for event in self.events))

    def select(self, device: str, phase: str) -> list[Event]:
        """Return the events of one ``device`` in one ``phase``, in order of completion."""
        return [e for e in self.events if e.device == device and e.phase == phase]


class DeviceTrace:
    """One device's recorder, with the phase it is in."""

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace = trace
        self.name = name
        self.phase = ""

    def record(
        self, t_begin: int, t_end: int, event: str, fields: Fields, result: int | None, phase: str | None = None
    ) -> None:
        """Append one event, in the current phase or in ``phase``, unless recording is off.

        ``fields`` is kept, not copied.
        """
        trace = self._trace
        if trace.limit:
            # as Trace.append() does, without the call: this is done for every message of a burst
            trace.recorded.append(
                Event(t_begin, t_end, self.name, self.phase if phase is None else phase, event, fields, result)
            )
            if len(trace.recorded) > trace.full:
                trace.make_room()

    def record_later(self, make: Callable[[], Iterable[tuple[int, int, str, Fields, int | None]]]) -> None:
        """Append what ``make`` returns, arguments of :meth:`record`, in the phase of now; called when that is read."""
        phase, name = self.phase, self.name
        self._trace.append_later(lambda: [Event(t[0], t[1], name, phase, *t[2:]) for t in make()])

    def note(self, event: str, **fields: int | str) -> None:
        """Record a decision that no system call shows, stamped with the current time."""
        now = time.monotonic_ns()
        self.record(now, now, event, fields, None)

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Stamp ``phase`` on all records inside the block."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer
