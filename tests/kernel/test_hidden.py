"""What hides: a device's holder behind another node, its driver in a container, a daemon that is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lab
import pytest
from test_probe import vhost_vdpa

from pyvhostvdpa import KernelError, MissingFeature, VdpaNetDevice, VhostVdpa
from pyvhostvdpa.base.uapi import Status

USER = ("setpriv", "--reuid=1000", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
NETWORK = ("unshare", "--net")
NO_TOOL = ("env", "PATH=/tmp/no-iproute2")


@contextmanager
def holding(path: str) -> Iterator[int]:
    code = "import sys, time\nfrom pyvhostvdpa import VhostVdpa\nd = VhostVdpa(sys.argv[1])\nprint(1, flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", code + "time.sleep(120)", path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.fixture
def node(devices: tuple[str, str], tmp_path: Path) -> str:
    """The first device by a node that a container runtime made."""
    path = tmp_path / "net0"
    os.mknod(path, 0o600 | 0o020000, os.stat(devices[0]).st_rdev)
    return str(path)


def test_list_names_a_holder_that_opened_another_node(devices: tuple[str, str], node: str) -> None:
    with holding(node) as pid:
        assert f"pid {pid}" in vhost_vdpa("list").stdout
        refused = vhost_vdpa("dev", "del", "vdpa0")
        assert refused.returncode == 1
        assert f"held by pid {pid}" in refused.stderr


def test_probe_by_another_node_finds_the_device(devices: tuple[str, str], node: str) -> None:
    done = vhost_vdpa("probe", node, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"]["name"] == "vdpa0"


def test_probe_of_a_name_that_means_two_devices_asks_which(fresh: tuple[str, str]) -> None:
    lab.command("vdpa", "dev", "add", "name", "vhost-vdpa-1", "mgmtdev", "vdpasim_net", "mac", "52:54:91:a1:b2:ce")
    try:
        asked = vhost_vdpa("probe", "vhost-vdpa-1")
        assert asked.returncode == 1
        assert "which device, vdpa1 (/dev/vhost-vdpa-1) or vhost-vdpa-1" in asked.stderr
        told = json.loads(vhost_vdpa("probe", "/dev/vhost-vdpa-1", "--json").stdout)
        assert told["device"]["name"] == "vdpa1"
    finally:
        lab.command("vdpa", "dev", "del", "vhost-vdpa-1")


# -- a container: what cannot be known is unknown --------------------------------------------


@pytest.mark.parametrize("prefix", [NETWORK, NO_TOOL], ids=["own network namespace", "no iproute2"])
def test_probe_without_netlink_reports_pinning_as_unknown(devices: tuple[str, str], prefix: tuple[str, ...]) -> None:
    python = (*prefix, sys.executable, "-m", "pyvhostvdpa")
    done = subprocess.run([*python, "probe", devices[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parent = next(line for line in done.stdout.splitlines() if line.startswith("parent"))
    assert "whether it pins memory is unknown" in parent
    assert "pins memory," not in parent
    as_json = subprocess.run([*python, "probe", devices[0], "--json"], capture_output=True, text=True, check=True)
    told = json.loads(as_json.stdout)["parent"]
    assert (told["module"], told["pinned"]) == (None, None)
    assert told["unknown"]
    listed = subprocess.run([*python, "list"], capture_output=True, text=True, check=True)
    assert "vdpa0, vdpa1: management device, type, MAC and link are unknown" in listed.stderr


def test_list_of_a_user_reports_holders_as_unknown(devices: tuple[str, str]) -> None:
    with holding(devices[0]):
        listed = subprocess.run([*USER, "vhost-vdpa", "list"], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines()[1:3]] == ["unknown", "unknown"]
    assert "holders are unknown" in listed.stderr


def test_doctor_in_a_container_of_a_user_never_reports_that_the_devices_pin(pinned: tuple[str, str]) -> None:
    argv = ["unshare", "--net", "sh", "-c", 'ulimit -l 64; exec "$@"', "sh", *USER, "vhost-vdpa", "doctor", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["findings"]
    assert any("whether it pins memory is unknown" in f["what"] for f in found if f["id"] == "M05"), done.stderr
    assert not any(f["level"] == "FAIL" for f in found if f["id"] == "M05")


def test_a_device_whose_parent_is_unknown_works_though_the_limit_forbids_pinning(devices: tuple[str, str]) -> None:
    """It works on user addresses: a limit that it does not meet must not keep it from being used."""
    code = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536)); os.setuid(1000)\n"
        "from pyvhostvdpa import GuestMemory, VdpaNetDevice\n"
        "with GuestMemory([(1 << 30, 32 << 20)]) as m, VdpaNetDevice(sys.argv[1]) as d:\n"
        "    assert d.iotlb.limits.pinned is None\n"
        "    d.attach(m)\n"
    )
    os.chmod(devices[0], 0o666)
    try:
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", code, devices[0]], capture_output=True, text=True, check=False
        )
    finally:
        os.chmod(devices[0], 0o600)
    assert done.returncode == 0, done.stderr


# -- a driver that is being removed -----------------------------------------------------------


def test_doctor_names_a_removal_that_waits_for_a_device(fresh: tuple[str, str]) -> None:
    with holding(fresh[0]) as pid:
        removal = subprocess.Popen(["rmmod", "vdpa_sim_net"])
        lab.wait_for(lambda: ") D " in Path(f"/proc/{removal.pid}/stat").read_text(), "the removal to wait")
        behind = subprocess.Popen(["vdpa", "dev", "show"], stdout=subprocess.DEVNULL)
        lab.wait_for(lambda: ") D " in Path(f"/proc/{behind.pid}/stat").read_text(), "vdpa to wait")
        done = vhost_vdpa("doctor", "--json")
    assert removal.wait(20) == 0
    behind.wait(20)
    lab.reload()
    [stuck] = [f for f in json.loads(done.stdout)["findings"] if f["id"] == "D02"]
    assert f"'rmmod' is stuck (pid {removal.pid}): it removes the driver of a device that pid {pid} (" in stuck["what"]
    assert stuck["next"] == f"kill {pid}"


# -- a VDUSE daemon that is stopped -------------------------------------------------------------


@contextmanager
def stopped_daemon() -> Iterator[tuple[str, int]]:
    with lab.vduse("loop5") as path:
        [pid] = [
            int(entry.parent.parent.name)
            for entry in Path("/proc").glob("[0-9]*/fd/*")
            if _target(entry) == "/dev/vduse/loop5"
        ]
        os.kill(pid, signal.SIGSTOP)
        lab.wait_for(lambda: ") T " in Path(f"/proc/{pid}/stat").read_text(), "the daemon to stop")
        try:
            yield path, pid
        finally:
            os.kill(pid, signal.SIGCONT)


def _target(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""


def test_a_stopped_vduse_daemon_is_named_within_seconds_and_serves_again() -> None:
    with stopped_daemon() as (path, pid):
        for words in (("list",), ("doctor", "loop5"), ("probe", "--no-open", path), ("probe", path)):
            began = time.monotonic()
            done = vhost_vdpa(*words)
            assert time.monotonic() - began < 20, words
            assert f"VDUSE daemon pid {pid}" in done.stdout + done.stderr, words
        assert done.returncode == 1
        assert f"kill -CONT {pid}" in done.stderr
        with pytest.raises(MissingFeature, match="does not answer"):
            VdpaNetDevice(path)
        os.kill(pid, signal.SIGCONT)
        assert vhost_vdpa("probe", path).returncode == 0


def drive(path: str) -> None:
    with VhostVdpa(path) as device:
        device.set_owner()
        device.set_status(Status.ACKNOWLEDGE)
        device.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        assert device.get_status() & Status.DRIVER


def test_vduse_net_that_answers_too_late_lives_on() -> None:
    with stopped_daemon() as (path, pid):
        Path("/sys/devices/virtual/vduse/loop5/msg_timeout").write_text("1")
        with pytest.raises(KernelError, match="EIO"):
            drive(path)
        os.kill(pid, signal.SIGCONT)
        time.sleep(2)
        assert ") S " in Path(f"/proc/{pid}/stat").read_text()
