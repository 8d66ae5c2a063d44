"""Draw the pictures of the page on benchmarks from what tools/bench/scaling.py measured, one file a kernel.

python3 tools/bench/pictures.py FOLDER ONE.json [OTHER.json]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, FAINT, GREY = "#333333", "#dddddd", "#777777"
COLOURS = {"unbatched": "#c1443c", "per-region-batch": "#c98a1b", "batch": "#2b6cb0"}
OTHERS = ("#2b6cb0", "#c1443c", "#c98a1b", "#3d8a5f", "#7a5ba8", "#555555")
HEIGHT = 190
"""About how many points a panel is high."""


class Line(NamedTuple):
    """A row of points: its name, "" for one that goes without."""

    name: str
    colour: str
    dotted: bool
    points: Sequence[tuple[float, float]]


def answers(measured: dict[str, Any], device: str, question: str) -> list[dict[str, Any]]:
    """Return the results of one question on one device."""
    for each in measured["measured"]:
        if (each["device"], each["question"]) == (device, question):
            results: list[dict[str, Any]] = each["results"]
            return results
    raise SystemExit(f"nothing was measured of {device}: {question}")


def asked(measured: dict[str, Any], device: str, question: str) -> bool:
    """Whether a question was asked on a device."""
    return any((each["device"], each["question"]) == (device, question) for each in measured["measured"])


def by_mode(measured: dict[str, Any], device: str, question: str, x: str, dotted: bool) -> Iterable[Line]:
    """Yield a line for each mode."""
    results = answers(measured, device, question)
    for mode, colour in COLOURS.items():
        points = [(r[x], r["map_ns"]["median"] / 1e6) for r in results if r["mode"] == mode]
        if points:
            yield Line("" if dotted else mode, colour, dotted, sorted(points))


def panel(axes: Any, title: str, x_label: str, lines: Sequence[Line]) -> None:
    """Draw lines on logarithmic scales."""
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        if line.dotted:
            axes.plot(xs, ys, color=INK, linestyle=(0, (1, 3)), linewidth=1.5)
        else:
            axes.plot(xs, ys, color=line.colour, marker="o", markersize=3.5, linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for line in lines for x, _ in line.points if not line.dotted})
    kept = [tick for i, tick in enumerate(ticks) if i == 0 or tick >= 1.5 * ticks[i - 1]]
    axes.set_xticks(kept, [f"{x:,.0f}" for x in kept])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.15)
    axes.grid(True, axis="y", color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=8.5, color=INK)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=7.5)


def label(axes: Any, lines: Sequence[Line], aside: bool) -> None:
    """Write each line's name behind its end (``aside``), or over it; none over another."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    above = math.inf
    for line in sorted((line for line in lines if line.name), key=lambda line: -line.points[-1][1]):
        x, y = line.points[-1]
        stands = (math.log(y) - low) / (high - low) * HEIGHT
        if aside:
            above = min(stands - 3, above - 9)
        else:
            above = stands + 5 if stands + 5 < above - 9 else min(stands - 12, above - 9)
        place = {"xytext": (7 if aside else 2, above - stands), "ha": "left" if aside else "right"}
        axes.annotate(line.name, (x, y), textcoords="offset points", fontsize=7.5, color=line.colour, **place)


def picture(
    path: Path, title: str, note: str, panels: Sequence[tuple[str, str, Sequence[Line]]], width: float = 2.5
) -> None:
    """Write one picture, its panels so many inches wide."""
    with mpl.rc_context({"svg.hashsalt": "pyvhostvdpa", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(width * len(panels) + 0.6, 3.7), layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=INK)
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=GREY)
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, x_label, lines) in zip(row, panels, strict=True):
            panel(axes, name, x_label, lines)
        row[0].set_ylabel("ms to map", fontsize=8)
        for axes, (_, _, lines) in zip(row, panels, strict=True):
            label(axes, lines, aside=len(panels) == 1)
            if len(panels) == 1:
                axes.set_xlim(right=axes.get_xlim()[1] * 3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def both(older: Any, newer: Any, device: str, question: str, x: str) -> list[Line]:
    """Return one kernel's lines, and the other's dotted as far as it was measured."""
    lines = list(by_mode(older, device, question, x, False))
    return lines + (list(by_mode(newer, device, question, x, True)) if asked(newer, device, question) else [])


def sizes(measured: Any, devices: Sequence[str]) -> list[Line]:
    """Return a line a device: one batch, by size."""
    return [
        Line(name.replace("vdpa_", ""), colour, False,
             [(r["bytes"] / (1 << 20), r["map_ns"]["median"] / 1e6) for r in answers(measured, name, "sizes")])
        for name, colour in zip(devices, OTHERS, strict=False)
    ]  # fmt: skip


def number(measured: Any) -> str:
    """Return the kernel's version without the distribution's suffix."""
    return str(measured["kernel"]).partition("+")[0]


def main() -> None:
    """Draw all of them."""
    folder, given = Path(sys.argv[1]), [json.loads(Path(name).read_text()) for name in sys.argv[2:]]
    older, newer = given[0], given[1] if given[1:] else {"measured": []}
    other = f", dotted {number(newer)}" if given[1:] else ""
    kernels = f"Linux {number(older)}{other}; virtual time, medians of 2"
    simulators = [f"vdpa_sim, {how}" for how in ("pinned, set_map", "pinned, dma_map", "use_va, set_map")]
    first = "vdpa_hwsim, none"
    runs = "contiguous runs"
    picture(
        folder / "benchmarks-runs.svg",
        "Without a batch, a parent with set_map that pins pays for its runs squared; in a batch for each run once",
        f"one message, 4 KiB pages in shuffled order · {kernels}",
        [(name, runs, both(older, newer, name, "runs", "runs")) for name in (first, *simulators)],
    )
    picture(
        folder / "benchmarks-profiles.svg",
        "With the costs of a NIC each run pays a whole set_map, a batch pays one",
        f"vdpa_hwsim by cost profile; one message, 4 KiB pages in shuffled order · {kernels}",
        [
            (profile, runs, both(older, newer, f"vdpa_hwsim, {profile}", "runs", "runs"))
            for profile in ("none", "series-2023", "mlx5-2025")
        ],
    )
    picture(
        folder / "benchmarks-regions.svg",
        "1 MiB in more and more regions: a batch for each of them comes to cost what no batch does",
        f"256 pages of 4 KiB in shuffled order · {kernels}",
        [
            (name, "regions", both(older, newer, name, "regions", "regions"))
            for name in (first, "vdpa_hwsim, mlx5-2025", simulators[0], simulators[2])
        ],
    )
    devices = ["vdpa_hwsim, none", "vdpa_hwsim, series-2023", "vdpa_hwsim, mlx5-2025", simulators[0], simulators[2]]
    picture(
        folder / "benchmarks-sizes.svg",
        "By size, in one batch: pinning costs by the page, and user addresses cost nothing",
        f"2 MiB pages, one region, one batch · Linux {number(older)}; virtual time, medians of 2",
        [("one batch", "MiB", sizes(older, devices))],
        width=6.5,
    )


main()
