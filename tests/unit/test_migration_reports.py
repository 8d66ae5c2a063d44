"""What a migration reports: unknown is null, what is wrong is a sentence, and no report ends a guest."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stub_migration import Rig

from pyvhostvdpa.base.errors import DeviceNeedsReset, MigrationFailed, QueueBroken, VhostVdpaError
from pyvhostvdpa.cli import migrate as migrate_command
from pyvhostvdpa.cli import send as send_command
from pyvhostvdpa.guest.protocol import FrameCounts
from pyvhostvdpa.guest.shape import ID_BYTES, GuestShape
from pyvhostvdpa.guest.synthetic import KINDS, GuestOptions, SyntheticGuest
from pyvhostvdpa.host import mgmt
from pyvhostvdpa.migration import local
from pyvhostvdpa.migration import report as migration_report
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.destination import Arrived
from pyvhostvdpa.migration.endpoint import NoPeer
from pyvhostvdpa.migration.order import Order
from pyvhostvdpa.migration.report import STAYED, Part, SentReport
from pyvhostvdpa.migration.saved import load
from pyvhostvdpa.migration.sent import SendResult
from pyvhostvdpa.migration.session import Receiving, Sending, drain
from pyvhostvdpa.migration.source import SendOptions

DRAIN = 0.05
"""Seconds that the last frames get here."""
TOO_MANY = OSError(errno.EMFILE, "Too many open files")


def fail(*arguments: object, **more: object) -> Any:
    raise TOO_MANY


def arrived(rig: Rig) -> Arrived[SyntheticGuest]:
    regions = tuple((region.gpa, region.size) for region in rig.guest.memory.regions)
    shape = GuestShape(bytes(ID_BYTES), "there", regions, rig.guest.shapes(), False)
    return Arrived(shape, rig.guest, [rig.device])  # type: ignore[list-item]


# -- receiving ------------------------------------------------------------------------------


def test_guest_that_arrived_outlives_every_report_that_fails(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mgmt, "vendor_statistics", fail)
    monkeypatch.setattr(migration_report, "parent_of", fail)
    monkeypatch.setattr(rig.guest, "announce", fail)
    began = time.monotonic()
    report = Receiving(["stub0"], 0.3, observer=fail, tell=fail, trace=rig.trace, drain=DRAIN, kinds=KINDS)._live(
        arrived(rig)
    )
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
    report = Receiving(["stub0"], 60.0, observer=interrupt, trace=rig.trace, drain=DRAIN, kinds=KINDS)._live(
        arrived(rig)
    )
    assert time.monotonic() - began < 30
    assert report.parts["destination"].seconds < 30


def test_destination_whose_queues_never_start_is_reported_in_a_sentence(rig: Rig) -> None:
    told: list[str] = []
    report = Receiving(["stub0"], 0.1, tell=told.append, trace=rig.trace, drain=DRAIN, kinds=KINDS)._live(arrived(rig))
    [warning] = [warning for warning in report.to_dict()["warnings"] if "frames did not come back" in warning]
    assert "no frame came back since the guest runs on stub0" in warning
    assert warning in told


def test_stalled_queue_is_named_with_its_device(rig: Rig) -> None:
    rig.device.still = {1: 12.5, 3: 0.1}
    [warning] = drain(rig.guest, [rig.device], Part(10, 1.0), DRAIN)  # type: ignore[list-item]
    assert "virtqueue 1 of stub0 has work and has not moved for 12.5 s" in warning
    assert "virtqueue 3" not in warning


def test_guest_whose_device_gives_up_after_the_move_is_saved_and_named(rig: Rig) -> None:
    rig.device.failures = {"check": [None, DeviceNeedsReset("stub0 gave up")], "stop": [QueueBroken("no answer")]}
    with pytest.raises(MigrationFailed) as caught:
        Receiving(["stub0"], 5.0, rig.folder, trace=rig.trace, drain=DRAIN, kinds=KINDS)._live(arrived(rig))
    [saved] = rig.files()
    assert str(caught.value).startswith(f"stub0 gave up. The guest is stopped and saved in {saved}")
    assert caught.value.hint == f"vhost-vdpa receive --take {saved} stub0"
    assert rig.device.calls[-3:] == ["stop", "halt", "reset"]
    found, memory = load(saved, KINDS)
    with memory:
        assert found.shape.source == "there"


def test_no_signal_ends_a_guest_while_it_is_saved(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)

    rig.device.failures = {"check": [DeviceNeedsReset("stub0 gave up")]}
    monkeypatch.setattr(rig.device, "reset", interrupt)
    with pytest.raises(MigrationFailed, match="stopped and saved in"):
        Receiving(["stub0"], 5.0, rig.folder, trace=rig.trace, drain=DRAIN, kinds=KINDS)._live(arrived(rig))
    assert len(rig.files()) == 1


def test_gap_at_the_move_without_a_frame_is_null(rig: Rig) -> None:
    report = Receiving(["stub0"], 0.1, trace=rig.trace, drain=DRAIN, kinds=KINDS)._live(arrived(rig))
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
    answer, _, header, cells = send_command._summary(report).splitlines()[:4]
    assert answer == "Sent the guest from stub0: 1,000 frames until then."
    assert dict(zip(header.split()[1:], cells.split(), strict=True))["in_flight"] == "128"


# -- the process for the destination ----------------------------------------------------------


def run_child(order: Order) -> tuple[int, list[dict[str, Any]], str]:
    argv, environment = local.child_argv(order), local.child_environment()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, pass_fds=[order.fd])
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


def test_of_relative_entries_the_destination_gets_that_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would be folders of the working directory there, and of whoever makes them."""
    editable = "__editable__.anything-1.0.finder.__path_hook__"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, editable, "", "own", "/a:b"])
    monkeypatch.setattr(local, "_FOUND_IN", str(tmp_path / "own"), raising=False)
    folders = local.child_environment()["PYTHONPATH"].split(os.pathsep)
    assert folders[-1] == str(tmp_path / "own")
    assert not {str(tmp_path / editable), str(tmp_path), editable, "/a", "b"} & set(folders)


def test_destination_imports_nothing_from_the_folder_that_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a checkout that was never built, or anybody's files: migrate is run as root."""
    for name in ("pyvhostvdpa", "json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('from the working directory')\n")
    monkeypatch.chdir(tmp_path)
    with destination("/dev/null", tmp_path) as other, Cancel() as cancel, pytest.raises(NoPeer, match="not a vhost-vd"):
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
