"""Rows, their resolution against a device, and the report that is made of them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyvhostvdpa.base.errors import MigrationRefused, MissingFeature
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.bench.ladder.report import Counts, LadderReport, RowResult, Run
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS, LadderRow, ladder_row
from pyvhostvdpa.bench.ladder.run import regions
from pyvhostvdpa.bench.ladder.stage import Simulated
from pyvhostvdpa.cli import main
from pyvhostvdpa.device.groups import Groups
from pyvhostvdpa.device.procedure.base import Target
from pyvhostvdpa.device.procedure.series import Optimization
from pyvhostvdpa.guest.protocol import FrameCounts
from pyvhostvdpa.memory.guest import HUGE_PAGE
from pyvhostvdpa.net.features import SUPPORTED

MIB = 1 << 20


def target(row: LadderRow, offered: BackendFeature = ALL_BACKEND_FEATURES, descriptors: int | None = 2) -> Target:
    """What resolution looks at: acknowledged features, groups, address spaces."""
    iotlb = SimpleNamespace(limits=SimpleNamespace(as_num=2))
    groups = Groups(max_pairs=2, control_index=4, control=1, descriptors=descriptors)
    return Target(cast(Any, None), cast(Any, iotlb), SUPPORTED, offered & row.use, groups)


@pytest.mark.parametrize("row", [row for row in LADDER_ROWS if row != "desc_asid_keep"])
def test_a_device_with_everything_can_do_every_row(row: str) -> None:
    found = LADDER_ROWS[row].resolve(target(LADDER_ROWS[row]))
    assert (found.left_out, found.impossible) == ({}, "")
    assert found.switches == LADDER_ROWS[row].switches


def test_maps_are_kept_without_persist_only_where_resets_drop_none() -> None:
    row = LADDER_ROWS["desc_asid_keep"]
    assert "clean_map=N" in row.resolve(target(row)).impossible
    assert not row.resolve(target(row), keeps_maps=True).impossible


def test_ladder_row_leaves_out_and_names_missing_features() -> None:
    row = LADDER_ROWS["persist"]
    found = row.resolve(target(row, ALL_BACKEND_FEATURES & ~BackendFeature.DESC_ASID))
    assert found.left_out == {Optimization.DESC_ASID: "DESC_ASID is not offered"}
    assert found.switches == LADDER_ROWS["persist"].switches & ~Optimization.DESC_ASID
    assert not found.impossible


@pytest.mark.parametrize(
    ("row", "lacking"),
    [
        ("desc_asid_literal", BackendFeature.DESC_ASID),
        ("persist", BackendFeature.IOTLB_PERSIST),
        ("batch", BackendFeature.IOTLB_BATCH),
        ("beyond", BackendFeature.RESUME),
        ("beyond", BackendFeature.DESC_ASID),
    ],
)
def test_a_row_without_its_own_optimization_is_not_possible(row: str, lacking: BackendFeature) -> None:
    assert LADDER_ROWS[row].resolve(target(LADDER_ROWS[row], ALL_BACKEND_FEATURES & ~lacking)).impossible


def test_descriptors_in_the_buffers_group_have_no_address_space_of_their_own() -> None:
    row = LADDER_ROWS["desc_asid_literal"]
    assert "group of their own" in row.resolve(target(row, descriptors=None)).impossible


def test_only_the_rows_that_are_about_it_acknowledge_a_feature() -> None:
    asked = {row: plan.use for row, plan in LADDER_ROWS.items()}
    assert BackendFeature.DESC_ASID not in asked["iterative_map"]
    assert BackendFeature.IOTLB_PERSIST not in asked["desc_asid_keep"]
    assert BackendFeature.IOTLB_PERSIST in asked["persist"]
    assert BackendFeature.RESUME not in asked["batch"]


def test_an_unknown_row_names_those_there_are() -> None:
    with pytest.raises(MissingFeature) as caught:
        ladder_row("fast")
    assert "baseline,iterative_map" in caught.value.hint


@pytest.mark.parametrize(("size", "count"), [(64 * MIB, 1), (64 * MIB, 4), (66 * MIB, 3), (1024 * MIB, 6)])
def test_guest_memory_is_divided_without_a_rest_and_with_holes(size: int, count: int) -> None:
    layout = regions(size, count)
    assert sum(length for _, length in layout) == size
    assert len(layout) == count
    for (start, length), (following, _) in pairwise(layout):
        assert start + length + HUGE_PAGE == following


def test_memory_that_is_too_small_for_its_regions_is_refused() -> None:
    with pytest.raises(MigrationRefused, match="too few for 4 regions"):
        regions(4 * MIB, 4)


@pytest.mark.parametrize("charged", [63 * MIB, 65 * MIB, 64 * MIB * 5000])
def test_memory_is_charged_as_a_multiple(charged: int) -> None:
    with pytest.raises(MigrationRefused, match="cannot be charged"):
        Simulated(2, 2, "none", 64 * MIB, charged)


FRAMES = FrameCounts(sent=10, received=10, lost=0, duplicated=0, corrupted=0, reordered=0)


def run(dt1: float, dt2: float, frames: FrameCounts = FRAMES, messages: int = 28) -> Run:
    counts = {
        "dt1": [Counts(56, 28, 18, 2), Counts(56, messages, 18, 2)],
        "dt2": [Counts(8, 18, None, None)] * 2,
        "dest": [Counts(46, 10, 5, 1)] * 2,
    }
    return Run({"dt1": [dt1, dt1 - 1], "dt2": [dt2, dt2], "dest": [1.0, 1.0]}, counts, frames)


def report(*rows: RowResult) -> LadderReport:
    return LadderReport(4, 2, 2, 1 << 30, 128 << 30, "series-2023", "virtual", rows, {"kernel": "x"})


def test_dt1_is_the_worst_device_and_dt2_the_sum_of_all() -> None:
    found = report(RowResult(LADDER_ROWS["baseline"], [run(24.0, 5.0)])).to_dict()
    [row] = found["rows"]
    assert found["schema"] == "pyvhostvdpa/ladder/1"
    assert (row["dt1_ms"]["worst"], row["dt2_ms"]["sum"]) == (24.0, 10.0)
    assert row["published"] == {"dt1_s": [20.0, 30.0], "dt2_s": 20.0}
    assert row["messages"] == {"dt1": 28, "dt2": 18, "dest": 10}
    assert row["set_maps"] == {"dt1": 18, "dt2": None, "dest": 5}
    assert row["dt1_explained"] is False


def test_several_runs_give_the_median_and_each_of_them() -> None:
    row = RowResult(LADDER_ROWS["batch"], [run(3.0, 1.0), run(5.0, 2.0), run(4.0, 9.0)])
    found = row.to_dict(None)
    assert (found["dt1_ms"]["worst"], found["dt2_ms"]["sum"]) == (4.0, 4.0)
    assert len(found["dt1_ms"]["runs"]) == 3
    assert found["speedup"] == {"dt1": None, "dt2": None}


def test_a_row_is_compared_with_the_baseline() -> None:
    rows = RowResult(LADDER_ROWS["baseline"], [run(20.0, 10.0)]), RowResult(LADDER_ROWS["batch"], [run(2.0, 1.0)])
    assert report(*rows).to_dict()["rows"][1]["speedup"] == {"dt1": 10.0, "dt2": 10.0}


def test_impossible_row_has_a_reason_and_no_figures() -> None:
    row = RowResult(LADDER_ROWS["beyond"], (), {}, "it takes RESUME").to_dict(None)
    assert row["impossible"] == "it takes RESUME"
    assert (row["dt1_ms"]["worst"], row["ioctls"]["dt1"]) == (None, None)


def test_a_lost_frame_or_unlike_devices_make_the_report_unsound() -> None:
    lost = FrameCounts(sent=10, received=9, lost=1, duplicated=0, corrupted=0, reordered=0)
    assert report(RowResult(LADDER_ROWS["batch"], [run(1.0, 1.0)])).sound
    assert not report(RowResult(LADDER_ROWS["batch"], [run(1.0, 1.0, lost)])).sound
    assert not report(RowResult(LADDER_ROWS["batch"], [run(1.0, 1.0, messages=27)])).sound


def test_ladder_command_without_devices_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", "--memory", "64M", "--charge", "63M"]) == 1
    assert "cannot be charged" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ladder", "--rows", "fast"])
    assert "--rows takes some of" in capsys.readouterr().err
