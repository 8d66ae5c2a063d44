"""Procedures against a double of the door: the calls they make, and what each leaves when any one call fails once."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from door_double import PAIRS, Fault
from procedure_rig import OWN, PROCEDURES, RELAYED, MiB, Rig, disorder, rig

from pyvhostvdpa import MissingFeature, OutOfOrder, QueueBroken, State, VhostVdpaError
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature, Status
from pyvhostvdpa.device.procedure import best
from pyvhostvdpa.device.procedure.direct import Direct
from pyvhostvdpa.device.shadowing import USED
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.control import OK, VQ_PAIRS_SET, Class, command
from pyvhostvdpa.net.features import Feature

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
    """Return the number of calls that step ``step_number`` of the scenario makes when nothing fails."""
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
        assert it.runs(), "the device continues, its control queue enabled again"


def test_refused_stop_without_resume_resets_and_reports_it() -> None:
    with rig("direct without RESUME") as it:
        it.start(State.PASSTHROUGH)
        disorder(it)
        with pytest.raises(OutOfOrder, match="reset"):
            it.stop(State.SHADOW)
        assert it.procedure.state is State.RESET
        assert not it.door.status


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
    # the relay sleeps by then, and is not notified of what follows
    time.sleep(0.01)
    return ffi.cast("struct vring_used *", it.memory.hva(queue.used))


def shadow_ring(it: Rig, index: int) -> Any:
    return it.procedure.shadows[index].c.device  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RELAYED)
def test_stop_returns_used_elements_that_were_not_notified(name: str) -> None:
    with rig(name) as it:
        used, ring = give_one(it), shadow_ring(it, 1)
        ring.used.ring[0].id, ring.used.idx = ring.avail.ring[0], 1
        it.stop()
        assert (used.idx, used.ring[0].id) == (1, 0)


@pytest.mark.parametrize("name", RELAYED)
def test_queue_that_broke_is_reported_and_keeps_no_other_from_the_guest(name: str) -> None:
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
def test_device_continues_at_the_used_index_of_the_guest_s_ring(name: str) -> None:
    with rig(name) as it:
        queue = it.nic.queues[1]
        for part in (queue.avail, queue.used):
            ffi.cast("uint16_t *", it.memory.hva(part))[1] = 5
        for step in SCENARIO[:5]:
            act(it, step)
            if step == ("start", State.PASSTHROUGH):
                assert it.door.vrings[1].base == 5


def test_switch_in_place_replays_a_changed_control_state() -> None:
    with rig("in place") as it:
        assert it.control is not None
        it.start(State.PASSTHROUGH)
        it.stop(State.SHADOW)
        it.door.answered.clear()
        it.control.model.pairs = PAIRS
        it.start(State.SHADOW)
        assert len(it.door.answered) == len(it.control.model.replay())


@pytest.mark.parametrize("name", OWN)
def test_halt_of_a_device_out_of_order_resets_it_and_reports_it(name: str) -> None:
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
    """The ring stays where it was, so nothing shows the device that it starts from scratch."""
    with rig("in place") as it:
        for _ in range(2):
            it.start(State.SHADOW)
            it.stop()
        resets = it.door.resets
        it.start(State.SHADOW)
        assert it.door.resets == resets + 1
        assert it.runs()


@pytest.mark.parametrize("name", [f"direct, {USED}", f"in place, {USED}"])
def test_queue_that_passes_is_looked_at_as_in_passthrough(name: str) -> None:
    """Its used ring is dirty once it is stopped, its base has to be between the indices, and it has to be in order."""
    with rig(name) as it:
        it.start(State.SHADOW)
        queue = it.nic.queues[1]
        assert [server.through for server in it.procedure.shadows] == [False, True] * PAIRS
        assert set(it.door.vrings[1].addresses) == {queue.desc, queue.avail, queue.used}
        it.memory.start_dirty_log()
        it.stop()
        assert queue.used & ~0xFFF in it.memory.dirty_pages()
        it.start(State.SHADOW)
        it.door.vrings[1].base += 3
        with pytest.raises(QueueBroken, match="virtqueue 1: the device reports base 3"):
            it.stop()


@pytest.mark.parametrize("name", [f"direct, {USED}", f"in place, {USED}"])
def test_new_eventfds_of_a_queue_that_passes_reach_the_device(name: str) -> None:
    with rig(name) as it:
        it.start(State.SHADOW)
        fds = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        try:
            it.procedure.set_eventfds(1, *fds)
            assert (it.door.vrings[1].kick, it.door.vrings[1].call) == fds
            assert (it.procedure.shadows[1].kick, it.procedure.shadows[1].call) == fds
            it.stop(State.PASSTHROUGH)
        finally:
            for fd in fds:
                os.close(fd)
