# SPDX-License-Identifier: MIT
"""Downtime, read from the trace.

DT1 is what switching one device to shadow virtqueues costs (teardown and
setup at the start of a migration), DT2 what stopping it on the source costs,
as the series "vdpa-net: improve migration downtime through descriptor ASID
and persistent IOTLB" defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .phases import DT1, DT2, PHASES
from .recorder import Trace

__all__ = [
    "DT1",
    "DT2",
    "PHASES",
    "Downtimes",
    "PhaseCost",
    "cost",
    "interval",
    "measured",
    "milliseconds",
    "of_all",
    "rounded",
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


def interval(trace: Trace, device: str, phases: Sequence[str]) -> tuple[int, int] | None:
    """Return first begin and last end of a device's phases, ns; None if nothing happened in them."""
    events = [event for phase in phases for event in trace.select(device, phase)]
    if not events:
        return None
    return min(e.t_begin for e in events), max(e.t_end for e in events)


def milliseconds(trace: Trace, device: str, phases: Sequence[str]) -> float:
    """Return how long a device's phases took together."""
    span = interval(trace, device, phases)
    return (span[1] - span[0]) / 1e6 if span else 0.0


def measured(trace: Trace, device: str, phases: Sequence[str]) -> float | None:
    """Return how long a device's phases took together, ms; None if one of them did not happen or was not recorded."""
    by_phase = [trace.select(device, phase) for phase in phases]
    if not all(by_phase):
        return None
    events = [event for each in by_phase for event in each]
    return (max(e.t_end for e in events) - min(e.t_begin for e in events)) / 1e6


def worst(ms: Iterable[float]) -> float:
    """Return what counts of the devices' DT1: the longest."""
    return max(ms)


def total(ms: Iterable[float]) -> float:
    """Return what counts of the devices' DT2, and of their starts: the sum."""
    return sum(ms)


def of_all(figure: Callable[[Iterable[float]], float], ms: Iterable[float | None]) -> float | None:
    """Return :func:`worst` or :func:`total` of all devices; None if one is unknown, or without devices."""
    every = list(ms)
    known = [each for each in every if each is not None]
    return figure(known) if known and len(known) == len(every) else None


def rounded(value: float | None) -> float | None:
    """Return a figure for JSON, to three digits behind the point; None stays unknown."""
    return None if value is None else round(value, 3)


@dataclass(frozen=True, slots=True)
class Downtimes:
    """Milliseconds of both downtimes by device, as the series defines them; None for what was not measured."""

    dt1_ms: dict[str, float | None]
    dt2_ms: dict[str, float | None]

    @property
    def dt1(self) -> float | None:
        """The worst device's switch to shadow virtqueues."""
        return of_all(worst, self.dt1_ms.values())

    @property
    def dt2(self) -> float | None:
        """The sum of the devices' stops on the source."""
        return of_all(total, self.dt2_ms.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "dt1_ms": {"worst": rounded(self.dt1), "devices": _by_device(self.dt1_ms)},
            "dt2_ms": {"sum": rounded(self.dt2), "devices": _by_device(self.dt2_ms)},
        }


def _by_device(ms: Mapping[str, float | None]) -> list[dict[str, Any]]:
    return [{"device": device, "ms": rounded(each)} for device, each in ms.items()]


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
