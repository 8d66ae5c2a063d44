"""Procedures against a double of the door: the calls they make, and what each leaves when any one call fails once."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from door_double import PAIRS, DoorDouble, Fault

from pyvhostvdpa import GuestMemory, MissingFeature, OutOfOrder, QueueBroken, State, VhostVdpaError
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature, Status
from pyvhostvdpa.bench.ladder.rows import PLANS
from pyvhostvdpa.chardev.iotlb import Iotlb, Limits
from pyvhostvdpa.device.groups import probe_groups
from pyvhostvdpa.device.procedure import best
from pyvhostvdpa.device.procedure.base import Procedure, Target
from pyvhostvdpa.device.procedure.direct import Direct
from pyvhostvdpa.device.procedure.in_place import InPlace
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.control import OK, VQ_PAIRS_SET, Class, ControlModel, command
from pyvhostvdpa.net.control_queue import GuestControl
from pyvhostvdpa.net.features import CONTROL, SUPPORTED, Feature, negotiate

MiB = 1 << 20
OFFERED = int(SUPPORTED | CONTROL)
WITHOUT_RESUME = ALL_BACKEND_FEATURES & ~BackendFeature.RESUME
WITHOUT_PERSIST = ALL_BACKEND_FEATURES & ~BackendFeature.IOTLB_PERSIST
WITHOUT_DESC_ASID = ALL_BACKEND_FEATURES & ~BackendFeature.DESC_ASID

Make = Callable[[Target], Procedure]
SERIES: dict[str, Make] = {
    f"series {plan.row}": lambda target, plan=plan: plan.resolve(target, False).make(target)  # type: ignore[misc]
    for plan in PLANS.values()
    if plan.procedure is None
}
PROCEDURES: dict[str, tuple[Make, BackendFeature]] = {
    "direct": (Direct, ALL_BACKEND_FEATURES),
    "direct without RESUME": (Direct, WITHOUT_RESUME),
    "direct without PERSIST": (Direct, WITHOUT_PERSIST),
    "direct without DESC_ASID": (Direct, WITHOUT_DESC_ASID),
    "in place": (InPlace, ALL_BACKEND_FEATURES),
    "in place without PERSIST": (InPlace, WITHOUT_PERSIST),
    **{name: (make, ALL_BACKEND_FEATURES) for name, make in SERIES.items()},
}
OWN = [name for name in PROCEDURES if not name.startswith("series")]


class Rig:
    """A guest with a control queue on the double, driven by one procedure."""

    def __init__(self, make: Make, advertised: BackendFeature, control: bool = True) -> None:
        self.door = DoorDouble(OFFERED, advertised)
        self.memory = GuestMemory([(DEFAULT_GPA, 2 * MiB)])
        door: DoorDouble = self.door
        features = negotiate(door.get_features(), SUPPORTED | CONTROL)
        door.set_backend_features(advertised)
        limits = Limits(first=0, last=(1 << 48) - 1, as_num=door.as_num, pinned=False, entries=None)
        groups = probe_groups(door, features, door.get_vqs_count())  # type: ignore[arg-type]
        iotlb = Iotlb(door, limits)  # type: ignore[arg-type]
        target = Target(door, iotlb, features, advertised, groups)  # type: ignore[arg-type]
        self.procedure = make(target)
        self.procedure.control_deadline = 5.0
        self.nic = GuestNic(
            self.memory, NicOptions(pairs=PAIRS, ring_size=8, features=features, control_index=groups.control_index)
        )
        assert self.nic.control is not None
        self.control = GuestControl(self.nic.control.queue, ControlModel(features)) if control else None
        self.procedure.attach(self.memory)

    def start(self, mode: State) -> None:
        self.procedure.start(mode, self.nic.queues, self.control)

    def stop(self, then: State | None = None) -> None:
        self.procedure.stop(then)

    def close(self) -> None:
        self.procedure.abandon()
        self.door.close()
        self.procedure.release()
        self.nic.close()
        self.memory.close()

    def runs(self) -> bool:
        """Whether the device works on rings that it can reach, every queue enabled."""
        enabled = all(ring.ready for ring in self.door.vrings)
        return self.door.running and enabled and not self.door.unreachable_rings()

    def device_is_off(self) -> bool:
        return not self.door.running


@contextmanager
def rig(name: str, **options: bool) -> Iterator[Rig]:
    """A rig that must leave no descriptor and no thread behind."""
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    made = Rig(*PROCEDURES[name], **options)
    try:
        yield made
    finally:
        made.close()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads


SCENARIO: tuple[tuple[str, State | None], ...] = (
    ("start", State.PASSTHROUGH),
    ("stop", State.SHADOW),
    ("start", State.SHADOW),
    ("stop", State.PASSTHROUGH),
    ("start", State.PASSTHROUGH),
    ("stop", State.SHADOW),
    ("start", State.SHADOW),
    ("stop", None),
)
"""A migration that is cancelled once: the modes a source goes through."""


def act(rig: Rig, step: tuple[str, State | None]) -> None:
    verb, mode = step
    if verb == "start":
        assert mode is not None
        rig.start(mode)
    else:
        rig.stop(mode)


def expected_eventfds(rig: Rig, mode: State) -> list[tuple[int, int]]:
    if mode is State.PASSTHROUGH:
        return [(queue.kick, queue.call) for queue in rig.nic.queues]
    return [(shadow.kick, shadow.call) for shadow in rig.procedure.shadows]


@pytest.mark.parametrize("name", PROCEDURES)
def test_procedure_device_reaches_its_rings_in_every_mode(name: str) -> None:
    with rig(name) as it:
        for step in SCENARIO:
            act(it, step)
            verb, mode = step
            if verb == "stop":
                assert it.device_is_off(), f"after {step}"
                continue
            assert it.door.running, f"after {step}"
            assert it.door.unreachable_rings() == [], f"after {step}"
            assert all(ring.ready for ring in it.door.vrings), f"a queue is not enabled after {step}"
            data = it.door.vrings[: 2 * PAIRS]
            assert mode is not None
            assert [(ring.kick, ring.call) for ring in data] == expected_eventfds(it, mode)
            assert it.procedure.state is mode


@pytest.mark.parametrize("name", PROCEDURES)
def test_procedure_repeated_switches_leak_no_map_and_no_iova(name: str) -> None:
    with rig(name) as it:
        seen = []
        for _ in range(3):
            for step in SCENARIO:
                act(it, step)
            it.procedure.reset()
            maps = [dict(space) for space in it.door.tree]
            probe = it.procedure.memories.holes.allocate(4 * MiB)
            it.procedure.memories.holes.free(probe)
            seen.append((maps, probe))
        assert seen[1] == seen[2], "maps or IOVAs of one round are still taken in the next"


def calls_of(name: str, step_number: int) -> int:
    """How many calls a step of the scenario makes when nothing fails."""
    with rig(name) as it:
        for step in SCENARIO[:step_number]:
            act(it, step)
        before = len(it.door.calls)
        act(it, SCENARIO[step_number])
        return len(it.door.calls) - before


@pytest.mark.parametrize("step_number", range(5))
@pytest.mark.parametrize(
    ("name", "number"), [(name, errno.EIO) for name in PROCEDURES] + [(name, errno.EINVAL) for name in OWN]
)
def test_step_with_any_one_call_failing_leaves_the_device_running_or_reset(
    name: str, step_number: int, number: int
) -> None:
    for at in range(1, calls_of(name, step_number) + 1):
        with rig(name) as it:
            for step in SCENARIO[:step_number]:
                act(it, step)
            before = it.procedure.state
            it.door.fault = Fault(at, number)
            verb, mode = SCENARIO[step_number]
            where = f"{verb} to {mode} with call {at} failing"
            try:
                act(it, SCENARIO[step_number])
            except VhostVdpaError:
                where += f" ({it.door.failed})"
                assert it.procedure.state in (State.RESET, before), where
                if it.procedure.state is before and verb == "stop":
                    assert it.runs(), f"{where}: the device neither runs as before nor is it reset"
                else:
                    assert it.device_is_off() or str(it.door.failed).startswith("SET_STATUS(0"), where
            else:
                where += f" ({it.door.failed}), which was tolerated"
                assert it.procedure.state is (mode if verb == "start" else State.RESET), where
            assert it.door.batch_asid is None, f"{where}: its batch is still open"


@pytest.mark.parametrize("name", PROCEDURES)
def test_device_starts_again_after_any_one_call_failed(name: str) -> None:
    for at in range(1, calls_of(name, 2) + 1):
        with rig(name) as it:
            act(it, SCENARIO[0])
            act(it, SCENARIO[1])
            it.door.fault = Fault(at)
            with suppress(VhostVdpaError):
                it.start(State.SHADOW)
            failed = str(it.door.failed)
            if failed.startswith("SET_STATUS(0"):
                continue
            if it.procedure.state is not State.RESET:
                it.procedure.reset()
            it.start(State.PASSTHROUGH)
            assert it.runs(), f"after {failed} failed once: {it.door.unreachable_rings()}"


@pytest.mark.parametrize("name", [name for name in OWN if BackendFeature.RESUME in PROCEDURES[name][1]])
def test_refused_stop_resumes_with_the_control_queue_enabled(name: str) -> None:
    with rig(name) as it:
        it.start(State.PASSTHROUGH)
        disorder(it)
        with pytest.raises(OutOfOrder):
            it.stop(State.SHADOW)
        assert it.procedure.state is State.PASSTHROUGH
        assert it.runs(), "the device goes on, its control queue enabled again"


def test_refused_stop_without_resume_resets_and_says_so() -> None:
    with rig("direct without RESUME") as it:
        it.start(State.PASSTHROUGH)
        disorder(it)
        with pytest.raises(OutOfOrder, match="reset"):
            it.stop(State.SHADOW)
        assert it.procedure.state is State.RESET
        assert not it.door.status


def disorder(it: Rig) -> None:
    """Make queue 0's ring look as a device leaves it that used the second of two descriptors first."""
    queue = it.nic.queues[0]
    avail = ffi.cast("uint16_t *", it.memory.hva(queue.avail))
    used = ffi.cast("uint16_t *", it.memory.hva(queue.used))
    ids = ffi.cast("uint32_t *", it.memory.hva(queue.used + 4))
    start = used[1]
    avail[1] = (start + 2) & 0xFFFF
    avail[2 + start % queue.num], avail[2 + (start + 1) % queue.num] = 0, 1
    ids[2 * (start % queue.num)] = 1
    used[1] = (start + 1) & 0xFFFF


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
@pytest.mark.parametrize("name", PROCEDURES)
def test_control_state_is_restored_before_the_data_queues_run(name: str, mode: State) -> None:
    with rig(name) as it:
        assert it.control is not None
        commands = len(it.control.model.replay())
        it.start(mode)
        assert commands
        assert len(it.door.answered) == commands
        enabled = [at for at, call in enumerate(it.door.calls) if call.name == "SET_VRING_ENABLE" and call.arguments[1]]
        [control, *data] = enabled
        assert it.door.calls[control].arguments[0] == 2 * PAIRS
        assert len(data) == 2 * PAIRS
        assert min(data) >= it.door.answered[-1]


def give_one(it: Rig) -> Any:
    """Start in shadow mode with one element in queue 1, which the device takes; the guest's used ring."""
    queue = it.nic.queues[1]
    avail = ffi.cast("struct vring_avail *", it.memory.hva(queue.avail))
    descriptor = ffi.cast("struct vring_desc *", it.memory.hva(queue.desc))
    descriptor.addr, descriptor.len, descriptor.flags = DEFAULT_GPA, 64, 0
    avail.ring[0], avail.idx = 0, 1
    it.start(State.SHADOW)
    ring = shadow_ring(it, 1)
    until = time.monotonic() + 30
    while not ring.avail.idx and time.monotonic() < until:
        time.sleep(0.001)
    assert ring.avail.idx == 1
    # the relay sleeps by then, and nobody tells it of what follows
    time.sleep(0.01)
    return ffi.cast("struct vring_used *", it.memory.hva(queue.used))


def shadow_ring(it: Rig, index: int) -> Any:
    return it.procedure.shadows[index].c.device  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PROCEDURES)
def test_stop_returns_what_the_device_used_and_nobody_was_told_of(name: str) -> None:
    with rig(name) as it:
        used, ring = give_one(it), shadow_ring(it, 1)
        ring.used.ring[0].id, ring.used.idx = ring.avail.ring[0], 1
        it.stop()
        assert (used.idx, used.ring[0].id) == (1, 0)


@pytest.mark.parametrize("name", PROCEDURES)
def test_queue_that_broke_is_told_and_keeps_no_other_from_the_guest(name: str) -> None:
    with rig(name) as it:
        used, ring = give_one(it), shadow_ring(it, 1)
        ring.used.ring[0].id, ring.used.idx = ring.avail.ring[0], 1
        shadow_ring(it, 0).used.idx = 1000
        with pytest.raises(QueueBroken, match="virtqueue 0"):
            it.stop()
        assert (used.idx, used.ring[0].id) == (1, 0)


@pytest.mark.parametrize("name", PROCEDURES)
def test_base_beyond_what_the_guest_gave_breaks_the_queue(name: str) -> None:
    with rig(name) as it:
        it.start(State.PASSTHROUGH)
        it.door.vrings[1].base += 3
        with pytest.raises(QueueBroken, match="reports base 3"):
            it.stop()


@pytest.mark.parametrize("name", PROCEDURES)
def test_stop_whose_suspend_fails_leaves_the_control_queue_served(name: str) -> None:
    with rig(name) as it:
        it.start(State.PASSTHROUGH)
        threads = threading.active_count()
        it.door.fault = Fault(1)
        with pytest.raises(VhostVdpaError, match="SUSPEND"):
            it.stop()
        assert threading.active_count() == threads


@pytest.mark.parametrize("name", PROCEDURES)
def test_device_goes_on_at_the_used_index_of_the_guest_s_ring(name: str) -> None:
    with rig(name) as it:
        queue = it.nic.queues[1]
        for part in (queue.avail, queue.used):
            ffi.cast("uint16_t *", it.memory.hva(part))[1] = 5
        for step in SCENARIO[:5]:
            act(it, step)
            if step == ("start", State.PASSTHROUGH):
                assert it.door.vrings[1].base == 5


def test_switch_in_place_with_another_control_state_tells_the_device() -> None:
    with rig("in place") as it:
        assert it.control is not None
        it.start(State.PASSTHROUGH)
        it.stop(State.SHADOW)
        it.door.answered.clear()
        it.control.model.pairs = PAIRS
        it.start(State.SHADOW)
        assert len(it.door.answered) == len(it.control.model.replay())


@pytest.mark.parametrize("name", OWN)
def test_halt_of_a_device_out_of_order_resets_it_and_says_so(name: str) -> None:
    with rig(name) as it:
        it.start(State.PASSTHROUGH)
        disorder(it)
        with pytest.raises(OutOfOrder):
            it.procedure.halt()
        assert it.procedure.state is State.RESET
        assert it.device_is_off()


@pytest.mark.parametrize("name", PROCEDURES)
def test_start_notifies_the_device_and_the_guest_of_every_queue(name: str) -> None:
    with rig(name) as it:
        it.start(State.PASSTHROUGH)
        for queue in it.nic.queues:
            assert os.eventfd_read(queue.kick) >= 1
            assert os.eventfd_read(queue.call) >= 1


@pytest.mark.parametrize("bit", [Status.FEATURES_OK, Status.DRIVER_OK])
@pytest.mark.parametrize("name", PROCEDURES)
def test_device_that_refuses_a_status_bit_is_reset(name: str, bit: Status) -> None:
    with rig(name) as it:
        it.door.refuses = int(bit)
        with pytest.raises(VhostVdpaError, match=r"refused the features|did not accept it"):
            it.start(State.PASSTHROUGH)
        assert it.procedure.state is State.RESET
        assert not it.door.status & Status.FEATURES_OK


@pytest.mark.parametrize("name", OWN)
def test_stop_suspends_before_it_reads_a_base(name: str) -> None:
    with rig(name) as it:
        it.start(State.PASSTHROUGH)
        first = len(it.door.calls)
        it.stop(State.SHADOW)
        made = it.door.names()[first:]
        assert "SUSPEND" in made
        assert "GET_VRING_BASE" in made
        assert made.index("SUSPEND") < made.index("GET_VRING_BASE")
        bases = [call.arguments[0] for call in it.door.calls[first:] if call.name == "GET_VRING_BASE"]
        assert bases == list(range(2 * PAIRS)), "the bases of all data queues, before anything else"


def test_stop_without_suspend_is_refused_before_any_call() -> None:
    PROCEDURES["no SUSPEND"] = (Direct, ALL_BACKEND_FEATURES & ~BackendFeature.SUSPEND)
    try:
        with rig("no SUSPEND") as it:
            it.start(State.PASSTHROUGH)
            before = len(it.door.calls)
            with pytest.raises(MissingFeature, match="cannot be suspended"):
                it.stop(State.SHADOW)
            assert len(it.door.calls) == before
            assert it.runs()
    finally:
        del PROCEDURES["no SUSPEND"]


@pytest.mark.parametrize("name", OWN)
def test_control_command_is_answered_in_every_mode(name: str) -> None:
    with rig(name) as it:
        assert it.nic.control is not None
        for step in SCENARIO[:5]:
            act(it, step)
            if step[0] == "start":
                assert it.nic.control.send(command(Class.MQ, VQ_PAIRS_SET, b"\1\0"), 10.0) == OK, f"after {step}"


def test_guest_with_indirect_descriptors_is_not_switched_in_place() -> None:
    """Its tables would be looked for in the descriptors' address space by some devices, and are not mapped there."""
    with rig("in place") as it:
        target = it.procedure.target
        assert best.choose(target).name == best.IN_PLACE
        indirect = replace(target, features=target.features | Feature.INDIRECT_DESC)
        choice = best.choose(indirect)
        assert choice.name == best.DIRECT
        assert "indirect descriptor tables" in choice.why_not_better
        with pytest.raises(MissingFeature, match="indirect descriptor tables"):
            best.choose(indirect, best.IN_PLACE)


def test_shadow_after_shadow_is_started_from_reset() -> None:
    """The ring stays where it was, so nothing tells the device that it begins anew."""
    with rig("in place") as it:
        for _ in range(2):
            it.start(State.SHADOW)
            it.stop()
        resets = it.door.resets
        it.start(State.SHADOW)
        assert it.door.resets == resets + 1
        assert it.runs()
