"""A vhost-user session: what each message leads to on the device, in the orders of real front-ends."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import hostile_front_end
import pytest
from served_double import MTU, PAIRS
from session_rig import MINIMAL, MODERN, OLD, P, number, rig, running, state
from vhost_front_end import MEMORY, RING, KiB, MiB, Refused

from pyvhostvdpa.base.errors import MapRejected, OutOfOrder, QueueBroken
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.device.net import State
from pyvhostvdpa.net.control import VQ_PAIRS_SET, Class, command
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.vhost_user.features import LOG_ALL
from pyvhostvdpa.vhost_user.messages import ProtocolError, ProtocolFeature, Request

INPUTS = int(os.environ.get("PYVHOSTVDPA_FUZZ_INPUTS", "1000"))


def test_offer_is_what_the_device_has_and_can_be_moved() -> None:
    with rig() as r:
        r.front.connect()
        offered = r.front.offered
        assert offered & LOG_ALL
        assert Feature.MQ & offered
        assert Feature.CSUM & offered
        for never in (Feature.ACCESS_PLATFORM, Feature.RING_RESET, Feature.RING_PACKED, Feature.MAC, Feature.RSS):
            assert not offered & never, never
        assert not offered & Feature.INDIRECT_DESC, "the device could not be switched in place"
        assert r.front.pairs == PAIRS
        assert r.front.slots == 509


def test_indirect_descriptors_are_offered_on_demand() -> None:
    with rig(indirect=True) as r:
        r.front.connect()
        assert r.front.offered & Feature.INDIRECT_DESC


def test_a_mask_takes_features_away_and_not_those_of_the_protocol() -> None:
    with rig(features=int(Feature.VERSION_1)) as r:
        r.front.connect()
        assert r.front.offered & ~int(Feature.VERSION_1) == LOG_ALL | 1 << 30
        assert r.front.pairs == 1


def test_a_feature_that_was_not_offered_is_refused() -> None:
    with rig() as r:
        r.front.connect()
        with pytest.raises(Refused):
            r.front.acknowledge(r.front.offered | int(Feature.RING_RESET), ack=True)
        r.front.acknowledge(r.front.offered, ack=True)


def test_a_protocol_feature_that_was_not_offered_ends_the_connection() -> None:
    with rig() as r:
        r.front.set(Request.SET_PROTOCOL_FEATURES, number(1 << 12), ack=False)
        assert "not offered" in str(r.join())


def test_the_device_is_asked_for_what_the_guest_took_and_for_what_it_needs() -> None:
    with rig() as r:
        r.front.connect()
        r.front.acknowledge(int(Feature.VERSION_1 | Feature.CSUM) | 1 << 30, ack=True)
        assert r.device.features & Feature.ACCESS_PLATFORM
        assert Feature.CTRL_VQ not in r.device.features, "one pair needs no control queue"
        r.front.acknowledge(int(Feature.VERSION_1 | Feature.MQ) | 1 << 30, ack=True)
        assert Feature.CTRL_VQ in r.device.features
        assert Feature.CTRL_VLAN not in r.device.features


def test_an_mtu_above_the_devices_is_refused() -> None:
    with rig() as r:
        r.front.connect()
        r.front.set(Request.NET_SET_MTU, number(MTU))
        with pytest.raises(Refused):
            r.front.set(Request.NET_SET_MTU, number(MTU + 1))


# -- start and stop -------------------------------------------------------------------


@pytest.mark.parametrize("use", [MODERN, OLD, MINIMAL], ids=["modern", "old", "minimal"])
def test_a_start_brings_the_device_up_once_on_the_guests_rings(use: ProtocolFeature) -> None:
    with running(use) as r:
        assert r.device.names().count("start") == 1
        assert r.device.state is State.PASSTHROUGH
        assert [queue.index for queue in r.device.queues] == [0, 1]
        assert [queue.desc for queue in r.device.queues] == [MiB, MiB + 64 * KiB]
        assert {gpa: region.size for gpa, region in r.device.regions.items()} == {
            0: 640 * KiB,
            MiB: MEMORY - MiB,
        }


def test_with_status_nothing_starts_before_driver_ok() -> None:
    with rig() as r:
        r.front.connect()
        r.front.rings()
        r.front.acknowledge(r.front.offered)
        r.front.share()
        for index in (0, 1):
            r.front.enable(index, True)
            r.front.ring(index)
        assert "start" not in r.device.names()
        r.front.set_status(0xF)
        assert r.device.state is State.PASSTHROUGH


def test_two_pairs_are_started_at_once_with_the_pairs_that_are_enabled() -> None:
    with rig() as r:
        r.front.connect()
        r.front.start(pairs=2)
        assert r.device.names().count("start") == 1
        assert len(r.device.queues) == 4
        assert r.device.control is not None
        assert r.device.control.model.pairs == 2


def test_without_status_the_second_pair_restarts_the_device_with_both() -> None:
    with rig(OLD) as r:
        r.front.connect()
        r.front.start(pairs=2)
        assert len(r.device.queues) == 4
        assert r.device.state is State.PASSTHROUGH


def test_the_number_of_pairs_follows_enable() -> None:
    with rig() as r:
        r.front.connect()
        r.front.start(pairs=2)
        r.front.enable(2, False)
        r.front.enable(3, False)
        r.front.enable(2, True)
        r.front.enable(3, True)
        pairs = [command(Class.MQ, VQ_PAIRS_SET, bytes([count, 0])) for count in (1, 2)]
        assert r.device.commands == pairs


def test_a_refused_number_of_pairs_is_an_error() -> None:
    with rig() as r:
        r.front.connect()
        r.front.start(pairs=2)
        r.device.answer = 1
        with pytest.raises(Refused):
            r.front.enable(2, False)


@pytest.mark.parametrize("use", [MODERN, OLD, MINIMAL], ids=["modern", "old", "minimal"])
def test_the_first_base_stops_the_whole_device_and_a_start_continues_there(use: ProtocolFeature) -> None:
    with running(use) as r:
        r.device.forget()
        assert r.front.stop() == [1, 1]
        assert r.device.names().count("stop") == 1
        assert r.device.state is State.RESET
        r.device.forget()
        r.front.start(share=P.CONFIGURE_MEM_SLOTS not in r.front.protocol)
        assert not {"add_memory", "remove_memory", "negotiate"} & set(r.device.names())
        assert r.device.names().count("start") == 1


def test_a_device_that_cannot_be_suspended_is_halted() -> None:
    with rig() as r:
        r.device.backend_features &= ~BackendFeature.SUSPEND
        r.front.connect()
        r.front.start()
        r.front.stop()
        assert "halt" in r.device.names()


def test_bases_of_a_ring_that_never_ran_are_what_was_set() -> None:
    with rig() as r:
        r.front.connect()
        r.front.set(Request.SET_VRING_BASE, state(1, 77))
        assert struct.unpack("=II", r.front.ask(Request.GET_VRING_BASE, state(1, 0))) == (1, 77)
        assert struct.unpack("=II", r.front.ask(Request.GET_VRING_BASE, state(0, 0))) == (0, 0)


def test_disabling_every_ring_suspends_and_enabling_continues() -> None:
    with running() as r:
        r.front.enable(0, False)
        r.front.enable(1, False)
        assert r.device.state is State.RESET
        r.front.enable(0, True)
        assert r.device.state is State.RESET
        r.front.enable(1, True)
        assert r.device.state is State.PASSTHROUGH


def test_status_0_stops_a_device_that_still_runs() -> None:
    with running() as r:
        r.front.set_status(0)
        assert r.device.state is State.RESET
        assert r.front.number(Request.GET_STATUS) == 0


def test_a_guests_reset_resets_the_device_and_keeps_memory() -> None:
    with running() as r:
        r.front.set(Request.RESET_DEVICE)
        assert "reset" in r.device.names()
        # each has to be kicked and enabled again
        assert not any(ring.enabled or ring.ready for ring in r.session.rings)
        r.front.start(share=False)
        assert r.device.state is State.PASSTHROUGH


def test_eventfds_are_exchanged_while_the_device_runs() -> None:
    with running() as r:
        r.device.forget()
        r.front.eventfd(Request.SET_VRING_CALL, 0, r.front.calls[1])
        r.front.eventfd(Request.SET_VRING_CALL, 1, -1)
        r.front.eventfd(Request.SET_VRING_KICK, 0, r.front.kicks[1])
        assert [call.what for call in r.device.calls if call.name == "set_eventfds"] == [
            (0, False, True),
            (1, False, True),
            (0, True, False),
        ]


def test_unchanged_queues_are_the_same_objects() -> None:
    with rig() as r:
        r.front.connect()
        r.front.start(pairs=2)
        before = r.device.queues
        r.front.enable(0, False)
        for index in (1, 2, 3):
            r.front.enable(index, False)
        for index in range(4):
            r.front.enable(index, True)
        assert all(one is other for one, other in zip(before, r.device.queues, strict=True))


def test_a_start_that_fails_is_an_error_and_leaves_the_session_usable() -> None:
    with rig() as r:
        r.front.connect()
        r.device.fails["start"] = QueueBroken("the base lies outside")
        with pytest.raises(Refused):
            r.front.start()
        assert r.backend.failed
        assert "device-failed" in r.names()
        r.front.set_status(0)
        r.front.start(share=False)
        assert not r.backend.failed


def test_a_stop_that_fails_still_answers_and_leaves_the_device_reset() -> None:
    with running() as r:
        r.device.fails["stop"] = OutOfOrder("used out of order")
        r.front.stop()
        assert r.device.state is State.RESET
        assert "device-failed" in r.names()


# -- memory ---------------------------------------------------------------------------


def test_memory_comes_and_goes_while_the_device_runs() -> None:
    with running() as r:
        more = os.memfd_create("dimm")
        os.ftruncate(more, MiB)
        region = bytes(8) + r.front.region(1 << 32, MiB, 0)
        r.front.set(Request.ADD_MEM_REG, region, [more])
        assert 1 << 32 in r.device.regions
        r.front.set(Request.REM_MEM_REG, region)
        assert 1 << 32 not in r.device.regions
        os.close(more)


def test_a_region_that_is_added_for_each_pair_goes_with_the_last_removal() -> None:
    """QEMU before 8.0 does so."""
    with rig() as r:
        r.front.connect()
        r.front.share()
        r.front.share()
        assert len(r.device.regions) == 2
        region = bytes(8) + r.front.region(*r.front.layout[0])
        r.front.set(Request.REM_MEM_REG, region)
        assert 0 in r.device.regions
        r.front.set(Request.REM_MEM_REG, region)
        assert 0 not in r.device.regions
        with pytest.raises(Refused):
            r.front.set(Request.REM_MEM_REG, region)


def test_memory_of_a_ring_that_runs_is_not_taken_away() -> None:
    with running() as r:
        with pytest.raises(Refused):
            r.front.set(Request.REM_MEM_REG, bytes(8) + r.front.region(*r.front.layout[1]))
        assert MiB in r.device.regions


@pytest.mark.parametrize(
    ("region", "why"),
    [
        ((2 * MiB, MiB, 0), "overlap"),
        ((1 << 32, MEMORY + MiB, 0), "bytes, it begins"),
        ((1 << 32, MiB, MEMORY), "bytes, it begins"),
        ((1 << 32, 0, 0), "multiples"),
        (((1 << 32) + 1, MiB, 0), "multiples"),
        ((1 << 32, MiB - 1, 0), "multiples"),
        ((1 << 32, MiB, 17), "multiples"),
    ],
)
def test_a_region_that_does_not_do_is_refused(region: tuple[int, int, int], why: str) -> None:
    with rig() as r:
        r.front.connect()
        r.front.share()
        with pytest.raises(Refused):
            r.front.set(Request.ADD_MEM_REG, bytes(8) + r.front.region(*region), [r.front.memory])
        assert why in r.events[-1][1]["error"]
        assert len(r.device.regions) == 2


def test_a_file_that_is_not_memory_is_refused(tmp_path: Any) -> None:
    with rig() as r, open("/proc/self/exe", "rb") as file:
        r.front.connect()
        with pytest.raises(Refused):
            r.front.set(Request.ADD_MEM_REG, bytes(8) + r.front.region(0, 4 * KiB, 0), [file.fileno()])
        assert "neither tmpfs nor hugetlbfs" in r.events[-1][1]["error"]


def test_more_memory_than_allowed_is_refused() -> None:
    with rig(max_memory=MEMORY // 2) as r:
        r.front.connect()
        with pytest.raises(Refused):
            r.front.share()
        assert r.events[-1][1]["hint"].startswith("vhost-vdpa serve --max-memory")


def test_memory_that_the_device_refuses_is_not_kept() -> None:
    with rig() as r:
        r.front.connect()
        r.device.fails["add_memory"] = MapRejected("too many entries")
        with pytest.raises(Refused):
            r.front.share()
        assert not r.backend.memory.regions
        r.front.share()
        assert len(r.backend.memory.regions) == 2


def test_a_table_changes_what_is_different_only() -> None:
    with rig(MINIMAL) as r:
        r.front.connect()
        r.front.share()
        r.front.barrier()
        r.device.forget()
        r.front.share()
        r.front.barrier()
        assert not {"add_memory", "remove_memory"} & set(r.device.names())
        table = struct.pack("=II", 1, 0) + r.front.region(*r.front.layout[0])
        r.front.set(Request.SET_MEM_TABLE, table, [r.front.memory])
        r.front.barrier()
        assert set(r.device.regions) == {0}


# -- rings that do not do -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_VRING_NUM, state(0, 0)),
        (Request.SET_VRING_NUM, state(0, 3)),
        (Request.SET_VRING_NUM, state(0, 512)),
        (Request.SET_VRING_NUM, state(2 * PAIRS, 256)),
        (Request.SET_VRING_NUM, state(0xFFFFFFFF, 256)),
        (Request.SET_VRING_BASE, state(0, 1 << 16)),
        (Request.SET_VRING_BASE, state(9, 0)),
        (Request.SET_VRING_ENABLE, state(0, 2)),
        (Request.SET_VRING_ENABLE, state(9, 1)),
        (Request.SET_STATUS, number(256)),
        (Request.SET_VRING_KICK, number(256)),
        (Request.SET_VRING_CALL, number(255 | 256)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, MiB + 1, 2 * MiB, MiB + 8192, 0)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, MiB, 2 * MiB, MiB + 8193, 0)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, MiB, 2 * MiB + 2, MiB + 8192, 0)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, MiB, 2 * MiB, MiB, 0)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 1 << 40, 2 * MiB, MiB, 0)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 2, MiB, 2 * MiB, MiB + 8192, 0)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 1, MiB, 2 * MiB, MiB + 8192, 4096)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 99, 0, MiB, 2 * MiB, MiB + 8192, 0)),
    ],
)
def test_a_value_out_of_range_is_refused(request_: Request, payload: bytes) -> None:
    with rig() as r:
        r.front.connect()
        r.front.share()
        r.front.set(Request.SET_VRING_NUM, state(0, RING))
        with pytest.raises(Refused):
            r.front.set(request_, payload)


def test_a_refused_message_without_an_answer_ends_the_connection() -> None:
    with rig(MINIMAL) as r:
        r.front.connect()
        r.front.set(Request.SET_VRING_NUM, state(0, 3))
        assert "asked for no answer" in str(r.join())


@pytest.mark.parametrize("request_", [Request.SET_VRING_NUM, Request.SET_VRING_BASE])
def test_a_ring_that_runs_is_not_changed(request_: Request) -> None:
    with running() as r:
        with pytest.raises(Refused):
            r.front.set(request_, state(0, 128))
        moved = struct.pack("=IIQQQQ", 0, 0, 2 * MiB, 3 * MiB, 2 * MiB + 64 * KiB, 0)
        with pytest.raises(Refused):
            r.front.set(Request.SET_VRING_ADDR, moved)


def test_half_a_pair_is_not_started() -> None:
    with rig() as r:
        r.front.connect()
        r.front.rings()
        r.front.acknowledge(r.front.offered)
        r.front.share()
        r.front.enable(0, True)
        r.front.enable(1, True)
        r.front.ring(0)
        with pytest.raises(Refused):
            r.front.set_status(0xF)
        assert r.device.state is State.RESET


def test_a_ring_whose_memory_went_away_is_not_started() -> None:
    with running() as r:
        r.front.stop()
        r.front.set(Request.REM_MEM_REG, bytes(8) + r.front.region(*r.front.layout[1]))
        for index in (0, 1):
            r.front.eventfd(Request.SET_VRING_KICK, index, r.front.kicks[index])
        with pytest.raises(Refused):
            r.front.set_status(0xF)


@pytest.mark.parametrize(
    ("request_", "payload"),
    [(Request.SET_STATUS, number(0)), (Request.GET_STATUS, b""), (Request.GET_QUEUE_NUM, b"")],
)
def test_a_message_of_a_feature_that_was_not_negotiated_is_not_served(request_: Request, payload: bytes) -> None:
    with rig(MINIMAL) as r:
        r.front.connect()
        r.front.send(request_, payload)
        assert "was not negotiated" in str(r.join())


def test_a_malformed_message_that_asks_for_an_answer_gets_one() -> None:
    with rig() as r:
        r.front.connect()
        with pytest.raises(Refused):
            r.front.set(Request.SET_VRING_NUM, b"abc")
        r.front.barrier()


@pytest.mark.parametrize("request_", [22, 24, 28, 31, 32, 41, 44, 63])
def test_a_request_that_is_not_offered_ends_the_connection(request_: int) -> None:
    with rig() as r:
        r.front.connect()
        r.front.send(request_, b"", flags=9)
        assert isinstance(r.join(), ProtocolError)


# -- the end --------------------------------------------------------------------------


def test_a_front_end_that_leaves_takes_its_memory_with_it_and_the_next_one_starts_from_scratch() -> None:
    with rig() as r:
        r.front.connect()
        r.front.start(pairs=2)
        os.close(r.front.start_logging(4))
        r.disconnect()
        assert r.device.state is State.RESET
        assert not r.device.regions
        assert r.device.log is None
        r.connect(MODERN)
        r.front.connect()
        r.front.start()
        assert r.device.state is State.PASSTHROUGH
        assert len(r.device.queues) == 2


@pytest.mark.parametrize("seed", range(1, 5))
def test_random_front_ends_leave_nothing_behind(seed: int) -> None:
    """The soak test `front_end` runs the same harness under libFuzzer."""
    generator = random.Random(seed)
    for _ in range(INPUTS // 4):
        hostile_front_end.run(generator.randbytes(generator.randrange(8, 400)))
