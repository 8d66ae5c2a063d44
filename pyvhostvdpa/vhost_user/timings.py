# SPDX-License-Identifier: MIT
"""What switches, stops and starts take, read from the recorded calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..trace.recorder import DeviceTrace, Event, Trace

_OTHERS_NS = 1_000_000_000
"""How much later than it ended an event of another thread may be recorded."""


class Timings:
    """The last figure of each kind for one device, ms; None if no call was recorded."""

    def __init__(self, trace: Trace, device: DeviceTrace) -> None:
        self._trace = trace
        self._device = device
        self.ms: dict[str, float | None] = {}

    @contextmanager
    def measured(self, name: str, *phases: str) -> Iterator[None]:
        """Stamp the first of ``phases`` on the block's calls, and keep what the calls in all of them took."""
        since = time.monotonic_ns()
        self.ms.pop(name, None)
        with self._device.in_phase(phases[0]):
            try:
                yield
            finally:
                events = [event for event in self._since(since) if event.phase in phases]
                took = max((e.t_end for e in events), default=0) - min((e.t_begin for e in events), default=0)
                self.ms[name] = round(took / 1e6, 3) if events else None

    def _since(self, since: int) -> Iterator[Event]:
        """Yield what the device was asked since then, the last first: a guest waits, and a trace may be long."""
        for event in reversed(self._trace.events):
            if event.t_end < since - _OTHERS_NS:
                return
            if event.device == self._device.name and event.t_begin >= since:
                yield event

    def took(self, name: str) -> dict[str, float | None]:
        """Return a figure as a field of an event."""
        return {"ms": self.ms.get(name)}
