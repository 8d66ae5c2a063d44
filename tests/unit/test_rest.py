"""The rest of a NIC's state, which is sent when the guest is paused: it arrives whole, or it is refused."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from pyvhostvdpa._cdefs import lib
from pyvhostvdpa.base.errors import StreamCorrupt
from pyvhostvdpa.guest.arena import GuestArena
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.rest import DeviceRest
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.guest.writer import GuestWriter
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.net.control import ControlModel
from pyvhostvdpa.net.features import CONTROL, SUPPORTED

SIZE = 2 << 20
PAIRS = 2
RING = 16
# of a pair: length, RX used, avail, heads, TX used, avail, heads, driver's indices, sending, counters
HEADS = 2 * RING


def source(memory: GuestMemory) -> SyntheticGuest:
    features = SUPPORTED | CONTROL
    guest = SyntheticGuest(memory)
    options = NicOptions(pairs=PAIRS, ring_size=RING, features=features, control_index=2 * PAIRS)
    guest.add(
        GuestNic(memory, options, GuestArena(memory, DEFAULT_GPA, 1 << 20)), ControlModel(features, mac=b"\2abcde")
    )
    guest.writer = GuestWriter(memory, DEFAULT_GPA + (1 << 20), 64, 100, 70)
    return guest


class World:
    """A guest that has run after its outline was taken, and one that expects it in memory of its own."""

    def __init__(self) -> None:
        self.here, self.there = (GuestMemory([(DEFAULT_GPA, SIZE)]) for _ in range(2))
        self.guest = source(self.here)
        self.expected = SyntheticGuest.expect(self.there, self.guest.outline(), self.guest.shapes())
        for number, pair in enumerate(self.guest.nics[0].pairs):
            lib.nic_run(pair.c, 0)
            # the device has sent two frames, of which none has come back
            used = pair.c.tx.used
            for k in range(2):
                used.ring[k].id = pair.c.tx.avail.ring[k]
            used.idx = 2
            lib.nic_run(pair.c, 0)
            pair.c.gaps[5].begin, pair.c.gaps[5].end = 1000 + number, 2000
            pair.c.last_rx = 5000 + number
        self.own, self.rests = self.guest.rest()
        self.there.regions[0].memory.buffer[:] = self.here.regions[0].memory.buffer

    def load(self, data: bytes) -> None:
        self.expected.load(self.own, [SyntheticGuest.decode_rest(data)], self.guest.shapes())

    def with_pairs(self, pairs: bytes) -> bytes:
        [rest] = self.rests
        assert isinstance(rest, DeviceRest)
        return DeviceRest(pairs, rest.control, rest.model).encode()

    @property
    def pairs(self) -> bytearray:
        [rest] = self.rests
        assert isinstance(rest, DeviceRest)
        return bytearray(rest.pairs)

    def close(self) -> None:
        self.guest.close()
        self.expected.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_outline_and_rest_are_all_of_the_state(world: World) -> None:
    world.load(world.rests[0].encode())
    (_, [here]), (own, [there]) = world.guest.state(), world.expected.state()
    assert there == here
    assert (own.writer_gpa, own.writer_written) == (world.own.writer_gpa, 70)


def test_a_bitmap_of_sequence_numbers_arrives_whatever_it_looks_like(world: World) -> None:
    """Of one word over and over, and the longest that it can be: no two neighbours are equal."""
    here, there = (guest.nics[0].pairs[0].c for guest in (world.guest, world.expected))
    for words in ([(1 << 64) - 1] * 1024, list(range(1024)), [*range(1023), 1022]):
        here.seen[0:1024] = words
        _, [rest] = world.guest.rest()
        world.load(rest.encode())
        assert list(there.seen) == words


def test_rest_carries_the_control_state_set_since_the_outline(world: World) -> None:
    control = world.guest.controls[0]
    assert control is not None
    [rest] = world.rests
    assert rest.model is None  # type: ignore[attr-defined]
    control.model.vlans.add(5)
    _, [rest] = world.guest.rest()
    known: Any = world.expected.controls[0]
    model = known.model
    world.load(rest.encode())
    assert model.vlans == {5}


def test_rest_that_ends_anywhere_else_is_refused(world: World) -> None:
    pairs, before = bytes(world.pairs), world.expected.state()[1]
    for length in [*range(200), *range(len(pairs) - 200, len(pairs))]:
        with pytest.raises(StreamCorrupt, match="state of device 0: "):
            world.load(world.with_pairs(pairs[:length]))
    with pytest.raises(StreamCorrupt, match="too early or too late"):
        world.load(world.with_pairs(pairs + b"\0"))
    assert world.expected.state()[1] == before


# offsets in the first pair: behind its length and two rings with RING and some heads
def offsets(world: World) -> dict[str, int]:
    pairs = world.pairs
    used, avail = struct.unpack_from("<HH", pairs, 4)
    at = 8 + 2 * (avail - used)
    tx = at
    used, avail = struct.unpack_from("<HH", pairs, at)
    at += 4 + 2 * (avail - used)
    free = seen = at + 10 + 64
    words = 0
    while words < 1024:
        words += struct.unpack_from("<H", pairs, free)[0]
        free += 2 + 8
    count = struct.unpack_from("<H", pairs, free)[0]
    return {
        "rx": 4,
        "tx": tx,
        "driver": at,
        "sending": at + 8,
        "counters": at + 10,
        "last_rx": at + 10 + 56,
        "seen": seen,
        "free": free,
        "gaps": free + 2 + 2 * count,
    }


@pytest.mark.parametrize(
    ("where", "beyond", "layout", "value", "why"),
    [
        ("rx", 0, "<H", 9, "virtqueue 0: "),
        ("rx", 2, "<H", 40000, "virtqueue 0: its used and avail index differ by more than the ring"),
        ("rx", 4, "<H", 11, "virtqueue 0: its heads in memory are not those"),
        ("tx", 0, "<H", 1, "virtqueue 1: "),
        ("driver", 0, "<H", 3, "virtqueue 0: its driver's indices"),
        ("driver", 4, "<H", 3, "virtqueue 1: its driver's indices"),
        ("sending", 0, "<H", 2, "sending is neither"),
        ("counters", 8, "<Q", 1 << 40, "more frames were received than sent"),
        ("counters", 40, "<Q", 1 << 40, "more frames were received than sent"),
        ("counters", 16, "<Q", 1 << 63, "cannot have been counted"),
        ("last_rx", 0, "<q", 1 << 62, "last_rx is not a time"),
        ("last_rx", 0, "<q", -(1 << 62), "last_rx is not a time"),
        ("seen", 0, "<H", 0, "seen: its runs"),
        ("seen", 0, "<H", 1025, "seen: its runs"),
        ("free", 0, "<H", RING + 1, "tx_free: its free TX slots"),
        ("free", 2, "<H", 3, "tx_free: its free TX slots"),
        ("free", 2, "<H", RING, "tx_free: its free TX slots"),
        ("gaps", 0, "<H", 65, "gaps: "),
        ("gaps", 2, "<q", 3000, "gaps: "),
        ("gaps", 10, "<q", 1 << 62, "gaps: "),
    ],
)
def test_rest_that_no_driver_can_have_is_refused_by_the_field(
    world: World, where: str, beyond: int, layout: str, value: int, why: str
) -> None:
    pairs = world.pairs
    struct.pack_into(layout, pairs, offsets(world)[where] + beyond, value)
    with pytest.raises(StreamCorrupt, match="state of device 0: ") as raised:
        world.load(world.with_pairs(bytes(pairs)))
    assert why in str(raised.value)


def test_the_same_slot_twice_is_refused(world: World) -> None:
    pairs, at = world.pairs, offsets(world)["free"]
    pairs[at + 4 : at + 6] = pairs[at + 2 : at + 4]
    with pytest.raises(StreamCorrupt, match="free TX slots"):
        world.load(world.with_pairs(bytes(pairs)))


def test_random_bytes_do_no_harm(world: World) -> None:
    chance = random.Random(14)
    for _ in range(3000):
        pairs = world.pairs
        for _ in range(chance.choice([1, 2, 8])):
            pairs[chance.choice([chance.randrange(len(pairs)), chance.randrange(160)])] = chance.randrange(256)
        try:
            world.load(world.with_pairs(bytes(pairs)))
        except StreamCorrupt:
            continue
        for pair in world.expected.nics[0].pairs:
            assert pair.c.tx_free_count <= RING
            lib.nic_run(pair.c, 0)
        world.there.regions[0].memory.buffer[:] = world.here.regions[0].memory.buffer


def test_a_writer_in_the_way_of_a_ring_is_refused(world: World) -> None:
    world.own = type(world.own)(clock=0, writer_gpa=DEFAULT_GPA, writer_pages=1, writer_rate=1)
    with pytest.raises(StreamCorrupt, match="overlap"):
        world.load(world.rests[0].encode())


def test_rests_of_more_devices_than_the_outline_had_are_refused(world: World) -> None:
    decoded = [SyntheticGuest.decode_rest(world.rests[0].encode())] * 2
    with pytest.raises(StreamCorrupt, match="2 devices, its outline had 1"):
        world.expected.load(world.own, decoded, world.guest.shapes())


def test_control_state_changed_during_the_outline_and_reverted_is_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = world.guest.controls[0].model  # type: ignore[union-attr]
    make = world.guest._make_rests

    def set_meanwhile() -> None:
        make()
        model.vlans.add(7)

    monkeypatch.setattr(world.guest, "_make_rests", set_meanwhile)
    [outline] = world.guest.outline()
    model.vlans.discard(7)
    [rest] = world.guest.rest()[1]
    assert isinstance(rest, DeviceRest)
    assert (rest.model or outline.nic.model) == model
