"""Which processes have a device open, wait for one or serve one, by a procfs that is made for the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import MissingFeature, NotVhostVdpa
from pyvhostvdpa.host import mgmt, processes
from pyvhostvdpa.host.mgmt import VdpaDevice
from pyvhostvdpa.host.processes import Holder, openers, stuck, vduse_daemon

NULL = os.stat("/dev/null").st_rdev
"""Stands for a vhost-vdpa device: a character device that every machine has."""

Add = Callable[..., None]


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    devices = f"Character devices:\n  4 tty\n{os.major(NULL):3} vhost-vdpa\n\nBlock devices:\n259 blkext\n"
    (tmp_path / "devices").write_text(devices)
    return tmp_path


@pytest.fixture
def add(proc: Path) -> Add:
    def process(
        pid: int, name: str, *open_on: str, state: str = "S", began: int = 100, words: tuple[str, ...] = ()
    ) -> None:
        folder = proc / str(pid)
        (folder / "fd").mkdir(parents=True)
        for number, target in enumerate(open_on):
            (folder / "fd" / str(number)).symlink_to(target)
        (folder / "stat").write_text(f"{pid} ({name}) {state} " + " ".join(["0"] * 18) + f" {began} 0 0\n")
        (folder / "cmdline").write_bytes("\0".join(words or (name,)).encode() + b"\0")

    return process


def test_openers_of_a_node_of_any_name_are_found_by_its_number(proc: Path, add: Add, tmp_path: Path) -> None:
    add(7, "qemu (x) D 1", "/dev/null")
    add(8, "other", "/dev/zero")
    zero = os.stat("/dev/zero").st_rdev
    assert openers(proc) == {NULL: (Holder(7, "qemu (x) D 1"),), zero: (Holder(8, "other"),)}


def test_openers_of_another_drivers_device_are_not_listed(proc: Path, add: Add) -> None:
    (proc / "devices").write_text("Character devices:\n  4 vhost-vdpa\n")
    add(7, "shell", "/dev/null", "socket:[1]", "pipe:[2]", "anon_inode:[eventfd]")
    assert openers(proc) == {}


def test_openers_with_a_descriptor_that_vanished_are_found(proc: Path, add: Add) -> None:
    add(7, "qemu", "/no/such/file", "/dev/null", "/gone")
    assert openers(proc) == {NULL: (Holder(7, "qemu"),)}


@pytest.mark.parametrize("who", ["this process", "a quiet process", "one that opens and closes files all the time"])
def test_openers_of_a_named_node_are_always_found(tmp_path: Path, who: str) -> None:
    path = tmp_path / "vhost-vdpa-99"
    path.touch()
    if who == "this process":
        with path.open():
            assert sees(os.getpid())
        return
    churn = "while True:\n  d = [os.open('/dev/null', 0) for _ in range(20)]\n  [os.close(x) for x in d]"
    code = f"import os, time\nf = open({str(path)!r})\nprint(1, flush=True)\n"
    code += "time.sleep(60)" if "quiet" in who else churn
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seen = [sees(process.pid) for _ in range(20)]
        process.kill()
    assert all(seen)


def sees(pid: int) -> bool:
    return any(holder.pid == pid for holders in openers().values() for holder in holders)


# -- processes that wait -------------------------------------------------------------------


def test_stuck_names_the_removal_of_a_driver_before_the_commands_that_wait_for_it(proc: Path, add: Add) -> None:
    add(900, "vdpa", state="D", began=300)
    add(20, "vdpa", state="D", began=400)
    add(30, "rmmod", state="D", began=200, words=("rmmod", "vdpa_sim_net"))
    assert stuck(proc) == (Holder(30, "rmmod"), Holder(900, "vdpa"), Holder(20, "vdpa"))


def test_stuck_leaves_out_what_has_nothing_to_do_with_vdpa(proc: Path, add: Add) -> None:
    add(1, "rmmod", state="D", words=("rmmod", "btrfs"))
    add(2, "modprobe", state="D", words=("modprobe", "vdpa_sim_net"))
    add(3, "vdpa", state="S")
    add(4, "dd", state="D", words=("dd", "vdpa"))
    assert stuck(proc) == ()


def test_stuck_leaves_out_a_process_that_sleeps_like_that_for_a_moment(
    proc: Path, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(3, "vdpa", state="D")
    stat = proc / "3/stat"
    monkeypatch.setattr(
        processes.time, "sleep", lambda seconds: stat.write_text(stat.read_text().replace(" D ", " R "))
    )
    assert stuck(proc) == ()


# -- processes that serve --------------------------------------------------------------------


@pytest.mark.parametrize(("state", "stopped"), [("S", False), ("R", False), ("T", True), ("t", True), ("Z", True)])
def test_vduse_daemon_is_the_process_with_the_devices_node(proc: Path, add: Add, state: str, stopped: bool) -> None:
    add(5, "python3", "/dev/vduse/control", "/dev/vduse/loop0", state=state)
    add(6, "python3", "/dev/vduse/loop01")
    daemon = vduse_daemon("loop0", proc)
    assert daemon is not None
    assert (daemon.pid, daemon.name, daemon.stopped) == (5, "python3", stopped)
    assert vduse_daemon("loop1", proc) is None


# -- names -------------------------------------------------------------------------------------


def listed(*names: tuple[str, str]) -> list[VdpaDevice]:
    return [VdpaDevice(name, chardev, "vhost_vdpa", None, None, None, ()) for name, chardev in names]


def test_chardev_of_a_name_that_means_two_devices_asks_which(monkeypatch: pytest.MonkeyPatch) -> None:
    both = listed(("vhost-vdpa-1", "/dev/vhost-vdpa-0"), ("plain", "/dev/vhost-vdpa-1"))
    monkeypatch.setattr(mgmt, "list_devices", lambda: both)
    with pytest.raises(MissingFeature, match=r"which device, vhost-vdpa-1 \(/dev/vhost-vdpa-0\) or plain") as asked:
        mgmt.chardev_of("vhost-vdpa-1")
    assert "/dev/vhost-vdpa-0, /dev/vhost-vdpa-1" in asked.value.hint
    with pytest.raises(MissingFeature, match="which device"):
        mgmt.select(both, "vhost-vdpa-1")
    assert mgmt.select(both, "plain") == mgmt.select(both, "/dev/vhost-vdpa-1") == both[1:]
    assert mgmt.select(both, "vhost-vdpa-0") == both[:1]
    assert mgmt.select(both, "absent") == []
    with pytest.raises(MissingFeature, match="which device"):
        mgmt.vdpa_name("vhost-vdpa-1")
    assert mgmt.vdpa_name("/dev/vhost-vdpa-0") == "vhost-vdpa-1"
    assert mgmt.vdpa_name("vhost-vdpa-0") == "vhost-vdpa-1"
    assert mgmt.vdpa_name("absent") == "absent"
    with pytest.raises(NotVhostVdpa, match="/dev/null"):
        mgmt.select(both, "/dev/null")
    assert mgmt.chardev_of("plain") == "/dev/vhost-vdpa-1"
    assert mgmt.chardev_of("/dev/vhost-vdpa-1") == "/dev/vhost-vdpa-1"
