"""The control queue on a device with groups: what the guest set is what the device does, wherever it is."""

from __future__ import annotations

import threading
import time

import lab
import pytest
from hw_guest import HwGuest, Make

from pyvhostvdpa import State
from pyvhostvdpa.base.errors import QueueBroken
from pyvhostvdpa.net import control
from pyvhostvdpa.net.control import Class, Rx, mac_table
from pyvhostvdpa.net.control_queue import ControlFailed, ControlQueue
from pyvhostvdpa.net.features import CONTROL, RING, SUPPORTED, Feature

EVERYTHING = SUPPORTED | CONTROL | Feature.GUEST_CSUM | Feature.GUEST_TSO4
OFFER_MORE = int(
    Feature.CTRL_RX
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_GUEST_OFFLOADS
    | Feature.GUEST_TSO4
    | Feature.RSS
    | Feature.HASH_REPORT
)
MACS = [bytes([2, 0, 0, 0, 1, n]) for n in range(1, 70)]
GROUPS = [bytes([1, 0, 0x5E, 0, 0, n]) for n in range(1, 5)]
KEY = bytes([40]) + bytes(range(40))


def two(number: int) -> bytes:
    return number.to_bytes(2, "little")


RSS = (7).to_bytes(4, "little") + two(1) + two(0) + two(0) + two(2) + two(2) + KEY
HASHES = (5).to_bytes(4, "little") + bytes(8) + KEY


def state_after(guest: HwGuest) -> dict[str, str]:
    """What the device itself says of what the control queue set."""
    state = guest.sim.read("state")
    wanted = ("mac", "pairs", "promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast", "vlans")
    tables = ("mac_table_uni", "mac_table_multi", "guest_offloads", "rss_hash_types", "rss_table", "rss_key")
    return {key: state[key] for key in (*wanted, *tables)}


COMMANDS: dict[str, list[tuple[Class, int, bytes]]] = {
    "MAC address": [(Class.MAC, control.MAC_ADDR_SET, bytes.fromhex("020000000042"))],
    "MAC tables": [(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:5], GROUPS))],
    "RX modes": [
        (Class.RX, Rx.PROMISC, b"\0"),
        (Class.RX, Rx.ALLMULTI, b"\1"),
        (Class.RX, Rx.ALLUNI, b"\1"),
        (Class.RX, Rx.NOMULTI, b"\1"),
        (Class.RX, Rx.NOUNI, b"\1"),
        (Class.RX, Rx.NOBCAST, b"\1"),
    ],
    "RX modes back": [(Class.RX, Rx.ALLMULTI, b"\1"), (Class.RX, Rx.ALLMULTI, b"\0")],
    "VLANs": [
        *[(Class.VLAN, control.VLAN_ADD, vlan.to_bytes(2, "little")) for vlan in (1, 77, 4095)],
        (Class.VLAN, control.VLAN_DEL, (77).to_bytes(2, "little")),
    ],
    "many VLANs": [(Class.VLAN, control.VLAN_ADD, vlan.to_bytes(2, "little")) for vlan in range(1, 200)],
    "pairs": [(Class.MQ, control.VQ_PAIRS_SET, b"\3\0")],
    "offloads": [(Class.GUEST_OFFLOADS, control.GUEST_OFFLOADS_SET, (1 << 7).to_bytes(8, "little"))],
    "RSS": [(Class.MQ, control.RSS_CONFIG, RSS)],
    "RSS, then pairs alone": [(Class.MQ, control.RSS_CONFIG, RSS), (Class.MQ, control.VQ_PAIRS_SET, two(4))],
    "hashes": [(Class.MQ, control.HASH_CONFIG, HASHES)],
    "RSS, then hashes alone": [(Class.MQ, control.RSS_CONFIG, RSS), (Class.MQ, control.HASH_CONFIG, HASHES)],
    "a table too large": [
        (Class.RX, Rx.PROMISC, b"\0"),
        (Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:5], GROUPS)),
        (Class.MAC, control.MAC_TABLE_SET, mac_table(MACS, GROUPS)),
        (Class.RX, Rx.PROMISC, b"\0"),
    ],
    "a table too large, then a small one": [
        (Class.RX, Rx.PROMISC, b"\0"),
        (Class.MAC, control.MAC_TABLE_SET, mac_table(MACS, GROUPS)),
        (Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:2], [])),
    ],
}


SET: list[tuple[Class, int, bytes]] = [
    (Class.MAC, control.MAC_ADDR_SET, MACS[6]),
    (Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:2], GROUPS[:1])),
    (Class.MQ, control.VQ_PAIRS_SET, two(4)),
    (Class.MQ, control.RSS_CONFIG, RSS),
    (Class.GUEST_OFFLOADS, control.GUEST_OFFLOADS_SET, (1 << 7).to_bytes(8, "little")),
    (Class.RX, Rx.PROMISC, b"\0"),
    (Class.RX, Rx.ALLMULTI, b"\1"),
    (Class.RX, Rx.ALLUNI, b"\1"),
    (Class.RX, Rx.NOMULTI, b"\0"),
    (Class.RX, Rx.NOUNI, b"\1"),
    (Class.RX, Rx.NOBCAST, b"\1"),
    *[(Class.VLAN, control.VLAN_ADD, two(vlan)) for vlan in (1, 2, 77, 4095)],
    (Class.VLAN, control.VLAN_DEL, two(77)),
    (Class.ANNOUNCE, control.ANNOUNCE_ACK, b""),
]
"""Every command that there is but HASH_CONFIG, whose place RSS_CONFIG takes."""

MEANT = {
    "mac": MACS[6].hex(":"),
    "pairs": "2",
    "promisc": "0",
    "allmulti": "1",
    "alluni": "1",
    "nomulti": "0",
    "nouni": "1",
    "nobcast": "1",
    "vlans": "1-2,4095",
    "mac_table_uni": f"{MACS[0].hex(':')},{MACS[1].hex(':')}",
    "mac_table_multi": GROUPS[0].hex(":"),
    "guest_offloads": "0x80",
    "rss_hash_types": "0x7",
    "rss_table": "0,2",
    "rss_key": bytes(range(40)).hex(),
}


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_frames_behind_a_header_with_a_hash_come_back_whole(make: Make, mode: State) -> None:
    """HASH_REPORT makes the header of every frame 8 bytes longer (virtio 1.3, 5.1.6)."""
    guest = make(1, SUPPORTED | CONTROL, extra_features=OFFER_MORE)
    assert Feature.HASH_REPORT in guest.device.features
    guest.start(mode)
    guest.traffic.run()
    guest.receives(200)
    guest.traffic.pause()
    counts = guest.nic.counts()
    assert (counts.corrupted, counts.reordered, counts.duplicated) == (0, 0, 0)


@pytest.mark.parametrize("ring", [Feature(0), RING], ids=["plain ring", "indirect tables and event index"])
def test_control_state_follows_the_guest_through_switches_and_migration(make: Make, ring: Feature) -> None:
    guest = make(4, EVERYTHING | ring, procedure="direct", extra_features=OFFER_MORE | int(ring))
    with guest.destination(4, extra_features=OFFER_MORE | int(ring)) as destination:
        guest.start()
        assert [guest.send(*each) for each in SET] == [control.OK] * len(SET)
        assert state_after(guest) == MEANT
        for mode in (State.SHADOW, State.PASSTHROUGH, State.SHADOW):
            guest.switch()
            assert guest.device.state is mode
            assert state_after(guest) == MEANT
        left = guest.sim
        guest.move(destination)
        assert state_after(guest) == MEANT
        assert left.read("state")["status"] == "0x00"
        guest.switch()
        assert state_after(guest) == MEANT
        assert guest.send(Class.MAC, control.MAC_ADDR_SET, MACS[7]) == control.OK
        assert state_after(guest) == {**MEANT, "mac": MACS[7].hex(":")}


@pytest.mark.parametrize("case", COMMANDS)
def test_device_has_the_guests_state_after_every_switch_and_a_move(make: Make, case: str) -> None:
    guest = make(4, EVERYTHING, extra_features=OFFER_MORE)
    with guest.destination(4, extra_features=OFFER_MORE) as destination:
        guest.start()
        assert [guest.send(*each) for each in COMMANDS[case]] == [control.OK] * len(COMMANDS[case])
        meant = state_after(guest)
        for _ in range(3):
            guest.switch()
            assert state_after(guest) == meant
        guest.move(destination)
        assert state_after(guest) == meant


def test_a_mac_table_too_large_is_promiscuous_mode_that_the_guest_cannot_turn_off(make: Make) -> None:
    guest = make(1, EVERYTHING, extra_features=OFFER_MORE)
    guest.start()
    off = (Class.RX, Rx.PROMISC, b"\0")
    assert guest.send(*off) == control.OK
    assert guest.send(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS, GROUPS)) == control.OK
    assert guest.send(*off) == control.OK
    for _ in range(2):
        assert guest.sim.read("state")["promisc"] == "1"
        guest.switch()
    assert guest.send(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:3], [])) == control.OK
    assert guest.sim.read("state")["promisc"] == "0"


def test_a_replay_has_several_commands_in_flight(make: Make) -> None:
    guest = make(1, procedure="direct")
    guest.start()
    vlans = [(Class.VLAN, control.VLAN_ADD, two(vlan)) for vlan in range(1, 200)]
    assert [guest.send(*each) for each in vlans] == [control.OK] * len(vlans)
    guest.sim.write("reset_stats", 1)
    guest.switch()
    stats = guest.sim.read("stats")
    assert int(stats["cvq_command"]) > len(vlans)
    assert int(stats[f"vq{guest.device.groups.control_index}.kicks"]) <= len(vlans) // 8


BAD_COMMANDS = {
    "class unknown": (9, 0, b""),
    "MAC of 5 bytes": (Class.MAC, control.MAC_ADDR_SET, b"12345"),
    "table longer than it is": (Class.MAC, control.MAC_TABLE_SET, (9999).to_bytes(4, "little")),
    "VLAN 5000": (Class.VLAN, control.VLAN_ADD, (5000).to_bytes(2, "little")),
    "no payload": (Class.RX, Rx.PROMISC, b""),
    "more pairs than there are": (Class.MQ, control.VQ_PAIRS_SET, b"\x40\0"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_is_answered_with_err_and_changes_nothing(make: Make, case: str) -> None:
    kind, number, payload = BAD_COMMANDS[case]
    guest = make(2, EVERYTHING, extra_features=OFFER_MORE)
    guest.start()
    before = state_after(guest)
    assert guest.nic.control is not None
    assert guest.nic.control.send(bytes([kind, number]) + payload) == control.ERR
    assert state_after(guest) == before
    guest.switch()
    assert state_after(guest) == before


def test_announce_is_answered_by_us(make: Make) -> None:
    guest = make(1)
    guest.start()
    guest.model.announce = True
    commands = guest.sim.read("stats")["cvq_command"]
    assert guest.send(Class.ANNOUNCE, control.ANNOUNCE_ACK) == control.OK
    assert not guest.model.announce
    assert guest.sim.read("stats")["cvq_command"] == commands


def test_a_device_that_refuses_the_guests_state_is_not_started(make: Make) -> None:
    guest = make(2, procedure="direct")
    guest.start()
    guest.model.pairs = 3
    with pytest.raises(ControlFailed, match="answered 1 to control command class 4 number 0"):
        guest.switch()
    assert guest.device.state is State.RESET
    guest.model.pairs = 2
    guest.start()
    assert guest.sim.read("state")["pairs"] == "2"


def test_control_command_changed_after_it_was_published_has_no_effect(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make(1)
    guest.start()
    driver, handle = guest.nic.control, ControlQueue.handle
    assert driver is not None

    def change_first(queue: ControlQueue, data: bytes) -> int:
        driver._bytes[2:8] = MACS[1]
        return handle(queue, data)

    monkeypatch.setattr(ControlQueue, "handle", change_first)
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, MACS[0]) == control.OK
    assert guest.sim.read("state")["mac"] == MACS[0].hex(":")
    assert guest.model.mac == MACS[0]


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_commands_continue_while_the_device_is_switched(make: Make, mode: State) -> None:
    guest = make(1)
    guest.start(mode)
    guest.sim.write("cost/cvq_ns", 20_000_000)
    answers: list[int] = []

    def keep_sending() -> None:
        answers.extend(guest.send(Class.MAC, control.MAC_ADDR_SET, mac) for mac in MACS[:40])

    sender = threading.Thread(target=keep_sending)
    sender.start()
    switches = 0
    while sender.is_alive():
        guest.switch()
        switches += 1
    sender.join()
    assert switches > 2
    assert answers == [control.OK] * 40
    assert guest.sim.read("state")["mac"] == MACS[39].hex(":")


@pytest.mark.parametrize("deadline", [0.3, 2.0])
def test_a_device_that_never_answers_costs_the_callers_deadline(make: Make, deadline: float) -> None:
    guest = make(1)
    guest.device.control_deadline = deadline
    guest.start()
    guest.sim.write("fault/cvq_mute", "Y")
    begin = time.monotonic()
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, MACS[0]) == control.ERR
    assert deadline <= time.monotonic() - begin < deadline + 2
    with pytest.raises(QueueBroken, match=f"did not answer 1 control commands within {deadline} s"):
        guest.device.check()


def test_a_device_may_be_slower_than_the_deadline_as_long_as_it_answers(make: Make) -> None:
    guest = make(1, procedure="direct")
    guest.start()
    for vlan in range(1, 11):
        assert guest.send(Class.VLAN, control.VLAN_ADD, two(vlan)) == control.OK
    guest.sim.write("cost/cvq_ns", 100_000_000)
    guest.device.control_deadline = 0.6
    begin = time.monotonic()
    guest.switch()
    assert time.monotonic() - begin > 1.0
    assert guest.sim.read("state")["vlans"] == "1-10"


def test_a_device_that_never_answers_costs_the_deadline_and_no_more(make: Make) -> None:
    guest = make(1, procedure="direct")
    guest.device.control_deadline = 1.0
    guest.start()
    guest.traffic.run()
    guest.receives(100)
    guest.sim.write("fault/cvq_mute", "Y")
    begin = time.monotonic()
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, MACS[0]) == control.ERR
    assert time.monotonic() - begin < 5
    with pytest.raises(QueueBroken, match="did not answer"):
        guest.device.check()
    received = guest.nic.counts().received
    lab.wait_for(lambda: guest.nic.counts().received > received + 100, "frames on the data queues")
    with pytest.raises(ControlFailed, match="did not answer"):
        guest.switch()
    assert guest.device.state is State.RESET
    guest.sim.write("fault/cvq_mute", "N")
    guest.start()
    guest.settle()
