# SPDX-License-Identifier: MIT
"""A recording in figures: by device, by migration, and what the downtimes consist of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .advice import Advice, advise, not_acknowledged
from .downtime import PhaseCost, rounded
from .infer import Inferred, Migration, infer, pieces
from .phases import DEST, DT1, DT2, PHASES
from .recorder import Trace
from .spans import Kind, by_kind, spans

SCHEMA = "pyvhostvdpa/watch/1"

PARTS = {"dt1": DT1, "dt2": DT2, "dest": DEST}
"""The downtimes that a summary splits by kind of call."""


@dataclass(slots=True)
class Summary:
    """What a recording shows. ``about`` describes the recording: clock, hosts, probes."""

    found: Inferred
    lost: int
    about: Mapping[str, Any] = field(default_factory=dict)
    advice: Sequence[Advice] = ()

    @property
    def trace(self) -> Trace:
        """The recording with its phases."""
        return self.found.trace

    def devices(self) -> list[dict[str, Any]]:
        """Return one entry per device, in order of their first call."""
        return [self._device(device) for device in self.trace.devices()]

    def _device(self, device: str) -> dict[str, Any]:
        events = [event for event in self.trace.events if event.device == device and event.result is not None]
        sessions = [session for session in self.found.sessions if session.device == device]
        migration = self.found.last(device)
        destination = migration.destination if migration is not None else None
        latest = sessions[-1] if sessions else None
        return {
            "device": device,
            "processes": [
                {"pid": each.pid, "comm": each.comm, "open_before": each.t_open is None} for each in sessions
            ],
            "dt1_ms": rounded(migration.dt1_ms if migration else None),
            "dt2_ms": rounded(migration.dt2_ms if migration else None),
            "stop_to_run_ms": rounded(migration.stop_to_run_ms if migration else None),
            "destination": destination.device if destination is not None else None,
            "cancelled": migration.cancelled if migration is not None else False,
            "ioctls": sum(event.event.startswith(("VHOST_", "ioctl")) for event in events),
            "messages": sum(event.event.startswith("IOTLB_") for event in events),
            "failed": sum((event.result or 0) < 0 for event in events),
            "phases": {phase: cost.to_dict() for phase in PHASES if (cost := self.cost(device, phase)) is not None},
            "by_kind": {name: {str(kind): ns / 1e6 for kind, ns in self.kinds(device, name).items()} for name in PARTS},
            "not_acknowledged": not_acknowledged(latest) if latest is not None else [],
            "shadow": latest.episodes[-1].shadow if latest is not None and latest.episodes else None,
        }

    def cost(self, device: str, phase: str) -> PhaseCost | None:
        """Return what a phase of one device took; None if it did not happen."""
        events = self.trace.select(device, phase)
        if not events:
            return None
        return PhaseCost(
            ms=(max(e.t_end for e in events) - min(e.t_begin for e in events)) / 1e6,
            ioctls=sum(e.event.startswith("VHOST_") for e in events),
            iotlb_messages=sum(e.event.startswith("IOTLB_") for e in events),
        )

    def kinds(self, device: str, part: str) -> dict[Kind, int]:
        """Return what one of :data:`PARTS` consists of on a device: ns by kind of call."""
        return by_kind(spans(self.trace, device, PARTS[part]))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "schema": SCHEMA,
            "devices": self.devices(),
            "migrations": [_migration(each) for each in self.found.migrations],
            "lost_events": self.lost,
            "advice": [each.to_dict() for each in self.advice],
            "recording": dict(self.about),
        }


def summarize(trace: Trace, about: Mapping[str, Any] | None = None) -> Summary:
    """Return the summary of a recording; its events may have no phases yet."""
    found = infer(trace)
    return Summary(found, trace.dropped, about or {}, advise(found))


def _migration(migration: Migration) -> dict[str, Any]:
    gap = pieces(migration)
    return {
        "source": migration.source.device,
        "destination": migration.destination.device if migration.destination is not None else None,
        "dt1_ms": rounded(migration.dt1_ms),
        "dt2_ms": rounded(migration.dt2_ms),
        "stop_to_run_ms": rounded(migration.stop_to_run_ms),
        "stop_to_run_parts_ms": None if gap is None else {name: round(ms, 3) for name, ms in gap.by_phase().items()},
        "cancelled": migration.cancelled,
    }
