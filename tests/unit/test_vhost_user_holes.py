"""Memory with a hole is taken from the device and given back: what is left if that fails half way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from served_double import ServedDouble
from session_rig import running
from vhost_front_end import MiB

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.vhost_user.mapped import DeviceMemory
from pyvhostvdpa.vhost_user.memory import FrontEndMemory, SharedRegion


@contextmanager
def two_regions() -> Iterator[tuple[ServedDouble, DeviceMemory, list[SharedRegion], int]]:
    """A device with two regions of a file, which could not be given back after a hole."""
    device = ServedDouble(Trace())
    mapped = DeviceMemory(device, FrontEndMemory())
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 3 * MiB)
    key = (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
    regions = [SharedRegion(at, MiB, at, at, key) for at in (0, MiB, 2 * MiB)]
    mapped.change((), [(region, fd) for region in regions[:2]])
    device.fails["add_memory"] = VhostVdpaError("no more entries")
    with pytest.raises(VhostVdpaError):
        mapped.map_again()
    assert not device.regions
    device.forget()
    yield device, mapped, regions, fd
    os.close(fd)


def test_memory_that_could_not_be_mapped_again_is_taken_away_without_the_device() -> None:
    """The next front-end is refused as long as the memory of the one before cannot be taken away."""
    with two_regions() as (device, mapped, _, _):
        mapped.drop()
        assert not device.calls
        assert not mapped.shared.regions


def test_memory_that_could_not_be_mapped_again_is_before_the_device_starts() -> None:
    with two_regions() as (device, mapped, regions, _):
        device.fails["add_memory"] = VhostVdpaError("still no more entries")
        with pytest.raises(VhostVdpaError):
            mapped.complete()
        mapped.complete()
        assert sorted(device.regions) == [region.gpa for region in regions[:2]]
        device.forget()
        mapped.complete()
        assert not device.calls


def test_memory_that_could_not_be_mapped_again_can_go_and_come() -> None:
    with two_regions() as (device, mapped, regions, fd):
        mapped.change(regions[:1], [(regions[2], fd)])
        mapped.complete()
        assert sorted(device.regions) == sorted(region.gpa for region in mapped.shared.regions) == [MiB, 2 * MiB]
        mapped.map_again()
        mapped.drop()
        assert not device.regions


def test_device_that_lost_its_memory_over_a_hole_has_it_when_the_guest_starts_again() -> None:
    with running() as r:
        r.backend.mapped.lost = lambda: 4096  # type: ignore[method-assign]
        regions = set(r.device.regions)
        r.device.fails["add_memory"] = VhostVdpaError("no more entries")
        r.backend.look_for_holes()
        assert "map again" in r.backend.failed
        r.backend.start(r.device.queues, {}, 1)
        assert set(r.device.regions) == regions
        assert not r.backend.failed
