# SPDX-License-Identifier: MIT
"""Devices that fetch the guest's own descriptors while they are shadowed, and of which only the rings are relayed.

PYVHOSTVDPA_SOAK_SWITCHES (6, in each way) and PYVHOSTVDPA_SOAK_MIGRATIONS (8, in all) say how often:
`tools/lab soak used_relay` has 200 of each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import hwsim
import lab
import pytest
from conftest import NOTHING, RunningGuest
from hw_guest import Make
from test_hwsim import test_every_page_that_changed_while_shadowed_and_that_the_guest_did_not_write_is_dirty as dirty
from test_shadow import switch_back_and_forth
from test_shadow import test_received_frames_are_dirty as received_frames_are_dirty

from pyvhostvdpa import (
    GuestMemory,
    GuestOptions,
    MigrationFailed,
    MigrationOptions,
    OutOfOrder,
    QueueBroken,
    SendOptions,
    State,
    VdpaNetDevice,
    migrate,
)
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.device.shadowing import USED, USED_ALL
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.features import CONTROL, RING, SUPPORTED, Feature

IN_PLACE, DIRECT = "in-place", "direct"
SWITCHES = int(os.environ.get("PYVHOSTVDPA_SOAK_SWITCHES", "6"))
"""In each way."""
MIGRATIONS = int(os.environ.get("PYVHOSTVDPA_SOAK_MIGRATIONS", "8"))
"""In all."""
WAYS = [(USED, IN_PLACE), (USED_ALL, IN_PLACE), (USED, DIRECT), (USED_ALL, DIRECT)]


@contextmanager
def on_vdpa_sim(path: str, shadow: str = USED, without: BackendFeature = NOTHING) -> Iterator[RunningGuest]:
    """A guest attached to a device, not started."""
    use = ALL_BACKEND_FEATURES & ~without
    with GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory, VdpaNetDevice(path, use=use, shadow=shadow) as device:
        device.attach(memory)
        guest = RunningGuest(device, memory)
        assert device.shadow == shadow
        try:
            yield guest
        finally:
            guest.close()


# -- vdpa_sim_net ------------------------------------------------------------------------


@pytest.mark.parametrize("shadow", [USED, USED_ALL])
def test_traffic_survives_switching_on_vdpa_sim(devices: tuple[str, str], shadow: str) -> None:
    with on_vdpa_sim(devices[0], shadow) as guest:
        switch_back_and_forth(guest, 10)


def test_traffic_survives_on_vdpa_sim_that_pins_or_forgets(pinned: tuple[str, str]) -> None:
    with on_vdpa_sim(pinned[0], without=BackendFeature.IOTLB_PERSIST) as guest:
        switch_back_and_forth(guest, 5)


def test_received_frames_are_dirty_on_vdpa_sim(devices: tuple[str, str]) -> None:
    with on_vdpa_sim(devices[0]) as guest:
        received_frames_are_dirty(guest)


def test_a_guest_that_breaks_its_receive_ring_is_stopped(devices: tuple[str, str]) -> None:
    with on_vdpa_sim(devices[0]) as guest:
        guest.device.start_shadow(guest.nic.queues)
        guest.traffic.run()
        guest.receives()
        guest.traffic.pause()
        ring = guest.nic.pairs[0].c.rx
        ring.avail.idx = (ring.avail.idx + ring.num + 1) & 0xFFFF
        with open(guest.nic.queues[0].kick, "wb", closefd=False, buffering=0) as kick:
            kick.write((1).to_bytes(8, "little"))

        def broken() -> bool:
            return bool(guest.device.shadows[0].broken)

        lab.wait_for(broken, "the queue that is given up")
        with pytest.raises(QueueBroken, match=r"virtqueue 0: guest: avail\.idx"):
            guest.device.check()
        with pytest.raises(QueueBroken):
            guest.device.stop()
        assert guest.device.state is State.RESET


# -- vdpa_hwsim --------------------------------------------------------------------------------


@pytest.mark.parametrize(("shadow", "procedure"), WAYS)
@pytest.mark.parametrize("pairs", [1, 4])
def test_traffic_survives_switching(make: Make, shadow: str, procedure: str, pairs: int) -> None:
    guest = make(pairs, procedure=procedure, shadow=shadow, ring_size=64)
    assert (guest.device.shadow, guest.device.procedure.name) == (shadow, procedure)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(6):
        guest.receives(50)
        guest.switch()
        assert [server.through for server in guest.device.shadows] in (
            [] if guest.device.state is State.PASSTHROUGH else [False, shadow == USED] * pairs,
            [],
        )
    guest.receives(50)
    guest.settle()


@pytest.mark.parametrize(("shadow", "procedure"), WAYS)
@pytest.mark.parametrize("base_avail", [0, 1], ids=["base is the used index", "base is the avail index"])
def test_descriptors_held_at_suspend_are_neither_lost_nor_done_twice(
    make: Make, shadow: str, procedure: str, base_avail: int
) -> None:
    """Out of order where both directions are relayed; in order where a device that sends works on the guest's ring."""
    guest = make(4, procedure=procedure, shadow=shadow, inflight=16, base_avail=base_avail)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(SWITCHES // 2):
        guest.receives(60)
        guest.switch()
        if shadow == USED_ALL:
            guest.sim.write("reorder", "Y")
        guest.receives(60)
        guest.sim.write("reorder", "N")
        guest.switch()
    guest.settle()


@pytest.mark.parametrize("pairs", [1, 4])
def test_a_guest_that_sends_too_much_loses_only_frames_without_a_receive_buffer(make: Make, pairs: int) -> None:
    """Frames are sent at once, buffers posted through the relay: a NIC drops what comes when it has none.

    The device counts that. Nothing else is lost.
    """
    guest = make(pairs, procedure=IN_PLACE, shadow=USED, ring_size=64)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(3):
        for pair in guest.nic.pairs:
            # what is lost stays in the window: without more room nothing would be sent some time
            pair.c.window = pair.c.sent - pair.c.received + 16 * pair.rx.num
        guest.receives(50)
        with guest.device._procedure._data_threads_paused():
            goals = [pair.c.received + 2 * pair.rx.num for pair in guest.nic.pairs]
            wanted = list(zip(guest.nic.pairs, goals, strict=True))
            lab.wait_for(lambda wanted=wanted: all(pair.c.sent > goal for pair, goal in wanted), "frames sent")
    guest.traffic.stop_sending(2.0)
    counts = guest.nic.counts()
    print(f"{counts}, the device dropped {guest.dropped()} for want of a buffer")
    assert counts.lost == guest.dropped() > 0
    assert (counts.duplicated, counts.corrupted) == (0, 0)


def test_a_device_that_sends_out_of_order_is_refused_and_continues_shadowed(make: Make) -> None:
    guest = make(2, procedure=IN_PLACE, shadow=USED, inflight=16)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    guest.traffic.run()
    guest.sim.write("reorder", "Y")
    guest.receives(500)
    with pytest.raises(OutOfOrder, match="out of order"):
        guest.device.stop()
    assert guest.device.state is State.SHADOW
    guest.receives(500)
    guest.settle()


@pytest.mark.parametrize("shadow", [USED, USED_ALL])
def test_a_halted_device_leaves_what_was_open(make: Make, shadow: str) -> None:
    guest = make(2, shadow=shadow, inflight=16)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(5):
        guest.switch()
        guest.receives(60)
        guest.device.halt()
        assert guest.device.state is State.RESET
        guest.start()
        guest.receives(60)
    guest.settle()


@pytest.mark.parametrize("ring", [Feature.EVENT_IDX, Feature.INDIRECT_DESC, RING])
def test_ring_features_work_in_both_modes(make: Make, ring: Feature) -> None:
    guest = make(2, SUPPORTED | CONTROL | ring, shadow=USED, extra_features=int(ring))
    assert ring in guest.device.features
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(6):
        guest.receives(300)
        guest.switch()
    guest.settle()


@pytest.mark.parametrize("ring_size", [2, 1024, 32768])
def test_rings_of_any_size_work(make: Make, ring_size: int) -> None:
    guest = make(1, shadow=USED_ALL, ring_size=ring_size, memory=300 << 20, ring_max=32768)
    guest.start(State.SHADOW)
    guest.traffic.run()
    for _ in range(2):
        guest.receives(2000)
        guest.switch()
    guest.receives(2000)
    guest.settle()


@pytest.mark.parametrize("ring", [Feature(0), RING], ids=["plain ring", "indirect tables and event index"])
def test_every_page_that_the_device_wrote_is_dirty(make: Make, ring: Feature) -> None:
    def relaying(*arguments: object, **options: object) -> object:
        options["reorder"] = 0
        return make(*arguments, shadow=USED, **options)  # type: ignore[arg-type]

    dirty(relaying, ring)  # type: ignore[arg-type]


# -- migrations ----------------------------------------------------------------------------------


def _migrates(source: str, destination: str, shadow: str, procedure: str | None, pairs: int, seconds: float = 3) -> int:
    """Migrate with memory compared; the frames that came back."""
    guest = GuestOptions(lab.SMALL * 2, pairs=pairs, ring_size=64, write_rate=1 << 20)
    options = MigrationOptions(guest, SendOptions(downtime=10.0, hashed=True), seconds, procedure, shadow)
    report = migrate(source, destination, options)
    frames = report.frames
    assert (frames.lost, frames.duplicated, frames.corrupted) == (0, 0, 0)
    assert all(part.received > 100 for part in report.parts.values())
    assert report.bad_pages == 0
    assert report.sent.hash
    assert report.procedure["source"]["shadow"] == shadow
    return frames.received


@pytest.mark.parametrize("base_avail", [0, 1])
@pytest.mark.parametrize(("shadow", "procedure"), WAYS)
def test_a_guest_migrates_with_what_the_device_held(shadow: str, procedure: str, base_avail: int) -> None:
    """As often, in all of these ways together, as MIGRATIONS says."""
    options: dict[str, object] = {"inflight": 8, "base_avail": base_avail}
    source, destination = hwsim.add("hw0", 2, **options), hwsim.add("hw1", 2, **options)
    times = -(-MIGRATIONS // (2 * len(WAYS)))
    try:
        frames = 0
        for number in range(times):
            ends = (source, destination) if number % 2 else (destination, source)
            frames += _migrates(*(end.chardev for end in ends), shadow, procedure, 2, seconds=1)
        print(f"{times} migrations, {frames:,} frames, none lost, memory the same each time")
    finally:
        for device in (source, destination):
            hwsim.remove(device.name)


def test_a_guest_whose_device_sends_out_of_order_stays_and_loses_nothing() -> None:
    """It kept order when it was switched; what is in flight is unknown at the end, so it must not be reset."""
    source, destination = (hwsim.add(name, 1, inflight=8) for name in ("hw0", "hw1"))
    told: list[str] = []

    def observer(phase: str) -> None:
        if phase == "shadow":
            source.write("reorder", "Y")
        elif phase == "back to source":
            told.append(phase)
            source.write("reorder", "N")

    guest = GuestOptions(lab.SMALL, pairs=1, ring_size=64)
    options = MigrationOptions(guest, SendOptions(downtime=10.0), 3, IN_PLACE, USED)
    try:
        with pytest.raises(MigrationFailed, match=r"out of order.*the guest continues"):
            migrate(source.chardev, destination.chardev, options, observer, tell=told.append)
    finally:
        for device in (source, destination):
            hwsim.remove(device.name)
    assert "back to source" in told


@pytest.mark.parametrize("shadow", [USED, USED_ALL])
def test_a_guest_migrates_between_vdpa_sims(devices: tuple[str, str], shadow: str) -> None:
    _migrates(*devices, shadow, None, 1)
