"""What a guest has read in configuration space, against the space of the device that it would move to."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from pyvhostvdpa.base.errors import StreamCorrupt
from pyvhostvdpa.guest.codec import Writer
from pyvhostvdpa.guest.shape import SECTION, DeviceShape, GuestShape
from pyvhostvdpa.memory.guest import PAGE_SIZE
from pyvhostvdpa.net.config import MAX_CONFIG, NetConfig
from pyvhostvdpa.net.features import CONTROL, REQUIRED, SUPPORTED, Feature
from pyvhostvdpa.net.fit import misfits, unknown_fields

A, B = bytes.fromhex("52540000000a"), bytes.fromhex("52540000000b")
EVERYTHING = SUPPORTED | CONTROL | Feature.SPEED_DUPLEX
NO_CONTROL = SUPPORTED | Feature.SPEED_DUPLEX


def space(
    mac: bytes = A,
    status: int = 1,
    pairs: int = 2,
    mtu: int = 1500,
    speed: int = 25000,
    duplex: int = 1,
    key: int = 40,
    table: int = 128,
    hashes: int = 0x3F,
) -> bytes:
    return struct.pack("<6sHHHIBBHI", mac, status, pairs, mtu, speed, duplex, key, table, hashes)


MISFITS = {
    "MAC": (NO_CONTROL, {"mac": B}, "MAC address is 52:54:00:00:00:0b, the guest relies on 52:54:00:00:00:0a"),
    "MAC, control queue without CTRL_MAC_ADDR": (
        EVERYTHING & ~Feature.CTRL_MAC_ADDR,
        {"mac": B},
        "MAC address is 52:54:00:00:00:0b",
    ),
    "MTU": (EVERYTHING, {"mtu": 1000}, "MTU is 1000, the guest relies on 1500"),
    "link": (EVERYTHING, {"status": 0}, "link is down"),
    "speed": (EVERYTHING, {"speed": 10000}, "speed in Mbit/s is 10000, the guest relies on 25000"),
    "duplex": (EVERYTHING, {"duplex": 0}, "duplex is half, the guest relies on full"),
    "pairs": (EVERYTHING, {"pairs": 4}, "max_virtqueue_pairs is 4, the guest relies on 2"),
    "RSS key": (EVERYTHING, {"key": 20}, "largest RSS key in bytes is 20, the guest relies on 40"),
    "RSS table": (EVERYTHING, {"table": 64}, "longest RSS indirection table is 64, the guest relies on 128"),
    "hash types": (EVERYTHING, {"hashes": 0x0F}, "set of RSS hash types is 0xf, the guest relies on 0x3f"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_of_a_differing_field_name_it_with_both_values_and_a_command(case: str) -> None:
    features, change, words = MISFITS[case]
    [found] = misfits(features, space(), space(**change))  # type: ignore[arg-type]
    assert words in str(found)
    assert found.why
    assert found.hint


FITS = {
    "the same space": (EVERYTHING, {}),
    "a MAC that the control queue sets": (EVERYTHING, {"mac": B}),
    "a larger MTU": (EVERYTHING, {"mtu": 9000}),
    "larger RSS limits": (EVERYTHING, {"key": 52, "table": 256, "hashes": 0xFF}),
    "an unknown speed": (EVERYTHING, {"speed": 0xFFFFFFFF}),
    "fields whose features the guest did not take": (
        REQUIRED,
        {"mac": B, "mtu": 68, "status": 0, "speed": 10, "duplex": 0, "pairs": 1, "key": 0, "table": 0, "hashes": 0},
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_misfits_of_a_space_that_the_guest_can_live_with_are_none(case: str) -> None:
    features, change = FITS[case]
    assert list(misfits(features, space(), space(**change))) == []  # type: ignore[arg-type]


def test_misfits_of_a_guest_whose_link_was_down_already_are_none() -> None:
    assert list(misfits(EVERYTHING, space(status=0), space(status=0))) == []


def test_unknown_fields_of_a_short_space_are_those_behind_its_end() -> None:
    features = SUPPORTED | CONTROL
    assert list(misfits(features, space(), space(mtu=68)[:10])) == []
    assert unknown_fields(features, space(), space()[:10]) == ["mtu", "rss_key", "rss_table", "hash_types"]
    assert unknown_fields(features, space(), space()) == []


@pytest.mark.parametrize("length", range(29))
def test_net_config_of_any_length_parses(length: int) -> None:
    parsed = NetConfig.parse(space()[:length].ljust(length, b"\0"), EVERYTHING)
    assert (parsed.mac is not None) == (length >= 6)
    assert (parsed.hash_types is not None) == (length >= 24)


# -- as it goes over the stream ----------------------------------------------------------

DEVICE = DeviceShape(int(SUPPORTED), 2, 256, 4, space())
GUEST = GuestShape(bytes(16), "host", ((1 << 30, 4 << 20),), (DEVICE, dataclasses.replace(DEVICE, config=None)), False)


def test_shape_carries_each_devices_configuration_space() -> None:
    decoded = GuestShape.decode(GUEST.encode())
    assert [device.config for device in decoded.devices] == [space(), None]


def test_shapes_that_differ_in_configuration_space_only_are_equal() -> None:
    assert dataclasses.replace(DEVICE, config=b"") == DEVICE


def test_shape_of_an_older_version_has_no_configuration_space() -> None:
    w = Writer()
    w.put("16s", bytes(16))
    w.text("host")
    w.put("I", PAGE_SIZE)
    w.each(GUEST.memory, lambda region: w.put("QQ", *region))
    w.each(GUEST.devices, lambda d: w.put("QIIH", d.features, d.pairs, d.ring_size, d.control_index))
    w.put("B", False)
    decoded = GuestShape.decode(w.section(SECTION, 1))
    assert decoded == GUEST
    assert [device.config for device in decoded.devices] == [None, None]


def test_shape_with_a_configuration_space_beyond_any_devices_is_refused() -> None:
    long = dataclasses.replace(GUEST, devices=(dataclasses.replace(DEVICE, config=bytes(MAX_CONFIG + 1)),))
    with pytest.raises(StreamCorrupt, match="configuration space is 257"):
        GuestShape.decode(long.encode())
