"""The chardev itself: what each call answers on a real device."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import lab
import pytest

from pyvhostvdpa import (
    BackendFeature,
    DeviceBusy,
    DeviceClosed,
    KernelError,
    NotVhostVdpa,
    Status,
    Trace,
    VdpaNetDevice,
    VhostVdpa,
)
from pyvhostvdpa.base.uapi import VIRTIO_ID_NET
from pyvhostvdpa.net.features import Feature

SIM_BACKEND = (
    BackendFeature.IOTLB_MSG_V2
    | BackendFeature.IOTLB_BATCH
    | BackendFeature.IOTLB_ASID
    | BackendFeature.SUSPEND
    | BackendFeature.RESUME
    | BackendFeature.ENABLE_AFTER_DRIVER_OK
    | BackendFeature.IOTLB_PERSIST
)


def test_device_reports_its_identity(devices: tuple[str, str]) -> None:
    with VhostVdpa(devices[0]) as dev:
        assert dev.get_device_id() == VIRTIO_ID_NET
        assert dev.get_backend_features() == SIM_BACKEND
        assert Feature(dev.get_features()) & (Feature.VERSION_1 | Feature.ACCESS_PLATFORM | Feature.CTRL_VQ)
        assert dev.get_status() == Status(0)
        assert dev.get_vqs_count() == 3
        assert dev.get_vring_num() == 256
        assert dev.get_group_num() == 2
        assert dev.get_as_num() == 2
        assert dev.get_iova_range() == (0, (1 << 64) - 1)
        assert dev.get_config_size() >= 12
        assert dev.get_config(0, 6) == bytes.fromhex(lab.MACS[0].replace(":", ""))


def test_groups_are_the_owners_to_ask_for(devices: tuple[str, str]) -> None:
    with VhostVdpa(devices[0]) as dev:
        with pytest.raises(KernelError) as refused:
            dev.get_vring_group(0)
        assert refused.value.errno == errno.EPERM
        dev.set_owner()
        assert [dev.get_vring_group(index) for index in range(3)] == [0, 0, 1]


REFUSALS = {
    "a second owner": (lambda dev: dev.set_owner(), errno.EBUSY),
    "a status that clears bits": (lambda dev: dev.set_status(Status.ACKNOWLEDGE), errno.EINVAL),
    "an unknown backend feature": (lambda dev: dev.set_backend_features(BackendFeature(1 << 20)), errno.EOPNOTSUPP),
    "DESC_ASID alone": (lambda dev: dev.set_backend_features(BackendFeature.DESC_ASID), errno.EINVAL),
    "DESC_ASID of a parent without": (
        lambda dev: dev.set_backend_features(BackendFeature.DESC_ASID | BackendFeature.IOTLB_ASID),
        errno.EOPNOTSUPP,
    ),
    "features without ACCESS_PLATFORM": (lambda dev: dev.set_features(int(Feature.VERSION_1)), errno.EINVAL),
    "a queue it has not": (lambda dev: dev.set_vring_num(3, 16), errno.ENOBUFS),
    "a ring size of 3": (lambda dev: dev.set_vring_num(0, 3), errno.EINVAL),
    "a base beyond 16 bits": (lambda dev: dev.set_vring_base(0, 1 << 16), errno.EINVAL),
    "an unaligned used ring": (lambda dev: dev.set_vring_addr(0, 0x1000, 0x2000, 0x3002), errno.EINVAL),
    "a kick that is not an eventfd": (lambda dev: dev.set_vring_kick(0, 0), errno.EINVAL),
    "a group's ASID out of range": (lambda dev: dev.set_group_asid(1, 9), errno.EINVAL),
    "a group it has not": (lambda dev: dev.set_group_asid(2, 0), errno.EINVAL),
    "a group beyond the queues": (lambda dev: dev.set_group_asid(3, 0), errno.ENOBUFS),
    "a descriptor group": (lambda dev: dev.get_vring_desc_group(0), errno.EOPNOTSUPP),
    "config beyond its end": (lambda dev: dev.get_config(4096, 4), errno.EINVAL),
    "config of no length": (lambda dev: dev.get_config(0, 0), errno.EINVAL),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_door_request_refused_by_kernel_has_its_errno(devices: tuple[str, str], case: str) -> None:
    act, expected = REFUSALS[case]
    with VhostVdpa(devices[0]) as dev:
        dev.set_owner()
        dev.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        with pytest.raises(KernelError) as refused:
            act(dev)
        assert refused.value.errno == expected
        assert refused.value.ioctl.startswith("VHOST_")
        assert refused.value.ioctl in str(refused.value)


def test_features_are_final_once_accepted(devices: tuple[str, str]) -> None:
    with VhostVdpa(devices[0]) as dev:
        features = int(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
        dev.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        dev.set_features(features)
        dev.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        with pytest.raises(KernelError) as refused:
            dev.set_features(features)
        assert refused.value.errno == errno.EBUSY
        dev.set_status(Status(0))
        dev.set_features(features)


def test_every_call_is_recorded_with_its_result(devices: tuple[str, str]) -> None:
    trace = Trace()
    with VhostVdpa(devices[0], trace) as dev:
        dev.get_status()
        with dev.trace.in_phase("probe"), pytest.raises(KernelError):
            dev.get_vring_group(0)
    assert [(e.phase, e.event, e.result) for e in trace.events] == [
        ("", "open", 0),
        ("", "VHOST_VDPA_GET_STATUS", 0),
        ("probe", "VHOST_VDPA_GET_VRING_GROUP", -errno.EPERM),
        ("", "close", 0),
    ]
    assert all(e.t_begin <= e.t_end and e.device == devices[0] for e in trace.events)


def test_request_to_a_closed_device_reports_that_it_is_closed(devices: tuple[str, str]) -> None:
    dev = VhostVdpa(devices[0])
    assert os.fstat(dev.fileno()).st_rdev == os.stat(devices[0]).st_rdev
    dev.close()
    dev.close()
    assert dev.closed
    for use in (dev.fileno, dev.get_status):
        with pytest.raises(DeviceClosed, match="was closed"):
            use()


def test_a_busy_device_is_refused_and_its_holder_named(devices: tuple[str, str]) -> None:
    hold = (
        "import sys, time; from pyvhostvdpa import VhostVdpa; d = VhostVdpa(sys.argv[1]);"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, devices[0]], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(DeviceBusy, match=f"pid {holder.pid} .python") as busy:
            VdpaNetDevice(devices[0])
        assert busy.value.errno == errno.EBUSY
        done = subprocess.run(
            ["vhost-vdpa", "migrate", *devices, "--memory", "32M"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert f"pid {holder.pid}" in done.stderr
        listed = subprocess.run(["vhost-vdpa", "list"], capture_output=True, text=True, check=True).stdout
        assert f"pid {holder.pid}" in listed
        holder.kill()
    with VhostVdpa(devices[0]):
        pass


@pytest.mark.parametrize("path", ["/dev/null", "/dev/vhost-vdpa-99", "/etc/passwd"])
def test_door_refuses_other_files_without_opening_them(path: str) -> None:
    with pytest.raises(NotVhostVdpa):
        VhostVdpa(path)
