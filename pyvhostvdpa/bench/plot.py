# SPDX-License-Identifier: MIT
"""The picture of a map benchmark. matplotlib is loaded here, when one is drawn, and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import MissingFeature
from ..base.files import check_writable, replace_file
from .plan import Mode, in_words
from .report import MapReport, Result

_COLOURS = {Mode.UNBATCHED: "#c1443c", Mode.PER_REGION: "#c98a1b", Mode.BATCH: "#2b6cb0"}
_INK, _FAINT = "#333333", "#dddddd"
_SIZE = (8.4, 4.4)
"""Inches."""
_PANEL_POINTS = 230
"""About how high a panel is."""


_End = tuple[str, str, float, float]
"""A line's name, its colour, and its last point."""


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise :class:`~pyvhostvdpa.MissingFeature` beforehand if a picture cannot be drawn, or not there."""
    if Path(path).suffix != ".svg":
        raise MissingFeature(f"{os.fspath(path)}: pictures are SVG", hint="vhost-vdpa bench map --plot FILE.svg")
    try:
        check_writable(path)
    except OSError as e:
        raise _unwritable(path, e) from e
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingFeature(
            "--plot needs matplotlib, which is not installed",
            hint="pip install 'pyvhostvdpa[plot]', or apt install python3-matplotlib",
        )


def _unwritable(path: str | os.PathLike[str], error: OSError) -> MissingFeature:
    return MissingFeature(
        f"cannot write {os.fspath(path)}: {error.strerror}", hint="vhost-vdpa bench map --plot with another file"
    )


def draw(report: MapReport, path: str | os.PathLike[str]) -> None:
    """Write the picture as SVG: time to map and to unmap, a line for each mode.

    Raises :class:`~pyvhostvdpa.MissingFeature` if the file cannot be written.
    """
    # loaded by name, because it is an optional extra without types
    figure_module: Any = importlib.import_module("matplotlib.figure")
    svg: Any = importlib.import_module("matplotlib.backends.backend_svg")
    matplotlib: Any = importlib.import_module("matplotlib")
    with matplotlib.rc_context({"svg.hashsalt": "pyvhostvdpa", "font.size": 9, "svg.fonttype": "none"}):
        figure = figure_module.Figure(figsize=_SIZE, layout="constrained")
        svg.FigureCanvasSVG(figure)
        axes = figure.subplots(1, 2, sharey=True)
        figure.suptitle(_title(report), x=0.01, ha="left", fontsize=11, color=_INK)
        maps = _panel(axes[0], report, "to map", lambda r: (r.map_ns.median, r.map_ns.spread), fits=True)
        unmaps = _panel(axes[1], report, "to unmap", lambda r: (r.unmap_ns.median, r.unmap_ns.spread), fits=False)
        # both panels have one scale, which is known now
        _label(axes[0], maps)
        _label(axes[1], unmaps)
        figure.supxlabel(_footer(report), x=0.01, ha="left", fontsize=7, color="#777777")
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    try:
        replace_file(path, lambda file: file.write(picture.getvalue()), binary=True)
    except OSError as e:
        raise _unwritable(path, e) from e


def _title(report: MapReport) -> str:
    gain = report.gain()
    unfinished = "  (interrupted: not all was measured)" if report.partial else ""
    if gain is None:
        return f"Mapping memory{unfinished}"
    slow, fast = gain
    times = slow.map_ns.median / fast.map_ns.median
    runs = slow.runs or slow.entries
    if times >= 1.15:
        return f"Mapping {runs:,} runs in one batch is {_times(times)} as fast as message by message{unfinished}"
    return f"One batch is no faster than message by message here ({runs:,} runs: {_times(times)}){unfinished}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _footer(report: MapReport) -> str:
    device = report.place["device"]
    options = report.options
    time = "virtual time" if report.place["accelerator"] == "icount" else "wall clock"
    how = "pinned pages" if device["pinned"] else "user addresses"
    words = [
        f"{device['driver']} ({how})",
        f"Linux {report.place['kernel']}",
        f"{report.place['accelerator']}, {time}",
        f"{options.layout.value} memory in pages of {options.page.value}",
        f"median of {options.repeat}, bars: quartiles apart",
    ]
    return " · ".join(words)


def _series(report: MapReport) -> dict[tuple[Mode, str], list[Result]]:
    """Return one line for each mode, and for each value of what varies besides the axis."""
    sizes = {r.point.bytes for r in report.results}
    regions = {r.point.regions for r in report.results}
    series: dict[tuple[Mode, str], list[Result]] = {}
    for r in report.results:
        other = ""
        if len(sizes) > 1 and len(regions) > 1:
            other = f", {r.point.regions} regions" if len(sizes) >= len(regions) else f", {in_words(r.point.bytes)}"
        series.setdefault((r.mode, other), []).append(r)
    return series


def _axis(report: MapReport) -> tuple[str, Callable[[Result], float]]:
    """Return what the points differ by: runs, unless there is only one number of them."""
    if len({r.runs for r in report.results}) > 1 or len(report.results) < 2:
        return "physically contiguous runs", lambda r: r.runs or r.entries
    if len({r.point.regions for r in report.results}) > 1:
        return "regions", lambda r: r.point.regions
    return "MiB", lambda r: r.point.bytes / (1 << 20)


def _panel(
    axes: Any, report: MapReport, what: str, value: Callable[[Result], tuple[float, float]], fits: bool
) -> list[_End]:
    """Draw one of both times; return each line's end."""
    label, x_of = _axis(report)
    curves = report.fits() if fits and label.startswith("physically") else {}
    ends: list[_End] = []
    for (mode, other), results in _series(report).items():
        ordered = sorted(results, key=x_of)
        xs = [x_of(r) for r in ordered]
        ys = [value(r)[0] / 1e6 for r in ordered]
        bars = [value(r)[1] / 2e6 for r in ordered]
        colour = _COLOURS[mode]
        axes.errorbar(xs, ys, yerr=bars, color=colour, marker="o", markersize=4, linewidth=1.6, capsize=2)
        curve = curves.get(mode.value)
        formula = f":  {curve.in_words()}" if curve is not None else ""
        ends.append((f"{mode.value}{other}{formula}", colour, xs[-1], ys[-1]))
        if curve is not None:
            dense = _between(min(xs), max(xs))
            axes.plot(dense, [curve.at(x) / 1e6 for x in dense], color=colour, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.15)
    axes.set_xlabel(label)
    if fits:
        axes.set_ylabel("ms")
    axes.set_title(what, loc="left", fontsize=9, color=_INK)
    ticks = _thinned(sorted({x_of(r) for r in report.results}))
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.minorticks_off()
    axes.grid(True, axis="y", color=_FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return ends


def _label(axes: Any, ends: Sequence[_End]) -> None:
    """Write each line's name over its end, none over another."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    above = math.inf
    for text, colour, x, y in sorted(ends, key=lambda end: -end[3]):
        stands = (math.log(y) - low) / (high - low) * _PANEL_POINTS
        # over the line, or under it where another name is in the way
        above = stands + 5 if stands + 5 < above - 10 else min(stands - 14, above - 10)
        offset = (-4, above - stands)
        axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha="right", color=colour, fontsize=8)


def _between(low: float, high: float, steps: int = 40) -> list[float]:
    return [low * (high / low) ** (i / steps) for i in range(steps + 1)] if low < high else [low]


def _thinned(ticks: Sequence[float]) -> list[float]:
    """Leave out what would be written over its neighbour."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.5 * kept[-1]:
            kept.append(tick)
    return kept
