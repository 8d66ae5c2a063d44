"""`vhost-vdpa ladder` on devices that it makes, and on devices that are given; without costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hwsim
import lab
import pytest

from pyvhostvdpa.cli import main
from pyvhostvdpa.host import mgmt

SIZES = ("--memory", "64M", "--charge", "64M", "--profile", "none", "--devices", "1")


def names() -> list[str]:
    return [device.name for device in mgmt.list_devices()]


def ladder(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Its status, and what it printed as JSON."""
    status = main(["ladder", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_rows_run_on_devices_that_are_made_and_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    hwsim.load()
    hwsim.set_parameters()
    before, parameters = names(), {p.name: p.read_text() for p in hwsim.PARAMETERS.iterdir()}
    status, found = ladder(capsys, *SIZES, "--rows", "desc_asid_keep,batch,beyond", "--pairs", "1")
    assert status == 0
    assert names() == before
    assert {p.name: p.read_text() for p in hwsim.PARAMETERS.iterdir()} == parameters
    assert [row["row"] for row in found["rows"]] == ["desc_asid_keep", "batch", "beyond"]
    keep, batch, beyond = found["rows"]
    assert keep["heavy"] == {"dt1": 0, "dt2": 1, "dest": 0}
    assert batch["set_maps"] == {"dt1": 4, "dt2": 1, "dest": 2}
    assert (beyond["messages"]["dt1"], beyond["messages"]["dt2"]) == (0, 0)
    for row in found["rows"]:
        assert row["frames"][0]["lost"] == 0
        assert row["frames"][0]["received"] > 0


def test_devices_of_another_driver_run_the_rows_that_they_can(
    devices: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "iterative_map,desc_asid_literal,persist,beyond"
    status, found = ladder(capsys, "--on", *devices, "--memory", "32M", "--pairs", "1", "--rows", rows)
    assert status == 0
    early, apart, persist, beyond = found["rows"]
    assert "DESC_ASID is not offered" in apart["impossible"]
    assert beyond["impossible"]
    assert persist["left_out"] == {"desc_asid": "DESC_ASID is not offered"}
    # Q = 1, N = 3, R = 4: without the descriptor ASID a switch takes another layout, so PERSIST saves DT2 alone
    assert (early["messages"]["dt1"], early["messages"]["dt2"]) == (24, 14)
    assert (persist["messages"]["dt1"], persist["messages"]["dt2"]) == (24, 8)
    assert persist["set_maps"]["dt1"] is None
    assert (found["profile"], found["charged_bytes"]) == (None, None)


def test_the_report_is_a_page_with_the_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hwsim.load()
    assert main(["ladder", *SIZES, "--rows", "batch", "--pairs", "1", "--report", str(tmp_path / "out")]) == 0
    assert "(un)map batching" in capsys.readouterr().out
    assert {"index.html", "ladder.json", "batch.events.jsonl"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("given", [lab.DEVICES[:1], (lab.DEVICES[0], lab.DEVICES[0])])
def test_sources_without_as_many_destinations_are_refused(
    devices: tuple[str, str], given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ladder", "--on", *given]) == 1
    assert "as many destinations as sources" in capsys.readouterr().err


def test_more_pairs_than_a_device_has_are_refused(devices: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", "--on", *devices, "--memory", "32M", "--pairs", "2", "--rows", "persist"]) == 1
    assert "has 1 queue pairs" in capsys.readouterr().err
