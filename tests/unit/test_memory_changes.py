"""Guest memory that comes and goes below a device, and the log of what it writes, against a double of the door."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from door_double import DoorDouble, Fault
from waiting import wait_for

from pyvhostvdpa import FileRegion, GuestMemory, MapRejected, MissingFeature, SharedLog, State, VdpaNetDevice
from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.device.shadowing import FULL
from pyvhostvdpa.guest.nic import GuestNic
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GUEST_PAGE
from pyvhostvdpa.memory.log import log_size
from pyvhostvdpa.net.features import SUPPORTED
from pyvhostvdpa.virtqueue.layout import map_queue

MiB = 1 << 20
WITHOUT_DESC_ASID = ALL_BACKEND_FEATURES & ~BackendFeature.DESC_ASID
WITHOUT_PERSIST = ALL_BACKEND_FEATURES & ~BackendFeature.IOTLB_PERSIST
RUNNING = [State.PASSTHROUGH, State.SHADOW]

Open = Callable[..., VdpaNetDevice]


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 16 * MiB)
    yield fd
    os.close(fd)


def spaces(door: DoorDouble) -> dict[int, int]:
    """What the device has in address space 0: IOVA to bytes."""
    return {iova: size for iova, (size, _) in door.device_maps[0].items()}


def names_since(door: DoorDouble, before: int) -> list[str]:
    return [call.name for call in door.calls[before:] if call.name.startswith("IOTLB")]


@pytest.mark.parametrize("advertised", [ALL_BACKEND_FEATURES, WITHOUT_DESC_ASID, WITHOUT_PERSIST])
@pytest.mark.parametrize("mode", RUNNING)
def test_regions_added_before_the_start_are_mapped_in_one_batch(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, ram: int, mode: State, advertised: Any
) -> None:
    device = opened(advertised, SUPPORTED)
    device.attach(memory)
    door, before = doors[0], len(doors[0].calls)
    for at in range(4):
        device.add_memory([FileRegion(at * 2 * MiB, MiB, ram, at * MiB)])
    assert len(door.calls) == before
    assert [region.gpa for region in memory.regions] == [0, 2 * MiB, 4 * MiB, 6 * MiB, DEFAULT_GPA]
    device.map_memory()
    assert names_since(door, before) == ["IOTLB_BATCH_BEGIN", *["IOTLB_UPDATE"] * 4, "IOTLB_BATCH_END"]
    device.start(mode, nic.queues)
    guest = {region.gpa: region.size for region in memory.regions}
    assert {iova: size for iova, size in spaces(door).items() if iova in guest} == guest
    assert not door.unreachable_rings()


def test_regions_collected_are_mapped_by_the_start_and_by_standing_by(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, ram: int
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    device.add_memory([FileRegion(0, MiB, ram)])
    device.stand_by(nic.queues)
    assert 0 in spaces(doors[0])
    device.start(State.PASSTHROUGH, nic.queues)
    device.stop()
    # the device is suspended: memory comes to it as it is
    resets = doors[0].resets
    device.add_memory([FileRegion(2 * MiB, MiB, ram, MiB)])
    device.start(State.PASSTHROUGH, nic.queues)
    assert 2 * MiB in spaces(doors[0])
    assert doors[0].resets == resets


def test_empty_memory_is_attached_and_filled_later(opened: Open, doors: list[DoorDouble], ram: int) -> None:
    device = opened()
    with GuestMemory.empty() as memory:
        device.attach(memory)
        device.negotiate(SUPPORTED)
        device.add_memory([FileRegion(0, MiB, ram), FileRegion(4 * MiB, MiB, ram, MiB)])
        device.map_memory()
        assert spaces(doors[0]) == {0: MiB, 4 * MiB: MiB}
        device.remove_memory([(0, MiB), (4 * MiB, MiB)])
        assert spaces(doors[0]) == {}
        device.close()


@pytest.mark.parametrize("advertised", [ALL_BACKEND_FEATURES, WITHOUT_DESC_ASID, WITHOUT_PERSIST])
@pytest.mark.parametrize("mode", RUNNING)
def test_region_comes_to_a_running_device_at_once_and_goes(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, ram: int, mode: State, advertised: Any
) -> None:
    device = opened(advertised, SUPPORTED)
    device.attach(memory)
    device.start(mode, nic.queues)
    door, before = doors[0], len(doors[0].calls)
    ours = spaces(door)
    new = 2 * DEFAULT_GPA
    device.add_memory([FileRegion(new, MiB, ram)])
    assert spaces(door) == {**ours, new: MiB}
    assert memory.hva(new, MiB)
    device.remove_memory([(new, MiB)])
    assert spaces(door) == ours
    assert names_since(door, before).count("IOTLB_BATCH_BEGIN") == 2
    with pytest.raises(ValueError, match="is not guest memory"):
        memory.hva(new)
    device.stop()
    device.start(mode, nic.queues)
    assert new not in spaces(door)


@pytest.mark.parametrize("mode", RUNNING)
def test_memory_with_the_rings_of_a_running_queue_stays(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, mode: State
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    device.start(mode, nic.queues)
    before = len(doors[0].calls)
    with pytest.raises(MissingFeature, match=r"virtqueues \[0, 1, 2, 3\] are running with their rings"):
        device.remove_memory([(DEFAULT_GPA, 2 * MiB)])
    assert len(doors[0].calls) == before


def test_memory_with_the_rings_of_a_suspended_device_goes_and_the_bases_stay(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    ring = ffi.new("struct vring *")
    map_queue(ring, nic.queues[2], memory)
    ring.avail.idx = ring.used.idx = 77
    device.start(State.PASSTHROUGH, nic.queues)
    device.stop()
    assert doors[0].suspended
    device.remove_memory([(DEFAULT_GPA, 2 * MiB)])
    assert not doors[0].status
    assert doors[0].device_maps == [{}, {}]
    assert device.bases() == {0: 0, 1: 0, 2: 77, 3: 0}
    device.close()


def test_memory_of_two_devices_does_not_change_below_one_of_them(opened: Open, memory: GuestMemory, ram: int) -> None:
    device, other = opened(wanted=SUPPORTED), opened(wanted=SUPPORTED)
    device.attach(memory)
    other.attach(memory)
    with pytest.raises(MissingFeature, match="guest memory of 2 devices"):
        device.add_memory([FileRegion(0, MiB, ram)])
    with pytest.raises(MissingFeature, match="guest memory of 2 devices"):
        other.remove_memory([(DEFAULT_GPA, 2 * MiB)])
    other.close()
    other.close()
    device.add_memory([FileRegion(0, MiB, ram)])


@pytest.mark.parametrize("place", ["overlap", "hole"])
def test_region_that_cannot_come_changes_nothing(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, ram: int, place: str
) -> None:
    device = opened(WITHOUT_DESC_ASID, SUPPORTED)
    device.attach(memory)
    device.start(State.SHADOW, nic.queues)
    before, regions, fds = len(doors[0].calls), memory.regions, len(os.listdir("/proc/self/fd"))
    ours = min(iova for iova in spaces(doors[0]) if iova != DEFAULT_GPA)
    if place == "overlap":
        with pytest.raises(ValueError, match="overlap"):
            device.add_memory([FileRegion(DEFAULT_GPA + MiB, MiB, ram)])
    else:
        with pytest.raises(MapRejected, match="collides with shadow rings") as refused:
            device.add_memory([FileRegion(ours, MiB, ram)])
        assert "stop() the device" in str(refused.value.hint)
    assert (len(doors[0].calls), memory.regions, len(os.listdir("/proc/self/fd"))) == (before, regions, fds)
    # when the device has stopped, our rings move aside
    device.stop()
    device.add_memory([FileRegion(ours, MiB, ram)] if place == "hole" else [])
    device.start(State.SHADOW, nic.queues)
    assert not doors[0].unreachable_rings()


def test_map_that_fails_leaves_memory_as_it_was(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, ram: int
) -> None:
    for at in range(1, 5):
        device = opened(wanted=SUPPORTED)
        device.attach(memory)
        device.start(State.SHADOW, nic.queues)
        door = doors[-1]
        had, regions = spaces(door), memory.regions
        door.fault = Fault(at, errno.ENOMEM)
        with pytest.raises(OSError, match="IOTLB"):
            device.add_memory([FileRegion(0, MiB, ram), FileRegion(2 * MiB, MiB, ram, MiB)])
        assert (spaces(door), memory.regions, door.batch_asid) == (had, regions, None)
        device.add_memory([FileRegion(0, MiB, ram)])
        device.remove_memory([(0, MiB)])
        device.stop()
        device.close()


def test_shadowed_buffers_in_flight_keep_their_region_and_are_found_again(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, ram: int
) -> None:
    device = opened(wanted=SUPPORTED, shadow=FULL)
    device.attach(memory)
    memory.start_dirty_log()
    buffers = 2 * DEFAULT_GPA
    device.add_memory([FileRegion(buffers, MiB, ram)])
    device.start(State.SHADOW, nic.queues)
    shadow: Any = device.shadows[1]
    ring = ffi.new("struct vring *")
    map_queue(ring, nic.queues[1], memory)
    ring.desc[0].addr, ring.desc[0].len, ring.desc[0].flags = buffers + GUEST_PAGE, 8, lib.VRING_DESC_F_WRITE
    ring.avail.ring[0], ring.avail.idx = 0, 1
    os.eventfd_write(nic.queues[1].kick, 1)
    wait_for(lambda: shadow.c.forwarded == 1, 5.0)
    with pytest.raises(MissingFeature, match="virtqueue 1 has buffers in guest memory"):
        device.remove_memory([(buffers, MiB)])
    # two regions before it: it has another number now
    device.add_memory([FileRegion(0, MiB, ram, MiB), FileRegion(2 * MiB, MiB, ram, 2 * MiB)])
    device_ring = shadow.c.device
    device_ring.used.ring[0].id, device_ring.used.ring[0].len, device_ring.used.idx = 0, 8, 1
    os.eventfd_write(shadow.call, 1)
    wait_for(lambda: shadow.c.returned == 1, 5.0)
    assert buffers + GUEST_PAGE in memory.dirty_pages()
    device.remove_memory([(buffers, MiB)])
    device.stop()


# -- the log ---------------------------------------------------------------------


@pytest.fixture
def bitmaps(memory: GuestMemory) -> Iterator[list[int]]:
    made = [os.memfd_create(f"log{number}") for number in range(2)]
    for fd in made:
        os.ftruncate(fd, log_size(memory))
    yield made
    for fd in made:
        os.close(fd)


def pages_in(fd: int) -> set[int]:
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    return {
        (8 * at + bit) * GUEST_PAGE for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1
    }


def used_pages(nic: GuestNic) -> set[int]:
    places = [queue.parts[2] for queue in nic.queues]
    return {page // GUEST_PAGE * GUEST_PAGE for gpa, size in places for page in (gpa, gpa + size - 1)}


def test_rings_that_a_device_used_itself_are_in_the_log_when_it_has_stopped(
    opened: Open, memory: GuestMemory, nic: GuestNic, bitmaps: list[int]
) -> None:
    device = opened(wanted=SUPPORTED)
    with pytest.raises(MissingFeature, match=r"attach\(\) guest memory first"):
        device.set_log(None)
    device.attach(memory)
    with SharedLog(memory, bitmaps[0], log_size(memory)) as log:
        device.set_log(log)
        device.start(State.PASSTHROUGH, nic.queues)
        assert not pages_in(bitmaps[0])
        device.stop()
        assert pages_in(bitmaps[0]) == used_pages(nic)
        device.set_log(None)


def test_log_without_a_thread_to_serve_it_is_not_taken(
    opened: Open, memory: GuestMemory, nic: GuestNic, bitmaps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    with SharedLog(memory, bitmaps[0], log_size(memory)) as log, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(MissingFeature, match="can't start new thread"):
            device.set_log(log)
    device.start(State.PASSTHROUGH, nic.queues)
    device.stop()
    with SharedLog(memory, bitmaps[1], log_size(memory)) as log:
        device.set_log(log)
        device.start(State.PASSTHROUGH, nic.queues)
        device.stop()
        assert pages_in(bitmaps[1]) == used_pages(nic)
        device.set_log(None)


@pytest.mark.parametrize("mode", RUNNING)
def test_log_is_replaced_while_the_device_runs_and_the_old_one_gets_not_one_bit_more(
    opened: Open, memory: GuestMemory, nic: GuestNic, bitmaps: list[int], mode: State
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    device.start(mode, nic.queues)
    first, second = (SharedLog(memory, fd, log_size(memory)) for fd in bitmaps)
    device.set_log(first)
    lib.memory_mark(memory.c_map, DEFAULT_GPA, 1)
    wait_for(lambda: DEFAULT_GPA in pages_in(bitmaps[0]), 5.0)
    lib.memory_mark(memory.c_map, DEFAULT_GPA + GUEST_PAGE, 1)
    device.set_log(second)
    first.close()
    had = pages_in(bitmaps[0])
    lib.memory_mark(memory.c_map, DEFAULT_GPA + 2 * GUEST_PAGE, 1)
    device.stop()
    assert pages_in(bitmaps[0]) == had
    assert {DEFAULT_GPA + GUEST_PAGE, DEFAULT_GPA + 2 * GUEST_PAGE} <= pages_in(bitmaps[0]) | pages_in(bitmaps[1])
    assert DEFAULT_GPA + 2 * GUEST_PAGE in pages_in(bitmaps[1])
    assert (used_pages(nic) <= pages_in(bitmaps[1])) or mode is State.SHADOW
    device.set_log(None)
    second.close()


def test_log_that_ended_has_the_last_marks_and_marking_has_ended(
    opened: Open, memory: GuestMemory, nic: GuestNic, bitmaps: list[int]
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    with SharedLog(memory, bitmaps[0], log_size(memory)) as log:
        device.set_log(log)
        lib.memory_mark(memory.c_map, DEFAULT_GPA, 1)
        device.set_log(None)
        assert pages_in(bitmaps[0]) == {DEFAULT_GPA}
    lib.memory_mark(memory.c_map, DEFAULT_GPA + GUEST_PAGE, 1)
    assert memory.dirty_pages() == []
    device.start(State.PASSTHROUGH, nic.queues)
    device.stop()
    assert pages_in(bitmaps[0]) == {DEFAULT_GPA}


def test_memory_that_the_log_has_no_bits_for_is_refused_until_the_log_is_larger(
    opened: Open, memory: GuestMemory, nic: GuestNic, bitmaps: list[int], ram: int
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    device.start(State.SHADOW, nic.queues)
    device.set_log(SharedLog(memory, bitmaps[0], log_size(memory)))
    new = 2 * DEFAULT_GPA
    with pytest.raises(MissingFeature, match="the dirty log has"):
        device.add_memory([FileRegion(new, MiB, ram)])
    os.ftruncate(bitmaps[1], (new + MiB) // GUEST_PAGE // 8)
    larger = SharedLog(memory, bitmaps[1], os.fstat(bitmaps[1]).st_size)
    device.set_log(larger)
    device.add_memory([FileRegion(new, MiB, ram)])
    lib.memory_mark(memory.c_map, new + MiB - 1, 1)
    wait_for(lambda: new + MiB - GUEST_PAGE in pages_in(bitmaps[1]), 5.0)
    device.remove_memory([(new, MiB)])
    lib.memory_mark(memory.c_map, DEFAULT_GPA, 1)
    wait_for(lambda: DEFAULT_GPA in pages_in(bitmaps[1]), 5.0)
    device.set_log(None)
    assert len(memory.regions) == 1
