"""Benchmarks where there is no device: plans, statistics, comparisons, pictures."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.base.uapi import IotlbType
from pyvhostvdpa.bench import plot
from pyvhostvdpa.bench.memory import Backing, BenchMemory, Page, PhysicalLayout
from pyvhostvdpa.bench.plan import HOLE, MapBenchOptions, MessagePlace, Mode, Point, messages, refusal
from pyvhostvdpa.bench.report import SCHEMA, MapReport, Result, compare, load_report
from pyvhostvdpa.bench.stats import fit, percentile, summarize
from pyvhostvdpa.chardev.burst import PreparedMessages
from pyvhostvdpa.chardev.iotlb import Limits
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.cli import main
from pyvhostvdpa.memory.guest import DEFAULT_GPA, PAGE_SIZE

MIB = 1 << 20
WIDE = Limits(first=0, last=(1 << 64) - 1, as_num=2, pinned=False, entries=2048)
FIRST = IotlbMessage(IotlbType.UPDATE, 1, 1 << 30, PAGE_SIZE, 0x7000_0000, 3)


# -- bursts ------------------------------------------------------------------------


def test_prepared_messages_keep_their_order() -> None:
    burst = PreparedMessages(8)
    burst.add(IotlbMessage(IotlbType.BATCH_BEGIN, 1))
    burst.add_pieces(FIRST, 5, 2 * PAGE_SIZE, uaddr_step=PAGE_SIZE)
    assert len(burst) == 6
    assert burst.message(0).type is IotlbType.BATCH_BEGIN
    for i in range(5):
        expected = FIRST._replace(iova=FIRST.iova + 2 * i * PAGE_SIZE, uaddr=FIRST.uaddr + i * PAGE_SIZE)
        assert burst.message(1 + i) == expected


def test_a_full_buffer_is_reported_and_can_be_filled_again() -> None:
    burst = PreparedMessages(2)
    burst.add_pieces(FIRST, 2, PAGE_SIZE)
    with pytest.raises(ValueError, match="2 of 2 are in the buffer"):
        burst.add(FIRST)
    burst.clear()
    burst.add(FIRST)
    assert len(burst) == 1
    with pytest.raises(IndexError):
        burst.message(1)


# -- plans ---------------------------------------------------------------------------


def test_regions_cover_the_memory_without_a_gap() -> None:
    pieces = MessagePlace(WIDE, PhysicalLayout.CONTIGUOUS).pieces(Point(MIB, 7))
    assert pieces[0].iova == DEFAULT_GPA
    assert sum(p.size for p in pieces) == MIB
    for one, following in pairwise(pieces):
        assert following.iova == one.iova + one.size
        assert following.offset == one.offset + one.size
    assert all(p.size % PAGE_SIZE == 0 for p in pieces)


def test_holes_lie_behind_each_region() -> None:
    pieces = MessagePlace(WIDE, PhysicalLayout.HOLES).pieces(Point(MIB, 4))
    assert [p.iova - DEFAULT_GPA for p in pieces] == [i * (MIB // 4 + HOLE) for i in range(4)]
    assert [p.offset for p in pieces] == [i * MIB // 4 for i in range(4)]


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        (Mode.BATCH, "BEGIN UPDATE UPDATE END"),
        (Mode.UNBATCHED, "UPDATE UPDATE"),
        (Mode.PER_REGION, "BEGIN UPDATE END BEGIN UPDATE END"),
    ],
)
def test_messages_depend_on_the_mode(mode: Mode, kinds: str) -> None:
    pieces = MessagePlace(WIDE, PhysicalLayout.CONTIGUOUS).pieces(Point(MIB, 2))
    sent = messages(mode, pieces, 0x7000_0000, asid=1)
    assert [m.type.name.removeprefix("BATCH_") for m in sent] == kinds.split()
    assert {m.asid for m in sent} == {1}
    unmapped = messages(mode, pieces, 0x7000_0000, asid=1, unmap=True)
    assert [m.type for m in unmapped if m.type is IotlbType.INVALIDATE] == [IotlbType.INVALIDATE] * 2


def narrow(**changes: Any) -> Limits:
    facts = {"first": 0, "last": (1 << 64) - 1, "as_num": 2, "pinned": True, "entries": 2048}
    return Limits(**{**facts, **changes})


REFUSED = {
    "no whole page a region": (Point(MIB, 257), MapBenchOptions(), WIDE, "have no 257 pages"),
    "no whole huge page": (Point(MIB, 1), MapBenchOptions(page=Page.LARGE), WIDE, "not whole pages of 2M"),
    "no pool of huge pages": (Point(1 << 40, 1), MapBenchOptions(page=Page.HUGE), WIDE, "of 1024 pages of 1G are free"),
    "more than this machine has": (Point(1 << 50, 1), MapBenchOptions(), WIDE, "available"),
    "more entries than there may be": (
        Point(16 * MIB, 1),
        MapBenchOptions(layout=PhysicalLayout.SCATTERED),
        narrow(),
        "about 3891 IOTLB entries besides the proof's own, an address space may have 2048",
    ),
    "beyond the IOVA range": (
        Point(MIB, 1),
        MapBenchOptions(),
        narrow(last=(4 << 20) + 1000),
        "IOVA range 0x0-0x4003e8",
    ),
    "holes beyond the IOVA range": (
        Point(MIB, 64),
        MapBenchOptions(layout=PhysicalLayout.HOLES),
        narrow(last=(1 << 36) - 1),
        "with holes of 1G",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bench_refuses_unmeasurable_points_before_it_starts(case: str) -> None:
    point, options, limits, why = REFUSED[case]
    refused = refusal(point, options, limits, [])
    assert refused is not None
    assert why in refused.why
    assert refused.hint


def test_bench_does_not_refuse_points_that_fit() -> None:
    assert refusal(Point(MIB, 16), MapBenchOptions(), WIDE, []) is None


# -- memory --------------------------------------------------------------------------


@pytest.mark.parametrize("backing", Backing)
def test_memory_is_allocated_and_can_be_written(backing: Backing) -> None:
    with BenchMemory(MIB, layout=PhysicalLayout.SCATTERED, backing=backing) as memory:
        assert memory.size == MIB
        assert memory.hva % Page.LARGE.bytes == 0
        ctypes.memset(memory.hva, 1, MIB)


def test_memory_that_is_not_to_be_had_is_reported() -> None:
    with pytest.raises(MissingFeature, match="pages of 1G are free") as refused:
        BenchMemory(1 << 40, Page.HUGE)
    assert "nr_hugepages" in refused.value.hint


# -- statistics ----------------------------------------------------------------------


def test_summary_has_median_spread_and_outliers() -> None:
    summary = summarize([100, 101, 102, 103, 104, 500])
    assert summary.median == 102.5
    assert summary.spread == pytest.approx(2.5)
    assert summary.outliers == (500,)
    assert summarize([7]).to_dict() == {"median": 7, "spread": 0, "outliers": [], "repeated": 1}


def test_percentiles_are_interpolated() -> None:
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile([5], 99) == 5
    assert percentile(list(range(101)), 99) == 99


@pytest.mark.parametrize(("a", "b", "c"), [(0, 0, 7), (5e5, 1e4, 0), (0, 3e3, 12), (1e5, 2e3, 40)])
def test_a_curve_is_found_behind_its_points(a: float, b: float, c: float) -> None:
    noise = random.Random(1)
    points = [(n, (a + b * n + c * n * n) * noise.uniform(0.99, 1.01)) for n in (16, 64, 128, 256, 512, 1024)]
    curve = fit(points)
    assert curve is not None
    assert curve.worst < 0.03
    assert curve.at(2048) == pytest.approx(a + b * 2048 + c * 2048 * 2048, rel=0.1)
    if c:
        assert curve.quadratic == pytest.approx(c, rel=0.15)


def test_two_points_have_no_curve() -> None:
    assert fit([(1, 2), (2, 3), (2, 3.1)]) is None


# -- reports -------------------------------------------------------------------------


def result(mode: Mode, runs: int, ns: int, regions: int = 1) -> Result:
    return Result(
        mode=mode,
        point=Point(runs * PAGE_SIZE, regions),
        page=Page.SMALL,
        layout=PhysicalLayout.CONTIGUOUS,
        asid=0,
        runs=runs,
        entries=runs,
        messages=regions,
        map_ns=summarize([ns, ns + ns // 100, ns - ns // 100]),
        unmap_ns=summarize([ns // 2] * 3),
        set_maps=runs if mode is Mode.UNBATCHED else 1,
    )


def report(slow: int = 1) -> MapReport:
    where = {
        "kernel": "6.12",
        "accelerator": "icount",
        "device": {"driver": "vdpa_hwsim", "pinned": True, "path": "/dev/vhost-vdpa-0"},
    }
    made = MapReport(where, MapBenchOptions(modes=(Mode.BATCH, Mode.UNBATCHED)))
    for runs in (64, 128, 256, 512):
        made.results.append(result(Mode.BATCH, runs, 20_000 * runs * slow))
        made.results.append(result(Mode.UNBATCHED, runs, 20_000 * runs + 900 * runs * runs))
    return made


def test_a_report_has_its_schema() -> None:
    found = report().to_dict()
    assert found["schema"] == SCHEMA
    assert found["partial"] is False
    first = found["results"][0]
    assert list(first)[:8] == ["mode", "regions", "runs", "page", "bytes", "map_ns", "unmap_ns", "proved"]
    assert {"median", "spread"} <= first["map_ns"].keys()
    assert found["fits"]["unbatched"]["quadratic_ns"] == pytest.approx(900, rel=0.05)
    assert found["fits"]["batch"]["quadratic_ns"] == 0


def test_comparison_names_what_got_slower(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(report().to_dict()))
    old = load_report(tmp_path / "old.json")
    changes = list(compare(old, report(slow=2).to_dict()))
    slower = [c for c in changes if c.verdict == "slower"]
    assert len(changes) == 16
    assert {c.combination.partition(",")[0] for c in slower} == {"batch"}
    assert all(c.ratio == pytest.approx(2, rel=0.01) for c in slower)
    assert all(c.verdict == "same" for c in compare(old, old))


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "something/1"}'])
def test_bench_compare_refuses_other_files_before_anything_runs(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text(text)
    assert main(["bench", "map", "/dev/null", "--compare", str(tmp_path / "old.json")]) == 1
    assert "old.json" in capsys.readouterr().err


# -- pictures ------------------------------------------------------------------------


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "map", "/dev/null", "--plot", "out.svg"]) == 1
    said = capsys.readouterr().err
    assert ("-m pip install matplotlib" if sys.prefix != sys.base_prefix else "apt install python3-matplotlib") in said


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib, an extra, is not installed")
def test_picture_shows_the_gain_of_batching(tmp_path: Path) -> None:
    target = tmp_path / "out.svg"
    plot.check_plot(target)
    plot.draw(report(), target)
    drawn = target.read_text()
    assert drawn.startswith("<?xml")
    assert "Mapping 512 runs in one batch is 24 times as fast as message by message" in drawn
    assert "physically contiguous runs" in drawn
    # names are below the panels, where they cross no line: test_pictures.py
    assert drawn.count('id="legend_') == 2
    plot.draw(report(), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn


def test_a_picture_that_cannot_be_put_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFeature, match="pictures are SVG"):
        plot.check_plot(tmp_path / "out.png")
    with pytest.raises(MissingFeature, match="cannot write"):
        plot.check_plot(tmp_path / "nowhere" / "out.svg")
