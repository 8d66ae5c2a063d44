"""Pictures with lines: no text crosses a line or another text, or is cut at the edge of the picture."""

from __future__ import annotations

import importlib.util
import re
import sys
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import traces

from pyvhostvdpa.bench import plot
from pyvhostvdpa.bench.memory import Page, PhysicalLayout
from pyvhostvdpa.bench.page.charts import Bar, stacked, timeline
from pyvhostvdpa.bench.plan import MapBenchOptions, Mode, Point
from pyvhostvdpa.bench.report import MapReport, Result
from pyvhostvdpa.bench.stats import summarize
from pyvhostvdpa.trace.spans import Kind, downtimes

if importlib.util.find_spec("matplotlib") is None:
    pytest.skip("matplotlib, an extra, is not installed", allow_module_level=True)

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from matplotlib.transforms import Bbox

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "bench"
DOCS = ROOT / "pyvhostvdpa" / "cli" / "docs"
MIB = 1 << 20


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def faults(figure: Any) -> list[str]:
    """What a reader would stumble over, found by geometry."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    # an axis has ticks beyond its limits, which are not drawn
    panels = [axes for axes in figure.findobj(Axes) if axes.axison]
    hidden = {
        label
        for axes in panels
        for axis in (axes.xaxis, axes.yaxis)
        for tick in [*axis.majorTicks, *axis.minorTicks]
        if tick not in axis._update_ticks()
        for label in (tick.label1, tick.label2)
    }
    off = {text for axes in figure.findobj(Axes) if not axes.axison for text in axes.findobj(Text)}
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text not in hidden | off]
    lines = [line for axes in panels for line in axes.lines]
    paths = [line.get_transform().transform_path(line.get_path()) for line in lines]
    found = [f"{name!r} crosses a line" for name, box in boxes for path in paths if path.intersects_bbox(box, False)]
    found += [f"{a!r} lies on {b!r}" for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    whole = figure.bbox
    found += [
        f"{name!r} is cut"
        for name, box in boxes
        if box.x0 < whole.x0 or box.y0 < whole.y0 or box.x1 > whole.x1 or box.y1 > whole.y1
    ]
    return found


def test_geometry_finds_a_label_at_the_end_of_a_line() -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(3, 3))
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2])
    axes.annotate("a name", (1.5, 1.5), ha="center", va="center")
    axes.text(5, 5, "far away")
    assert faults(figure) == ["'a name' crosses a line", "'far away' is cut"]


# -- the page on benchmarks -------------------------------------------------------------


def measured(kernel: str, factor: float) -> dict[str, Any]:
    """Figures of the shape that scaling.py writes: lines that cross, that lie on each other, and flat ones."""
    devices = [f"vdpa_hwsim, {profile}" for profile in ("none", "series-2023", "mlx5-2025")]
    devices += [f"vdpa_sim, {how}" for how in ("pinned, set_map", "pinned, dma_map", "use_va, set_map")]
    found = []
    for device in devices:
        cost = {"vdpa_hwsim, series-2023": 25e6, "vdpa_hwsim, mlx5-2025": 6e6}.get(device, 0)
        square = 0 if "dma_map" in device or "use_va" in device else 500
        runs = [
            {"mode": mode, "runs": n, "map_ns": {"median": factor * (4000 + 1500 * n + extra * n * n + cost * heavy)}}
            for n in (16, 32, 60, 128, 255, 512)
            for mode, extra, heavy in (("batch", 0, 1), ("unbatched", square, n))
        ]
        regions = [
            {"mode": mode, "regions": n, "map_ns": {"median": factor * (4e5 + 2e3 * n + (cost or 1e5) * sets)}}
            for n in (1, 4, 16, 64, 256)
            for mode, sets in (("batch", 1), ("per-region-batch", n), ("unbatched", 256))
        ]
        sizes = [
            {"mode": "batch", "bytes": n * MIB, "map_ns": {"median": factor * (2e4 + 8600 * n + cost)}}
            for n in (2, 8, 32, 128, 512)
        ]
        for question, results in (("runs", runs), ("regions", regions), ("sizes", sizes)):
            found.append({"device": device, "question": question, "results": results})
    return {"kernel": kernel, "measured": found}


@pytest.mark.parametrize("name", ["runs", "profiles", "regions", "sizes"])
@pytest.mark.parametrize("kernels", [1, 2])
def test_no_text_of_a_benchmark_picture_crosses_a_line(name: str, kernels: int) -> None:
    pictures = tool("pictures")
    newer = measured("7.2.12+deb13-amd64", 0.95) if kernels > 1 else {"measured": []}
    figure = pictures.drawn(pictures.pictures(measured("6.12.118+deb13-amd64", 1.0), newer)[name])
    assert faults(figure) == []


# -- bench map --plot -------------------------------------------------------------------


def report(sizes: tuple[int, ...], regions: tuple[int, ...], square: int) -> MapReport:
    where = {
        "kernel": "6.12.118+deb13-amd64",
        "accelerator": "icount",
        "device": {"driver": "vdpa_hwsim", "pinned": True, "path": "/dev/vhost-vdpa-0"},
    }
    made = MapReport(where, MapBenchOptions(memory=sizes, regions=regions))
    for size in sizes:
        for count in regions:
            runs = max(size // 4096, count)
            for mode, extra in ((Mode.BATCH, 0), (Mode.PER_REGION, square // 2), (Mode.UNBATCHED, square)):
                times = summarize([20_000 + 1500 * runs + extra * runs * runs] * 3)
                point = Point(size, count)
                made.results.append(
                    Result(mode, point, Page.SMALL, PhysicalLayout.SCATTERED, 0, runs, runs, count, times, times, None)
                )
    return made


@pytest.mark.parametrize(
    ("sizes", "regions", "square"),
    [
        ((64 << 10, MIB, 4 * MIB), (1,), 900),
        ((64 << 10, MIB, 4 * MIB), (1,), 0),
        ((MIB,), (1, 16, 256), 900),
        ((64 << 10, MIB, 16 * MIB), (1, 16, 256), 900),
        ((MIB,), (1,), 900),
    ],
    ids=["sizes", "equal", "regions", "both", "one"],
)
def test_no_text_of_a_plot_crosses_a_line(sizes: tuple[int, ...], regions: tuple[int, ...], square: int) -> None:
    assert faults(plot.figure_of(report(sizes, regions, square))) == []


# -- drawings that are made without matplotlib ------------------------------------------

SANS = FontProperties(family="DejaVu Sans")


def text_box(element: ET.Element, size: float) -> tuple[str, Bbox]:
    """A text as DejaVu Sans has it, which is wider than most fonts."""
    words = "".join(element.itertext())
    outline = TextPath((0, 0), words, size=size, prop=SANS).get_extents()
    x, y = float(element.get("x", 0)), float(element.get("y", 0))
    anchor = element.get("text-anchor") or {"m": "middle", "e": "end"}.get(element.get("class", "").split(" ")[-1], "")
    left = x - {"middle": outline.width / 2, "end": outline.width}.get(anchor, 0)
    return words, Bbox.from_extents(left, y - outline.y1, left + outline.width, y - min(outline.y0, 0))


def svg_faults(svg: str, size: float = 12, lines: bool = True) -> list[str]:
    root = ET.fromstring(re.sub(r' xmlns="[^"]*"', "", svg))
    _, _, width, height = (float(each) for each in root.attrib["viewBox"].split())
    shift = re.search(r"translate\((\d+) (\d+)\)", svg)
    dx, dy = (float(shift[1]), float(shift[2])) if shift else (0.0, 0.0)
    boxes = [text_box(each, size) for each in root.iter("text") if "".join(each.itertext()).strip()]
    strokes = [
        Bbox.from_extents(*(float(each.attrib[name]) for name in ("x1", "y1", "x2", "y2")))
        for each in root.iter("line")
    ]
    found = [f"{name!r} crosses a line" for name, box in boxes for stroke in strokes if lines and box.overlaps(stroke)]
    found += [f"{a!r} lies on {b!r}" for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    found += [
        f"{name!r} is cut"
        for name, box in boxes
        if box.x0 + dx < 0 or box.y0 + dy < 0 or box.x1 + dx > width or box.y1 + dy > height
    ]
    return found


TITLES = (
    "+ SVQ descriptor ASID, maps dropped at resets, with QEMU's patches of next year and of the year after that",
    "baseline QEMU",
    "switched in place, without a reset",
)


def test_no_text_of_the_ladder_picture_crosses_a_line() -> None:
    rows = [
        {"title": title[:60], "stop_to_run_ms": ms, "published": published}
        for title, ms, published in zip(TITLES, (61_931.1, 99_999.0, 1.0), (1, 1, None), strict=True)
    ]
    assert svg_faults(tool("ladder_picture").picture(rows), 13) == []


@pytest.mark.parametrize(("name", "size"), [("ladder", 13), ("watch-qemu", 12)])
def test_no_text_of_a_shipped_drawing_crosses_a_line(name: str, size: float) -> None:
    assert svg_faults((DOCS / f"{name}.svg").read_text(), size) == []


def test_no_text_of_a_bar_chart_crosses_a_line() -> None:
    bars = [
        Bar(TITLES[0], {Kind.SUSPEND: 61_000_000_000, Kind.RESET: 931_000_000}, (20e9, 30e9)),
        Bar(TITLES[1], {Kind.RESET: 40_000}, (1.0, 1.0)),
        Bar(TITLES[2], {}, (1e9, 1e9), "not possible on these devices"),
    ]
    assert svg_faults(stacked(bars, "")) == []
    assert svg_faults(stacked(bars[1:], "", width=540)) == []


def test_no_text_of_a_timeline_is_cut() -> None:
    for lanes in downtimes(traces.migration()).values():
        assert svg_faults(timeline(lanes, ""), lines=False) == []
