"""What a migration reports: unknown is null, what is wrong is a sentence, and no report ends a guest."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_migration import Rig

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.cli import migrate as migrate_command
from pyvhostvdpa.cli import send as send_command
from pyvhostvdpa.guest.nic import FrameCounts
from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.host import mgmt
from pyvhostvdpa.migration import local
from pyvhostvdpa.migration import report as migration_report
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.destination import Arrived
from pyvhostvdpa.migration.endpoint import NoPeer
from pyvhostvdpa.migration.order import Order
from pyvhostvdpa.migration.report import STAYED, Part, SentReport
from pyvhostvdpa.migration.session import Receiving, Sending, drain
from pyvhostvdpa.migration.source import SendOptions, SendResult

DRAIN = 0.05
"""Seconds that the last frames get here."""
TOO_MANY = OSError(errno.EMFILE, "Too many open files")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def fail(*arguments: object, **more: object) -> Any:
    raise TOO_MANY


def arrived(rig: Rig) -> Arrived:
    return Arrived("01", "there", rig.guest, [rig.device])  # type: ignore[list-item]


# -- receiving ------------------------------------------------------------------------------


def test_guest_that_arrived_outlives_every_report_that_fails(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mgmt, "vendor_statistics", fail)
    monkeypatch.setattr(migration_report, "parent_of", fail)
    monkeypatch.setattr(rig.guest, "announce", fail)
    began = time.monotonic()
    report = Receiving(["stub0"], 0.3, observer=fail, tell=fail, trace=rig.trace, drain=DRAIN)._live(arrived(rig))
    assert time.monotonic() - began > 0.3
    assert report.drops == {"stub0": None}
    assert report.environment["devices"]["stub0"]["driver"] is None
    assert any("could not announce itself" in warning for warning in report.warnings)
    assert any("drop counters of stub0 are unknown" in warning for warning in report.warnings)


def test_interrupt_while_the_guest_runs_ends_its_traffic_early_with_a_report(rig: Rig) -> None:
    def interrupt(phase: str) -> None:
        if phase == "destination":
            signal.raise_signal(signal.SIGINT)

    began = time.monotonic()
    report = Receiving(["stub0"], 60.0, observer=interrupt, trace=rig.trace, drain=DRAIN)._live(arrived(rig))
    assert time.monotonic() - began < 30
    assert report.parts["destination"].seconds < 30


def test_destination_whose_queues_never_start_is_reported_in_a_sentence(rig: Rig) -> None:
    told: list[str] = []
    report = Receiving(["stub0"], 0.1, tell=told.append, trace=rig.trace, drain=DRAIN)._live(arrived(rig))
    [warning] = [warning for warning in report.to_dict()["warnings"] if "frames did not come back" in warning]
    assert "no frame came back since the guest runs on stub0" in warning
    assert warning in told


def test_stalled_queue_is_named_with_its_device(rig: Rig) -> None:
    rig.device.stalled = {1: 12.5, 3: 0.1}
    [warning] = drain(rig.guest, [rig.device], Part(10, 1.0), DRAIN)  # type: ignore[list-item]
    assert "virtqueue 1 of stub0 has work and has not moved for 12.5 s" in warning
    assert "virtqueue 3" not in warning


def test_gap_at_the_move_without_a_frame_is_null(rig: Rig) -> None:
    report = Receiving(["stub0"], 0.1, trace=rig.trace, drain=DRAIN)._live(arrived(rig))
    assert report.to_dict()["guest_gap_ms"] == {"move": None}


# -- sending --------------------------------------------------------------------------------


def sent_report(rig: Rig, outcome: str) -> SentReport:
    sending = Sending(["stub0"], lambda cancel: fail(), GuestOptions(), trace=rig.trace)
    sending._parts, sending._lost, sending._warnings = {"passthrough": Part(5, 1.0)}, {}, []
    rig.guest.pause()
    return sending._report(outcome, rig.guest, [rig.device], SendResult())  # type: ignore[list-item]


def test_report_of_a_migration_cancelled_early_has_null_for_what_was_not_measured(rig: Rig) -> None:
    report = local._stayed(sent_report(rig, STAYED)).to_dict()
    assert report["dt1_ms"] == {"worst": None, "devices": [{"device": "stub0", "ms": None}]}
    assert report["dt2_ms"] == {"sum": None, "devices": [{"device": "stub0", "ms": None}]}
    assert report["guest_gap_ms"] == {"switch": None, "move": None, "back": None}
    json.dumps(report)


def test_tables_of_a_migration_cancelled_early_are_not_empty(rig: Rig) -> None:
    report = sent_report(rig, STAYED)
    for said in (migrate_command._summary(local._stayed(report)), send_command._summary(report)):
        assert "DT1" not in said
        assert "round" not in said
        assert "IOTLB" not in said
        assert STAYED in said


def test_frames_in_flight_of_a_guest_that_left_are_not_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.guest, "counts", lambda: FrameCounts(1000, 872, 128, 0, 0, 0))
    report = sent_report(rig, "sent")
    assert (report.to_dict()["frames"]["lost"], report.to_dict()["frames"]["in_flight"]) == (None, 128)
    header, cells = send_command._summary(report).splitlines()[:2]
    assert dict(zip(header.split()[1:], cells.split(), strict=True))["in_flight"] == "128"


# -- the process for the destination ----------------------------------------------------------


def run_child(order: Order) -> tuple[int, list[dict[str, Any]], str]:
    argv = [sys.executable, "-m", "pyvhostvdpa.migration.child", order.encode()]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, pass_fds=[order.fd])
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_child_reports_its_error_as_a_json_line(tmp_path: Path) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    status, lines, said = run_child(Order(["/dev/null"], fd, 1.0, str(tmp_path)))
    os.close(fd)
    assert status == 1
    assert "message" in lines[-1]["error"]
    assert said == ""


def destination(path: str, folder: Path) -> local._Destination:
    return local._Destination(path, 1.0, SendOptions(folder=folder), None, lambda text: None)


def test_dead_destination_is_named_with_what_ended_it(tmp_path: Path) -> None:
    with destination("/dev/null", tmp_path) as other, Cancel() as cancel:
        other._process.kill()
        with pytest.raises(NoPeer, match=r"the process for the destination \(/dev/null\) was killed by SIGKILL"):
            other.connect(cancel)


def test_destination_that_fails_says_why_itself(tmp_path: Path) -> None:
    with (
        destination("/dev/null", tmp_path) as other,
        Cancel() as cancel,
        pytest.raises(NoPeer, match=r"the destination \(/dev/null\) says: .*not a vhost-vdpa"),
    ):
        other.connect(cancel)


def test_destination_that_dies_with_the_guest_says_where_the_guest_is(tmp_path: Path) -> None:
    with destination("/dev/null", tmp_path) as other, Cancel() as cancel:
        other._process.kill()
        other.await_result(cancel)
        with pytest.raises(VhostVdpaError, match="ended with that process; nothing of it is left on the source"):
            _ = other.result
