"""Shadow virtqueues on a device with groups, pairs and descriptors in flight."""

from __future__ import annotations

import threading
import time

import hwsim
import lab
import pytest
from hw_guest import HwGuest, Make

from pyvhostvdpa import GuestOptions, MigrationOptions, OutOfOrder, State, migrate
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.memory.guest import PAGE_SIZE
from pyvhostvdpa.net.features import CONTROL, RING, SUPPORTED, Feature
from pyvhostvdpa.virtqueue.shadow import ServingOptions

ELSEWHERE = 0x7000_0000_0000


@pytest.mark.parametrize("pairs", [1, 4, 16])
def test_traffic_survives_switching_on_any_number_of_pairs(make: Make, pairs: int) -> None:
    guest = make(pairs, ring_size=64)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(4):
        guest.receives(50)
        guest.switch()
    guest.receives(50)
    guest.settle()


PLACES = {
    "rings in the descriptor group's address space": (BackendFeature(0), 1),
    "rings in holes of guest memory": (BackendFeature.DESC_ASID, 0),
    "maps lost at reset": (BackendFeature.IOTLB_PERSIST, 1),
    "all enabled before DRIVER_OK": (BackendFeature.ENABLE_AFTER_DRIVER_OK, 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_mix_of_backend_features_switches(make: Make, place: str) -> None:
    without, asid = PLACES[place]
    guest = make(2, without=without)
    assert guest.device.ring_asid == asid
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(4):
        guest.receives(100)
        guest.switch()
        if guest.device.state is State.SHADOW:
            assert guest.sim.read("state")["asid.desc"] == str(asid)
    guest.settle()


@pytest.mark.parametrize("base_avail", [0, 1], ids=["base is the used index", "base is the avail index"])
def test_descriptors_held_at_suspend_are_neither_lost_nor_done_twice(make: Make, base_avail: int) -> None:
    """Out of order while shadowed, where the shadow ring has the list; the newest ones in passthrough."""
    guest = make(4, inflight=16, base_avail=base_avail)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(10):
        guest.receives(60)
        guest.switch()
        guest.sim.write("reorder", "Y")
        guest.receives(60)
        # what is open now is out of order; passthrough begins in order
        guest.sim.write("reorder", "N")
        guest.switch()
    guest.settle()


def reordered(make: Make, without: BackendFeature) -> HwGuest:
    """A guest in passthrough on a device that has used descriptors out of order."""
    guest = make(inflight=16, reorder=1, without=without)
    guest.start()
    guest.traffic.run()
    guest.receives(500)
    return guest


def test_a_device_that_reorders_in_passthrough_is_refused_and_continues(make: Make) -> None:
    guest = reordered(make, BackendFeature(0))
    with pytest.raises(OutOfOrder, match="out of order"):
        guest.device.stop()
    assert guest.device.state is State.PASSTHROUGH
    guest.receives(500)
    guest.settle()


def test_reordering_device_without_resume_is_reset_at_stop(make: Make) -> None:
    guest = reordered(make, BackendFeature.RESUME)
    with pytest.raises(OutOfOrder, match="cannot be resumed and was reset"):
        guest.device.stop()
    assert guest.device.state is State.RESET


def test_a_device_halted_while_shadowed_leaves_what_was_open_in_any_order(make: Make) -> None:
    guest = make(2, inflight=16)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    for _ in range(5):
        guest.switch()
        guest.sim.write("reorder", "Y")
        guest.receives(60)
        guest.device.halt()
        assert guest.device.state is State.RESET
        guest.sim.write("reorder", "N")
        guest.start()
        guest.receives(60)
    guest.settle()


@pytest.mark.parametrize(("threads", "busy_poll"), [(2, 0.0), (4, 0.001), (9, 0.0)])
def test_pairs_are_spread_over_threads(make: Make, threads: int, busy_poll: float) -> None:
    guest = make(4)
    guest.device.serving_options = ServingOptions(threads, busy_poll)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    guest.switch()
    relays = [thread for thread in threading.enumerate() if thread.name == "svq-thread"]
    assert len(relays) == min(threads, 4)
    guest.receives(200)
    guest.switch()
    guest.receives(100)
    guest.settle()


def test_an_idle_relay_uses_no_cpu(make: Make) -> None:
    guest = make(4)
    guest.start(State.SHADOW)
    time.sleep(0.3)
    begin, cpu = time.monotonic(), time.process_time()
    time.sleep(3)
    assert time.process_time() - cpu < 0.02 * (time.monotonic() - begin)


@pytest.mark.parametrize("ring", [Feature.EVENT_IDX, Feature.INDIRECT_DESC, RING])
def test_ring_features_work_in_both_modes(make: Make, ring: Feature) -> None:
    guest = make(1, SUPPORTED | CONTROL | ring, extra_features=int(ring))
    assert ring in guest.device.features
    guest.start()
    guest.traffic.run()
    for _ in range(4):
        guest.receives(300)
        guest.switch()
    guest.settle()


@pytest.mark.parametrize("ring_size", [2, 1024, 32768])
def test_rings_of_any_size_work(make: Make, ring_size: int) -> None:
    guest = make(1, ring_size=ring_size, memory=300 << 20, ring_max=32768)
    guest.start(State.SHADOW)
    guest.traffic.run()
    for _ in range(2):
        guest.receives(2000)
        guest.switch()
    guest.receives(2000)
    guest.settle()


ONE_SPACE: dict[str, dict[str, object]] = {
    "one address space": {"nas": 1},
    "one group": {"single_group": "Y"},
    "one of both": {"nas": 1, "single_group": "Y"},
}


@pytest.mark.parametrize("kind", ONE_SPACE)
def test_a_device_with_one_address_space_has_its_shadow_rings_in_holes_of_guest_memory(make: Make, kind: str) -> None:
    guest = make(1, RING | SUPPORTED, extra_features=int(RING), inflight=8, **ONE_SPACE[kind])
    assert guest.control is None
    assert guest.device.ring_asid == 0
    guest.start()
    guest.traffic.run()
    before = guest.device.iotlb.space(0).mappings
    for _ in range(3):
        guest.receives(200)
        guest.switch()
        rings = set(guest.device.iotlb.space(0).mappings) - set(before)
        assert len(rings) == 4
        assert not any(region.gpa <= ring.iova < region.end for ring in rings for region in guest.memory.regions)
        guest.receives(200)
        guest.switch()
        assert guest.device.iotlb.space(0).mappings == before
    guest.settle()


@pytest.mark.parametrize("ring", [Feature(0), RING], ids=["plain ring", "indirect tables and event index"])
def test_every_page_that_changed_while_shadowed_and_that_the_guest_did_not_write_is_dirty(
    make: Make, ring: Feature
) -> None:
    guest = make(2, SUPPORTED | CONTROL | ring, extra_features=int(ring), inflight=8, reorder=1)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    [region] = guest.memory.regions
    # first of all: what was answered last may still ask its guest for the next command
    guest.memory.start_dirty_log()
    before = bytes(region.memory.buffer)
    guest.traffic.run()
    guest.receives(1000)
    guest.settle()
    guest.traffic.pause()
    guest.device.stop()
    now = bytes(region.memory.buffer)
    places = [slice(at, at + PAGE_SIZE) for at in range(0, region.size, PAGE_SIZE)]
    changed = {region.gpa + place.start for place in places if now[place] != before[place]}
    written = set()
    for pair in guest.nic.pairs:
        p = pair.c
        for gpa, size in ((p.tx_gpa, p.tx.num * p.buffer_size), (p.tx_table_gpa, 32 * p.tx.num)):
            written |= set(range(gpa, gpa + size, PAGE_SIZE))
        written |= {page for queue in pair.queues for page in range(queue.desc, queue.used, PAGE_SIZE)}
    dirty = set(guest.memory.dirty_pages())
    assert changed - written <= dirty
    assert len(changed - written) > 100


PIECE = 128 << 10


@pytest.mark.parametrize("moved", [False, True], ids=["where the guest has them", "moved, in reverse order"])
def test_buffers_across_regions_are_cut_and_arrive_whole(make: Make, moved: bool) -> None:
    """Memory in regions that follow each other for the guest, and for the device perhaps not."""
    guest = make(1)
    [pair], [region], c_map = guest.nic.pairs, guest.memory.regions, guest.memory.c_map
    for name in ("rx_gpa", "rx_hva", "tx_gpa", "tx_hva"):
        setattr(pair.c, name, getattr(pair.c, name) + 1000)
    guest.restart_driver()
    count, whole = region.size // PIECE, c_map.regions
    pieces = ffi.new("struct memory_region[]", count)
    with guest.device.iotlb.space(0).batch() as batch:
        for number, piece in enumerate(pieces):
            offset = number * PIECE
            piece.gpa, piece.size, piece.hva = region.gpa + offset, PIECE, whole[0].hva + offset
            piece.iova = ELSEWHERE - offset if moved else piece.gpa
            if moved:
                batch.map(piece.iova, region.memory.hva + offset, PIECE)
    c_map.regions, c_map.count = pieces, count
    guest.start(State.SHADOW)
    receive = guest.device.shadows[0]
    # a buffer in two pieces takes two descriptors, so a few have to wait
    lab.wait_for(lambda: len(receive.in_flight) > receive.queue.num - 8, "the receive buffers to be with the device")
    assert max(element.segments for element in receive.c.elements[0 : receive.queue.num]) == 2
    guest.traffic.run()
    guest.receives(3000)
    guest.settle()
    guest.device.stop()
    c_map.regions, c_map.count = whole, 1


@pytest.mark.parametrize("pairs", [pytest.param(1, marks=pytest.mark.smoke), 4, 16])
def test_a_guest_migrates_with_all_its_pairs_and_its_address(pairs: int) -> None:
    source, destination = hwsim.add("hw0", pairs), hwsim.add("hw1", pairs)
    try:
        seen: dict[str, str] = {}

        def look(part: str) -> None:
            if part == "destination":
                seen.update(destination.read("state"))

        options = MigrationOptions(GuestOptions(lab.SMALL * 2, pairs=pairs, ring_size=64), lab.SLOW_STREAM, seconds=3)
        report = migrate(source.chardev, destination.chardev, options, look)
        frames = report.frames
        assert (frames.lost, frames.duplicated, frames.corrupted) == (0, 0, 0)
        assert all(part.received > 100 for part in report.parts.values())
        assert seen["pairs"] == str(pairs)
        assert seen["mac"] == source.mac.hex(":")
    finally:
        for device in (source, destination):
            hwsim.remove(device.name)
