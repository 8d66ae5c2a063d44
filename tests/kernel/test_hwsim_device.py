"""vdpa_hwsim where it differs from a device that forgives: early kicks, maps during a change, costs of rings."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hwsim
import lab
import pytest
import unharmed
from hw_guest import HwGuest, Make

from pyvhostvdpa import State
from pyvhostvdpa._cdefs import lib
from pyvhostvdpa.base.errors import KernelError
from pyvhostvdpa.base.uapi import BackendFeature, Status
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.net import control
from pyvhostvdpa.net.control import Class, command
from pyvhostvdpa.net.control_queue import ControlQueue
from pyvhostvdpa.net.features import CONTROL, SUPPORTED

MAC = bytes([2, 0, 0, 0, 0, 9])
GIB = 1 << 30
OWN = 1
BASE, FAR = 0x4000_0000_0000, 0x4100_0000_0000
PAGE, RING, MEMORY, SCALE = 4 << 10, 64 << 10, 4 << 20, 16
MUCH = 128 << 20
LOOK_S = 0.4
"""How long a queue is watched that should not be looked at; one that is looked at takes milliseconds."""


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """The kernel has nothing to report in its log."""
    with unharmed.watched_kernel():
        yield


# -- the control queue is served at a kick, and at nothing else (mlx5_vdpa_kick_vq) ------------


def control_of(guest: HwGuest) -> ControlQueue:
    queue = guest.device._procedure._control
    assert queue is not None
    return queue


def post(queue: ControlQueue) -> None:
    """Put a command into the device's ring, and kick."""
    data = command(Class.MAC, control.MAC_ADDR_SET, MAC)
    area, driver = queue.area, queue._driver
    queue._commands[: len(data)] = data
    assert lib.ctrl_driver_add(driver, area.iova + area.commands, len(data), area.iova + area.answers) >= 0
    lib.ctrl_driver_kick(driver)


def commands(guest: HwGuest) -> int:
    return int(guest.sim.read("stats")["cvq_command"])


def is_answered_at_the_next_kick_only(guest: HwGuest, queue: ControlQueue, before: int) -> None:
    time.sleep(LOOK_S)
    assert commands(guest) == before, "the command was looked at without a kick"
    os.eventfd_write(queue.kick, 1)
    lab.wait_for(lambda: commands(guest) == before + 1, "the command to be answered")
    assert guest.sim.read("state")["mac"] == MAC.hex(":")


def test_command_kicked_before_its_queue_is_enabled_waits_for_the_next_kick(make: Make) -> None:
    guest = make()
    guest.start()
    queue, before = control_of(guest), commands(guest)
    guest.device.chardev.set_vring_enable(queue.queue.index, False)
    post(queue)
    guest.device.chardev.set_vring_enable(queue.queue.index, True)
    is_answered_at_the_next_kick_only(guest, queue, before)


def test_command_kicked_before_driver_ok_waits_for_the_next_kick(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = make()
    set_status = guest.device.chardev.set_status

    def kick_too_early(status: Status) -> None:
        if status & Status.DRIVER_OK:
            post(control_of(guest))
            time.sleep(LOOK_S)
        set_status(status)

    monkeypatch.setattr(guest.device.chardev, "set_status", kick_too_early)
    monkeypatch.setattr(ControlQueue, "replay", lambda queue: is_answered_at_the_next_kick_only(guest, queue, 0))
    guest.start()


def test_command_kicked_during_a_suspension_waits_for_the_next_kick(make: Make) -> None:
    guest = make()
    guest.start()
    queue, before, chardev = control_of(guest), commands(guest), guest.device.chardev
    chardev.suspend()
    post(queue)
    chardev.resume()
    time.sleep(LOOK_S)
    chardev.set_vring_enable(queue.queue.index, True)
    is_answered_at_the_next_kick_only(guest, queue, before)


def test_device_that_resumes_its_control_queue_answers_what_was_kicked_meanwhile(make: Make) -> None:
    guest = make(resume_cvq="Y")
    guest.start()
    queue, before, chardev = control_of(guest), commands(guest), guest.device.chardev
    chardev.suspend()
    post(queue)
    time.sleep(LOOK_S)
    assert commands(guest) == before
    chardev.resume()
    lab.wait_for(lambda: commands(guest) == before + 1, "the command to be answered")


def test_control_queue_is_not_looked_at_when_maps_change(make: Make) -> None:
    guest = make()
    guest.start()
    for cost in ("suspend", "resume"):
        guest.sim.write(f"cost/{cost}_ns", 1_000_000)
    queue, before = control_of(guest), commands(guest)
    guest.device.chardev.set_vring_enable(queue.queue.index, False)
    post(queue)
    guest.device.chardev.set_vring_enable(queue.queue.index, True)
    with SharedMemory("piece", RING) as memory:
        space = guest.device.iotlb.space(OWN)
        space.map(FAR, memory.hva, RING)
        space.unmap(FAR, RING)
        is_answered_at_the_next_kick_only(guest, queue, before)


def test_control_queue_has_to_be_enabled_again_after_a_resume(make: Make) -> None:
    guest = make()
    guest.start()
    queue, before, chardev = control_of(guest), commands(guest), guest.device.chardev
    chardev.suspend()
    chardev.resume()
    post(queue)
    time.sleep(LOOK_S)
    assert commands(guest) == before
    chardev.set_vring_enable(queue.queue.index, True)
    is_answered_at_the_next_kick_only(guest, queue, before)


def test_queues_that_come_into_use_are_looked_at(make: Make) -> None:
    """Their driver kicked before the relay listened, and waits."""
    guest = make(2)
    guest.start()
    guest.traffic.run()
    first, second = guest.nic.pairs
    lab.wait_for(lambda: first.counts().received > 50, "frames on the first pair")
    time.sleep(LOOK_S)
    assert second.counts().received == 0
    guest.use_all_pairs()
    guest.receives(50, 20.0)
    guest.settle()


# -- maps while they change --------------------------------------------------------------------


def in_background(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_table_in_use_keeps_its_page_references_while_its_successor_is_built(make: Make) -> None:
    guest = make()
    guest.start()
    guest.sim.write("cost/set_map_ns", 1_000_000_000)
    with SharedMemory("piece", RING) as memory:
        space = guest.device.iotlb.space(0)
        mapping = in_background(lambda: space.map(FAR, memory.hva, RING))
        seen = []
        while mapping.is_alive():
            state = guest.sim.read("state")
            seen.append((state["as0.entries"], state["as0.referenced"]))
        mapping.join()
        assert len(seen) > 2
        assert [entries for entries, referenced in seen if entries != referenced] == []
        guest.sim.write("cost/set_map_ns", 0)
        space.unmap(FAR, RING)
    state = guest.sim.read("state")
    assert state["as0.entries"] == state["as0.referenced"] != "0"


def available() -> int:
    """Return how many bytes of memory are available (MemAvailable)."""
    return int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) << 10


def test_pages_are_free_again_once_nothing_maps_them() -> None:
    """Each change of the maps beside them hands their references over: one too many, and they stay for ever."""
    before = available()
    sim = hwsim.add("hw0")
    guest = HwGuest(sim, 1, SUPPORTED, BackendFeature(0), memory=MUCH)
    with SharedMemory("piece", RING) as memory:
        space = guest.device.iotlb.space(0)
        for _ in range(3):
            space.map(FAR, memory.hva, RING)
            space.unmap(FAR, RING)
        assert available() < before - MUCH // 2
        guest.close()
    hwsim.remove(sim.name)
    lab.wait_for(lambda: available() > before - MUCH // 2, "the guest's memory to be free")


def test_reset_that_cannot_drop_its_maps_is_reported(make: Make) -> None:
    guest = make(without=BackendFeature.IOTLB_PERSIST)
    guest.sim.write("reset_stats", 1)
    guest.sim.write("fault/fail_clean_map", 1)
    with pytest.raises(KernelError, match="EIO"):
        guest.device.chardev.set_status(Status(0))
    state, stats = guest.sim.read("state"), guest.sim.read("stats")
    assert stats["reset_clean_map_errors"] == "1"
    assert state["as0.entries"] != "0", "the maps are still there"
    guest.device.chardev.set_status(Status(0))
    assert guest.sim.read("state")["as0.entries"] == "0"


def test_failure_of_one_address_space_leaves_no_other_uncleaned(make: Make) -> None:
    guest = make(without=BackendFeature.IOTLB_PERSIST)
    with SharedMemory("piece", RING) as memory:
        guest.device.iotlb.space(OWN).map(FAR, memory.hva, RING)
        guest.sim.write("fault/fail_clean_map", 1)
        with pytest.raises(KernelError, match="EIO"):
            guest.device.chardev.set_status(Status(0))
        assert guest.sim.read("state")["as1.entries"] == "0"


# -- mem_scale: guest memory only --------------------------------------------------------------


def charge(guest: HwGuest, operation: str, act: Callable[[], Any]) -> int:
    """What an operation was charged for ``act``, in ns; with costs of 1 s a GiB that is about one for each byte."""
    guest.sim.write("reset_stats", 1)
    act()
    return int(guest.sim.read("stats")[f"{operation}_charged_ns"])


@pytest.mark.parametrize("operation", ["set_map", "dma_map"])
def test_mem_scale_charges_guest_memory_so_many_times_and_a_ring_once(make: Make, operation: str) -> None:
    by_piece = operation == "dma_map"
    guest = make(mem_scale=SCALE, dma_map="Y" if by_piece else "N")
    away = "dma_unmap" if by_piece else "set_map"
    for cost in ("map_gib", "unmap_gib"):
        guest.sim.write(f"cost/{cost}_ns", GIB)
    space = guest.device.iotlb.space(OWN)
    with SharedMemory("piece", MEMORY) as memory:
        for iova, size, meant in ((FAR, RING, RING), (BASE, MEMORY, MEMORY * SCALE)):
            assert charge(guest, operation, lambda: space.map(iova, memory.hva, size)) == meant  # noqa: B023
        for iova, size, meant in ((FAR, RING, RING), (BASE, MEMORY, MEMORY * SCALE)):
            assert charge(guest, away, lambda: space.unmap(iova, size)) == meant  # noqa: B023


def test_piece_that_turns_out_to_be_guest_memory_is_charged_as_such_when_it_does(make: Make) -> None:
    guest = make(mem_scale=SCALE, dma_map="Y")
    guest.sim.write("cost/map_gib_ns", GIB)
    space = guest.device.iotlb.space(OWN)
    with SharedMemory("pieces", MEMORY) as memory:
        begun = charge(guest, "dma_map", lambda: space.map(BASE, memory.hva, RING))
        rest = charge(guest, "dma_map", lambda: space.map(BASE + RING, memory.hva + RING, MEMORY - RING))
        assert (begun, begun + rest) == (RING, MEMORY * SCALE)


def test_pinning_for_a_map_that_fails_is_charged(make: Make) -> None:
    """vhost-vdpa has pinned it by then. It asks for each run of physical pages on its own: this is one."""
    guest = make()
    guest.sim.write("cost/map_gib_ns", GIB)
    space = guest.device.iotlb.space(OWN)
    with SharedMemory("page", PAGE) as memory:

        def fail() -> None:
            guest.sim.write("fault/fail_set_map", 1)
            with pytest.raises(KernelError):
                space.map(BASE, memory.hva, PAGE)

        assert charge(guest, "set_map", fail) == PAGE


def test_ring_right_behind_guest_memory_is_not_part_of_it(make: Make) -> None:
    guest = make(mem_scale=SCALE)
    guest.sim.write("cost/map_gib_ns", GIB)
    space = guest.device.iotlb.space(OWN)
    with SharedMemory("piece", 2 * MEMORY) as memory:
        space.map(BASE, memory.hva, MEMORY)
        assert charge(guest, "set_map", lambda: space.map(BASE + MEMORY, memory.hva, RING)) == RING
        assert guest.sim.read("state")["as1.guest"] == str(MEMORY)
        guest.sim.write("cost/map_gib_ns", 0)
        guest.sim.write("cost/set_map_gib_ns", GIB)
        built = charge(guest, "set_map", lambda: space.map(BASE - RING, memory.hva, RING))
        assert built == MEMORY * SCALE + 2 * RING
        more = BASE + MEMORY + RING
        built = charge(guest, "set_map", lambda: space.map(more, memory.hva, MEMORY))
        assert guest.sim.read("state")["as1.guest"] in (str(2 * MEMORY), str(2 * MEMORY + RING))
        assert built >= 2 * MEMORY * SCALE
        for iova, size in ((BASE - RING, RING), (BASE, MEMORY), (BASE + MEMORY, RING), (more, MEMORY)):
            space.unmap(iova, size)
        assert guest.sim.read("state")["as1.guest"] == "0"


def test_guest_memory_and_rings_mapped_at_once_are_distinguished(make: Make) -> None:
    guest = make(mem_scale=SCALE)
    guest.sim.write("cost/map_gib_ns", GIB)

    def both() -> None:
        with guest.device.iotlb.space(OWN).batch() as batch:
            batch.map(BASE, memory.hva, MEMORY)
            batch.map(BASE + 2 * MEMORY, memory.hva, RING)

    with SharedMemory("piece", MEMORY) as memory:
        assert charge(guest, "set_map", both) == MEMORY * SCALE + RING


def test_start_in_shadow_costs_its_rings_the_same_whatever_the_scale(make: Make) -> None:
    """The rings of all queues, in the descriptor group's address space: nothing of it is guest memory."""
    charged = []
    for scale in (1, 1024):
        guest = make(4, mem_scale=scale)
        for cost in ("map_gib", "set_map_gib"):
            guest.sim.write(f"cost/{cost}_ns", GIB)
        charged.append(charge(guest, "set_map", lambda: guest.start(State.SHADOW)))  # noqa: B023
        for cost in ("map_gib", "set_map_gib"):
            guest.sim.write(f"cost/{cost}_ns", 0)
    assert charged[0] == charged[1] > 0


def test_close_unpins_guest_memory_by_the_scale_and_rings_once(make: Make) -> None:
    guest = make(mem_scale=SCALE)
    whole = sum(region.size for region in guest.memory.regions)
    with SharedMemory("piece", RING) as memory:
        guest.device.iotlb.space(OWN).map(FAR, memory.hva, RING)
        guest.sim.write("cost/unmap_gib_ns", 1 << 20)
        assert charge(guest, "reset_map", guest.device.close) == (whole * SCALE + RING) >> 10


# -- a wire, which is cut when one of its ends is deleted ---------------------------------------


def test_wired_device_that_is_deleted_while_it_is_open_does_not_loop_frames_back() -> None:
    guest = HwGuest(hwsim.add("leaving", wire="Y"), 1, SUPPORTED | CONTROL, BackendFeature(0))
    with subprocess.Popen(["vdpa", "dev", "del", "leaving"]) as deletion:
        try:
            # it waits for the process that has the device open
            time.sleep(LOOK_S)
            guest.start()
            guest.traffic.run()
            lab.wait_for(lambda: guest.nic.counts().sent > 0, "the guest to send")
            time.sleep(LOOK_S)
            assert deletion.poll() is None
            assert guest.nic.counts().received == 0
        finally:
            guest.close()
    assert deletion.returncode == 0
