"""vdpa_hwsim's control queue, asked directly: what each command changes, and what is refused and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import hwsim
import pytest
from hw_guest import HwGuest

from pyvhostvdpa._cdefs import lib
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.net import control
from pyvhostvdpa.net.control import Class, Rx, mac_table
from pyvhostvdpa.net.control_queue import ControlQueue
from pyvhostvdpa.net.features import CONTROL, SUPPORTED, Feature

PAIRS = 4
OFFERED = Feature.CTRL_RX | Feature.CTRL_RX_EXTRA | Feature.CTRL_GUEST_OFFLOADS | Feature.GUEST_TSO4
OFFERED |= Feature.RSS | Feature.HASH_REPORT | Feature.GUEST_ANNOUNCE
MORE = SUPPORTED | CONTROL | Feature.GUEST_CSUM | OFFERED
NEEDS = {
    Class.RX: Feature.CTRL_RX,
    Class.MAC: Feature.CTRL_MAC_ADDR,
    Class.VLAN: Feature.CTRL_VLAN,
    Class.ANNOUNCE: Feature.GUEST_ANNOUNCE,
    Class.MQ: Feature.MQ,
    Class.GUEST_OFFLOADS: Feature.CTRL_GUEST_OFFLOADS,
}
MACS = [bytes([2, 0, 0, 0, 1, n]) for n in range(1, 70)]
GROUPS = [bytes([1, 0, 0x5E, 0, 0, n]) for n in range(1, 5)]
MAX_COMMAND = 4096


def two(number: int) -> bytes:
    return number.to_bytes(2, "little")


def rss(
    table: tuple[int, ...] = (0, 2), unclassified: int = 0, mask: int | None = None, tx: int = 2, key: int = 40
) -> bytes:
    fields = (7).to_bytes(4, "little") + two(len(table) - 1 if mask is None else mask) + two(unclassified)
    return fields + b"".join(map(two, table)) + two(tx) + bytes([key]) + bytes(range(key))


def hashes(key: int = 40) -> bytes:
    return (5).to_bytes(4, "little") + bytes(8) + bytes([key]) + bytes(range(key))


def offloads(bits: int) -> bytes:
    return bits.to_bytes(8, "little")


Sent = tuple[int, int, bytes]
TAKEN: dict[str, tuple[list[Sent], dict[str, str]]] = {
    "promiscuous off": ([(Class.RX, Rx.PROMISC, b"\0")], {"promisc": "0"}),
    "promiscuous off and on": ([(Class.RX, Rx.PROMISC, b"\0"), (Class.RX, Rx.PROMISC, b"\1")], {"promisc": "1"}),
    "all multicast": ([(Class.RX, Rx.ALLMULTI, b"\1")], {"allmulti": "1", "alluni": "0", "nomulti": "0"}),
    "all unicast": ([(Class.RX, Rx.ALLUNI, b"\1")], {"allmulti": "0", "alluni": "1"}),
    "no multicast": ([(Class.RX, Rx.NOMULTI, b"\1")], {"nomulti": "1", "nouni": "0"}),
    "no unicast": ([(Class.RX, Rx.NOUNI, b"\1")], {"nomulti": "0", "nouni": "1", "nobcast": "0"}),
    "no broadcast": ([(Class.RX, Rx.NOBCAST, b"\1")], {"nouni": "0", "nobcast": "1"}),
    "the address": ([(Class.MAC, control.MAC_ADDR_SET, MACS[3])], {"mac": MACS[3].hex(":")}),
    "tables of both kinds": (
        [(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:2], GROUPS[:1]))],
        {"mac_table_uni": f"{MACS[0].hex(':')},{MACS[1].hex(':')}", "mac_table_multi": GROUPS[0].hex(":")},
    ),
    "a table as long as there is": (
        [(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:64], []))],
        {"mac_table_uni": ",".join(mac.hex(":") for mac in MACS[:64]), "mac_table_multi": ""},
    ),
    "a table that is longer": (
        [(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:65], []))],
        {"mac_table_uni": "all", "mac_table_multi": ""},
    ),
    "VLANs": (
        [
            *((Class.VLAN, control.VLAN_ADD, two(vlan)) for vlan in (1, 2, 3, 4095)),
            (Class.VLAN, control.VLAN_DEL, two(2)),
        ],
        {"vlans": "1,3,4095"},
    ),
    "the announcement is done": ([(Class.ANNOUNCE, control.ANNOUNCE_ACK, b"")], {"announce": "0"}),
    "as many pairs as there are": ([(Class.MQ, control.VQ_PAIRS_SET, two(PAIRS))], {"pairs": str(PAIRS)}),
    "one pair": (
        [(Class.MQ, control.VQ_PAIRS_SET, two(PAIRS)), (Class.MQ, control.VQ_PAIRS_SET, two(1))],
        {"pairs": "1"},
    ),
    "RSS": (
        [(Class.MQ, control.RSS_CONFIG, rss((0, 3), tx=3))],
        {"rss_table": "0,3", "rss_hash_types": "0x7", "pairs": "3", "rss_key": bytes(range(40)).hex()},
    ),
    "RSS with the longest table": (
        [(Class.MQ, control.RSS_CONFIG, rss((3,) * 128))],
        {"rss_table": ",".join(["3"] * 128)},
    ),
    "RSS, then pairs alone": (
        [(Class.MQ, control.RSS_CONFIG, rss()), (Class.MQ, control.VQ_PAIRS_SET, two(4))],
        {"rss_table": "", "pairs": "4"},
    ),
    "hashes": ([(Class.MQ, control.HASH_CONFIG, hashes())], {"rss_hash_types": "0x5", "rss_table": ""}),
    "offloads": ([(Class.GUEST_OFFLOADS, control.GUEST_OFFLOADS_SET, offloads(1 << 7))], {"guest_offloads": "0x80"}),
}
REFUSED: dict[str, Sent] = {
    "an unknown class": (9, 0, b""),
    "an unknown mode": (Class.RX, 6, b"\1"),
    "a mode without a value": (Class.RX, Rx.PROMISC, b""),
    "a mode with two values": (Class.RX, Rx.PROMISC, b"\0\0"),
    "a table shorter than it says": (Class.MAC, control.MAC_TABLE_SET, (2).to_bytes(4, "little") + MACS[0]),
    "a table without the second one": (Class.MAC, control.MAC_TABLE_SET, (1).to_bytes(4, "little") + MACS[0]),
    "tables and a byte": (Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:1], GROUPS[:1]) + b"\0"),
    "a table whose length overflows": (
        Class.MAC,
        control.MAC_TABLE_SET,
        (0x2AAAAAAB).to_bytes(4, "little") + bytes(2) + bytes(4),
    ),
    "a table longer than all memory": (Class.MAC, control.MAC_TABLE_SET, b"\xff" * 8),
    "an address of 5 bytes": (Class.MAC, control.MAC_ADDR_SET, MACS[1][:5]),
    "an address of 7 bytes": (Class.MAC, control.MAC_ADDR_SET, MACS[1] + b"\0"),
    "a group's address": (Class.MAC, control.MAC_ADDR_SET, GROUPS[0]),
    "an unknown MAC command": (Class.MAC, 2, MACS[1]),
    "VLAN 4096": (Class.VLAN, control.VLAN_ADD, two(4096)),
    "a VLAN of one byte": (Class.VLAN, control.VLAN_ADD, b"\1"),
    "a VLAN of three bytes": (Class.VLAN, control.VLAN_ADD, b"\1\0\0"),
    "an unknown VLAN command": (Class.VLAN, 2, two(5)),
    "an announcement with a payload": (Class.ANNOUNCE, control.ANNOUNCE_ACK, b"\0"),
    "an unknown announcement": (Class.ANNOUNCE, 1, b""),
    "no pair": (Class.MQ, control.VQ_PAIRS_SET, two(0)),
    "more pairs than there are": (Class.MQ, control.VQ_PAIRS_SET, two(PAIRS + 1)),
    "pairs and a byte": (Class.MQ, control.VQ_PAIRS_SET, two(2) + b"\0"),
    "an unknown MQ command": (Class.MQ, 3, two(2)),
    "RSS with an invalid mask": (Class.MQ, control.RSS_CONFIG, rss((0, 1, 2))),
    "RSS with a longer table": (Class.MQ, control.RSS_CONFIG, rss((0,) * 256)),
    "RSS to a pair that does not exist": (Class.MQ, control.RSS_CONFIG, rss((0, PAIRS))),
    "RSS of the rest to a pair that does not exist": (Class.MQ, control.RSS_CONFIG, rss(unclassified=PAIRS)),
    "RSS that sends from no pair": (Class.MQ, control.RSS_CONFIG, rss(tx=0)),
    "RSS with a longer key": (Class.MQ, control.RSS_CONFIG, rss(key=41)),
    "RSS with a shorter key than it says": (Class.MQ, control.RSS_CONFIG, rss()[:-1]),
    "RSS and a byte": (Class.MQ, control.RSS_CONFIG, rss() + b"\0"),
    "hashes with a longer key": (Class.MQ, control.HASH_CONFIG, hashes(key=41)),
    "hashes and a byte": (Class.MQ, control.HASH_CONFIG, hashes() + b"\0"),
    "an offload that was not negotiated": (
        Class.GUEST_OFFLOADS,
        control.GUEST_OFFLOADS_SET,
        offloads(1 << 8),
    ),
    "offloads of 7 bytes": (Class.GUEST_OFFLOADS, control.GUEST_OFFLOADS_SET, bytes(7)),
    "an unknown offload command": (Class.GUEST_OFFLOADS, 1, offloads(0)),
}
WITHOUT: dict[str, tuple[Feature, Sent]] = {
    "modes": (Feature.CTRL_RX, (Class.RX, Rx.PROMISC, b"\0")),
    "the second mode": (Feature.CTRL_RX, (Class.RX, Rx.ALLMULTI, b"\1")),
    "more modes": (Feature.CTRL_RX_EXTRA, (Class.RX, Rx.ALLUNI, b"\1")),
    "tables": (Feature.CTRL_RX, (Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:1], []))),
    "the address": (Feature.CTRL_MAC_ADDR, (Class.MAC, control.MAC_ADDR_SET, MACS[3])),
    "VLANs": (Feature.CTRL_VLAN, (Class.VLAN, control.VLAN_ADD, two(5))),
    "announcements": (Feature.GUEST_ANNOUNCE, (Class.ANNOUNCE, control.ANNOUNCE_ACK, b"")),
    "RSS": (Feature.RSS, (Class.MQ, control.RSS_CONFIG, rss())),
    "hashes": (Feature.HASH_REPORT, (Class.MQ, control.HASH_CONFIG, hashes())),
    "offloads": (
        Feature.CTRL_GUEST_OFFLOADS,
        (Class.GUEST_OFFLOADS, control.GUEST_OFFLOADS_SET, offloads(1 << 7)),
    ),
}
SHOWN = ("mac", "announce", "pairs", "promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast", "vlans")
SHOWN += ("mac_table_uni", "mac_table_multi", "guest_offloads", "rss_hash_types", "rss_table", "rss_key")


@contextmanager
def opened(name: str, wanted: Feature, **parameters: object) -> Iterator[HwGuest]:
    """A guest whose own control queue rests."""
    sim = hwsim.add(name, PAIRS, extra_features=int(OFFERED), **parameters)
    try:
        with closing(HwGuest(sim, PAIRS, wanted, BackendFeature(0), ring_size=64)) as guest:
            yield guest
    finally:
        hwsim.remove(name)


def begin(guest: HwGuest) -> ControlQueue:
    """Start from scratch: the device has nothing but the guest's first state, and no announcement is due."""
    if guest.device.shadows or guest.device._procedure._control is not None:
        guest.device.reset()
    guest.start()
    queue = guest.device._procedure._control
    assert queue is not None
    return queue


def ask(queue: ControlQueue, sent: Sent) -> int:
    kind, number, payload = sent
    [answer] = queue._send([bytes([kind, number]) + payload])
    return answer


def shown(guest: HwGuest) -> dict[str, str]:
    state = guest.sim.read("state")
    return {key: state[key] for key in SHOWN}


@pytest.mark.parametrize("part", range(3))
def test_command_changes_what_it_is_for(part: int) -> None:
    with opened("hw0", MORE) as guest:
        for case in list(TAKEN)[part::3]:
            sent, meant = TAKEN[case]
            queue = begin(guest)
            if any(kind == Class.ANNOUNCE for kind, _, _ in sent):
                guest.sim.write("announce", 1)
                assert shown(guest)["announce"] == "1"
            before = shown(guest)
            assert [ask(queue, each) for each in sent] == [control.OK] * len(sent), case
            assert shown(guest) == {**before, **_rest(guest, meant), **meant}, case


def _rest(guest: HwGuest, meant: dict[str, str]) -> dict[str, str]:
    """What a command may change beside what is looked at: RSS and hashes have a key and types."""
    state = shown(guest)
    keys = [key for key in ("rss_hash_types", "rss_key", "rss_table", "pairs") if "rss_table" in meant]
    return {key: state[key] for key in keys if key not in meant}


def test_command_that_is_wrong_is_refused_and_changes_nothing() -> None:
    with opened("hw0", MORE) as guest:
        queue = begin(guest)
        for each in TAKEN["RSS"][0] + TAKEN["VLANs"][0] + TAKEN["tables of both kinds"][0]:
            assert ask(queue, each) == control.OK
        guest.sim.write("announce", 1)
        before, errors = shown(guest), guest.sim.read("stats")["cvq_refused"]
        wrong = {case: shown(guest) for case, sent in REFUSED.items() if ask(queue, sent) != control.ERR}
        assert wrong == {}
        assert shown(guest) == before
        assert int(guest.sim.read("stats")["cvq_refused"]) - int(errors) == len(REFUSED)
        assert guest.sim.read("state")["fault"] == ""


def test_device_with_receive_filters_begins_with_everything() -> None:
    with opened("hw0", MORE) as guest:
        begin(guest)
        assert shown(guest)["promisc"] == "1"


def test_command_longer_than_any_is_refused() -> None:
    with opened("hw0", MORE) as guest:
        queue = begin(guest)
        area, driver = queue.area, queue._driver
        before, place = shown(guest), driver.avail_idx % len(queue._answers)
        queue._answers[place : place + 1] = b"\xff"
        added = lib.ctrl_driver_add(
            driver, area.iova + area.commands, MAX_COMMAND + 1, area.iova + area.answers + place
        )
        assert added >= 0
        lib.ctrl_driver_kick(driver)
        queue._wait(1)
        assert queue._answers[place : place + 1] == bytes([control.ERR])
        assert shown(guest) == before


def test_command_of_one_byte_is_refused() -> None:
    with opened("hw0", MORE) as guest:
        assert begin(guest)._send([b"\0"]) == bytes([control.ERR])


@pytest.mark.parametrize("case", WITHOUT)
def test_command_whose_feature_was_not_negotiated_is_refused(case: str) -> None:
    feature, sent = WITHOUT[case]
    more = Feature(0) if feature is not Feature.CTRL_RX else Feature.CTRL_RX_EXTRA
    with opened("hw0", MORE & ~feature & ~more) as guest:
        queue, before = begin(guest), shown(guest)
        assert feature not in guest.device.features
        assert ask(queue, sent) == control.ERR
        assert shown(guest) == before


def test_commands_are_answered_in_order_and_all_of_them() -> None:
    """More than the device does in one go."""
    with opened("hw0", MORE) as guest:
        queue = begin(guest)
        sent = [bytes([Class.VLAN, control.VLAN_ADD]) + two(vlan) for vlan in range(1, 25)]
        assert queue._send(sent) == bytes([control.OK] * len(sent))
        assert guest.sim.read("state")["vlans"] == f"1-{len(sent)}"


def test_command_takes_its_cost_and_a_suspension_waits_for_it() -> None:
    with opened("hw0", MORE) as guest:
        queue = begin(guest)
        guest.sim.write("cost/cvq_ns", 300_000_000)
        began = time.monotonic()
        assert ask(queue, (Class.VLAN, control.VLAN_ADD, two(9))) == control.OK
        assert time.monotonic() - began >= 0.3
        assert int(guest.sim.read("stats")["cvq_command_charged_ns"]) >= 300_000_000
