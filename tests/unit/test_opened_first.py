"""A device that is opened first and configured later, against a double of the door."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from door_double import OFFERED, PAIRS, DoorDouble

from pyvhostvdpa import GuestMemory, MissingFeature, OutOfOrder, QueueBroken, State, VdpaNetDevice
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature, Status
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS, LadderRow
from pyvhostvdpa.device.procedure.best import DIRECT, IN_PLACE
from pyvhostvdpa.device.shadowing import FULL, NAMES, USED_ALL
from pyvhostvdpa.guest.nic import GuestNic
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.control import OK, VQ_PAIRS_SET, Class, ControlModel, command
from pyvhostvdpa.net.control_queue import NetGuestControl
from pyvhostvdpa.net.features import CONTROL, REQUIRED, SUPPORTED, Feature
from pyvhostvdpa.virtqueue.layout import GuestQueue, map_queue
from pyvhostvdpa.virtqueue.serving import ServingOptions

WITHOUT_PERSIST = ALL_BACKEND_FEATURES & ~BackendFeature.IOTLB_PERSIST

Open = Callable[..., VdpaNetDevice]


def runs(door: DoorDouble, queues: list[GuestQueue]) -> bool:
    """Whether the device works on these rings, with these eventfds."""
    rings = door.vrings[: len(queues)]
    told = [(ring.addresses, ring.kick, ring.call) for ring in rings]
    return (
        door.running
        and not door.unreachable_rings()
        and all(ring.ready for ring in rings)
        and told == [((q.desc, q.avail, q.used), q.kick, q.call) for q in queues]
    )


def indices_of(queue: GuestQueue, memory: GuestMemory) -> Any:
    ring = ffi.new("struct vring *")
    map_queue(ring, queue, memory)
    return ring


# -- features ------------------------------------------------------------------


def test_offer_of_a_device_is_known_before_features_are_chosen(opened: Open, doors: list[DoorDouble]) -> None:
    device = opened()
    assert device.offered == OFFERED
    assert device.backend_features == ALL_BACKEND_FEATURES
    assert (device.vqs_count, len(device.ring_sizes), device.groups.max_pairs) == (2 * PAIRS + 1, 2 * PAIRS + 1, PAIRS)
    assert (device.features, device.mac) == (Feature(0), None)
    assert device.config()[:6] == bytes.fromhex("525491a1c200")
    assert "SET_FEATURES" not in doors[0].names()


def test_start_before_features_are_chosen_is_refused(opened: Open, memory: GuestMemory, nic: GuestNic) -> None:
    device = opened()
    device.attach(memory)
    with pytest.raises(MissingFeature, match=r"negotiate\(\) features first"):
        device.start(State.PASSTHROUGH, nic.queues)


@pytest.mark.parametrize("advertised", [ALL_BACKEND_FEATURES, WITHOUT_PERSIST])
@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_memory_attached_before_the_features_is_mapped_once_and_serves(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, mode: State, advertised: BackendFeature
) -> None:
    device = opened(advertised)
    device.attach(memory)
    mapped = [call for call in doors[0].calls if call.name == "IOTLB_UPDATE"]
    assert device.negotiate(SUPPORTED) == SUPPORTED
    assert [call for call in doors[0].calls if call.name == "IOTLB_UPDATE"] == mapped
    device.start(mode, nic.queues)
    assert doors[0].driver_features == SUPPORTED
    if mode is State.PASSTHROUGH:
        assert runs(doors[0], nic.queues)
    assert not doors[0].unreachable_rings()


def test_features_are_chosen_again_while_the_device_is_reset_and_procedure_and_groups_follow(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic
) -> None:
    device = opened()
    device.attach(memory)
    for wanted, procedure, control in (
        (SUPPORTED | CONTROL, "in-place", 2 * PAIRS),
        (SUPPORTED | Feature.INDIRECT_DESC, "direct", None),
        (REQUIRED, "in-place", None),
    ):
        assert device.negotiate(wanted) == device.features == device.target.features == wanted
        assert (device.procedure.name, device.groups.control_index) == (procedure, control)
        assert (device.mac is None) == (Feature.MAC not in wanted)
        guest = None
        if control is not None and nic.control is not None:
            guest = NetGuestControl(nic.control.queue, ControlModel(wanted))
        device.start(State.PASSTHROUGH, nic.queues, guest)
        assert runs(doors[0], nic.queues)
        assert doors[0].driver_features == wanted
        with pytest.raises(MissingFeature, match=r"passthrough: stop\(\) it before negotiating again"):
            device.negotiate(SUPPORTED)
        assert runs(doors[0], nic.queues)
        # a device that can be resumed stays suspended
        device.stop()
    # guest memory was never unmapped
    [region] = memory.regions
    assert ("IOTLB_INVALIDATE", (0, region.gpa, region.size)) not in [(c.name, c.arguments) for c in doors[0].calls]


def test_choice_that_cannot_be_had_leaves_the_one_before(opened: Open, memory: GuestMemory, nic: GuestNic) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    with pytest.raises(MissingFeature, match="RING_PACKED"):
        device.negotiate(SUPPORTED | Feature.RING_PACKED)
    assert device.features == SUPPORTED
    device.start(State.PASSTHROUGH, nic.queues)


def test_constructor_negotiates_as_it_did(opened: Open, doors: list[DoorDouble]) -> None:
    device = opened(wanted=SUPPORTED | CONTROL)
    assert device.features == SUPPORTED | CONTROL
    assert device.mac == bytes.fromhex("525491a1c200")
    assert doors[0].status == Status(0)
    # the reset behind the groups' question is the only one
    assert doors[0].resets == 1


# -- bases ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_base_at_the_used_index_is_where_the_device_starts(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, mode: State
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    rings = [indices_of(queue, memory) for queue in nic.queues]
    for at, ring in enumerate(rings):
        ring.avail.idx = ring.used.idx = 65530 + at
    device.start(mode, nic.queues, bases={queue.index: 65530 + queue.index for queue in nic.queues})
    if mode is State.PASSTHROUGH:
        assert [ring.base for ring in doors[0].vrings[: 2 * PAIRS]] == [65530, 65531, 65532, 65533]
    with pytest.raises(MissingFeature, match=r"stop\(\) it to know its bases"):
        device.bases()
    device.stop()
    assert device.bases() == {0: 65530, 1: 65531, 2: 65532, 3: 65533}


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_descriptors_in_flight_at_a_base_are_taken_again(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, mode: State
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    ring = indices_of(nic.queues[1], memory)
    ring.avail.idx, ring.used.idx = 6, 2
    for slot in range(8):
        ring.avail.ring[slot] = slot
        ring.used.ring[slot].id = slot
    device.start(mode, nic.queues, bases={1: 5})
    if mode is State.PASSTHROUGH:
        assert doors[0].vrings[1].base == 2
    device.reset()
    assert device.bases()[1] == 2


@pytest.mark.parametrize(
    ("base", "ids", "error", "match"),
    [
        (7, range(8), QueueBroken, "virtqueue 1: it was stopped at base 7, the ring has avail 6 and used 2"),
        (1, range(8), QueueBroken, "virtqueue 1: it was stopped at base 1, the ring has avail 6 and used 2"),
        (5, [1, 0, 2, 3, 4, 5, 6, 7], OutOfOrder, "virtqueue 1: it was stopped at base 5 with used index 2"),
    ],
)
def test_base_that_the_ring_does_not_bear_out_is_refused_before_the_device_is_touched(
    opened: Open,
    doors: list[DoorDouble],
    memory: GuestMemory,
    nic: GuestNic,
    base: int,
    ids: list[int],
    error: type[Exception],
    match: str,
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    ring = indices_of(nic.queues[1], memory)
    ring.avail.idx, ring.used.idx = 6, 2
    for slot, used in enumerate(ids):
        ring.avail.ring[slot] = slot
        ring.used.ring[slot].id = used
    before = len(doors[0].calls)
    with pytest.raises(error, match=match):
        device.start(State.PASSTHROUGH, nic.queues, bases={1: base})
    assert len(doors[0].calls) == before
    assert device.state is State.RESET


# -- eventfds --------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[tuple[int, int]]:
    """Two eventfds that a queue does not have yet."""
    made = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    yield made
    for fd in made:
        os.close(fd)


def test_eventfds_of_a_running_queue_are_replaced_in_the_device(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, fresh: tuple[int, int]
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    with pytest.raises(MissingFeature, match="virtqueue 1 is not running"):
        device.set_eventfds(1, call=-1)
    device.start(State.PASSTHROUGH, nic.queues)
    device.set_eventfds(1, kick=fresh[0], call=fresh[1])
    assert (doors[0].vrings[1].kick, doors[0].vrings[1].call) == fresh
    assert [os.eventfd_read(fd) for fd in fresh] == [1, 1]
    device.set_eventfds(1, call=-1)
    assert (doors[0].vrings[1].kick, doors[0].vrings[1].call) == (fresh[0], -1)
    with pytest.raises(MissingFeature, match="virtqueue 9 is not running"):
        device.set_eventfds(9, call=-1)


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
@pytest.mark.parametrize("before", [State.PASSTHROUGH, State.SHADOW])
def test_suspended_device_continues_with_other_eventfds_without_a_reset(
    opened: Open,
    doors: list[DoorDouble],
    memory: GuestMemory,
    nic: GuestNic,
    fresh: tuple[int, int],
    before: State,
    mode: State,
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    device.start(before, nic.queues)
    device.stop(mode)
    resets = doors[0].resets
    queues = [replace(nic.queues[0], kick=fresh[0], call=fresh[1]), *nic.queues[1:]]
    device.start(mode, queues)
    assert doors[0].resets == resets + (before is mode is State.SHADOW)
    assert doors[0].running
    if mode is State.PASSTHROUGH:
        assert runs(doors[0], queues)
    else:
        c = device.shadows[0].c  # type: ignore[attr-defined]
        assert (c.guest_kick, c.guest_call) == fresh


def test_eventfd_with_a_reused_number_is_set_on_the_device(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic
) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    device.start(State.PASSTHROUGH, nic.queues)
    device.stop(State.PASSTHROUGH)
    before = len(doors[0].calls)
    # the front-end's new eventfd has got the number of its old one
    device.start(State.PASSTHROUGH, [replace(nic.queues[0]), *nic.queues[1:]])
    told = [call.arguments for call in doors[0].calls[before:] if call.name == "SET_VRING_CALL"]
    assert told == [(0, nic.queues[0].call)]


def test_device_that_stands_by_is_started_with_other_eventfds(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, fresh: tuple[int, int]
) -> None:
    for wanted in (SUPPORTED, SUPPORTED | Feature.INDIRECT_DESC):
        device = opened(wanted=wanted)
        device.attach(memory)
        device.stand_by(nic.queues)
        resets = doors[-1].resets
        queues = [replace(nic.queues[0], kick=fresh[0], call=-1), *nic.queues[1:]]
        device.start(State.PASSTHROUGH, queues)
        assert runs(doors[-1], queues)
        assert doors[-1].resets == resets


def test_eventfds_are_replaced_while_a_relay_serves_the_ring(
    opened: Open, memory: GuestMemory, nic: GuestNic, fresh: tuple[int, int]
) -> None:
    device = opened(wanted=SUPPORTED, shadow=FULL)
    device.attach(memory)
    device.start(State.SHADOW, nic.queues)
    shadow: Any = device.shadows[1]
    device.set_eventfds(1, kick=fresh[0], call=-1)
    assert (shadow.c.guest_kick, shadow.c.guest_call) == (fresh[0], -1)
    ring = indices_of(nic.queues[1], memory)
    ring.desc[0].addr, ring.desc[0].len, ring.desc[0].flags = DEFAULT_GPA, 8, 0
    ring.avail.ring[0], ring.avail.idx = 0, 1
    os.eventfd_write(fresh[0], 1)
    end = time.monotonic() + 5.0
    while not shadow.c.forwarded and time.monotonic() < end:
        time.sleep(0.01)
    assert shadow.c.forwarded == 1
    device.stop()
    assert device.bases()[1] == 0


def test_queue_without_a_kick_is_refused(opened: Open, memory: GuestMemory, nic: GuestNic) -> None:
    device = opened(wanted=SUPPORTED)
    device.attach(memory)
    with pytest.raises(MissingFeature, match="virtqueue 0 has no kick eventfd"):
        device.start(State.PASSTHROUGH, [replace(nic.queues[0], kick=-1)])


# -- a control queue that no guest has ----------------------------------------------


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_control_queue_is_driven_without_a_guest_behind_it(
    opened: Open, doors: list[DoorDouble], memory: GuestMemory, nic: GuestNic, mode: State
) -> None:
    device = opened(wanted=SUPPORTED | CONTROL)
    device.attach(memory)
    control = NetGuestControl(None, ControlModel(device.features), 2 * PAIRS)
    pairs = command(Class.MQ, VQ_PAIRS_SET, PAIRS.to_bytes(2, "little"))
    with pytest.raises(MissingFeature, match="not running with a control queue"):
        device.command(pairs)
    device.start(mode, nic.queues, control)
    assert doors[0].vrings[2 * PAIRS].ready
    restored = len(doors[0].answered)
    assert device.command(pairs) == OK
    assert device.command(b"\x04") != OK
    assert control.model.pairs == PAIRS
    assert len(doors[0].answered) == restored + 1
    device.stop(mode)
    assert list(device.bases()) == [queue.index for queue in nic.queues]
    device.negotiate(device.features)
    # what was set is set again on a device that was reset
    device.start(mode, nic.queues, control)
    assert len(doors[0].answered) > restored + 1
    device.check()


def test_control_queue_without_a_guest_and_an_index_is_refused() -> None:
    with pytest.raises(ValueError, match="needs its index"):
        NetGuestControl(None, ControlModel(SUPPORTED))


@pytest.mark.parametrize("shadow", NAMES)
def test_a_device_is_shadowed_in_the_way_that_is_asked_for(
    opened: Any, nic: GuestNic, memory: GuestMemory, shadow: str
) -> None:
    device = opened(wanted=SUPPORTED | CONTROL, shadow=shadow)
    assert device.shadow == shadow
    device.attach(memory)
    device.start_shadow(nic.queues)
    passed = [index for index, server in enumerate(device.shadows) if server.through]
    assert passed == ([1, 3] if shadow == "used" else [])
    device.stop()
    device.start_passthrough(nic.queues)
    device.stop()
    assert device.negotiate(SUPPORTED)
    assert device.shadow == shadow


@pytest.mark.parametrize(
    ("advertised", "wanted", "procedure", "shadow"),
    [
        (ALL_BACKEND_FEATURES, SUPPORTED, IN_PLACE, USED_ALL),
        (ALL_BACKEND_FEATURES, SUPPORTED | Feature.INDIRECT_DESC, DIRECT, FULL),
        (ALL_BACKEND_FEATURES & ~BackendFeature.RESUME, SUPPORTED, DIRECT, FULL),
        (ALL_BACKEND_FEATURES & ~BackendFeature.DESC_ASID, SUPPORTED, DIRECT, USED_ALL),
    ],
)
def test_a_procedure_relays_rings_where_that_maps_no_more_at_a_switch(
    opened: Any, advertised: BackendFeature, wanted: Feature, procedure: str, shadow: str
) -> None:
    """Beside guest memory the rings of a relay would make some drivers tell their device all of its memory again."""
    device = opened(advertised, wanted)
    assert (device.procedure.name, device.shadow) == (procedure, shadow)


@pytest.mark.parametrize("plan", [plan for plan in LADDER_ROWS.values() if plan.procedure is None])
def test_the_rows_of_qemu_copy_descriptors_as_it_does(doors: list[DoorDouble], plan: LadderRow) -> None:
    doors.append(DoorDouble(OFFERED, ALL_BACKEND_FEATURES))
    make = lambda target: plan.resolve(target, False).make(target)  # noqa: E731
    with VdpaNetDevice("/dev/vhost-vdpa-double", wanted=SUPPORTED | CONTROL, procedure=make) as device:
        assert device.shadow == FULL


def test_an_unknown_way_to_shadow_is_refused_before_the_device_is_opened(opened: Any) -> None:
    with pytest.raises(MissingFeature, match="no way 'half'"):
        opened(shadow="half")


def test_options_of_serving_by_their_name_of_an_earlier_release_work_with_a_warning(opened: Open) -> None:
    device = opened()
    with pytest.warns(DeprecationWarning, match="relay_options is called serving_options now"):
        device.relay_options = ServingOptions(threads=3)
    assert device.serving_options == ServingOptions(threads=3)
    with pytest.warns(DeprecationWarning, match="relay_options is called serving_options now"):
        assert device.relay_options is device.serving_options
