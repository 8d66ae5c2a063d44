# SPDX-License-Identifier: MIT
"""What a migration was: frames, downtimes, calls. What was not measured, or cannot be known, is ``None``."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from ..base.errors import VhostVdpaError
from ..base.uapi import names
from ..device.net import VdpaNetDevice
from ..guest.protocol import FrameCounts
from ..host import mgmt
from ..host.parents import parent_of
from ..trace import gap
from ..trace.downtime import Downtimes, PhaseCost, rounded
from ..virtqueue.layout import GuestQueue
from .common import ReportCallback, attempt
from .sent import SendResult

SCHEMA = "pyvhostvdpa/migrate/1"
SENT_SCHEMA = "pyvhostvdpa/send/1"
RECEIVED_SCHEMA = "pyvhostvdpa/receive/1"

STAYED = "stayed on source"
"""The outcome of a migration whose guest stays where it was."""

DropCounts = dict[str, dict[str, int] | None]
"""Frames that each device lost, by counter: {} if its parent counts none, None if that is unknown."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfTheSource:
    """What the side that sends a guest knows of it."""

    outcome: str
    sent: SendResult
    frames: FrameCounts
    bad_pages: int | None
    parts: dict[str, Part]
    downtimes: Downtimes
    gap_switch_ms: float | None
    gap_back_ms: float | None
    phases: dict[str, PhaseCost]
    drops: DropCounts
    environment: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    procedure: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentReport(_OfTheSource):
    """What sending a guest was.

    ``outcome`` is "sent" or "stayed on source"; ``sent`` has the rounds of the
    stream. ``frames`` are the guest's frame counts when it left, or in the end if it stayed.
    ``bad_pages`` are the pages that its CPU found wrong, known only if it stayed. ``parts`` are the
    frames and seconds of each part of the migration, ``downtimes`` DT1 and DT2
    in ms by device. ``gap_switch_ms`` and ``gap_back_ms`` are the longest
    times without a frame at the switch to shadow virtqueues and at the return
    to passthrough, in ms. ``phases`` are the calls and their cost by phase,
    ``drops`` the frames that each device lost by its own counters,
    ``environment`` what a reader needs to place the figures. ``warnings`` are
    sentences on what is wrong or unknown, ``procedure`` says by device how it
    was started and stopped. What was not measured is ``None``.
    ``steps`` are this side's steps of the time in which the guest was paused.
    """

    steps: list[gap.Piece] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON schema ``pyvhostvdpa/send/1`` has it."""
        return {
            "schema": SENT_SCHEMA,
            "outcome": self.outcome,
            "id": self.sent.id,
            "frames": frames_when(self.outcome, self.frames),
            **_traffic(self, gap.join(self.steps)),
            **self.downtimes.to_dict(),
            "guest_gap_ms": {"switch": rounded(self.gap_switch_ms), **_back(self.outcome, self.gap_back_ms)},
            **self.sent.to_dict(),
            **_devices(self),
        }


def frames_when(outcome: str, frames: FrameCounts) -> dict[str, int | None]:
    """Return the counts of frames for JSON.

    A guest that left has frames in flight, and this side does not know which of
    them it will receive: its losses are then None.
    """
    if outcome == STAYED:
        return {**frames.to_dict(), "in_flight": 0}
    return {**frames.to_dict(), "lost": None, "in_flight": frames.sent - frames.received}


def _back(outcome: str, ms: float | None) -> dict[str, float | None]:
    return {"back": rounded(ms)} if outcome == STAYED else {}


@dataclass(frozen=True, slots=True)
class ReceivedReport:
    """What receiving a guest was.

    ``id`` names the migration on both sides, ``source`` is where it came
    from. ``frames`` are the guest's frame counts since its first start,
    ``bad_pages`` the pages that its CPU found wrong, ``parts`` the frames and
    seconds here. ``gap_move_ms`` is the longest time without a frame at the
    move, in ms, None if unknown. ``hash`` is that of its memory, "" unless the
    source asked for it; ``note`` what its owner should know, or "". ``phases``
    are the calls and their cost by phase, ``drops`` the frames that each device
    lost by its own counters, ``environment`` what a reader needs to place the
    figures. ``warnings`` are sentences on what is wrong or unknown,
    ``procedure`` says by device how it was started. ``steps`` are this side's
    steps of the time in which the guest was paused.
    """

    id: str
    source: str
    frames: FrameCounts
    bad_pages: int
    parts: dict[str, Part]
    gap_move_ms: float | None
    hash: str
    note: str
    phases: dict[str, PhaseCost]
    drops: DropCounts
    environment: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    procedure: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[gap.Piece] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON schema ``pyvhostvdpa/receive/1`` has it."""
        return {
            "schema": RECEIVED_SCHEMA,
            "id": self.id,
            "source": self.source,
            "frames": self.frames.to_dict(),
            **_traffic(self, gap.join(self.steps)),
            "stop_to_run_steps_ns": gap.to_numbers(self.steps),
            "guest_gap_ms": {"move": rounded(self.gap_move_ms)},
            "memory_hash": self.hash or None,
            "note": self.note or None,
            **_devices(self),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport(_OfTheSource):
    """The result of one migration.

    ``outcome`` is "migrated" or "stayed on source"; ``sent`` has the rounds of
    the stream. ``frames`` are the guest's frame counts in the end.
    ``bad_pages`` are the pages that its CPU found wrong in the end. ``parts`` are the
    frames and seconds of each part of the migration, ``downtimes`` DT1 and DT2
    in ms by device. ``gap_switch_ms`` and ``gap_back_ms`` are the longest
    times without a frame at the switch to shadow virtqueues and at the return
    to passthrough, None if it moved, in ms. ``phases`` are the calls and their cost by phase,
    ``drops`` the frames that each device lost by its own counters,
    ``environment`` what a reader needs to place the figures. ``warnings`` are
    sentences on what is wrong or unknown, ``procedure`` says by device how it
    was started and stopped. What was not measured is ``None``.
    ``gap_move_ms`` is the longest time without a frame at the move.
    ``drops`` and ``procedure`` have the keys "source" and "destination".
    ``stopped`` is stop to run in pieces, None if the guest stayed.
    """

    gap_move_ms: float | None
    stopped: gap.StopToRun | None = None

    @property
    def dt1_ms(self) -> dict[str, float | None]:
        """The devices' DT1."""
        return self.downtimes.dt1_ms

    @property
    def dt2_ms(self) -> dict[str, float | None]:
        """The devices' DT2."""
        return self.downtimes.dt2_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON schema ``pyvhostvdpa/migrate/1`` has it."""
        return {
            "schema": SCHEMA,
            "outcome": self.outcome,
            "frames": self.frames.to_dict(),
            **_traffic(self, self.stopped),
            **self.downtimes.to_dict(),
            "guest_gap_ms": {
                "switch": rounded(self.gap_switch_ms),
                "move": rounded(self.gap_move_ms),
                **_back(self.outcome, self.gap_back_ms),
            },
            **self.sent.to_dict(),
            **_devices(self),
        }


def _traffic(report: SentReport | ReceivedReport | MigrationReport, stopped: gap.StopToRun | None) -> dict[str, Any]:
    """Return for JSON what the guest's traffic and CPU were, part by part, and how long it was paused."""
    return {
        "bad_pages": report.bad_pages,
        "parts": {name: part.to_dict() for name, part in report.parts.items()},
        **gap.to_dict(stopped),
    }


def _devices(report: SentReport | ReceivedReport | MigrationReport) -> dict[str, Any]:
    """Return for JSON what the devices did, and where."""
    return {
        "phases": {name: phase.to_dict() for name, phase in report.phases.items()},
        "device_drops": report.drops,
        "procedure": report.procedure,
        "warnings": report.warnings,
        "environment": report.environment,
    }


_LOSS = ("drop", "overrun", "error", "filtered", "discard", "miss", "lost", "trunc", "too_long", "no_buf")
_LOSS_WORDS = ("down", "err", "bad", "oversize", "runt")


def means_loss(name: str) -> bool:
    """Return whether a parent's counter of that name counts frames that did not reach the guest or the wire.

    Parents name their own counters (``vdpa dev vstats show``), so this goes by the words that drivers use.
    """
    lowered = name.lower().replace(" ", "_").replace("-", "_").replace(".", "_")
    return any(part in lowered for part in _LOSS) or any(word in lowered.split("_") for word in _LOSS_WORDS)


class Drops:
    """Frames that a device lost since this was made, by its parent's own counters, if it has any.

    Asking takes a process of its own, which may fail. That is reported, and
    makes the counters unknown; the guest has nothing to do with it.
    """

    def __init__(self, path: str, queues: Sequence[GuestQueue], tell: ReportCallback) -> None:
        self._path, self._queues, self._tell = path, [queue.index for queue in queues], tell
        self._before = self._read()

    def _read(self) -> dict[str, int] | None:
        told = attempt(
            lambda: mgmt.vendor_statistics(self._path, self._queues),
            f"the drop counters of {self._path} are unknown",
            self._tell,
        )
        if told is None:
            return None
        found: dict[str, int] = {}
        for name, value in (each for counters in told.values() for each in counters.items()):
            if means_loss(name):
                found[name] = found.get(name, 0) + value
        return found

    def now(self) -> dict[str, int] | None:
        """Return the counters by name, None if they are unknown; the device must still run."""
        before = self._before
        found = None if before is None else self._read()
        if before is None or found is None:
            return None
        return {name: value - before.get(name, 0) for name, value in found.items()}


def procedures(devices: Sequence[VdpaNetDevice]) -> dict[str, dict[str, Any]]:
    """Return for JSON by which procedure each device was started and stopped, and why not by a better one."""
    return {device.path: {**device.procedure.to_dict(), "shadow": device.shadow} for device in devices}


def environment(devices: dict[str, VdpaNetDevice], memory: int) -> dict[str, Any]:
    """Return what a reader needs to place the figures; None for what cannot be found out."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": psutil.cpu_count(),
        "accelerator": os.environ.get("PYVHOSTVDPA_LAB_ACCEL", "not in the lab"),
        "memory_bytes": memory,
        "devices": {
            role: {
                "path": device.path,
                "driver": _driver(device.path),
                "features": names(device.features),
                "backend_features": names(device.backend_features),
                "pinned": device.iotlb.limits.pinned,
                "max_iotlb_entries": device.iotlb.limits.entries,
            }
            for role, device in devices.items()
        },
    }


def _driver(path: str) -> str | None:
    try:
        return parent_of(path).module
    except (VhostVdpaError, OSError):
        return None
