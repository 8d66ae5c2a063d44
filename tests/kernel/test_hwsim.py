"""Shadow virtqueues and the control queue on a device with groups, pairs and descriptors in flight."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import hwsim
import lab
import pytest
from hw_guest import HwGuest

from pyvhostvdpa import Options, OutOfOrder, State, migrate
from pyvhostvdpa.errors import QueueBroken
from pyvhostvdpa.net import control
from pyvhostvdpa.net.control import Class, Rx, mac_table
from pyvhostvdpa.net.control_queue import ControlFailed
from pyvhostvdpa.net.features import CONTROL, RING, SUPPORTED, Feature
from pyvhostvdpa.uapi import BackendFeature
from pyvhostvdpa.virtqueue.shadow import RelayOptions

EVERYTHING = SUPPORTED | CONTROL | RING | Feature.GUEST_CSUM | Feature.GUEST_TSO4
OFFER_MORE = int(
    Feature.CTRL_RX
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_GUEST_OFFLOADS
    | Feature.GUEST_TSO4
    | Feature.RSS
    | Feature.HASH_REPORT
)


Make = Callable[..., HwGuest]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make guests on devices with the given parameters."""
    made: list[HwGuest] = []

    def build(
        pairs: int = 1,
        wanted: Feature = SUPPORTED | CONTROL,
        without: BackendFeature = BackendFeature(0),  # noqa: B008
        ring_size: int = 256,
        **parameters: object,
    ) -> HwGuest:
        sim = hwsim.add(f"hw{len(made)}", pairs, **parameters)
        try:
            made.append(HwGuest(sim, pairs, wanted, without, ring_size))
        except BaseException:
            hwsim.remove(sim.name)
            raise
        return made[-1]

    yield build
    for guest in made:
        guest.close()
        hwsim.remove(guest.sim.name)


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
    """Out of order while shadowed, where the list is ours; the newest ones in passthrough."""
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


def test_a_device_that_reorders_in_passthrough_is_refused_and_goes_on(make: Make) -> None:
    guest = make(inflight=16, reorder=1)
    guest.start()
    guest.traffic.run()
    guest.receives(500)
    with pytest.raises(OutOfOrder, match="out of order"):
        guest.device.stop()
    assert guest.device.state is State.PASSTHROUGH
    guest.receives(500)
    guest.settle()


@pytest.mark.parametrize(("threads", "busy_poll"), [(2, 0.0), (4, 0.001), (9, 0.0)])
def test_pairs_are_spread_over_threads(make: Make, threads: int, busy_poll: float) -> None:
    guest = make(4)
    guest.device.relay_options = RelayOptions(threads, busy_poll)
    guest.start()
    guest.use_all_pairs()
    guest.traffic.run()
    guest.switch()
    relays = [thread for thread in threading.enumerate() if thread.name == "svq-relay"]
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


def test_a_device_that_stops_completing_hangs_nobody(make: Make) -> None:
    guest = make(2)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    guest.traffic.run()
    guest.receives(100)
    guest.sim.write("fault/stall", "Y")
    time.sleep(0.2)
    begin = time.monotonic()
    guest.switch()
    assert time.monotonic() - begin < 10
    guest.sim.write("fault/stall", "N")
    guest.device.stop()
    guest.start()
    guest.receives(100)
    guest.settle()


@pytest.mark.parametrize("knob", ["corrupt_used_id"])
def test_a_device_that_lies_in_its_used_ring_breaks_that_queue_alone(make: Make, knob: str) -> None:
    guest = make(2)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    guest.traffic.run()
    guest.receives(100)
    guest.sim.write(f"fault/{knob}", 1)
    lab.wait_for(lambda: any(shadow.broken for shadow in guest.device.shadows), "the queue that is given up")
    broken = [shadow.queue.index // 2 for shadow in guest.device.shadows if shadow.broken]
    assert len(broken) == 1
    other = guest.nic.pairs[1 - broken[0]]
    received = other.counts().received
    lab.wait_for(lambda: other.counts().received > received + 200, "the other pair's traffic")
    with pytest.raises(QueueBroken, match="device: used id that it was not given"):
        guest.device.check()


def test_a_closed_eventfd_breaks_its_queue_alone(make: Make) -> None:
    guest = make(2)
    guest.start(State.SHADOW)
    guest.use_all_pairs()
    victim = guest.device.shadows[0]
    os.close(victim.call)
    os.eventfd_write(guest.device.shadows[2].kick, 1)
    os.eventfd_write(guest.device.shadows[2].call, 1)
    lab.wait_for(lambda: victim.broken, "the queue that is given up")
    victim.call = -1
    assert "eventfd" in victim.broken
    assert not guest.device.shadows[2].broken


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


def test_large_rings_work(make: Make) -> None:
    guest = make(1, ring_size=1024, ring_max=32768)
    guest.start(State.SHADOW)
    guest.traffic.run()
    guest.receives(5000)
    guest.switch()
    guest.receives(5000)
    guest.settle()


@pytest.mark.parametrize("pairs", [pytest.param(1, marks=pytest.mark.smoke), 4, 16])
def test_a_guest_migrates_with_all_its_pairs_and_its_address(pairs: int) -> None:
    source, destination = hwsim.add("hw0", pairs), hwsim.add("hw1", pairs)
    try:
        seen: dict[str, str] = {}

        def look(part: str) -> None:
            if part == "drain":
                seen.update(destination.read("state"))

        options = Options(memory=lab.SMALL * 2, pairs=pairs, seconds=3, ring_size=64)
        report = migrate(source.chardev, destination.chardev, options, look)
        frames = report.frames
        assert (frames.lost, frames.duplicated, frames.corrupted) == (0, 0, 0)
        assert all(part.received > 100 for part in report.parts.values())
        assert seen["pairs"] == str(pairs)
        assert seen["mac"] == source.mac.hex(":")
    finally:
        for device in (source, destination):
            hwsim.remove(device.name)


# -- control queue --------------------------------------------------------------

MACS = [bytes([2, 0, 0, 0, 1, n]) for n in range(1, 70)]
GROUPS = [bytes([1, 0, 0x5E, 0, 0, n]) for n in range(1, 5)]
RSS = (0x07).to_bytes(4, "little") + (1).to_bytes(2, "little") + (0).to_bytes(2, "little")
RSS += b"".join(n.to_bytes(2, "little") for n in (0, 2)) + (2).to_bytes(2, "little") + bytes([40]) + bytes(range(40))


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
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_the_guest_set_is_the_devices_state_after_every_switch(make: Make, case: str) -> None:
    guest = make(4, EVERYTHING, extra_features=OFFER_MORE)
    guest.start()
    assert [guest.send(*each) for each in COMMANDS[case]] == [control.OK] * len(COMMANDS[case])
    meant = state_after(guest)
    for _ in range(2):
        guest.switch()
        assert state_after(guest) == meant


def test_a_mac_table_too_large_becomes_promiscuous_mode(make: Make) -> None:
    guest = make(1, EVERYTHING, extra_features=OFFER_MORE)
    guest.start()
    assert guest.send(Class.RX, Rx.PROMISC, b"\0") == control.OK
    assert guest.send(Class.MAC, control.MAC_TABLE_SET, mac_table(MACS, GROUPS)) == control.OK
    for _ in range(2):
        assert guest.sim.read("state")["promisc"] == "1"
        guest.switch()


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


def test_a_device_that_never_answers_costs_the_deadline_and_no_more(make: Make) -> None:
    guest = make(1)
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
    lab.wait_for(lambda: guest.nic.counts().received > received + 100, "data queues that go on")
    with pytest.raises(ControlFailed, match="did not answer"):
        guest.switch()
    assert guest.device.state is State.RESET
    guest.sim.write("fault/cvq_mute", "N")
    guest.start()
    guest.settle()
