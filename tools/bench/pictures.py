"""Draw the pictures of the page on benchmarks from what tools/bench/scaling.py measured, one file per kernel.

python3 tools/bench/pictures.py FOLDER ONE.json [OTHER.json]

Lines are named below the panels, and never where a line is: tests/unit/test_pictures.py measures that.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, FAINT, GREY = "#333333", "#dddddd", "#777777"
COLOURS = {"unbatched": "#c1443c", "per-region-batch": "#c98a1b", "batch": "#2b6cb0"}
OTHERS = ("#2b6cb0", "#c1443c", "#c98a1b", "#3d8a5f", "#7a5ba8", "#555555")
WIDTH = 5.6
"""Inches: a phone shows it at three quarters of that, where text of nine points can be read."""
NOTE, NAME = 0.26, 0.2
"""Inches: how high the note is, and a row of names above it."""
TITLE_LETTERS = 66
"""How many letters of a title fit into one line."""


class Line(NamedTuple):
    """A row of points; a dotted line goes without points, and has the name of what all dotted lines are."""

    name: str
    colour: str
    style: str
    points: Sequence[tuple[float, float]]


SOLID, DASHED, DOTTED = "-", "--", ":"


class Picture(NamedTuple):
    """What is drawn: panels of a title, a label of the x axis and lines, each so many inches high."""

    title: str
    note: str
    panels: Sequence[tuple[str, str, Sequence[Line]]]
    columns: int = 2
    height: float = 2.3


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


def by_mode(measured: dict[str, Any], device: str, question: str, x: str, style: str = SOLID) -> Iterable[Line]:
    """Yield a line for each mode."""
    results = answers(measured, device, question)
    for mode, colour in COLOURS.items():
        points = [(r[x], r["map_ns"]["median"] / 1e6) for r in results if r["mode"] == mode]
        if points:
            name = f"Linux {number(measured)}" if style == DOTTED else mode
            yield Line(name, INK if style == DOTTED else colour, style, sorted(points))


def panel(axes: Any, title: str, x_label: str, lines: Sequence[Line]) -> None:
    """Draw lines on logarithmic scales."""
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        axes.plot(xs, ys, **look(line))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for line in lines for x, _ in line.points if line.style != DOTTED})
    kept = [tick for i, tick in enumerate(ticks) if i == 0 or tick >= 1.5 * ticks[i - 1]]
    axes.set_xticks(kept, [f"{x:,.0f}" for x in kept])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.12)
    axes.grid(True, axis="y", color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.tick_params(labelsize=8.5)


def look(line: Line) -> dict[str, Any]:
    """Return how matplotlib draws a line, in a panel and in the legend."""
    if line.style == DOTTED:
        return {"color": line.colour, "linestyle": (0, (1, 3)), "linewidth": 1.5}
    return {"color": line.colour, "linestyle": line.style, "linewidth": 1.6, "marker": "o", "markersize": 3.5}


def drawn(picture: Picture) -> Figure:
    """Return a picture: its panels in columns, and the names of all lines below them."""
    title, note, panels, columns, height = picture
    named = {line.name: line for _, _, lines in panels for line in lines}
    across = 2 if columns == 1 else 4
    rows, named_rows = -(-len(panels) // columns), -(-len(named) // across)
    below = NOTE + NAME * named_rows
    whole = height * rows + 0.6 + below
    figure = Figure(figsize=(WIDTH, whole), layout="constrained")
    figure.get_layout_engine().set(rect=(0, below / whole, 1, 1 - below / whole))  # type: ignore[union-attr]
    figure.suptitle(textwrap.fill(title, TITLE_LETTERS), x=0.01, ha="left", fontsize=10.5, color=INK)
    figure.text(0.01, 0.06 / whole, note, ha="left", va="bottom", fontsize=7.5, color=GREY)
    cells = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (name, x_label, lines) in zip(cells, panels, strict=False):
        panel(axes, name, x_label, lines)
    for axes in cells[::columns]:
        axes.set_ylabel("ms to map", fontsize=8.5)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    figure.legend(
        [Line2D([], [], **look(line)) for line in named.values()],
        list(named),
        loc="lower left",
        bbox_to_anchor=(0, NOTE / whole),
        ncols=across,
        borderaxespad=0,
        frameon=False,
        labelcolor="linecolor",
        handlelength=2.2,
        fontsize=9,
    )
    return figure


def write(picture: Picture, path: Path) -> None:
    """Write a picture as SVG; the same figures give the same file."""
    with mpl.rc_context({"svg.hashsalt": "pyvhostvdpa", "font.size": 9, "svg.fonttype": "none"}):
        figure = drawn(picture)
        FigureCanvasSVG(figure)
        figure.savefig(path, format="svg", metadata={"Date": None})


def both(older: Any, newer: Any, device: str, question: str, x: str) -> list[Line]:
    """Return one kernel's lines, and the other's dotted, where it was measured."""
    lines = list(by_mode(older, device, question, x))
    return lines + (list(by_mode(newer, device, question, x, DOTTED)) if asked(newer, device, question) else [])


def sizes(measured: Any, devices: Sequence[str]) -> list[Line]:
    """Return one line per device: one batch, by size."""
    return [
        Line(named(name).replace("vdpa_", ""), colour, DASHED if place % 2 else SOLID,
             [(r["bytes"] / (1 << 20), r["map_ns"]["median"] / 1e6) for r in answers(measured, name, "sizes")])
        for place, (name, colour) in enumerate(zip(devices, OTHERS, strict=False))
    ]  # fmt: skip


def named(device: str) -> str:
    """Return a device's name for a panel, with words for the profile 'none'."""
    return device.replace("none", "no costs")


def number(measured: Any) -> str:
    """Return the kernel's version without the distribution's suffix."""
    return str(measured["kernel"]).partition("+")[0]


def pictures(older: Any, newer: Any) -> dict[str, Picture]:
    """Return every picture by its name."""
    measured = f"Linux {number(older)}{f', dotted {number(newer)}' if newer['measured'] else ''}; virtual time, medians"
    simulators = [f"vdpa_sim, {how}" for how in ("pinned, set_map", "pinned, dma_map", "use_va, set_map")]
    first, today = "vdpa_hwsim, none", "vdpa_hwsim, mlx5-2025"
    profiles = [first, "vdpa_hwsim, series-2023", today]
    pages = "4 KiB pages in shuffled order"

    def panels(devices: Sequence[str], question: str, x: str, label: str) -> list[tuple[str, str, list[Line]]]:
        return [(named(name), label, both(older, newer, name, question, x)) for name in devices]

    return {
        "runs": Picture(
            "Without a batch, a parent with set_map that pins pays for its runs squared; in a batch for each once",
            f"one message, {pages} · {measured}",
            panels([first, *simulators], "runs", "runs", "contiguous runs"),
        ),
        "profiles": Picture(
            "With the costs of a NIC each run pays a whole set_map, a batch pays one",
            f"one message, {pages} · {measured}",
            panels(profiles, "runs", "runs", "contiguous runs"),
        ),
        "regions": Picture(
            "1 MiB in more and more regions: a batch for each of them comes to cost what no batch does",
            f"256 pages of 4 KiB in shuffled order · {measured}",
            panels([first, today, simulators[0], simulators[2]], "regions", "regions", "regions"),
        ),
        "sizes": Picture(
            "By size, in one batch: pinning costs by the page, and user addresses cost nothing",
            f"2 MiB pages, one region · Linux {number(older)}; virtual time, medians",
            [("one batch", "MiB", sizes(older, [*profiles, simulators[0], simulators[2]]))],
            columns=1,
            height=2.8,
        ),
    }


def main() -> None:
    """Draw all of them."""
    folder, given = Path(sys.argv[1]), [json.loads(Path(name).read_text()) for name in sys.argv[2:]]
    for name, picture in pictures(given[0], given[1] if given[1:] else {"measured": []}).items():
        write(picture, folder / f"benchmarks-{name}.svg")


if __name__ == "__main__":
    main()
