"""A device that a Python daemon plays: traffic, configuration interrupts, and what it cannot do."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import lab
import pytest
from conftest import RunningGuest

from pyvhostvdpa import GuestMemory, KernelError, MissingFeature, Status, VdpaNetDevice, VhostVdpa
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.config import NetConfig
from pyvhostvdpa.net.features import Feature, negotiate


def carries_frames(guest: RunningGuest) -> None:
    """Let it run on its started device, demand that every frame arrives, and end it."""
    guest.traffic.run()
    guest.receives(500)
    guest.settle()
    guest.close()


def test_frames_come_back_whole_in_passthrough_and_through_shadow_queues(vduse: str) -> None:
    for start in ("start_passthrough", "start_shadow"):
        with GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory, VdpaNetDevice(vduse) as device:
            device.attach(memory)
            guest = RunningGuest(device, memory)
            getattr(device, start)(guest.nic.queues)
            carries_frames(guest)


def test_vduse_device_is_started_directly_and_is_ready_before(vduse: str) -> None:
    with GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory, VdpaNetDevice(vduse) as device:
        assert device.procedure.name == "direct"
        assert device.procedure.why_not_better.startswith("in-place is not possible: ")
        device.attach(memory)
        guest = RunningGuest(device, memory)
        assert "DRIVER_OK" in device.stand_by(guest.nic.queues)
        device.start_passthrough(guest.nic.queues)
        carries_frames(guest)


def test_device_that_cannot_suspend_is_refused_for_migration(vduse: str) -> None:
    with GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory, VdpaNetDevice(vduse) as device:
        device.attach(memory)
        guest = RunningGuest(device, memory)
        device.start_passthrough(guest.nic.queues)
        with pytest.raises(MissingFeature, match="cannot be suspended"):
            device.stop()
        guest.close()


def test_config_interrupt_reports_a_change_of_the_link(vduse: str) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    daemon = _daemon()
    with VhostVdpa(vduse) as dev:
        features = negotiate(dev.get_features())
        status = Status.ACKNOWLEDGE | Status.DRIVER
        dev.set_status(status)
        dev.set_features(int(features))
        dev.set_config_call(fd)
        for step in (Status.FEATURES_OK, Status.DRIVER_OK):
            status |= step
            dev.set_status(status)
        for expected in (False, True):
            os.kill(daemon, signal.SIGUSR1)
            assert select.select([fd], [], [], 10)[0], "no configuration interrupt"
            os.eventfd_read(fd)
            config = NetConfig.parse(dev.get_config(0, dev.get_config_size()), Feature(features))
            assert config.link_up is expected
    os.close(fd)


def test_groups_are_not_bound_where_there_is_one_address_space(vduse: str) -> None:
    with VhostVdpa(vduse) as dev:
        dev.set_owner()
        assert (dev.get_group_num(), dev.get_as_num()) == (1, 1)
        with pytest.raises(KernelError) as refused:
            dev.set_group_asid(0, 1)
        assert refused.value.hint


def _daemon() -> int:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        if b"vduse_net.py" in process.read_bytes():
            return int(process.parent.name)
    raise AssertionError("no daemon")
