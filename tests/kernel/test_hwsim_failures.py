"""Guests, devices and descriptors that die or lie: the cost, which side gets a report, and which queues continue."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import lab
import pytest
from hw_guest import HwGuest, Make

from pyvhostvdpa import State
from pyvhostvdpa._cdefs import lib
from pyvhostvdpa.base.errors import DeviceNeedsReset, KernelError, OutOfOrder, QueueBroken
from pyvhostvdpa.base.uapi import Status
from pyvhostvdpa.guest.nic import NicPair
from pyvhostvdpa.net import control
from pyvhostvdpa.net.config import ANNOUNCE, NetConfig
from pyvhostvdpa.net.control import Class
from pyvhostvdpa.net.features import SUPPORTED

MAC = bytes([2, 0, 0, 0, 0, 7])


def is_notified(guest: HwGuest) -> bool:
    """Whether the guest gets an interrupt and then finds NEEDS_RESET in its device's status."""
    while guest.is_interrupted():
        if guest.nic.config.status & Status.NEEDS_RESET:
            return True
    return False


@contextmanager
def closed(fd: int) -> Iterator[None]:
    """Close a descriptor behind its users' back; its number is good again afterwards. Nothing may be opened within."""
    os.close(fd)
    try:
        yield
    finally:
        fresh = os.eventfd(0, os.EFD_NONBLOCK)
        os.dup2(fresh, fd)
        if fresh != fd:
            os.close(fresh)


def still_receives(pair: NicPair, frames: int = 200) -> None:
    goal = pair.counts().received + frames
    lab.wait_for(lambda: pair.counts().received > goal, f"{frames} frames on the other pair", 60)


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_device_that_stops_completing_is_noticed_and_hangs_no_thread(make: Make, mode: State) -> None:
    guest = make(2)
    guest.start(mode)
    guest.use_all_pairs()
    guest.traffic.run()
    guest.receives(100)
    guest.sim.write("fault/stall", "Y")
    lab.wait_for(lambda: guest.device.stalled().get(1, 0) > 1, "the queue to be reported as stalled")
    begin = time.monotonic()
    guest.switch()
    assert time.monotonic() - begin < 10
    guest.sim.write("fault/stall", "N")
    guest.device.stop()
    guest.start()
    guest.receives(100)
    guest.settle()
    assert guest.device.stalled() == {}


def test_a_device_that_lies_in_its_used_ring_breaks_that_queue_alone(make: Make) -> None:
    guest = make(2)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    guest.traffic.run()
    guest.receives(100)
    assert not guest.nic.config.status & Status.NEEDS_RESET
    guest.sim.write("fault/corrupt_used_id", 1)
    lab.wait_for(lambda: any(shadow.broken for shadow in guest.device.shadows), "the queue to be marked broken")
    broken = [shadow.queue.index // 2 for shadow in guest.device.shadows if shadow.broken]
    assert len(broken) == 1
    assert is_notified(guest)
    still_receives(guest.nic.pairs[1 - broken[0]])
    with pytest.raises(QueueBroken, match="device: used id that it was not given"):
        guest.device.check()
    with pytest.raises(QueueBroken):
        guest.device.stop()
    assert guest.nic.config.status & Status.NEEDS_RESET


def test_a_broken_queue_leaves_other_devices_alone(make: Make) -> None:
    first, second = make(), make()
    for guest in (first, second):
        guest.start(State.SHADOW)
        guest.traffic.run()
        guest.receives(100)
    first.sim.write("fault/corrupt_used_id", 1)
    assert is_notified(first)
    for _ in range(2):
        second.receives(200)
        second.switch()
    assert not second.nic.config.status & Status.NEEDS_RESET
    second.settle()


def test_a_guest_that_breaks_its_control_queue_is_reported_and_its_frames_continue(make: Make) -> None:
    guest = make()
    guest.start()
    guest.traffic.run()
    guest.receives(100)
    assert guest.nic.control is not None
    ring = guest.nic.control._driver.ring
    ring.avail.idx = (ring.avail.idx + ring.num + 1) & 0xFFFF
    os.eventfd_write(guest.nic.control.queue.kick, 1)
    assert is_notified(guest)
    with pytest.raises(QueueBroken, match=r"control queue: guest: avail\.idx moved"):
        guest.device.check()
    still_receives(guest.nic.pairs[0])
    guest.settle()


def test_a_guest_is_reported_of_a_device_without_answers(make: Make) -> None:
    guest = make()
    guest.start()
    guest.sim.write("fault/cvq_mute", "Y")
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, MAC) == control.ERR
    assert is_notified(guest)


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_device_that_sets_needs_reset_is_reported_to_the_guest_and_by_check(make: Make, mode: State) -> None:
    guest = make()
    guest.start(mode)
    guest.device.check()
    guest.device.iotlb.space(0).unmap(guest.memory.regions[0].gpa, guest.memory.regions[0].size)
    guest.traffic.run()
    assert is_notified(guest)
    assert guest.sim.read("state")["fault"]
    with pytest.raises(DeviceNeedsReset, match="NEEDS_RESET"):
        guest.device.check()


def test_a_guest_that_resets_starts_again(make: Make) -> None:
    guest = make()
    guest.start(State.SHADOW)
    guest.traffic.run()
    guest.receives(100)
    guest.sim.write("fault/corrupt_used_id", 1)
    assert is_notified(guest)
    guest.traffic.pause()
    with pytest.raises(QueueBroken):
        guest.device.stop()
    guest.nic.config.reset()
    guest.restart_driver()
    guest.start()
    assert not guest.nic.config.status & Status.NEEDS_RESET
    guest.traffic.run()
    guest.receives(200)
    guest.settle()


FACES = {
    "device's kick": lambda guest: guest.device.shadows[0].kick,
    "device's call": lambda guest: guest.device.shadows[0].call,
    "guest's kick": lambda guest: guest.nic.queues[0].kick,
    "guest's call": lambda guest: guest.nic.queues[0].call,
}


@pytest.mark.parametrize("face", FACES)
def test_a_closed_eventfd_breaks_its_queue_alone(make: Make, face: str) -> None:
    guest = make(2)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    victim = guest.device.shadows[0]
    guest.traffic.run()
    guest.receives(50)
    with closed(FACES[face](guest)):
        lab.wait_for(lambda: victim.broken, "the queue to be marked broken")
        assert "eventfd" in victim.broken
        still_receives(guest.nic.pairs[1])
        guest.traffic.pause()
    assert is_notified(guest)
    assert [shadow.broken for shadow in guest.device.shadows[2:]] == ["", ""]


def test_a_closed_eventfd_of_the_control_queue_is_reported(make: Make) -> None:
    guest = make()
    guest.start()
    assert guest.nic.control is not None
    with closed(guest.nic.control.queue.kick):
        assert is_notified(guest)
    with pytest.raises(QueueBroken, match="control queue: an eventfd of the control queue was closed"):
        guest.device.check()
    guest.device.stop()


def test_a_device_is_not_started_with_a_closed_eventfd(make: Make) -> None:
    guest = make(wanted=SUPPORTED)
    with closed(guest.nic.queues[1].kick), pytest.raises(KernelError, match=r"SET_VRING_KICK.*EBADF"):
        guest.start()
    assert guest.device.state is State.RESET
    guest.start()
    guest.traffic.run()
    guest.receives(50)
    guest.settle()


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_a_guest_thread_that_ends_is_seen_and_stops_nothing_else(make: Make, mode: State) -> None:
    guest = make(2)
    guest.start(mode)
    guest.use_all_pairs()
    guest.traffic.run()
    guest.receives(50)
    dead, alive = guest.nic.pairs
    dead.c.stop = 1
    os.eventfd_write(dead.wake, 1)
    lab.wait_for(lambda: guest.traffic.dead == [0], "the thread to be reported as dead")
    still_receives(alive)
    for _ in range(4):
        guest.switch()
        still_receives(alive, 50)
    guest.traffic.pause()
    guest.traffic.run()
    guest.receives(50)
    guest.settle()


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_a_guest_killed_anywhere_leaves_rings_that_a_new_one_can_use(make: Make, mode: State) -> None:
    guest = make(1)
    [pair] = guest.nic.pairs
    ring, chance = pair.c.rx, random.Random(5)
    for _ in range(5):
        guest.restart_driver()
        child = os.fork()
        if child == 0:
            while True:
                lib.nic_run(pair.c, time.monotonic_ns() + 1_000_000_000)
        try:
            guest.start(mode)
            lab.wait_for(lambda: ring.used.idx > 200, "the guest's traffic")
            time.sleep(chance.random() / 100)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        guest.device.check()
        try:
            guest.device.stop()
        except OutOfOrder:
            # it died between writing a slot and publishing it
            assert mode is State.PASSTHROUGH
            guest.device.reset()
        assert guest.device.state is State.RESET
    guest.restart_driver()
    guest.start(mode)
    guest.traffic.run()
    guest.receives(100)
    guest.settle()


# -- what else the guest is notified of -------------------------------------------


def test_a_guest_is_interrupted_when_its_link_changes(make: Make) -> None:
    guest = make()
    for mode in (State.PASSTHROUGH, State.SHADOW):
        guest.start(mode)
        while guest.is_interrupted(0.2):
            pass
        for up in (0, 1):
            guest.sim.write("link", up)
            assert guest.is_interrupted()
            assert NetConfig.parse(guest.nic.config.read(), guest.device.features).link_up is bool(up)
        guest.device.stop()


def test_a_guest_that_moved_is_asked_to_announce_itself_until_it_has(make: Make) -> None:
    guest = make()
    with guest.destination() as destination:
        guest.start()
        assert guest.send(Class.MAC, control.MAC_ADDR_SET, MAC) == control.OK
        guest.switch()
        while guest.is_interrupted(0.2):
            assert not announce_wanted(guest)
        guest.move(destination)
        assert guest.is_interrupted()
        assert announce_wanted(guest)
        assert guest.nic.config.read()[:6] == MAC
        commands = destination.read("stats")["cvq_command"]
        assert guest.send(Class.ANNOUNCE, control.ANNOUNCE_ACK) == control.OK
        assert not announce_wanted(guest)
        assert destination.read("stats")["cvq_command"] == commands, "it is answered by us"
        guest.switch()
        assert not announce_wanted(guest)


def announce_wanted(guest: HwGuest) -> bool:
    return bool(int.from_bytes(guest.nic.config.read()[6:8], "little") & ANNOUNCE)
