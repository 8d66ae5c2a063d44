"""`vhost-vdpa doctor` on machines in trouble: each pain is brought about here, and found."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lab
from test_probe import held, vhost_vdpa

AS_USER = ("setpriv", "--reuid=1000", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")


def findings(*arguments: str, prefix: Sequence[str] = (), status: int | None = None) -> dict[str, list[dict[str, Any]]]:
    done = vhost_vdpa("doctor", "--json", *arguments, prefix=tuple(prefix))
    assert status in (None, done.returncode), done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == "pyvhostvdpa/host/doctor/1"
    by_id: dict[str, list[dict[str, Any]]] = {}
    for finding in told["findings"]:
        by_id.setdefault(finding["id"], []).append(finding)
    assert len(by_id) == 20
    return by_id


def says(found: dict[str, list[dict[str, Any]]], check: str, level: str, what: str) -> None:
    assert any(f["level"] == level and what in f["what"] for f in found[check]), found[check]


def test_a_sound_machine_has_no_failure_and_nothing_was_opened(devices: tuple[str, str]) -> None:
    with held(devices[1]):
        before = vhost_vdpa("list").stdout
        found = findings(devices[0], status=0)
        assert vhost_vdpa("list").stdout == before
    says(found, "K01", "PASS", "vdpa_sim")
    says(found, "D02", "PASS", "vdpasim_net")
    says(found, "O10", "PASS", "is free")
    says(found, "O11", "INFO", f"{devices[0]} is vdpa0, made by vdpasim_net")
    says(found, "O12", "PASS", "usable by uid 0")
    says(found, "G13", "PASS", "can suspend")
    says(found, "F19", "PASS", "offers ACCESS_PLATFORM")


def test_strict_counts_warnings(devices: tuple[str, str]) -> None:
    assert findings(devices[0], status=0)["M07"][0]["level"] == "WARN"
    findings(devices[0], "--strict", status=1)


def test_m07_a_device_on_user_addresses(devices: tuple[str, str]) -> None:
    says(findings(devices[0]), "M07", "WARN", "maps shared memory only")


def test_m08_g14_a18_report_what_only_use_can_show(devices: tuple[str, str]) -> None:
    found = findings(devices[0])
    says(found, "M08", "INFO", "does not report a batch")
    says(found, "G14", "INFO", "reports the avail index")
    says(found, "A18", "INFO", "ring addresses are IOVAs")


def test_m05_too_little_memlock_for_a_user(pinned: tuple[str, str]) -> None:
    limited = ("sh", "-c", 'ulimit -l 64; exec "$@"', "sh", *AS_USER)
    found = findings(pinned[0], prefix=limited, status=1)
    says(found, "M05", "FAIL", "RLIMIT_MEMLOCK is 64 KiB, pinning the guest takes 1024 MiB")


def test_m06_g16_scattered_memory_meets_the_entry_limit(pinned: tuple[str, str]) -> None:
    choice = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    before = choice.read_text().partition("[")[2].partition("]")[0]
    choice.write_text("never")
    try:
        found = findings(pinned[0], "--memory", "64M")
    finally:
        choice.write_text(before)
    says(found, "M06", "WARN", "at most 2048 IOTLB entries; 64 MiB may take 16384")
    says(found, "G16", "WARN", "16384 contiguous runs")
    says(findings(pinned[0], "--memory", "64M"), "M06", "PASS", "in huge pages")


def test_o10_a_busy_device(devices: tuple[str, str]) -> None:
    with held(devices[0]) as pid:
        says(findings("vdpa0", status=1), "O10", "FAIL", f"held by pid {pid} (python")


@contextmanager
def virtio_vdpa(name: str) -> Iterator[None]:
    """The device is a network card of this machine for the block."""
    device = Path("/sys/bus/vdpa/devices") / name
    lab.command("modprobe", "virtio_vdpa")
    (device / "driver_override").write_text("virtio_vdpa")
    (device / "driver/unbind").write_text(name)
    Path("/sys/bus/vdpa/drivers/virtio_vdpa/bind").write_text(name)
    try:
        yield
    finally:
        (device / "driver_override").write_text("vhost_vdpa")
        (device / "driver/unbind").write_text(name)
        Path("/sys/bus/vdpa/drivers/vhost_vdpa/bind").write_text(name)
        lab.wait_for(lambda: all(Path(path).exists() for path in lab.DEVICES), "the devices' nodes")


def test_o10_a_device_that_is_a_network_card(devices: tuple[str, str]) -> None:
    with virtio_vdpa("vdpa1"):
        found = findings("vdpa1", status=1)
        says(found, "O10", "FAIL", "vdpa1 is bound to virtio_vdpa")
        assert "driver_override" in found["O10"][0]["next"]
        listed = vhost_vdpa("list").stdout
    assert "virtio_vdpa" in listed
    assert devices[1] in vhost_vdpa("list").stdout


def test_o12_another_user(devices: tuple[str, str]) -> None:
    found = findings(devices[0], prefix=AS_USER, status=1)
    says(found, "O12", "FAIL", "mode 0600, owner 0:0; you are uid 1000")
    assert "udev rule" in found["O12"][0]["next"]
    says(found, "O10", "PASS", "this user cannot see all processes")


def test_o12_a_container_without_dev(devices: tuple[str, str]) -> None:
    empty = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh")
    found = findings("vdpa0", prefix=empty, status=1)
    says(found, "O12", "FAIL", f"{devices[0]} is not there though the kernel has the device")
    refused = vhost_vdpa("probe", "vdpa0", prefix=empty)
    assert refused.returncode == 1
    assert f"{devices[0]}: No such file" in refused.stderr


def test_g13_g15_a_device_that_cannot_suspend(vduse: str) -> None:
    found = findings(vduse, status=0)
    says(found, "G13", "WARN", "vduse cannot suspend")
    says(found, "G15", "SKIP", "no device that is known to suspend")


def test_d20_a_device_without_a_mac_address(devices: tuple[str, str]) -> None:
    lab.command("vdpa", "dev", "add", "name", "nameless", "mgmtdev", "vdpasim_net")
    try:
        says(findings("nameless"), "D20", "WARN", "created with MAC 00:00:00:00:00:00")
        says(findings(devices[0]), "D20", "INFO", "created with MAC 52:54:91:a1:b2:c1, MTU 1500")
    finally:
        lab.command("vdpa", "dev", "del", "nameless")


def test_f19_a_driver_that_did_not_take_access_platform(devices: tuple[str, str]) -> None:
    """Its user negotiated, and netlink reports which features."""
    hold = (
        "import sys, time; from pyvhostvdpa import VhostVdpa, Status as S; d = VhostVdpa(sys.argv[1]);"
        "d.set_status(S.ACKNOWLEDGE | S.DRIVER); d.set_features(3 << 32);"
        "d.set_status(S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(["python3", "-c", hold, devices[0]], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = findings("vdpa0")
        holder.kill()
    says(found, "F19", "PASS", "vdpasim_net: offers ACCESS_PLATFORM")
    assert not any(f["level"] == "WARN" for f in found["F19"])


def test_d02_a_deletion_that_hangs_is_reported_with_its_cure(devices: tuple[str, str]) -> None:
    lab.command("vdpa", "dev", "add", "name", "doomed", "mgmtdev", "vdpasim_net", "mac", "52:54:91:a1:b2:cd")
    path = lab.chardev("doomed")
    with held(path) as pid:
        deletion = subprocess.Popen(["vdpa", "dev", "del", "doomed"])
        lab.wait_for(lambda: " D " in Path(f"/proc/{deletion.pid}/stat").read_text(), "the deletion to hang")
        found = findings(status=1)
        refused = vhost_vdpa("dev", "add", "name", "other", "mgmtdev", "vdpasim_net")
    assert deletion.wait(20) == 0
    says(found, "D02", "FAIL", f"'vdpa' is stuck (pid {deletion.pid}): it deletes a device that pid {pid} (python")
    assert found["D02"][0]["next"] == f"kill {pid}"
    assert refused.returncode == 1
    assert "waits for an open device" in refused.stderr
    assert devices[0] in vhost_vdpa("list").stdout


def test_d02_a_network_namespace_that_sees_no_management_device(devices: tuple[str, str]) -> None:
    found = findings(devices[0], prefix=("unshare", "--net"))
    says(found, "D02", "WARN", "lists nothing")
    assert found["D02"][0]["next"].startswith("nsenter --target 1 --net")


def test_k01_a_container_that_sees_no_modules(devices: tuple[str, str]) -> None:
    """With devices at hand it does not matter; without any, it is reported."""
    hide = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /usr/lib/modules && exec "$@"', "sh")
    says(findings(prefix=hide), "K01", "PASS", "vhost_vdpa is there")
    assert devices
