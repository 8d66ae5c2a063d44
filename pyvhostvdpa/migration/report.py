# SPDX-License-Identifier: MIT
"""What a migration was: frames, downtimes, calls."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from ..base.uapi import names
from ..device.net import VdpaNetDevice
from ..guest.nic import FrameCounts
from ..host import mgmt
from ..trace import gap
from ..trace.downtime import PhaseCost
from ..virtqueue.layout import GuestQueue
from .source import Sent

SCHEMA = "pyvhostvdpa/migrate/1"


@dataclass(frozen=True, slots=True)
class Part:
    """Frames received in one part of a migration, and its length in seconds."""

    received: int
    seconds: float

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.received / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields for JSON."""
        return {
            "received": self.received,
            "seconds": round(self.seconds, 3),
            "frames_per_second": round(self.rate, 1),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one migration. Times in milliseconds.

    ``outcome`` is ``"migrated"`` or ``"stayed on source"``. ``bad_pages`` is
    what the guest's CPU found wrong in its memory at the destination;
    ``drops`` are the devices' own counters, as far as they have any;
    ``procedure`` is by device, "source" and "destination"; ``stopped`` is stop
    to run, None if the guest stayed.
    """

    outcome: str
    sent: Sent
    frames: FrameCounts
    bad_pages: int
    parts: dict[str, Part]
    dt1_ms: dict[str, float]
    dt2_ms: dict[str, float]
    gap_switch_ms: float
    gap_move_ms: float
    phases: dict[str, PhaseCost]
    drops: dict[str, dict[str, int]]
    environment: dict[str, Any]
    procedure: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: gap.StopToRun | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON schema ``pyvhostvdpa/migrate/1`` has it."""
        return {
            "schema": SCHEMA,
            "outcome": self.outcome,
            "frames": self.frames.to_dict(),
            "bad_pages": self.bad_pages,
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
            **gap.to_dict(self.stopped),
            **downtimes(self.dt1_ms, self.dt2_ms),
            "guest_gap_ms": {"switch": round(self.gap_switch_ms, 3), "move": round(self.gap_move_ms, 3)},
            **self.sent.to_dict(),
            "phases": {name: phase.to_dict() for name, phase in self.phases.items()},
            "device_drops": self.drops,
            "procedure": self.procedure,
            "environment": self.environment,
        }


class Drops:
    """Frames that a device lost since this was made, by its parent's own counters, as far as it has any."""

    def __init__(self, path: str, queues: Sequence[GuestQueue]) -> None:
        self._path, self._queues = path, [queue.index for queue in queues]
        self._before = self._read()

    def _read(self) -> dict[str, int]:
        found: dict[str, int] = {}
        told = mgmt.vendor_statistics(self._path, self._queues)
        for name, value in (each for counters in told.values() for each in counters.items()):
            if any(word in name for word in ("drop", "overrun", "error")):
                found[name] = found.get(name, 0) + value
        return found

    def now(self) -> dict[str, int]:
        """Return the counters by name; the device must still run."""
        return {name: value - self._before.get(name, 0) for name, value in self._read().items()}


def downtimes(dt1_ms: dict[str, float], dt2_ms: dict[str, float]) -> dict[str, Any]:
    """Return both downtimes for JSON, as the series defines them: DT1 is the worst device's, DT2 the sum."""
    return {
        "dt1_ms": {
            "worst": round(max(dt1_ms.values(), default=0.0), 3),
            "devices": [{"device": d, "ms": round(ms, 3)} for d, ms in dt1_ms.items()],
        },
        "dt2_ms": {
            "sum": round(sum(dt2_ms.values()), 3),
            "devices": [{"device": d, "ms": round(ms, 3)} for d, ms in dt2_ms.items()],
        },
    }


def procedures(devices: Sequence[VdpaNetDevice]) -> dict[str, dict[str, Any]]:
    """Return for JSON by which procedure each device was started and stopped, and why not by a better one."""
    return {device.path: device.procedure.to_dict() for device in devices}


def environment(devices: dict[str, VdpaNetDevice], memory: int) -> dict[str, Any]:
    """Return what a reader needs to place the figures."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": psutil.cpu_count(),
        "accelerator": os.environ.get("PYVHOSTVDPA_LAB_ACCEL", "not in the lab"),
        "memory_bytes": memory,
        "devices": {
            role: {
                "path": device.path,
                "driver": mgmt.parent_of(device.path).module,
                "features": names(device.features),
                "backend_features": names(device.backend_features),
                "pinned": device.iotlb.limits.pinned,
                "max_iotlb_entries": device.iotlb.limits.entries,
            }
            for role, device in devices.items()
        },
    }
