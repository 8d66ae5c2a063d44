# SPDX-License-Identifier: MIT
"""What a map benchmark found: schema ``pyvhostvdpa/bench-map/1``, and the comparison of two."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ..base.errors import MissingFeature
from ..base.uapi import names
from ..device.net import VdpaNetDevice
from ..host.parents import parent_of
from .memory import Page, PhysicalLayout
from .plan import MapBenchOptions, Mode, Point, Refusal
from .stats import Distribution, Fit, fit

SCHEMA = "pyvhostvdpa/bench-map/1"
_NOTICED = 0.05
"""By how much a median has to change to be called different, spreads aside."""


_FITS = 0.25
"""A curve that is further off than that at one of its points does not describe them, and is not reported."""


@dataclass(frozen=True, slots=True)
class Result:
    """One mode at one point, proved.

    ``runs`` are physically contiguous runs (0 if this process may not know),
    ``entries`` what the maps take of the kernel's tree, ``set_maps`` how
    often the device was given its table for one map, by its own count (None
    where it has none).
    """

    mode: Mode
    point: Point
    page: Page
    layout: PhysicalLayout
    asid: int
    runs: int
    entries: int
    messages: int
    map_ns: Distribution
    unmap_ns: Distribution
    set_maps: int | None

    def in_words(self) -> str:
        """Return both times for a line of progress."""
        return f"map {self.map_ns.median / 1e6:.3f} ms, unmap {self.unmap_ns.median / 1e6:.3f} ms"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        gib = self.point.bytes / (1 << 30)
        return {
            "mode": self.mode.value,
            "regions": self.point.regions,
            "runs": self.runs,
            "page": self.page.value,
            "bytes": self.point.bytes,
            "map_ns": self.map_ns.to_dict(),
            "unmap_ns": self.unmap_ns.to_dict(),
            "proved": True,
            "layout": self.layout.value,
            "asid": self.asid,
            "entries": self.entries,
            "messages": self.messages,
            "set_maps": self.set_maps,
            "per_message_ns": {
                "map": round(self.map_ns.median / self.messages),
                "unmap": round(self.unmap_ns.median / self.messages),
            },
            "per_gib_ns": {"map": round(self.map_ns.median / gib), "unmap": round(self.unmap_ns.median / gib)},
        }


@dataclass(slots=True)
class MapReport:
    """All results. ``loops`` is how they were proved: by frames that came back, or by finished descriptors only."""

    environment: dict[str, Any]
    options: MapBenchOptions
    results: list[Result] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    loops: bool = False
    partial: bool = False

    def fits(self) -> dict[str, Fit]:
        """Return the curve over the number of runs of each mode that has enough points."""
        found = {}
        for mode in self.options.modes:
            mine = [r for r in self.results if r.mode is mode]
            curve = fit([(r.runs or r.entries, r.map_ns.median) for r in mine])
            if curve is not None and curve.worst <= _FITS:
                found[mode.value] = curve
        return found

    def gain(self) -> tuple[Result, Result] | None:
        """Return the point with most runs as it is unbatched and in one batch, None if one of both is missing."""
        both: dict[Point, dict[Mode, Result]] = {}
        for result in self.results:
            both.setdefault(result.point, {})[result.mode] = result
        pairs = [(m[Mode.UNBATCHED], m[Mode.BATCH]) for m in both.values() if {Mode.UNBATCHED, Mode.BATCH} <= m.keys()]
        return max(pairs, key=lambda pair: pair[0].entries) if pairs else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its schema has it. Times in ns."""
        return {
            "schema": SCHEMA,
            "partial": self.partial,
            "results": [result.to_dict() for result in self.results],
            "fits": {mode: curve.to_dict() for mode, curve in self.fits().items()},
            "refused": [refused.to_dict() for refused in self.refused],
            "proof": "frames came back whole" if self.loops else "descriptors were finished",
            "backing": self.options.backing.value,
            "environment": self.environment,
        }


def device_environment(device: VdpaNetDevice) -> dict[str, Any]:
    """Return what a reader needs to place the figures."""
    limits = device.iotlb.limits
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": psutil.cpu_count(),
        "accelerator": os.environ.get("PYVHOSTVDPA_LAB_ACCEL", "not in the lab"),
        "device": {
            "path": device.path,
            "driver": parent_of(device.path).module,
            "features": names(device.features),
            "backend_features": names(device.backend_features),
            "pinned": limits.pinned,
            "max_iotlb_entries": limits.entries,
            "iova_range": [limits.first, limits.last],
        },
    }


@dataclass(frozen=True, slots=True)
class FigureChange:
    """One combination then and now: medians and spreads in ns."""

    combination: str
    what: str
    old: float
    new: float
    spread: float

    @property
    def ratio(self) -> float:
        """How many times as long it takes now."""
        return self.new / self.old if self.old else float("inf")

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` if the medians differ by more than both spreads and 5 percent, else ``same``."""
        apart = abs(self.new - self.old)
        if apart <= max(self.spread, _NOTICED * self.old):
            return "same"
        return "slower" if self.new > self.old else "faster"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "combination": self.combination,
            "what": self.what,
            "old_ns": self.old,
            "new_ns": self.new,
            "spread_ns": self.spread,
            "ratio": round(self.ratio, 4),
            "verdict": self.verdict,
        }


def load_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a stored report; :class:`~pyvhostvdpa.MissingFeature` if it is not one."""
    try:
        stored = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        why = f"cannot be read: {e.strerror}" if isinstance(e, OSError) else f"is not JSON: {e}"
        raise MissingFeature(
            f"{os.fspath(path)} {why}", hint="vhost-vdpa bench map --compare takes what --json printed"
        ) from e
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        raise MissingFeature(
            f"{os.fspath(path)} is not a report of schema {SCHEMA}", hint="vhost-vdpa bench map DEV --json"
        )
    return stored


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[FigureChange]:
    """Yield the change of each combination that both reports (as their schema has them) measured."""
    before = {_combination(result): result for result in old["results"]}
    for result in new["results"]:
        was = before.get(_combination(result))
        if was is None:
            continue
        for what in ("map", "unmap"):
            a, b = was[f"{what}_ns"], result[f"{what}_ns"]
            yield FigureChange(_combination(result), what, a["median"], b["median"], a["spread"] + b["spread"])


def _combination(result: Mapping[str, Any]) -> str:
    """Return what makes two results the same measurement; runs are not among it, they are the kernel's choice."""
    words = [f"{result['bytes'] >> 10}K", f"{result['regions']} regions", result["page"], result["layout"]]
    return ", ".join([result["mode"], *words, f"ASID {result['asid']}"])
