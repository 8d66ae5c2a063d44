# lab: --vmm
"""A Linux guest under a stock QEMU moves from one vdpa_hwsim device to another, and all that it sees is checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import pytest

from labvm import calls, move, report
from labvm.backends import BACKENDS
from labvm.machine import GuestMachine, vmms
from labvm.network import Costs


def test_both_stock_versions_are_there() -> None:
    assert len(vmms()) == 2


CASES = BACKENDS if os.environ.get("EVERY_BACKEND") else BACKENDS[1:]
"""QEMU's own driver of vhost-vdpa moves in test_watch_qemu.py, where the same is looked at: `--env EVERY_BACKEND=1`."""


@pytest.fixture(scope="module", params=CASES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> move.Outcome:
    """One move by the newest QEMU; booting the guest is most of what it costs."""
    guest, costs = GuestMachine(memory=64 << 20), Costs(memory=64 << 20)
    plan = move.Plan(vmms()[-1], request.param, costs=costs, guest=guest, seconds=2.0)
    return move.run(plan, tmp_path_factory.mktemp("move"), print)


def test_guest_arrives_whole(outcome: move.Outcome) -> None:
    row = report.row(outcome)
    assert report.faults(row) == []
    assert row["guest"]["lost"] == 0
    assert row["device"]["sent"][0] > 0
    assert row["device"]["sent"][1] > 0


def test_figures_of_a_move_are_in_order(outcome: move.Outcome) -> None:
    row = report.row(outcome)
    assert 0 < row["dt2_ms"] < row["stop_to_run_ms"]
    assert 0 < row["vmm_ms"] < row["stop_to_run_ms"]
    assert row["guest"]["move_gap_ms"] >= row["start_ms"]


def test_log_has_the_calls_that_start_a_device(outcome: move.Outcome) -> None:
    source, destination = outcome.logs
    for made in (source, destination):
        names = {call.name for call in made}
        assert {"SET_OWNER", "SET_FEATURES", "SET_VRING_ADDR", "SET_VRING_ENABLE", "IOTLB_UPDATE"} <= names
        assert all(call.end_ns >= call.begin_ns for call in made)
    assert sum(call.name == "SUSPEND" for call in source) == 2
    assert calls.first(source, lambda call: call.result < 0 and call.name.startswith("IOTLB")) is None
