"""The format of a guest's state: what is written is read again, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvhostvdpa.base.errors import StreamCorrupt
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.shape import DeviceShape, GuestShape
from pyvhostvdpa.guest.state import DeviceState, GuestState
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.guest.writer import GuestWriter
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.net.control import ControlModel, Rx
from pyvhostvdpa.net.features import CONTROL, SUPPORTED, Feature

SIZE = 16 << 20
FEATURES = SUPPORTED | CONTROL | Feature.EVENT_IDX | Feature.GUEST_CSUM
SHAPE = GuestShape(
    id=bytes(range(16)),
    source="host /dev/vhost-vdpa-0",
    memory=((1 << 30, SIZE), (1 << 33, 4096)),
    devices=(DeviceShape(int(SUPPORTED), 2, 256, 4), DeviceShape(int(SUPPORTED), 1, 16, None)),
    hashed=True,
)
GUEST = GuestState(clock=-5, writer_gpa=1 << 30, writer_pages=4, writer_rate=9, writer_written=1 << 40)


def model() -> ControlModel:
    return ControlModel(
        features=FEATURES,
        mac=b"\2abcde",
        unicast=[b"\2uuuu" + bytes([n]) for n in range(3)],
        multicast=[b"\3mmmmm"],
        multicast_overflow=True,
        rx={mode: mode is Rx.NOBCAST for mode in Rx},
        vlans={1, 7, 4095},
        pairs=2,
        offloads=int(Feature.GUEST_CSUM),
        rss=struct.pack("<IHHHHHB", 0x3F, 1, 0, 0, 2, 2, 40) + bytes(range(40)),
        announce=True,
    )


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(DEFAULT_GPA, SIZE)]) as it:
        yield it


@pytest.fixture(scope="module")
def device(memory: GuestMemory) -> Iterator[DeviceState]:
    """A NIC of two pairs with a control queue, just started: all RX buffers are open."""
    nic = GuestNic(memory, NicOptions(pairs=2, ring_size=32, features=FEATURES, control_index=4))
    guest = SyntheticGuest(memory)
    guest.add(nic, model())
    _, [state] = guest.state()
    yield state
    guest.detach()


@pytest.fixture(scope="module")
def sections(device: DeviceState) -> list[tuple[bytes, Callable[[bytes], Any]]]:
    return [
        (SHAPE.encode(), GuestShape.decode),
        (GUEST.encode(), GuestState.decode),
        (device.encode(), DeviceState.decode),
    ]


def test_sections_decode_to_what_was_encoded(device: DeviceState) -> None:
    assert GuestShape.decode(SHAPE.encode()) == SHAPE
    assert GuestState.decode(GUEST.encode()) == GUEST
    assert DeviceState.decode(device.encode()) == device


def test_the_open_heads_of_each_queue_are_part_of_it(device: DeviceState) -> None:
    rx, tx = device.queues[:2]
    assert rx.heads == tuple(range(32))
    assert tx.heads == ()


def test_every_truncation_is_refused(sections: list[tuple[bytes, Callable[[bytes], Any]]]) -> None:
    for data, decode in sections:
        for end in range(0, len(data), max(1, len(data) // 500)):
            with pytest.raises(StreamCorrupt):
                decode(data[:end])


def test_section_with_bytes_after_its_end_is_refused(sections: list[tuple[bytes, Callable[[bytes], Any]]]) -> None:
    for data, decode in sections:
        with pytest.raises(StreamCorrupt, match="says it has"):
            decode(data + b"\0")
        longer = bytearray(data + b"\0")
        longer[4:8] = struct.pack("<I", len(longer) - 8)
        with pytest.raises(StreamCorrupt, match="1 bytes behind its end"):
            decode(bytes(longer))


def test_another_version_is_refused_by_name(sections: list[tuple[bytes, Callable[[bytes], Any]]]) -> None:
    for data, decode in sections:
        with pytest.raises(StreamCorrupt, match=r"format version 9, this side knows [13]") as refused:
            decode(data[:2] + b"\x09\0" + data[4:])
        assert "same version" in refused.value.hint


def test_another_section_is_refused() -> None:
    with pytest.raises(StreamCorrupt, match="section 2 where 1 belongs"):
        GuestShape.decode(GUEST.encode())


def test_a_number_of_items_is_not_believed(device: DeviceState) -> None:
    data = bytearray(device.encode())
    data[8:12] = b"\xff\xff\xff\xff"
    with pytest.raises(StreamCorrupt, match="number of queues is 4294967295, at most 256"):
        DeviceState.decode(bytes(data))


@pytest.mark.parametrize(
    "memory_regions",
    [(), ((0, 4095),), ((1, 4096),), ((4096, 0),), ((0, 8192), (4096, 4096)), ((1 << 60, 4096),)],
    ids=["none", "part of a page", "not on a page", "empty", "overlapping", "beyond any guest"],
)
def test_memory_that_no_guest_has_is_refused(memory_regions: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(StreamCorrupt):
        GuestShape.decode(dataclasses.replace(SHAPE, memory=memory_regions).encode())


@pytest.mark.parametrize("device_shape", [(0, 0, 16, None), (0, 1, 17, None), (0, 999, 16, None)])
def test_a_device_that_there_is_not_is_refused(device_shape: tuple[int, int, int, None]) -> None:
    with pytest.raises(StreamCorrupt, match="a device with"):
        GuestShape.decode(dataclasses.replace(SHAPE, devices=(DeviceShape(*device_shape),)).encode())


def test_words_for_a_terminal_are_printable() -> None:
    with pytest.raises(StreamCorrupt, match="cannot be shown"):
        GuestShape.decode(dataclasses.replace(SHAPE, source="\x1b[2J").encode())


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_damaged_state_is_refused_or_encodes_to_the_same_bytes(
    data: st.DataObject, sections: list[tuple[bytes, Callable[[bytes], Any]]]
) -> None:
    """A decoder that lets something through that it would not write itself has guessed."""
    section, decode = data.draw(st.sampled_from(sections))
    damaged = bytearray(section)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from("set cut insert"))
        if kind == "s":
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "c":
            del damaged[at : at + data.draw(st.integers(1, 64))]
        else:
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=64))
        if not damaged:
            break
    if data.draw(st.booleans()) and len(damaged) >= 8:
        damaged[4:8] = struct.pack("<I", len(damaged) - 8)
    try:
        meant = decode(bytes(damaged))
    except StreamCorrupt:
        return
    assert meant.encode() == bytes(damaged)


# -- a NIC from state ---------------------------------------------------------------


def test_a_nic_continues_from_its_state(memory: GuestMemory, device: DeviceState) -> None:
    guest = SyntheticGuest.restore(memory, GUEST_WITHOUT_WRITER, [device])
    try:
        assert guest.state()[1] == [device]
    finally:
        guest.detach()


GUEST_WITHOUT_WRITER = GuestState(clock=0)
OUTSIDE = 1 << 45


def pair_with(device: DeviceState, **fields: Any) -> DeviceState:
    first, *rest = device.nic.pairs
    pairs = (dataclasses.replace(first, **fields), *rest)
    return dataclasses.replace(device, nic=dataclasses.replace(device.nic, pairs=pairs))


@pytest.mark.parametrize(
    "fields",
    [
        {"rx_gpa": OUTSIDE},
        {"tx_gpa": DEFAULT_GPA + SIZE - 4096},
        {"tx_gpa": (1 << 64) - 1},
        {"tx_descs": 0},
        {"tx_descs": 3},
        {"frame_size": 59},
        {"frame_size": 1 << 31},
        {"tx_free": (1,)},
        {"tx_free": (2, 2)},
        {"tx_free": (32,)},
    ],
    ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()),
)
def test_a_pair_that_would_reach_beyond_its_memory_is_refused(
    memory: GuestMemory, device: DeviceState, fields: dict[str, Any]
) -> None:
    with pytest.raises(StreamCorrupt):
        SyntheticGuest.restore(memory, GUEST_WITHOUT_WRITER, [pair_with(device, **fields)])


@pytest.mark.parametrize(
    "change",
    [{"desc": OUTSIDE}, {"desc": DEFAULT_GPA + 1}, {"num": 33}, {"num": 32768}, {"index": 5}, {"used": (1 << 64) - 4}],
    ids=str,
)
def test_a_ring_that_no_driver_has_is_refused(memory: GuestMemory, device: DeviceState, change: dict[str, Any]) -> None:
    ring = dataclasses.replace(device.nic.pairs[0].rx, **change)
    with pytest.raises(StreamCorrupt):
        SyntheticGuest.restore(memory, GUEST_WITHOUT_WRITER, [pair_with(device, rx=ring)])


def test_memory_and_state_of_different_guests_are_a_corrupt_stream(memory: GuestMemory, device: DeviceState) -> None:
    rx, *rest = device.queues
    queues = (dataclasses.replace(rx, heads=(*rx.heads[1:], rx.heads[0])), *rest)
    with pytest.raises(StreamCorrupt, match="and other heads"):
        SyntheticGuest.restore(memory, GUEST_WITHOUT_WRITER, [dataclasses.replace(device, queues=queues)])


def test_a_writer_outside_memory_is_refused(memory: GuestMemory, device: DeviceState) -> None:
    with pytest.raises(StreamCorrupt, match="is not guest memory"):
        SyntheticGuest.restore(memory, dataclasses.replace(GUEST, writer_pages=1 << 62), [device])


# -- the guest's CPU -------------------------------------------------------------------


def test_the_writer_knows_what_each_page_holds() -> None:
    with GuestMemory([(DEFAULT_GPA, 1 << 20)]) as memory:
        writer = GuestWriter(memory, DEFAULT_GPA, 16, 10_000)
        try:
            writer.run()
            while writer.c.written < 40:
                pass
            writer.pause()
            assert writer.bad_pages() == 0
            memory.regions[0].memory.buffer[5 * 4096 + 9] ^= 1
            assert writer.bad_pages() == 1
        finally:
            writer.close()
