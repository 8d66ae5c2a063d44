# SPDX-License-Identifier: MIT
"""Downtime, read from the trace.

DT1 is what switching one device to shadow virtqueues costs (teardown and
setup at the start of a migration), DT2 what stopping it on the source costs,
as the series "vdpa-net: improve migration downtime through descriptor ASID
and persistent IOTLB" defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .phases import DT1, DT2, PHASES
from .recorder import Event, Trace

__all__ = [
    "DT1",
    "DT2",
    "PHASES",
    "PhaseCost",
    "cost",
    "interval",
    "measured",
    "milliseconds",
    "of_all",
    "total",
    "worst",
]


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """What a phase took: milliseconds from its first call to its last, and how many calls."""

    ms: float
    ioctls: int
    iotlb_messages: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields for JSON."""
        return {"ms": round(self.ms, 3), "ioctls": self.ioctls, "iotlb_messages": self.iotlb_messages}


def _select(trace: Trace, device: str, phases: Sequence[str]) -> list[Event]:
    return [event for phase in phases for event in trace.select(device, phase)]


def interval(trace: Trace, device: str, phases: Sequence[str]) -> tuple[int, int] | None:
    """Return first begin and last end of a device's phases, ns; None if nothing happened in them."""
    events = _select(trace, device, phases)
    if not events:
        return None
    return min(e.t_begin for e in events), max(e.t_end for e in events)


def milliseconds(trace: Trace, device: str, phases: Sequence[str]) -> float:
    """Return how long a device's phases took together."""
    span = interval(trace, device, phases)
    return (span[1] - span[0]) / 1e6 if span else 0.0


def measured(trace: Trace, device: str, phases: Sequence[str]) -> float | None:
    """Return how long a device's phases took together, ms; None if one of them did not happen or was not recorded."""
    if not all(trace.select(device, phase) for phase in phases):
        return None
    return milliseconds(trace, device, phases)


def worst(ms: Iterable[float]) -> float:
    """Return what counts of the devices' DT1: the longest."""
    return max(ms)


def total(ms: Iterable[float]) -> float:
    """Return what counts of the devices' DT2, and of their starts: the sum."""
    return sum(ms)


def of_all(figure: Callable[[Iterable[float]], float], ms: Iterable[float | None]) -> float | None:
    """Return :func:`worst` or :func:`total` of all devices; None if one is unknown, or there is none."""
    every = list(ms)
    known = [each for each in every if each is not None]
    return figure(known) if known and len(known) == len(every) else None


def cost(trace: Trace, phase: str) -> PhaseCost | None:
    """Return what a phase cost over all devices; None if it did not happen."""
    events = [e for e in trace.events if e.phase == phase]
    if not events:
        return None
    messages = sum(e.event.startswith("IOTLB_") for e in events)
    return PhaseCost(
        ms=(max(e.t_end for e in events) - min(e.t_begin for e in events)) / 1e6,
        ioctls=sum(e.event.startswith("VHOST_") for e in events),
        iotlb_messages=messages,
    )
