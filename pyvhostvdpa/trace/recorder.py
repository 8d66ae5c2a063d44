# SPDX-License-Identifier: MIT
"""What passed through the door, when, and in which phase.

Downtime is computed from these records, never measured by a second clock.
Recording is on the way of every call, so it only appends; whatever is for
people is made of the records afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
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
    """A system call, or a decision that somebody noted. Times are CLOCK_MONOTONIC in nanoseconds."""

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
"""Events that a trace keeps unless told otherwise, about 90 MB of them."""
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
        self.events: list[Event] = []
        self.limit = limit
        self.dropped = 0
        """Events that were recorded and are not kept; with ``limit`` 0 none is recorded."""
        self._full = limit + limit // _SLACK
        self._making_room = threading.Lock()

    def append(self, event: Event) -> None:
        """Add an event, and make room if there are too many."""
        self.events.append(event)
        if len(self.events) > self._full:
            self._make_room()

    def extend(self, events: Iterable[Event], dropped: int = 0) -> None:
        """Add what another trace recorded, of which ``dropped`` events are missing, in order of completion."""
        if not self.limit:
            return
        self.events.extend(events)
        self.events.sort(key=lambda event: event.t_end)
        self.dropped += dropped
        if len(self.events) > self._full:
            self._make_room()

    def _make_room(self) -> None:
        # devices are driven by several threads; the one that comes second finds room
        with self._making_room:
            count = len(self.events)
            excess = spare = max(0, count - self.limit)
            kept = []
            for event in self.events[:count]:
                if spare and not event.phase:
                    spare -= 1
                else:
                    kept.append(event)
            # in one step: others append meanwhile
            self.events[:count] = kept[spare:]
            self.dropped += excess

    def device(self, name: str) -> DeviceTrace:
        """Return the recorder that stamps ``name`` on its events."""
        return DeviceTrace(self, name)

    def devices(self) -> list[str]:
        """Return the names of the devices, in order of their first event."""
        return list(dict.fromkeys(event.device for event in self.events))

    def select(self, device: str, phase: str) -> list[Event]:
        """Return one device's events of one phase, in order."""
        return [e for e in self.events if e.device == device and e.phase == phase]


class DeviceTrace:
    """One device's recorder, with the phase it is in."""

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace = trace
        self.name = name
        self.phase = ""

    def record(self, t_begin: int, t_end: int, event: str, fields: Fields, result: int | None) -> None:
        """Append one event in the current phase, unless recording is off. ``fields`` is kept, not copied."""
        if self._trace.limit:
            self._trace.append(Event(t_begin, t_end, self.name, self.phase, event, fields, result))

    def note(self, event: str, **fields: int | str) -> None:
        """Record, as of now, what was decided: that which no system call tells."""
        now = time.monotonic_ns()
        self.record(now, now, event, fields, None)

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Stamp ``phase`` on what is recorded inside the block."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer
