"""What the guest set through its control queue: the model, and the commands that bring a device to it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvhostvdpa.net import control
from pyvhostvdpa.net.config import control_index
from pyvhostvdpa.net.control import BadCommand, Class, ControlModel, Rx, command, mac_table, parse_mac_table
from pyvhostvdpa.net.features import CONTROL, Feature

FEATURES = CONTROL | Feature.GUEST_CSUM | Feature.GUEST_TSO4
KEY = bytes(range(40))
MACS = [bytes([2, 0, 0, 0, 0, n]) for n in range(100)]


def rss(table: list[int], pairs: int, key: bytes = KEY) -> bytes:
    body = struct.pack("<IHH", 7, len(table) - 1, 0) + b"".join(struct.pack("<H", queue) for queue in table)
    return body + struct.pack("<HB", pairs, len(key)) + key


def hashes(types: int = 7, key: bytes = KEY) -> bytes:
    return struct.pack("<IQB", types, 0, len(key)) + key


class Device:
    """Executes commands the way a device does, and shows what it was set to."""

    def __init__(self) -> None:
        self.rx = {mode: mode is Rx.PROMISC for mode in Rx}
        self.macs: tuple[list[bytes], list[bytes]] = ([], [])
        self.mac = b""
        self.vlans: set[int] = set()
        self.pairs, self.hashes, self.table = 1, b"", b""
        self.offloads = int(Feature.GUEST_CSUM | Feature.GUEST_TSO4)

    def execute(self, data: bytes) -> None:
        kind, number, payload = data[0], data[1], data[2:]
        if kind == Class.RX:
            self.rx[Rx(number)] = bool(payload[0])
        elif kind == Class.MAC and number == control.MAC_ADDR_SET:
            self.mac = payload
        elif kind == Class.MAC:
            self.macs = parse_mac_table(payload)
            assert sum(map(len, self.macs)) <= control.MAC_TABLE_ENTRIES
        elif kind == Class.VLAN:
            (self.vlans.add if number == control.VLAN_ADD else self.vlans.discard)(int.from_bytes(payload, "little"))
        elif kind == Class.GUEST_OFFLOADS:
            self.offloads = int.from_bytes(payload, "little")
        else:
            self._queues(number, payload)

    def _queues(self, number: int, payload: bytes) -> None:
        if number == control.VQ_PAIRS_SET:
            self.pairs, self.table = int.from_bytes(payload, "little"), b""
        elif number == control.HASH_CONFIG:
            self.hashes, self.table = payload[:4] + payload[12:], b""
        else:
            end = 8 + 2 * (int.from_bytes(payload[4:6], "little") + 1)
            self.hashes, self.table = payload[:4] + payload[end + 2 :], payload[4:end]
            self.pairs = int.from_bytes(payload[end : end + 2], "little")


def send(model: ControlModel, device: Device, data: bytes) -> ControlModel:
    wanted = ControlModel(**{**vars(model), "rx": dict(model.rx), "vlans": set(model.vlans)})
    wanted.apply(data)
    if data[0] != Class.ANNOUNCE:
        for each in model.for_device(data, wanted):
            device.execute(each)
    return wanted


def replayed(model: ControlModel) -> Device:
    device = Device()
    for each in model.replay():
        device.execute(each)
    return device


modes = st.builds(lambda mode, on: command(Class.RX, mode, bytes([on])), st.sampled_from(Rx), st.booleans())
macs = st.builds(lambda mac: command(Class.MAC, control.MAC_ADDR_SET, mac), st.sampled_from(MACS))
sizes = st.sampled_from([0, 1, 5, 40, 64, 65, 100])
tables = st.builds(
    lambda unicast, multicast: command(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:unicast], MACS[:multicast])),
    sizes,
    sizes,
)
vlans = st.builds(
    lambda number, vlan: command(Class.VLAN, number, vlan.to_bytes(2, "little")),
    st.sampled_from([control.VLAN_ADD, control.VLAN_DEL]),
    st.integers(0, 5),
)
queues = st.one_of(
    st.integers(1, 8).map(lambda pairs: command(Class.MQ, control.VQ_PAIRS_SET, pairs.to_bytes(2, "little"))),
    st.integers(1, 8).map(lambda pairs: command(Class.MQ, control.RSS_CONFIG, rss([0, 2, 4, 6], pairs))),
    st.integers(1, 7).map(lambda types: command(Class.MQ, control.HASH_CONFIG, hashes(types))),
)
offloads = st.sampled_from([0, 2, 128, 130]).map(
    lambda bits: command(Class.GUEST_OFFLOADS, control.GUEST_OFFLOADS_SET, bits.to_bytes(8, "little"))
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(modes, macs, tables, tables, vlans, queues, offloads), max_size=25))
def test_a_replay_brings_a_fresh_device_to_where_the_commands_brought_the_first(commands: list[bytes]) -> None:
    model, device = ControlModel(FEATURES, mac=MACS[0]), Device()
    device.mac = MACS[0]
    for data in commands:
        model = send(model, device, data)
        assert vars(replayed(model)) == vars(device)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_a_command_or_a_bad_one(data: bytes) -> None:
    model = ControlModel(FEATURES)
    try:
        send(model, Device(), data)
    except BadCommand:
        assert vars(model) == vars(ControlModel(FEATURES))


def test_a_table_too_large_means_promiscuous_until_a_smaller_one() -> None:
    model, device = ControlModel(FEATURES), Device()
    promisc_off = command(Class.RX, Rx.PROMISC, b"\0")
    model = send(model, device, promisc_off)
    model = send(model, device, command(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:65], [])))
    assert device.rx[Rx.PROMISC]
    model = send(model, device, promisc_off)
    assert device.rx[Rx.PROMISC], "the guest's table is not in the device"
    send(model, device, command(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS[:3], MACS[:2])))
    assert not device.rx[Rx.PROMISC]
    assert device.macs == (MACS[:3], MACS[:2])


BAD = {
    "RSS without a table": command(Class.MQ, control.RSS_CONFIG, rss([0, 2], 1)[:7]),
    "RSS table whose size is not a power of two": command(Class.MQ, control.RSS_CONFIG, rss([0, 2, 4], 1)),
    "RSS table longer than the command": command(Class.MQ, control.RSS_CONFIG, rss([0, 2], 1)[:12]),
    "RSS key of 41 bytes": command(Class.MQ, control.RSS_CONFIG, rss([0, 2], 1, bytes(41))),
    "bytes behind the key": command(Class.MQ, control.HASH_CONFIG, hashes() + b"\0"),
    "hashes without a key's length": command(Class.MQ, control.HASH_CONFIG, hashes()[:12]),
}


@pytest.mark.parametrize("case", BAD)
def test_hashes_that_do_not_add_up_are_bad(case: str) -> None:
    with pytest.raises(BadCommand):
        ControlModel(FEATURES).apply(BAD[case])


@pytest.mark.parametrize(("max_pairs", "index"), [(None, 2), (1, 2), (8, 16)])
def test_the_control_queue_comes_behind_all_pairs(max_pairs: int | None, index: int) -> None:
    assert control_index(CONTROL, max_pairs) == index


def test_control_queue_does_not_exist_without_its_feature() -> None:
    assert control_index(CONTROL & ~Feature.CTRL_VQ, 8) is None
