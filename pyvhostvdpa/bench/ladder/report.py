# SPDX-License-Identifier: MIT
"""What the ladder found: one entry a row, and what a reader needs to place the figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...guest.protocol import FrameCounts
from ...trace.downtime import rounded, total, worst
from ...trace.gap import StopToRun
from .rows import LadderRow

SCHEMA = "pyvhostvdpa/ladder/1"


@dataclass(frozen=True, slots=True)
class Counts:
    """Calls of one device in one downtime: ioctls, IOTLB messages, and what the device counted (None: it does not)."""

    ioctls: int
    messages: int
    set_maps: int | None = None
    heavy: int | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """What the devices take that no procedure can spare, side by side, in ms: to stop their queues and let them go."""

    switch: float
    stop_to_run: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields for JSON."""
        return {"switch": round(self.switch, 3), "stop_to_run": round(self.stop_to_run, 3)}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a row: ms and calls by downtime (``dt1``, ``dt2``, ``dest``) and device, in the devices' order.

    ``gap`` is from the guest's pause to its last queue running.
    """

    ms: Mapping[str, Sequence[float]]
    counts: Mapping[str, Sequence[Counts]]
    frames: FrameCounts
    gap: StopToRun | None = None
    floor: Floor | None = None
    procedure: str | None = None
    shadow: str | None = None

    @property
    def dt1_ms(self) -> float:
        """The worst device's switch to shadow virtqueues."""
        return worst(self.ms["dt1"])

    @property
    def dt2_ms(self) -> float:
        """The sum of all devices' stops on the source."""
        return total(self.ms["dt2"])

    @property
    def dest_ms(self) -> float:
        """The sum of all devices' starts on the destination."""
        return total(self.ms["dest"])


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row: its runs, what was left out of it, or why it was not possible."""

    plan: LadderRow
    runs: Sequence[Run] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    impossible: str = ""

    @property
    def dt1_ms(self) -> float | None:
        """The median over the runs; None without a run."""
        return statistics.median(run.dt1_ms for run in self.runs) if self.runs else None

    @property
    def dt2_ms(self) -> float | None:
        """The median over the runs; None without a run."""
        return statistics.median(run.dt2_ms for run in self.runs) if self.runs else None

    @property
    def dest_ms(self) -> float | None:
        """The median over the runs; None without a run."""
        return statistics.median(run.dest_ms for run in self.runs) if self.runs else None

    @property
    def stop_to_run_ms(self) -> float | None:
        """The median over the runs; None without a measured run."""
        found = [run.gap.ms for run in self.runs if run.gap is not None]
        return statistics.median(found) if found else None

    @property
    def floor(self) -> Floor | None:
        """What the devices take for themselves, in the first run."""
        return self.runs[0].floor if self.runs else None

    def parts(self) -> dict[str, float]:
        """Return what stop to run consists of, ms by phase, in the run that is nearest to the median."""
        runs = [run.gap for run in self.runs if run.gap is not None]
        middle = self.stop_to_run_ms
        return {} if middle is None else min(runs, key=lambda each: abs(each.ms - middle)).by_phase()

    def ratio(self) -> dict[str, float | None]:
        """Return how many times its floor the switch and stop to run take; None where that is not known, or 0."""
        floor = self.floor
        pairs = {
            "switch": (self.dt1_ms, floor.switch if floor else None),
            "stop_to_run": (self.stop_to_run_ms, floor.stop_to_run if floor else None),
        }
        return {name: took / least if took is not None and least else None for name, (took, least) in pairs.items()}

    def counts(self, downtime: str) -> Counts | None:
        """Return a device's calls in a downtime, those of the first run's first device."""
        return self.runs[0].counts[downtime][0] if self.runs else None

    @property
    def alike(self) -> bool:
        """Whether every device made the same calls in every run."""
        return all(
            each == self.counts(downtime)
            for run in self.runs
            for downtime in run.counts
            for each in run.counts[downtime]
        )

    def to_dict(self, baseline: RowResult | None) -> dict[str, Any]:
        """Return the fields for JSON."""
        published = self.plan.published
        return {
            "row": self.plan.row,
            "title": self.plan.title,
            "procedure": self.runs[0].procedure if self.runs else None,
            "shadow": self.runs[0].shadow if self.runs else None,
            "stop_to_run_ms": rounded(self.stop_to_run_ms),
            "stop_to_run_parts_ms": {name: round(ms, 3) for name, ms in self.parts().items()} or None,
            "floor_ms": self.floor.to_dict() if self.floor else None,
            "floor_ratio": {name: rounded(value) for name, value in self.ratio().items()},
            "dt1_ms": {"worst": rounded(self.dt1_ms), "runs": [_all(run.ms["dt1"]) for run in self.runs]},
            "dt2_ms": {"sum": rounded(self.dt2_ms), "runs": [_all(run.ms["dt2"]) for run in self.runs]},
            "dest_ms": {"sum": rounded(self.dest_ms), "runs": [_all(run.ms["dest"]) for run in self.runs]},
            "published": published.to_dict() if published else None,
            "dt1_explained": published.dt1_explained if published else True,
            "speedup": {name: rounded(value) for name, value in self.speedup(baseline).items()},
            "messages": self._each("messages"),
            "ioctls": self._each("ioctls"),
            "set_maps": self._each("set_maps"),
            "heavy": self._each("heavy"),
            "alike": self.alike,
            "frames": [run.frames.to_dict() for run in self.runs],
            "left_out": dict(self.left_out),
            "impossible": self.impossible or None,
        }

    def _each(self, what: str) -> dict[str, int | None]:
        found = {downtime: self.counts(downtime) for downtime in ("dt1", "dt2", "dest")}
        return {downtime: getattr(counts, what) if counts else None for downtime, counts in found.items()}

    def speedup(self, baseline: RowResult | None) -> dict[str, float | None]:
        """Return how many times shorter both downtimes are than the baseline's; None without one."""
        pairs = {
            "dt1": (baseline.dt1_ms if baseline else None, self.dt1_ms),
            "dt2": (baseline.dt2_ms if baseline else None, self.dt2_ms),
        }
        return {name: before / now if before and now else None for name, (before, now) in pairs.items()}


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """A row of what another program did, from a recording: figures in ms, calls by downtime, over all its devices."""

    title: str
    recording: str
    dt1_ms: float | None
    dt2_ms: float | None
    dest_ms: float | None
    stop_to_run_ms: float | None
    counts: Mapping[str, Counts]
    lost: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "title": self.title,
            "recording": self.recording,
            "dt1_ms": rounded(self.dt1_ms),
            "dt2_ms": rounded(self.dt2_ms),
            "dest_ms": rounded(self.dest_ms),
            "stop_to_run_ms": rounded(self.stop_to_run_ms),
            "ioctls": {name: each.ioctls for name, each in self.counts.items()},
            "messages": {name: each.messages for name, each in self.counts.items()},
            "lost_events": self.lost,
        }


@dataclass(frozen=True, slots=True)
class LadderReport:
    """The whole ladder. ``regions`` is how many regions guest memory has, R of the formulas."""

    regions: int
    devices: int
    pairs: int
    memory: int
    charged: int | None
    profile: str | None
    clock: str
    rows: Sequence[RowResult]
    environment: Mapping[str, Any]
    measured: Sequence[MeasuredRow] = ()
    """Rows from recordings."""

    @property
    def baseline(self) -> RowResult | None:
        """The row that the others are compared with, if it was run."""
        return next((row for row in self.rows if row.plan.row == "baseline" and row.runs), None)

    @property
    def sound(self) -> bool:
        """Whether no frame was lost, duplicated or corrupted, and every device of a row made the same calls."""
        frames = [run.frames for row in self.rows for run in row.runs]
        return not any(f.lost or f.duplicated or f.corrupted for f in frames) and all(row.alike for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON schema ``pyvhostvdpa/ladder/1`` has it; null is what was not measured."""
        return {
            "schema": SCHEMA,
            "regions": self.regions,
            "devices": self.devices,
            "pairs": self.pairs,
            "memory_bytes": self.memory,
            "charged_bytes": self.charged,
            "profile": self.profile,
            "clock": self.clock,
            "rows": [row.to_dict(self.baseline) for row in self.rows],
            "measured": [row.to_dict() for row in self.measured],
            "environment": dict(self.environment),
        }


def _all(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
