"""Shadow virtqueues on a real device, under traffic."""

from __future__ import annotations

import threading
from types import FrameType
from typing import Any

import pytest
from conftest import RunningGuest

from pyvhostvdpa import QueueBroken, State
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.chardev.iotlb import GuestMapping
from pyvhostvdpa.memory.guest import PAGE_SIZE


def to_shadow(guest: RunningGuest) -> None:
    guest.device.stop()
    guest.device.start_shadow(guest.nic.queues)


def to_passthrough(guest: RunningGuest) -> None:
    guest.device.stop()
    guest.device.start_passthrough(guest.nic.queues)


def switch_back_and_forth(guest: RunningGuest, times: int) -> None:
    device = guest.device
    device.start_passthrough(guest.nic.queues)
    guest.traffic.run()
    guest.receives()
    for _ in range(times):
        to_shadow(guest)
        assert device.state is State.SHADOW
        guest.receives(200)
        device.check()
        to_passthrough(guest)
        assert device.state is State.PASSTHROUGH
        guest.receives(200)
    guest.settle()


def test_traffic_survives_switching_back_and_forth(guest: RunningGuest) -> None:
    switch_back_and_forth(guest, 10)


def test_traffic_survives_on_a_device_that_pins(pinned_guest: RunningGuest) -> None:
    switch_back_and_forth(pinned_guest, 5)


def test_traffic_survives_on_a_device_that_forgets_its_maps_at_reset(forgetful_guest: RunningGuest) -> None:
    switch_back_and_forth(forgetful_guest, 5)


def test_guest_memory_stays_mapped_while_only_rings_come_and_go(guest: RunningGuest) -> None:
    space = guest.device.iotlb.space(0)
    before = space.mappings
    assert space.guest_mapping is GuestMapping.IDENTITY
    guest.device.start_shadow(guest.nic.queues)
    assert set(before) < set(space.mappings)
    assert len(space.mappings) == len(before) + 2 * len(guest.nic.queues)
    guest.device.stop()
    assert space.mappings == before


def test_received_frames_are_dirty(guest: RunningGuest) -> None:
    guest.memory.start_dirty_log()
    guest.device.start_shadow(guest.nic.queues)
    guest.traffic.run()
    guest.receives(2000)
    guest.settle()
    pair = guest.nic.pairs[0].c
    buffers = set(range(pair.rx_gpa, pair.rx_gpa + pair.rx.num * pair.buffer_size, PAGE_SIZE))
    dirty = set(guest.memory.dirty_pages())
    assert buffers <= dirty
    sent = set(range(pair.tx_gpa, pair.tx_gpa + pair.tx.num * pair.buffer_size, PAGE_SIZE))
    assert not sent & dirty


def test_a_guest_that_breaks_its_ring_is_stopped_and_the_device_can_be_used_again(guest: RunningGuest) -> None:
    guest.device.start_shadow(guest.nic.queues)
    guest.traffic.run()
    guest.receives()
    guest.traffic.pause()
    ring: Any = guest.nic.pairs[0].c.tx
    ring.desc[0].addr = 0x1000
    ring.avail.ring[ring.avail.idx % ring.num] = 0
    ring.avail.idx = (ring.avail.idx + 1) & 0xFFFF
    for queue in guest.nic.queues:
        with open(queue.kick, "wb", closefd=False, buffering=0) as kick:
            kick.write((1).to_bytes(8, "little"))
    threading.Event().wait(0.5)
    with pytest.raises(QueueBroken, match="virtqueue 1: guest: buffer outside guest memory"):
        guest.device.check()
    with pytest.raises(QueueBroken):
        guest.device.stop()
    assert guest.device.state is State.RESET
    ffi.memmove(guest.nic.pairs[0].c.tx.desc, guest.nic.pairs[0].c.tx.desc, 16)


def test_no_python_runs_per_frame(guest: RunningGuest) -> None:
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    threading.setprofile(count)
    try:
        guest.device.start_shadow(guest.nic.queues)
        guest.traffic.run()
    finally:
        threading.setprofile(None)
    guest.receives(20_000, seconds=60)
    guest.traffic.pause()
    guest.device.stop()
    assert calls > 0
    assert calls < 20_000 / 50
