"""The main job, and what happens when it cannot be done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hwsim
import lab
import psutil
import pytest

from pyvhostvdpa import (
    GuestOptions,
    MigrationCancelled,
    MigrationFailed,
    MigrationOptions,
    MigrationRefused,
    MissingFeature,
    SendOptions,
    Trace,
    VhostVdpa,
    migrate,
)
from pyvhostvdpa.base.errors import MigrationEnded
from pyvhostvdpa.cli import migrate as migrate_command
from pyvhostvdpa.host import mgmt

GUEST = GuestOptions(lab.SMALL)
QUICK = MigrationOptions(GUEST, lab.SLOW_STREAM, 1.5)
COMMAND = ("vhost-vdpa", "migrate", *lab.DEVICES, "--memory", "32M", "--downtime", "10000")
# test_migration_failures.py cancels at every phase
CANCELLED = ("connect", "shadow", "go")


def migrates(seconds: str = "1.5") -> None:
    done = subprocess.run([*COMMAND, "--seconds", seconds], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def stood_ms(trace: Trace, device: str) -> float:
    """How long the device was stopped in the switch: frames flow again before the last call of the start."""
    [suspend] = [e for e in trace.select(device, "dt1.stop") if e.event == "VHOST_VDPA_SUSPEND"]
    driver_ok = [e for e in trace.select(device, "dt1.start") if e.event == "VHOST_VDPA_SET_STATUS"][-1]
    return (driver_ok.t_begin - suspend.t_end) / 1e6


@pytest.mark.smoke
def test_a_guest_moves_with_all_its_frames(devices: tuple[str, str]) -> None:
    trace = Trace()
    report = migrate(*devices, MigrationOptions(GUEST, lab.SLOW_STREAM, 6), trace=trace)
    frames = report.frames
    assert report.outcome == "migrated"
    assert (frames.lost, frames.duplicated, frames.corrupted, frames.reordered) == (0, 0, 0, 0)
    assert frames.sent == frames.received
    assert list(report.parts) == ["passthrough", "shadow", "destination"]
    assert sum(each.memory for each in report.sent.rounds) >= lab.SMALL
    assert trace.devices() == list(devices)
    assert all(part.received > 100 for part in report.parts.values())
    assert report.drops["source"]
    assert not any(value for each in report.drops.values() for value in each.values())
    assert 0 < stood_ms(trace, devices[0]) <= min(report.dt1_ms[devices[0]], report.gap_switch_ms + 1)
    assert 0 < report.dt2_ms[devices[0]] <= report.gap_move_ms + 1


def test_migrate_between_pinning_devices_moves_the_guest(pinned: tuple[str, str]) -> None:
    frames = migrate(*pinned, QUICK).frames
    assert frames.sent == frames.received > 300
    assert frames.duplicated == frames.corrupted == 0


def test_json_is_all_there_is_on_standard_output(devices: tuple[str, str]) -> None:
    done = subprocess.run([*COMMAND, "--seconds", "1.5", "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["schema"] == "pyvhostvdpa/migrate/1"
    assert set(result["frames"]) >= {"sent", "received", "lost", "duplicated", "corrupted"}
    assert result["dt1_ms"]["worst"] == max(d["ms"] for d in result["dt1_ms"]["devices"])
    assert result["dt2_ms"]["sum"] == pytest.approx(sum(d["ms"] for d in result["dt2_ms"]["devices"]))
    assert set(result["guest_gap_ms"]) == {"switch", "move"}
    assert result["stop_to_run_ms"] == pytest.approx(sum(result["stop_to_run_parts_ms"].values()), abs=0.1)
    assert {"gap.pause", "dt2.stop", "gap.last_round", "gap.load", "dest.start"} <= set(result["stop_to_run_parts_ms"])
    # frames flow until the guest is paused, and again once the last queue runs
    stood = result["stop_to_run_ms"] - result["stop_to_run_parts_ms"]["gap.pause"]
    assert 0 < stood <= result["guest_gap_ms"]["move"] + 5
    last = result["last_round"]
    assert last["pages"] == last["by_device"] + last["by_cpu"] == result["rounds"][-1]["pages"]
    assert set(result["procedure"]) == {"source", "destination"}
    assert sum(each["pages"] + each["zero_pages"] for each in result["rounds"]) * 4096 >= lab.SMALL
    assert set(result["environment"]["devices"]) == {"source", "destination"}
    assert {"dest.premap", "dt1.stop", "dt1.start", "dt2.stop", "dest.start"} <= set(result["phases"])
    assert all(set(phase) == {"ms", "ioctls", "iotlb_messages"} for phase in result["phases"].values())
    assert result["environment"]["kernel"] == os.uname().release


def test_the_table_names_both_downtimes(devices: tuple[str, str]) -> None:
    done = subprocess.run([*COMMAND, "--seconds", "1.5"], capture_output=True, text=True, check=True)
    for text in (
        "stop to run: ",
        "the last round of it: ",
        "procedure: source direct (in-place is not possible: ",
        "DT1, switch",
        "DT2, stop",
        "lost",
        "duplicated",
        "corrupted",
        "IOTLB messages",
        "drop counters: all 0",
    ):
        assert text in done.stdout


def test_memory_that_the_guest_writes_all_the_time_arrives(devices: tuple[str, str]) -> None:
    report = migrate(
        *devices,
        MigrationOptions(GuestOptions(lab.SMALL, write_rate=1 << 20), SendOptions(downtime=10.0, hashed=True), 1.5),
    )
    assert report.bad_pages == 0
    assert report.sent.hash
    assert report.frames.sent == report.frames.received


def test_the_guest_runs_for_a_short_round_before_it_is_paused(devices: tuple[str, str]) -> None:
    """All of memory, what was written meanwhile, and what was written during that: three rounds at least."""
    sent = migrate(
        *devices, MigrationOptions(GuestOptions(lab.SMALL, write_rate=1 << 20), SendOptions(downtime=30.0), 1.5)
    ).sent
    assert len(sent.rounds) >= 3
    assert sent.last is not None
    assert sent.last.by_cpu > 0


def test_source_and_destination_must_differ(devices: tuple[str, str], tmp_path: object) -> None:
    link = f"{tmp_path}/same"
    os.symlink(devices[0], link)
    for other in (devices[0], link):
        with pytest.raises(MigrationRefused, match="same device"):
            migrate(devices[0], other, QUICK)


def test_more_memory_than_there_is_is_refused(devices: tuple[str, str]) -> None:
    with pytest.raises(MissingFeature, match="available"):
        migrate(*devices, MigrationOptions(GuestOptions(1 << 44)))


def test_a_destination_that_lacks_the_guests_features_is_refused(devices: tuple[str, str]) -> None:
    without_mtu = hex((1 << 33) | (1 << 32) | (1 << 5) | (1 << 16))
    lab.command("vdpa", "dev", "del", "vdpa1")
    add = ("vdpa", "dev", "add", "name", "vdpa1", "mgmtdev", "vdpasim_net", "mac", lab.MACS[1])
    lab.command(*add, "device_features", without_mtu)
    try:
        with pytest.raises(MigrationRefused, match="lacks features that the guest uses on the source: MTU"):
            migrate(*devices, QUICK)
    finally:
        lab.command("vdpa", "dev", "del", "vdpa1")
        lab.command(*add)


def fd_of(device: str) -> int:
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}") == device:
            return int(fd)
    raise AssertionError(f"{device} is not open")


def break_fd_at(part: str, device: str) -> object:
    """An observer that puts /dev/null under a device's descriptor: each call to it fails from then on."""

    def observe(now: str) -> None:
        if now == part:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, fd_of(device), inheritable=False)
            os.close(null)

    return observe


def test_when_the_destination_dies_the_guest_continues_at_the_source(devices: tuple[str, str]) -> None:
    def kill(now: str) -> None:
        if now == "state":
            [child] = psutil.Process().children()
            child.kill()
            child.wait()

    with pytest.raises(MigrationFailed, match=f"continues in passthrough on {devices[0]}") as failed:
        migrate(*devices, QUICK, kill)
    report = failed.value.report
    assert report.outcome == "stayed on source"
    assert report.parts["source again"].received > 100
    frames = report.frames
    assert frames.sent == frames.received
    assert frames.duplicated == frames.corrupted == 0
    migrates()


def test_when_the_source_dies_the_guest_is_saved(devices: tuple[str, str], tmp_path: Path) -> None:
    options = MigrationOptions(GUEST, SendOptions(downtime=10.0, folder=tmp_path), 1.5)
    with pytest.raises(MigrationFailed, match=r"source could not be started again.*saved in") as failed:
        migrate(*devices, options, break_fd_at("stop", devices[0]))  # type: ignore[arg-type]
    assert failed.value.report is None
    [saved] = tmp_path.glob("*.saved")
    assert failed.value.hint == f"vhost-vdpa send --resume {saved} {devices[0]}"
    migrates()


def interrupt_at(part: str) -> Callable[[str], None]:
    def interrupt(now: str) -> None:
        if now == part:
            os.kill(os.getpid(), signal.SIGINT)

    return interrupt


def both_are_reset(devices: tuple[str, str]) -> None:
    for device in devices:
        with VhostVdpa(device) as dev:
            assert dev.get_status() == 0


@pytest.mark.parametrize("part", ["start", "passthrough"])
def test_an_interrupt_before_ends_it_and_leaves_nothing_behind(devices: tuple[str, str], part: str) -> None:
    """Raised exactly as the part begins; the leak check of every test looks at what is left."""
    with pytest.raises(KeyboardInterrupt):
        migrate(*devices, QUICK, interrupt_at(part))
    both_are_reset(devices)


@pytest.mark.parametrize("part", CANCELLED)
def test_an_interrupt_under_way_cancels_and_the_guest_continues(devices: tuple[str, str], part: str) -> None:
    with pytest.raises(MigrationCancelled, match=f"continues in passthrough on {devices[0]}") as cancelled:
        migrate(*devices, QUICK, interrupt_at(part))
    report = cancelled.value.report
    assert report.parts["source again"].received > 100
    assert (report.frames.lost, report.frames.duplicated, report.frames.corrupted) == (0, 0, 0)
    both_are_reset(devices)


@pytest.mark.parametrize("part", ["running", "destination"])
def test_an_interrupt_after_the_guest_was_given_away_is_too_late(devices: tuple[str, str], part: str) -> None:
    report = migrate(*devices, MigrationOptions(GUEST, lab.SLOW_STREAM, 15), interrupt_at(part))
    assert report.outcome == "migrated"
    assert report.frames.sent == report.frames.received
    assert report.parts["destination"].seconds < 4
    both_are_reset(devices)


def test_cancelled_migration_reports_null_for_what_was_not_measured(devices: tuple[str, str]) -> None:
    with pytest.raises(MigrationCancelled) as cancelled:
        migrate(*devices, QUICK, interrupt_at("connect"))
    report = cancelled.value.report.to_dict()
    assert report["dt1_ms"] == {"worst": None, "devices": [{"device": devices[0], "ms": None}]}
    assert report["dt2_ms"] == {"sum": None, "devices": [{"device": devices[0], "ms": None}]}
    assert report["guest_gap_ms"]["switch"] is report["guest_gap_ms"]["move"] is None
    with pytest.raises(MigrationCancelled) as cancelled:
        migrate(*devices, QUICK, interrupt_at("go"))
    report = cancelled.value.report.to_dict()
    assert report["dt1_ms"]["worst"] > 0
    assert report["dt2_ms"]["sum"] > 0
    assert report["guest_gap_ms"]["switch"] > 0
    assert report["guest_gap_ms"]["move"] is None
    assert report["guest_gap_ms"]["back"] > report["dt2_ms"]["sum"]


def test_migrate_in_another_thread_works_without_signals(devices: tuple[str, str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(migrate, *devices, QUICK).result()
    assert report.outcome == "migrated"
    assert report.frames.sent == report.frames.received


def test_migrate_without_a_trace_of_its_own_reports_unknown_downtimes(devices: tuple[str, str]) -> None:
    report = migrate(*devices, QUICK, trace=Trace(limit=0))
    assert (report.downtimes.dt1, report.downtimes.dt2) == (None, None)
    assert report.frames.sent == report.frames.received
    assert report.gap_switch_ms is not None


def kill_destination_at(part: str) -> Callable[[str], None]:
    def kill(now: str) -> None:
        if now == part:
            [child] = psutil.Process().children()
            child.kill()
            # its parent collects the exit status
            lab.wait_for(lambda: child.status() == psutil.STATUS_ZOMBIE, "the destination's end")

    return kill


def test_destination_dead_from_the_start_is_named_and_the_guest_stays(pinned: tuple[str, str]) -> None:
    with pytest.raises(MigrationEnded, match="was killed by SIGKILL; the guest continues in passthrough") as failed:
        migrate(*pinned, QUICK, kill_destination_at("connect"))
    assert "MEMLOCK" not in str(failed.value)
    assert failed.value.report.outcome == "stayed on source"


def test_destination_that_dies_with_the_guest_is_named(pinned: tuple[str, str]) -> None:
    with pytest.raises(MigrationFailed, match=r"ran there: .*SIGKILL\. It ended with that process") as failed:
        migrate(*pinned, QUICK, kill_destination_at("destination"))
    assert "MEMLOCK" not in str(failed.value)


def test_progress_that_cannot_be_written_ends_no_guest(devices: tuple[str, str]) -> None:
    def fail(text: str) -> None:
        raise BrokenPipeError("standard error is closed")

    report = migrate(*devices, QUICK, fail, tell=fail)
    assert report.outcome == "migrated"
    assert report.frames.sent == report.frames.received


def test_stalled_destination_is_reported_in_a_sentence() -> None:
    source, destination = hwsim.add("hw0"), hwsim.add("hw1")

    def stall(now: str) -> None:
        if now == "destination":
            destination.write("fault/stall", "Y")

    try:
        report = migrate(source.chardev, destination.chardev, MigrationOptions(GUEST, lab.SLOW_STREAM, 3), stall)
        [warning] = report.warnings
        assert "frames did not come back within 10 s" in warning
        assert f"of {destination.chardev} has work and has not moved for" in warning or "no frame came back" in warning
        assert report.frames.lost > 0
        assert warning in migrate_command._summary(report)
    finally:
        for device in (source, destination):
            hwsim.remove(device.name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("opening the source", r"interrupted; (the devices were reset and closed|no device was opened)"),
        ("moving memory", r"the guest continues in passthrough on"),
    ],
)
def test_ctrl_c_is_status_130(devices: tuple[str, str], words: str, told: str) -> None:
    with subprocess.Popen([*COMMAND, "--seconds", "3"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if words in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait() == 130, rest
        assert re.search(told, rest)
        assert "Traceback" not in rest
    both_are_reset(devices)


@pytest.mark.parametrize("words", ["traffic in passthrough on the destination", "waiting until it runs there"])
def test_ctrl_c_after_the_hand_over_ends_well_with_the_tables(devices: tuple[str, str], words: str) -> None:
    with subprocess.Popen(
        [*COMMAND, "--seconds", "9"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if words in line:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGINT)
                break
        shown, rest = process.communicate()
    assert process.returncode == 0, rest
    assert "DT2, stop on the source" in shown
    assert "migrated; kernel" in shown
    assert "Traceback" not in rest
    both_are_reset(devices)


def test_after_kill_9_in_the_shadow_phase_the_next_run_works(devices: tuple[str, str]) -> None:
    with subprocess.Popen([*COMMAND, "--seconds", "9"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "traffic through shadow" in line:
                process.kill()
                break
        process.stderr.read()
        assert process.wait() == -signal.SIGKILL
    lab.wait_for(lambda: not any(map(mgmt.holders, devices)), "the destination to notice")
    migrates()
