"""Migrations between two processes that share a stream and nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import hwsim
import lab
import pytest
from peers import Failed
from world import OPTIONS, World

from pyvhostvdpa.guest.shape import DeviceShape, GuestShape
from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.migration.endpoint import Address, connect
from pyvhostvdpa.migration.stream import Frame, words
from pyvhostvdpa.net.features import SUPPORTED


@pytest.fixture
def hw_devices() -> Iterator[list[str]]:
    """Four vdpa_hwsim devices of two pairs, with a control queue."""
    sims = [hwsim.add(f"hw{number}", pairs=2) for number in range(4)]
    yield [sim.chardev for sim in sims]
    for sim in sims:
        hwsim.remove(sim.name)


def there_and_back(here: list[str], there: list[str], folder: Path, options: GuestOptions) -> None:
    world = World(here, there, folder, options)
    try:
        for _ in range(2):
            report = world.migrates()
            assert report["rounds"] >= 2
            world.lives()
        world.is_sound()
        assert not world.files()
    finally:
        world.close()


def test_a_guest_moves_to_another_process_and_back(devices: tuple[str, str], tmp_path: Path) -> None:
    there_and_back([devices[0]], [devices[1]], tmp_path, OPTIONS)


def test_send_receive_between_pinning_devices_moves_the_guest(pinned: tuple[str, str], tmp_path: Path) -> None:
    there_and_back([pinned[0]], [pinned[1]], tmp_path, OPTIONS)


def test_send_receive_moves_control_queue_and_several_pairs(hw_devices: list[str], tmp_path: Path) -> None:
    options = GuestOptions(memory=32 << 20, pairs=2, ring_size=64, write_rate=1 << 20)
    there_and_back(hw_devices[:1], hw_devices[1:2], tmp_path, options)


def test_a_guest_with_two_devices_moves_in_one_migration(hw_devices: list[str], tmp_path: Path) -> None:
    options = GuestOptions(memory=32 << 20, pairs=2, ring_size=64, write_rate=1 << 20)
    there_and_back(hw_devices[:2], hw_devices[2:], tmp_path, options)


def test_a_guest_that_writes_faster_than_the_stream_moves_stays(devices: tuple[str, str], tmp_path: Path) -> None:
    world = World([devices[0]], [devices[1]], tmp_path, replace(OPTIONS, write_rate=32 << 20), downtime=0.01)
    try:
        with world.migration(limit=4 << 20) as stream:
            stream.close()
            with pytest.raises(
                Failed, match=r"faster than the stream moves it: after \d+ rounds .* continues in passthrough"
            ):
                world.here.result()
            with pytest.raises(Failed, match="the source has it"):
                world.there.result()
        world.lives()
        world.is_sound()
    finally:
        world.close()


# -- the commands ---------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(["vhost-vdpa", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def words_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was never said:\n{said}")


def test_send_and_receive(devices: tuple[str, str], tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/socket"
    with run("receive", devices[1], "--listen", where, "--seconds", "1", "--state", str(tmp_path), "--json") as there:
        words_until(there, "waiting for a source")
        sending = (
            *("--memory", "16M", "--seconds", "1", "--write", "1M", "--downtime", "3000", "--hash"),
            *("--state", str(tmp_path), "--json"),
        )
        with run("send", devices[0], "--to", where, *sending) as here:
            sent, told = here.communicate()
        received, said = there.communicate()
    assert here.returncode == 0, told
    assert there.returncode == 0, said
    source, destination = json.loads(sent), json.loads(received)
    assert (source["schema"], destination["schema"]) == ("pyvhostvdpa/send/1", "pyvhostvdpa/receive/1")
    assert source["outcome"] == "sent"
    assert source["id"] == destination["id"]
    assert source["memory_hash"] == destination["memory_hash"] is not None
    assert len(source["rounds"]) >= 2
    assert source["dt1_ms"]["worst"] > 0
    assert source["dt2_ms"]["sum"] > 0
    assert {"dt1.stop", "dt1.start", "dt2.stop"} <= set(source["phases"])
    assert {"dest.premap", "dest.start"} <= set(destination["phases"])
    frames = destination["frames"]
    assert (frames["lost"], frames["duplicated"], frames["corrupted"], destination["bad_pages"]) == (0, 0, 0, 0)
    assert frames["received"] > source["frames"]["received"]
    assert destination["guest_gap_ms"]["move"] > 0
    assert source["environment"]["kernel"] == os.uname().release
    assert "KiB written since" in told


def events_of(file: Path, phase: str) -> set[str]:
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return {line["event"] for line in lines if line["phase"] == phase}


def test_either_side_records_what_it_does(devices: tuple[str, str], tmp_path: Path) -> None:
    where, traces = f"unix:{tmp_path}/socket", [tmp_path / "here.jsonl", tmp_path / "there.jsonl"]
    common = ("--seconds", "1", "--state", str(tmp_path), "--json", "--trace")
    with run("receive", devices[1], "--listen", where, *common, str(traces[1])) as there:
        words_until(there, "waiting for a source")
        sending = ("--memory", "16M", "--downtime", "3000", "--spans", *common, str(traces[0]))
        with run("send", devices[0], "--to", where, *sending) as here:
            sent, told = here.communicate()
        there.communicate()
    assert here.returncode == 0, told
    assert "vhost_vdpa_suspend" in events_of(traces[0], "dt1.stop")
    assert "vhost_vdpa_dev_start" in events_of(traces[1], "dest.start")
    result = json.loads(sent)
    spans = [span["ms"] for device in result["spans"]["dt2"] for span in device["spans"]]
    assert sum(spans) == pytest.approx(result["dt2_ms"]["sum"], abs=0.001)


def test_ctrl_c_cancels_and_the_guest_continues(devices: tuple[str, str], tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/socket"
    with run("receive", devices[1], "--listen", where, "--state", str(tmp_path)) as there:
        words_until(there, "waiting for a source")
        slowly = ("--memory", "16M", "--seconds", "1", "--limit", "100K", "--state", str(tmp_path), "--json")
        with run("send", devices[0], "--to", where, *slowly) as here:
            words_until(here, "moving memory")
            here.send_signal(2)
            sent, told = here.communicate()
        _, said = there.communicate()
    assert here.returncode == 130
    assert f"the guest continues in passthrough on {devices[0]}" in told
    report = json.loads(sent)
    assert report["outcome"] == "stayed on source"
    assert report["parts"]["source again"]["received"] > 100
    assert report["frames"]["lost"] == report["frames"]["corrupted"] == 0
    assert there.returncode == 1
    assert "nothing of the guest is left here, the source has it" in said


def test_a_destination_that_lacks_a_feature_refuses_and_waits_on(devices: tuple[str, str], tmp_path: Path) -> None:
    lab.command("vdpa", "dev", "del", "vdpa1")
    add = ("vdpa", "dev", "add", "name", "vdpa1", "mgmtdev", "vdpasim_net", "mac", lab.MACS[1])
    lab.command(*add, "device_features", hex((1 << 33) | (1 << 32) | (1 << 5) | (1 << 16)))
    where = f"unix:{tmp_path}/socket"
    try:
        with run("receive", devices[1], "--listen", where, "--state", str(tmp_path)) as there:
            words_until(there, "waiting for a source")
            rest = ("--memory", "16M", "--seconds", "1", "--state", str(tmp_path))
            with run("send", devices[0], "--to", where, *rest) as here:
                _, told = here.communicate()
            # before the guest was started, the source checked that a process listens here
            words_until(there, "lacks features")
            words_until(there, "waiting for a source")
            assert there.poll() is None
            there.send_signal(signal.SIGINT)
            there.communicate()
        assert here.returncode == 1
        assert there.returncode == 130
        assert "the destination says: " in told
        assert "lacks features that the guest uses on the source" in told
        assert "the guest continues in passthrough" in told
    finally:
        lab.command("vdpa", "dev", "del", "vdpa1")
        lab.command(*add)


def test_strangers_and_a_guest_that_does_not_fit_keep_no_source_out(devices: tuple[str, str], tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/socket"
    shape = GuestShape(
        bytes(16), "too many devices", ((DEFAULT_GPA, 8 << 20),), (DeviceShape(int(SUPPORTED), 1, 64, None),) * 2, False
    )
    with run("receive", devices[1], "--listen", where, "--seconds", "1", "--state", str(tmp_path), "--json") as there:
        words_until(there, "waiting for a source")
        with ExitStack() as strangers:
            for _ in range(60):
                sock = strangers.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(f"{tmp_path}/socket")
                sock.send(b"v")
            misfit = strangers.enter_context(connect(Address.parse(where)))
            misfit.send_frame(Frame.SHAPE, shape.encode())
            kind, payload = misfit.expect(Frame.REFUSE, Frame.ALIVE, seconds=30.0)
            assert kind is Frame.REFUSE
            assert "the guest has 2 devices, this side was given 1" in words(payload)
            rest = ("--memory", "16M", "--seconds", "1", "--state", str(tmp_path), "--downtime", "3000", "--json")
            with run("send", devices[0], "--to", where, *rest) as here:
                _, told = here.communicate()
        received, said = there.communicate()
    assert here.returncode == 0, told
    assert there.returncode == 0, said
    frames = json.loads(received)["frames"]
    assert (frames["lost"], frames["duplicated"], frames["corrupted"]) == (0, 0, 0)


def refused_for_its_folder(device: str, folder: Path, mounted: str) -> str:
    """Mount a file system with these options as the folder for saved guests; what `send` says to it."""
    folder.mkdir()
    lab.command("mount", "-t", "tmpfs", "-o", mounted, "tmpfs", str(folder))
    try:
        with run("send", device, "--to", f"unix:{folder}-none", "--memory", "16M", "--state", str(folder)) as here:
            _, told = here.communicate()
    finally:
        lab.command("umount", str(folder))
    assert here.returncode == 1
    return str(told)


def test_folder_on_a_read_only_mount_is_refused_at_the_start(devices: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    told = refused_for_its_folder(devices[0], folder, "ro")
    assert f"no place to save a guest: {folder}: Read-only file system" in told
    assert "--state DIR" in told


def test_a_place_too_small_for_a_saved_guest_is_refused(devices: tuple[str, str], tmp_path: Path) -> None:
    told = refused_for_its_folder(devices[0], tmp_path / "small", "size=1M")
    assert "MiB free; a guest whose stream breaks at the hand-over is saved there" in told
