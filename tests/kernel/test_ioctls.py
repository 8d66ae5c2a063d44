"""Every request of linux/vhost.h that reaches vhost-vdpa: bound, seen to succeed, seen to fail with its errno."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from ioctl_cases import CASES, READY, Act, Case, errno_of, start

from pyvhostvdpa import KernelError, Status, Trace, VhostVdpa
from pyvhostvdpa.base.uapi import IOCTLS

HEADER = Path("/usr/include/linux/vhost.h")
OTHERS = ("VHOST_NET_", "VHOST_SCSI_", "VHOST_VSOCK_")

NO_STOCK_KERNEL_SERVES = {"VHOST_SET_VRING_ENDIAN", "VHOST_GET_VRING_ENDIAN"}
"""Debian's kernels are built without VHOST_CROSS_ENDIAN_LEGACY: only the refusal can be seen."""
NO_STOCK_DEVICE_SERVES = {"VHOST_VDPA_GET_VRING_DESC_GROUP"}
"""Seen to succeed on vdpa_hwsim, in test_probe_hwsim.py."""


def requests_of_the_header() -> set[str]:
    found = re.findall(r"^#define\s+(VHOST_\w+)\s+_IO[RW]*\(", HEADER.read_text(), re.MULTILINE)
    return {name for name in found if not name.startswith(OTHERS)}


def test_every_request_is_bound_and_has_a_case_that_succeeds_and_one_that_fails() -> None:
    assert requests_of_the_header() <= IOCTLS.keys(), "the header has requests that uapi.IOCTLS lacks"
    unbound = [name for name, row in IOCTLS.items() if not callable(getattr(VhostVdpa, row.method, None))]
    assert not unbound
    assert {c.ioctl for c in CASES if c.errno} == set(IOCTLS)
    served = {name for name, row in IOCTLS.items() if not row.rejected}
    succeeding = {c.ioctl for c in CASES if not c.errno}
    assert succeeding == served - NO_STOCK_KERNEL_SERVES - NO_STOCK_DEVICE_SERVES


def run(path: str, case: Case) -> None:
    trace = Trace()
    with VhostVdpa(path, trace) as dev:
        if case.owned:
            dev.set_owner()
        if case.errno:
            with pytest.raises(KernelError) as refused:
                case.act(dev)
            assert refused.value.errno == case.errno
            assert refused.value.ioctl == case.ioctl
            assert case.ioctl in str(refused.value)
            assert refused.value.hint, "an error names the next step"
        else:
            case.act(dev)
        results = [event.result for event in trace.events if event.event == case.ioctl]
        assert (-case.errno in results) if case.errno else any(result >= 0 for result in results)


def run_case(path: str, ioctl: str, act: Act) -> None:
    """A request that succeeds, on a device of another kind."""
    run(path, Case(ioctl, "", act))


def identity(case: Case) -> str:
    return f"{case.ioctl.removeprefix('VHOST_')} {case.what}"


@pytest.mark.smoke
@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "sim"], ids=identity)
def test_on_a_device_with_set_map(devices: tuple[str, str], case: Case) -> None:
    run(devices[0], case)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "sim_dma"], ids=identity)
def test_on_a_device_with_dma_map(unbatched: tuple[str, str], case: Case) -> None:
    run(unbatched[0], case)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "vduse"], ids=identity)
def test_on_a_device_of_a_daemon(vduse: str, case: Case) -> None:
    run(vduse, case)


def test_the_cases_name_kinds_of_devices_that_are_run() -> None:
    assert {c.kind for c in CASES} == {"sim", "sim_dma", "vduse"}


def test_missing_doorbell_is_explained(devices: tuple[str, str]) -> None:
    with VhostVdpa(devices[0]) as dev:
        with pytest.raises(KernelError, match="no doorbell page") as refused:
            dev.mmap_doorbell(0)
        assert refused.value.errno == 524
        assert "set_vring_kick" in refused.value.hint


@pytest.mark.smoke
def test_a_ring_larger_than_the_device_allows_is_refused_or_taken(devices: tuple[str, str]) -> None:
    """Kernels that compare with the device's maximum say EINVAL; older ones do not look."""
    with VhostVdpa(devices[0]) as dev:
        dev.set_owner()
        answer = errno_of(lambda: dev.set_vring_num(0, 2 * dev.get_vring_num()))
        assert answer in (0, errno.EINVAL)
        # either way the most that is allowed is
        dev.set_vring_num(0, dev.get_vring_num())


@pytest.mark.smoke
def test_binding_a_group_of_a_running_device_is_refused_or_taken(devices: tuple[str, str]) -> None:
    """Kernels that protect a running device say EBUSY, also while it is suspended; none after a reset."""
    with VhostVdpa(devices[0]) as dev:
        dev.set_owner()
        start(dev)
        answer = errno_of(lambda: dev.set_group_asid(1, 1))
        assert answer in (0, errno.EBUSY)
        dev.suspend()
        assert errno_of(lambda: dev.set_group_asid(1, 1)) == answer
        dev.set_status(Status(0))
        dev.set_group_asid(1, 1)


def test_a_bad_config_interrupt_descriptor_changes_nothing_for_the_device(devices: tuple[str, str]) -> None:
    with VhostVdpa(devices[0]) as dev:
        dev.set_owner()
        assert errno_of(lambda: dev.set_config_call(999)) == errno.EBADF
        start(dev)
        assert dev.get_status() == READY | Status.DRIVER_OK
