# SPDX-License-Identifier: MIT
"""The picture of a map benchmark. matplotlib is loaded here, when one is drawn, and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import MissingFeature
from ..base.files import check_writable, replace_file
from .plan import Mode, in_words
from .report import MapReport, Result

_INSTALL = (
    f"{sys.executable} -m pip install matplotlib"
    if sys.prefix != sys.base_prefix
    else "apt install python3-matplotlib   (in a virtual environment: pip install matplotlib)"
)

_COLOURS = {Mode.UNBATCHED: "#c1443c", Mode.PER_REGION: "#c98a1b", Mode.BATCH: "#2b6cb0"}
_INK, _FAINT = "#333333", "#dddddd"
_WIDTH, _HEIGHT = 8.4, 4.2
_FOOTER, _ROW = 0.3, 0.18
"""Inches: below the panels are a row for each name, and the footer."""


_MARKERS = "os^Dv*"
"""Of lines of one mode, which have one colour."""

_Name = tuple[str, str, str]
"""A line's name, its colour and its marker."""


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise :class:`~pyvhostvdpa.MissingFeature` in advance if a picture cannot be drawn or written there."""
    if Path(path).suffix != ".svg":
        raise MissingFeature(f"{os.fspath(path)}: pictures are SVG", hint="vhost-vdpa bench map --plot FILE.svg")
    try:
        check_writable(path)
    except OSError as e:
        raise _unwritable(path, e) from e
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingFeature(
            "--plot needs matplotlib, which is not installed",
            hint=_INSTALL,
        )


def _unwritable(path: str | os.PathLike[str], error: OSError) -> MissingFeature:
    return MissingFeature(
        f"cannot write {os.fspath(path)}: {error.strerror}", hint="vhost-vdpa bench map --plot with another file"
    )


def draw(report: MapReport, path: str | os.PathLike[str]) -> None:
    """Write the picture as SVG: time to map and to unmap, a line for each mode.

    Raises :class:`~pyvhostvdpa.MissingFeature` if the file cannot be written.
    """
    svg: Any = importlib.import_module("matplotlib.backends.backend_svg")
    matplotlib: Any = importlib.import_module("matplotlib")
    with matplotlib.rc_context({"svg.hashsalt": "pyvhostvdpa", "font.size": 9, "svg.fonttype": "none"}):
        figure = figure_of(report)
        svg.FigureCanvasSVG(figure)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    try:
        replace_file(path, lambda file: file.write(picture.getvalue()), binary=True)
    except OSError as e:
        raise _unwritable(path, e) from e


def figure_of(report: MapReport) -> Any:
    """Return the picture as a figure of matplotlib."""
    # loaded by name, because it is an optional extra without types
    module: Any = importlib.import_module("matplotlib.figure")
    rows = len(_series(report))
    below = _FOOTER + _ROW * rows
    whole = _HEIGHT + below
    figure = module.Figure(figsize=(_WIDTH, whole), layout="constrained")
    figure.get_layout_engine().set(rect=(0, below / whole, 1, 1 - below / whole))
    axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=11, color=_INK)
    maps = _panel(axes[0], report, "to map", lambda r: (r.map_ns.median, r.map_ns.spread), fits=True)
    unmaps = _panel(axes[1], report, "to unmap", lambda r: (r.unmap_ns.median, r.unmap_ns.spread), fits=False)
    for left, names in ((0.05, maps), (0.53, unmaps)):
        _name(figure, names, (left, below / whole))
    figure.text(0.01, 0.06 / whole, _footer(report), ha="left", va="bottom", fontsize=7, color="#777777")
    return figure


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
    return f"One batch is not faster than message by message here ({runs:,} runs: {_times(times)}){unfinished}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _footer(report: MapReport) -> str:
    device = report.environment["device"]
    options = report.options
    time = "virtual time" if report.environment["accelerator"] == "icount" else "wall clock"
    how = "pinned pages" if device["pinned"] else "user addresses"
    words = [
        f"{device['driver']} ({how})",
        f"Linux {report.environment['kernel']}",
        f"{report.environment['accelerator']}, {time}",
        f"{options.layout.value} memory in pages of {options.page.value}",
        f"median of {options.repeat}, bars: quartiles",
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
            count = r.point.regions
            by_regions = f", {count} region{'s' * (count != 1)}"
            other = by_regions if len(sizes) >= len(regions) else f", {in_words(r.point.bytes)}"
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
) -> list[_Name]:
    """Draw one of both times; return its lines' names."""
    label, x_of = _axis(report)
    curves = report.fits() if fits and label.startswith("physically") else {}
    names: list[_Name] = []
    series = _series(report)
    others = list(dict.fromkeys(other for _, other in series))
    for (mode, other), results in series.items():
        ordered = sorted(results, key=x_of)
        xs = [x_of(r) for r in ordered]
        ys = [value(r)[0] / 1e6 for r in ordered]
        bars = [value(r)[1] / 2e6 for r in ordered]
        colour, marker = _COLOURS[mode], _MARKERS[others.index(other) % len(_MARKERS)]
        axes.errorbar(xs, ys, yerr=bars, color=colour, marker=marker, markersize=4, linewidth=1.6, capsize=2)
        curve = curves.get(mode.value)
        formula = f":  {curve.in_words()}" if curve is not None else ""
        names.append((f"{mode.value}{other}{formula}", colour, marker))
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
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.minorticks_off()
    axes.grid(True, axis="y", color=_FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return names


def _name(figure: Any, names: Sequence[_Name], corner: tuple[float, float]) -> None:
    """Write a panel's names below it, where no line is; ``corner`` is the upper left one, in parts of the figure."""
    lines: Any = importlib.import_module("matplotlib.lines")
    handles = [
        lines.Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.6) for _, colour, marker in names
    ]
    figure.legend(
        handles,
        [text for text, *_ in names],
        loc="upper left",
        bbox_to_anchor=corner,
        borderaxespad=0,
        frameon=False,
        labelcolor="linecolor",
        handlelength=1.4,
        fontsize=8,
    )


def _between(low: float, high: float, steps: int = 40) -> list[float]:
    return [low * (high / low) ** (i / steps) for i in range(steps + 1)] if low < high else [low]


def _thinned(ticks: Sequence[float]) -> list[float]:
    """Leave out what would be written over its neighbour."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.5 * kept[-1]:
            kept.append(tick)
    return kept
