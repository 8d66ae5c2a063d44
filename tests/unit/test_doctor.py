"""The doctor's rules, on machines that the lab cannot be: facts in, findings out."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from pyvhostvdpa.host import mgmt
from pyvhostvdpa.host.doctor import CHECKS, GuestSize, Level, examine, healthy, to_dict
from pyvhostvdpa.host.doctor.finding import Finding
from pyvhostvdpa.host.machine import Firmware, Machine, Nic, Node, gather
from pyvhostvdpa.host.mgmt import VdpaDevice
from pyvhostvdpa.host.parents import Parent
from pyvhostvdpa.host.processes import Daemon, Holder

GIB = 1 << 30
DEVICE = VdpaDevice("vdpa0", "/dev/vhost-vdpa-0", "vhost_vdpa", "pci/0000:01:00.2", 1, "52:54:91:a1:b2:c1", ())
SOUND = Machine(
    release="6.12",
    installed=frozenset({"vhost_vdpa", "mlx5_vdpa"}),
    loaded=frozenset({"vhost_vdpa", "mlx5_vdpa"}),
    bus=True,
    tool=True,
    management={"pci/0000:01:00.2": {"dev_features": ["VERSION_1", "ACCESS_PLATFORM"]}},
    devices=(DEVICE,),
    parents={"vdpa0": Parent("mlx5_core", True, 2048)},
    net={"vdpa0": {"mtu": 1500}},
    nodes={"/dev/vhost-vdpa-0": Node(0o600, 0, 0, True)},
    shmem_huge="advise",
)


def replace(facts: Any, **changes: Any) -> Any:
    return facts._replace(**changes)


def found(machine: Machine, check: str, memory: int = GIB) -> list[Finding]:
    return [finding for finding in examine(machine, GuestSize(memory)) if finding.id == check]


def only(machine: Machine, check: str, memory: int = GIB) -> Finding:
    [finding] = found(machine, check, memory)
    return finding


def parent(module: str, pinned: bool = True, entries: int | None = 2048) -> dict[str, Parent]:
    return {"vdpa0": Parent(module, pinned, entries)}


def test_doctor_has_twenty_checks_that_report_on_any_machine() -> None:
    assert len(CHECKS) == 20
    for machine in (Machine(), SOUND, replace(SOUND, uid=1000)):
        assert {finding.id for finding in examine(machine)} == set(CHECKS)


def test_a_sound_machine_is_healthy() -> None:
    assert healthy(examine(SOUND))


def test_every_complaint_has_a_reason_and_a_next_step() -> None:
    broken = replace(
        SOUND,
        devices=(replace(DEVICE, holders=(Holder(7, "qemu"),)),),
        nodes={"/dev/vhost-vdpa-0": None},
        tool=False,
        memlock=64 << 10,
        uid=1000,
        shmem_huge="never",
    )
    complaints = [f for f in examine(broken) if f.level in (Level.WARN, Level.FAIL)]
    assert len(complaints) >= 5
    assert all(complaint.why and complaint.next for complaint in complaints)


def test_warnings_count_only_when_asked_for() -> None:
    warned = replace(SOUND, tool=False)
    assert healthy(examine(warned))
    assert not healthy(examine(warned), strict=True)
    assert to_dict(examine(warned))["schema"] == "pyvhostvdpa/host/doctor/1"


PAINS = {
    "K01 the kernel has no vhost_vdpa": (
        replace(SOUND, installed=frozenset(), loaded=frozenset(), config={}, config_source="/boot/config-6.12"),
        Level.FAIL,
        "CONFIG_VHOST_VDPA is not set (/boot/config-6.12)",
    ),
    "K01 a container that sees no modules": (
        replace(SOUND, installed=None, loaded=frozenset(), devices=()),
        Level.WARN,
        "cannot be read from here",
    ),
    "K01 vhost_vdpa and nothing that makes devices": (
        replace(SOUND, installed=frozenset({"vhost_vdpa"}), loaded=frozenset(), devices=()),
        Level.FAIL,
        "no driver that makes a vDPA device",
    ),
    "D02 iproute2 without vdpa": (replace(SOUND, tool=False), Level.WARN, "no 'vdpa' command"),
    "D02 no management device": (replace(SOUND, management={}), Level.WARN, "lists nothing"),
    "D02 a container with a network of its own": (
        replace(SOUND, management={}, own_network=True),
        Level.WARN,
        "lists nothing",
    ),
    "D02 a deletion that hangs": (replace(SOUND, stuck=(Holder(4711, "vdpa"),)), Level.FAIL, "pid 4711"),
    "D03 a NIC with a vDPA driver": (
        replace(SOUND, nics=(Nic("0000:01:00.0", "15b3:101d", "mlx5_core", 0, 8),)),
        Level.INFO,
        "ConnectX-6 Dx: mlx5_vdpa; suspend yes, resume by firmware",
    ),
    "D03 a NIC without": (
        replace(SOUND, nics=(Nic("0000:00:03.0", "8086:100e", "e1000", 0, 0),)),
        Level.INFO,
        "8086:100e",
    ),
    "D04 firmware and its board": (
        replace(SOUND, firmware=(Firmware("mlx5_0", "22.38.1002", "DEL0000000027"),)),
        Level.INFO,
        "firmware 22.38.1002, board DEL0000000027",
    ),
    "D04 modules of two builds": (
        replace(SOUND, vendor_modules={"mlx5_core": "24.10-1.1.4"}),
        Level.WARN,
        "mlx5_core 24.10-1.1.4 is not the kernel's own build",
    ),
    "M05 a small memlock limit": (
        replace(SOUND, memlock=8 << 20, uid=1000),
        Level.FAIL,
        "RLIMIT_MEMLOCK is 8192 KiB, pinning the guest takes 1024 MiB",
    ),
    "M06 scattered memory": (replace(SOUND, shmem_huge="never"), Level.WARN, "at most 2048 IOTLB entries"),
    "M07 user addresses": (replace(SOUND, parents=parent("vdpa_sim", False)), Level.WARN, "maps shared memory only"),
    "M08 silent batches": (SOUND, Level.INFO, "does not report a batch"),
    "O09 the IOMMU is off": (replace(SOUND, parents=parent("vp_vdpa")), Level.FAIL, "the IOMMU is off"),
    "O09 an IOMMU that is not coherent": (
        replace(SOUND, parents=parent("ifcvf"), iommu_groups=9, incoherent_iommus=("dmar1",)),
        Level.FAIL,
        "dmar1 cannot enforce cache coherency",
    ),
    "O10 held by a VMM": (
        replace(SOUND, devices=(replace(DEVICE, holders=(Holder(4711, "qemu-system-x86"),)),)),
        Level.FAIL,
        "held by pid 4711 (qemu-system-x86)",
    ),
    "O10 bound to virtio_vdpa": (
        replace(SOUND, devices=(replace(DEVICE, driver="virtio_vdpa", chardev=None),), parents={}, nodes={}),
        Level.FAIL,
        "bound to virtio_vdpa",
    ),
    "O11 which chardev is which": (SOUND, Level.INFO, "/dev/vhost-vdpa-0 is vdpa0"),
    "O12 not root": (
        replace(SOUND, nodes={"/dev/vhost-vdpa-0": Node(0o600, 0, 0, False)}, uid=1000),
        Level.FAIL,
        "mode 0600, owner 0:0; you are uid 1000",
    ),
    "O12 a container without the node": (
        replace(SOUND, nodes={"/dev/vhost-vdpa-0": None}),
        Level.FAIL,
        "not there though the kernel has the device",
    ),
    "G13 a parent that cannot suspend": (
        replace(SOUND, parents=parent("vduse", False)),
        Level.WARN,
        "cannot suspend, so its guest cannot be migrated",
    ),
    "G13 an unknown parent": (replace(SOUND, parents=parent("acme_vdpa")), Level.INFO, "nothing is known"),
    "G14 a base that is the used index": (SOUND, Level.WARN, "reports the used index"),
    "G15 resume by firmware": (SOUND, Level.WARN, "resumes by firmware"),
    "G16 a guest in small pages": (replace(SOUND, shmem_huge="never"), Level.WARN, "262144 contiguous runs"),
    "G17 slow calls": (SOUND, Level.INFO, "15 firmware commands"),
    "A18 addresses": (SOUND, Level.INFO, "ring addresses are IOVAs"),
    "F19 not offered": (
        replace(SOUND, management={"pci/0000:01:00.2": {"dev_features": ["VERSION_1"]}}),
        Level.FAIL,
        "offers no ACCESS_PLATFORM",
    ),
    "F19 not taken": (
        replace(SOUND, net={"vdpa0": {"negotiated_features": ["VERSION_1"]}}),
        Level.WARN,
        "did not take ACCESS_PLATFORM",
    ),
    "D20 no MAC address": (
        replace(SOUND, devices=(replace(DEVICE, mac="00:00:00:00:00:00"),)),
        Level.WARN,
        "created with MAC 00:00:00:00:00:00",
    ),
}


@pytest.mark.parametrize("pain", PAINS)
def test_a_pain_is_found(pain: str) -> None:
    machine, level, what = PAINS[pain]
    findings = found(machine, pain.partition(" ")[0])
    assert any(finding.level is level and what in finding.what for finding in findings), findings


def test_pains_cover_all_twenty_checks() -> None:
    assert {pain.partition(" ")[0] for pain in PAINS} == set(CHECKS)


def test_memlock_is_counted_once_per_pinning_device() -> None:
    two = replace(
        SOUND,
        devices=(DEVICE, replace(DEVICE, name="vdpa1", chardev="/dev/vhost-vdpa-1")),
        parents={name: Parent("mlx5_core", True, 2048) for name in ("vdpa0", "vdpa1")},
        memlock=int(1.5 * GIB),
        uid=1000,
    )
    assert only(two, "M05").level is Level.FAIL
    assert only(two, "M05", memory=GIB // 2).level is Level.PASS


def test_memlock_finding_for_root_reports_that_the_limit_is_raised() -> None:
    assert "raises its own limit" in only(replace(SOUND, memlock=8 << 20), "M05").what


# -- gathering -------------------------------------------------------------------------


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_facts_are_read_below_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = "9.9-test"
    monkeypatch.setattr("pyvhostvdpa.host.machine.os.uname", lambda: type("uname", (), {"release": release}))
    nic = "sys/bus/pci/devices/0000:01:00.0"
    put(
        tmp_path,
        {
            f"boot/config-{release}": "CONFIG_VHOST_VDPA=m\n# CONFIG_VDPA_SIM is not set\n",
            f"lib/modules/{release}/modules.dep": "kernel/drivers/vhost/vhost_vdpa.ko.xz: kernel/a.ko\n",
            f"lib/modules/{release}/modules.builtin": "kernel/drivers/vdpa/mlx5/mlx5-vdpa.ko\n",
            f"{nic}/class": "0x020000\n",
            f"{nic}/vendor": "0x15b3\n",
            f"{nic}/device": "0x101d\n",
            f"{nic}/sriov_totalvfs": "8\n",
            "sys/bus/pci/devices/0000:02:00.0/class": "0x010802\n",
            "sys/class/infiniband/mlx5_0/fw_ver": "22.38.1002\n",
            "sys/class/infiniband/mlx5_0/board_id": "MT_0000000359\n",
            "sys/module/mlx5_core/version": "24.10-1.1.4\n",
            "sys/class/iommu/dmar0/intel-iommu/ecap": "f020df\n",
            "sys/class/iommu/dmar1/intel-iommu/ecap": "f0205f\n",
            "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force\n",
        },
    )
    machine = gather(tmp_path)
    assert machine.config == {"VHOST_VDPA": "m"}
    assert machine.installed == {"vhost_vdpa", "mlx5_vdpa"}
    assert machine.nics == (Nic("0000:01:00.0", "15b3:101d", None, 0, 8),)
    assert machine.firmware == (Firmware("mlx5_0", "22.38.1002", "MT_0000000359"),)
    assert machine.vendor_modules == {"mlx5_core": "24.10-1.1.4"}
    assert machine.incoherent_iommus == ("dmar1",)
    assert machine.shmem_huge == "advise"


def test_the_running_kernels_own_configuration_comes_first(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/config.gz").write_bytes(gzip.compress(b"CONFIG_VDPA=y\n"))
    machine = gather(tmp_path)
    assert machine.config == {"VDPA": "y"}
    assert machine.config_source.endswith("proc/config.gz")


def test_gather_of_an_empty_root_succeeds(tmp_path: Path) -> None:
    machine = gather(tmp_path)
    assert (machine.config, machine.installed, machine.nics) == (None, None, ())
    assert {finding.id for finding in examine(machine)} == set(CHECKS)


# -- what cannot be known ----------------------------------------------------------------

WHY = "there is no 'vdpa' command (apt-get install iproute2)"
UNKNOWN = replace(
    SOUND,
    tool=False,
    devices=(replace(DEVICE, mac=None, mgmtdev=None, virtio_id=None, unknown=WHY),),
    parents={"vdpa0": Parent(None, None, 2048, WHY)},
    net={},
    memlock=8 << 20,
    uid=1000,
)


def test_unknown_parent_is_never_reported_to_pin_memory() -> None:
    findings = examine(UNKNOWN)
    assert not any(
        "devices here pin" in f.what or "pinning the guest takes" in f.what for f in findings if f.level is Level.FAIL
    )
    assert f"whether it pins memory is unknown ({WHY})" in only(UNKNOWN, "M05").what
    assert only(UNKNOWN, "M05").level is Level.WARN
    assert only(UNKNOWN, "M07").level is Level.INFO
    assert "unknown" in only(UNKNOWN, "M07").what
    assert "unknown" in only(UNKNOWN, "G16").what
    assert f"unknown driver ({WHY})" in only(UNKNOWN, "G13").what


def test_management_devices_that_netlink_does_not_report_are_unknown_and_not_missing() -> None:
    finding = only(replace(SOUND, management={}, management_unknown="'vdpa' failed (no netlink)"), "D02")
    assert "lists nothing: 'vdpa' failed (no netlink)" in finding.what
    assert "unknown" in finding.why
    assert "unknown" not in only(replace(SOUND, management={}), "D02").why


def test_unknown_mac_address_is_not_reported_as_zero() -> None:
    creation = only(UNKNOWN, "D20")
    assert creation.level is Level.INFO
    assert f"MAC address, MTU and link are unknown: {WHY}" in creation.what


def test_a_link_that_is_down_is_warned_of() -> None:
    machine = replace(SOUND, net={"vdpa0": {"mtu": 1500, "link": "down"}})
    assert any(f.level is Level.WARN and "vdpa0: its link is down" in f.what for f in found(machine, "D20"))
    assert not any("down" in f.what for f in found(replace(SOUND, net={"vdpa0": {"link": "up"}}), "D20"))


def test_a_removal_that_waits_for_a_device_is_named_before_what_waits_for_it() -> None:
    machine = replace(SOUND, stuck=(Holder(30, "rmmod"), Holder(40, "vdpa")), open_elsewhere=(Holder(7, "qemu"),))
    finding = only(machine, "D02")
    assert finding.what == "'rmmod' is stuck (pid 30): it removes the driver of a device that pid 7 (qemu) has open"
    assert "behind it: pid 40 (vdpa)" in finding.why
    assert finding.next == "kill 7"


SERVED = replace(SOUND, parents=parent("vduse", False))


def test_a_vduse_daemon_that_is_stopped_is_named_with_the_command_that_continues_it() -> None:
    machine = replace(SERVED, daemons={"vdpa0": Daemon(11, "vduse_net", "T")})
    assert any(
        f.level is Level.FAIL and "VDUSE daemon pid 11 (vduse_net) is stopped" in f.what and f.next == "kill -CONT 11"
        for f in found(machine, "O10")
    )


def test_missing_vduse_daemon_is_reported_only_if_all_processes_are_visible() -> None:
    gone = replace(SERVED, daemons={"vdpa0": None})
    assert any(f.level is Level.FAIL and "no process serves it" in f.what for f in found(gone, "O10"))
    assert not any("no process" in f.what for f in found(replace(gone, sees_all=False), "O10"))
    assert any("this user cannot see all processes" in f.what for f in found(replace(gone, sees_all=False), "O10"))


@pytest.mark.parametrize("bus", [True, False])
def test_every_process_is_looked_at_only_where_there_is_vdpa(monkeypatch: pytest.MonkeyPatch, bus: bool) -> None:
    looks: list[None] = []
    is_there = os.path.isdir
    monkeypatch.setattr(mgmt, "stuck", lambda: (looks.append(None), ())[1])
    monkeypatch.setattr(os.path, "isdir", lambda path: bus if str(path).endswith("/sys/bus/vdpa") else is_there(path))
    gather()
    assert bool(looks) is bus
