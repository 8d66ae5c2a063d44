"""A guest outlives its reports on real devices: few descriptors, a closed standard error, no room to save it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import lab
import pytest
from peers import Failed
from world import OPTIONS, World

from pyvhostvdpa import GuestOptions, VdpaNetDevice
from pyvhostvdpa.guest.shape import GuestShape
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.migration.saved import SavedGuest, save
from pyvhostvdpa.net.features import CONTROL, SUPPORTED


def save_a_guest(path: str, folder: Path) -> Path:
    """A guest of a device that has never run, in a file."""
    with VdpaNetDevice(path, wanted=SUPPORTED | CONTROL) as device:
        guest = SyntheticGuest.create([device], GuestOptions(memory=8 << 20, ring_size=64))
        own, devices = guest.state()
        layout = tuple((region.gpa, region.size) for region in guest.memory.regions)
        saved = save(
            folder,
            "source",
            SavedGuest(GuestShape(os.urandom(16), "here", layout, guest.shapes(), False), own, tuple(devices)),
            guest.memory,
        )
        guest.close()
    return saved


def test_guest_taken_with_few_descriptors_runs_or_its_file_stays(devices: tuple[str, str], tmp_path: Path) -> None:
    """Each limit leaves another step without a descriptor; those after the start are for reports only."""
    ran = []
    for limit in range(12, 24):
        for old in tmp_path.iterdir():
            old.unlink()
        saved = save_a_guest(devices[0], tmp_path)
        take = ["vhost-vdpa", "receive", devices[0], "--take", str(saved), "--seconds", "0.3", "--json"]
        done = subprocess.run(
            ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *take], capture_output=True, text=True, check=False
        )
        if saved.exists():
            assert done.returncode != 0
            continue
        assert done.returncode == 0, f"{limit} descriptors: {done.stderr}"
        report = json.loads(done.stdout)
        ran.append(report["device_drops"][devices[0]])
        assert report["frames"]["received"] > 100
    # with the fewest the counters are unknown, with more they are known
    assert ran[0] is None
    assert ran[-1] is not None


def test_send_whose_standard_error_is_closed_hands_its_guest_over(devices: tuple[str, str], tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/socket"
    receive = ["vhost-vdpa", "receive", devices[1], "--listen", where, "--seconds", "1", "--state", str(tmp_path)]
    send = ["vhost-vdpa", "send", devices[0], "--to", where, "--memory", "16M", "--seconds", "1"]
    with subprocess.Popen([*receive, "--json"], stdout=-1, stderr=-1, text=True) as there:
        assert there.stderr is not None
        assert "waiting for a source" in there.stderr.readline()
        with subprocess.Popen(
            [*send, "--downtime", "10000", "--state", str(tmp_path), "--json"], stdout=-1, stderr=-1, text=True
        ) as here:
            assert here.stderr is not None
            for line in here.stderr:
                if "switching to shadow" in line:
                    break
            here.stderr.close()
            assert here.stdout is not None
            sent = here.stdout.read()
        received, said = there.communicate()
    assert there.returncode == 0, said
    assert here.returncode == 0
    assert json.loads(sent)["outcome"] == "sent"
    assert json.loads(sent)["frames"]["lost"] is None
    assert json.loads(received)["frames"]["lost"] == 0
    assert not list(tmp_path.glob("*.saved"))


def test_interrupted_receive_accounts_for_its_guest(devices: tuple[str, str], tmp_path: Path) -> None:
    saved = save_a_guest(devices[0], tmp_path)
    take = ["vhost-vdpa", "receive", devices[0], "--take", str(saved), "--seconds", "60", "--json"]
    with subprocess.Popen(take, stdout=-1, stderr=-1, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "traffic in passthrough" in line:
                process.send_signal(signal.SIGINT)
                break
        shown, said = process.communicate()
    assert process.returncode == 0, said
    assert json.loads(shown)["frames"]["lost"] == 0


def test_resume_does_not_speak_of_a_destination(devices: tuple[str, str], tmp_path: Path) -> None:
    saved = save_a_guest(devices[0], tmp_path)
    resume = ["vhost-vdpa", "send", devices[0], "--resume", str(saved), "--seconds", "0.3"]
    done = subprocess.run(resume, capture_output=True, text=True, check=True)
    assert "destination" not in done.stderr
    assert "traffic in passthrough" in done.stderr


def test_guest_without_room_is_kept_until_there_is_some(devices: tuple[str, str], tmp_path: Path) -> None:
    """The place is full by the hand-over, and the destination dies with GO and without an answer."""
    small = tmp_path / "small"
    small.mkdir()
    lab.command("mount", "-t", "tmpfs", "-o", "size=24M", "tmpfs", str(small))
    world = World([devices[0]], [devices[1]], small, OPTIONS, downtime=10.0)
    try:
        with world.migration(hold=("destination", "start")) as stream:
            stream.close()
            world.there.until("start")
            with pytest.raises(OSError, match="No space left"):
                (small / "other").write_bytes(bytes(25 << 20))
            world.there.kill()
            world.here.control.settimeout(5)
            with pytest.raises(socket.timeout):
                world.here.result()
            world.here.control.settimeout(120)
            (small / "other").unlink()
            with pytest.raises(Failed, match="saved in") as failed:
                world.here.result()
        [path] = world.files()
        assert f"send --resume {path}" in failed.value.hint
        assert "on one side only" in failed.value.message
        world.here.call("drop_stopped")
        world.here.call("take", path, world.paths[world.here.name])
        world.there = world.fork(world.there.name)
        world.lives()
        world.is_sound()
    finally:
        world.close()
        lab.command("umount", str(small))
