"""A device on stand-by, against a double of the door: what is left when any one call fails once."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from door_double import Fault
from procedure_rig import OWN, Rig, rig

from pyvhostvdpa import State, VhostVdpaError

STEPS = ("stand_by", "start")


def act(it: Rig, step: str) -> None:
    if step == "stand_by":
        it.procedure.stand_by(it.nic.queues, it.control)
    else:
        it.start(State.PASSTHROUGH)


def calls_of(name: str, step: str) -> int:
    with rig(name) as it:
        for each in STEPS[: STEPS.index(step)]:
            act(it, each)
        before = len(it.door.calls)
        act(it, step)
        return len(it.door.calls) - before


@pytest.mark.parametrize("name", OWN)
def test_device_that_is_ready_does_not_run_and_then_does(name: str) -> None:
    with rig(name) as it:
        act(it, "stand_by")
        assert it.device_is_off()
        assert it.procedure.state is State.RESET
        act(it, "start")
        assert it.runs()
        data = it.door.vrings[:-1]
        assert [(ring.kick, ring.call) for ring in data] == [(queue.kick, queue.call) for queue in it.nic.queues]
        assert [ring.addresses for ring in data] == [(q.desc, q.avail, q.used) for q in it.nic.queues]


@pytest.mark.parametrize("name", OWN)
def test_start_of_a_device_that_is_ready_maps_nothing(name: str) -> None:
    with rig(name) as it:
        act(it, "stand_by")
        before = len(it.door.calls)
        act(it, "start")
        assert not [call for call in it.door.names()[before:] if call.startswith("IOTLB_")]


@pytest.mark.parametrize("name", [name for name in OWN if name.startswith("in place")])
def test_start_of_a_suspended_device_is_bases_and_resume(name: str) -> None:
    """It was given the guest's rings, and everything else, before."""
    with rig(name) as it:
        act(it, "stand_by")
        data = it.door.vrings[:-1]
        assert [ring.addresses for ring in data] == [(q.desc, q.avail, q.used) for q in it.nic.queues]
        before = len(it.door.calls)
        act(it, "start")
        made = {call.partition("(")[0] for call in it.door.names()[before:]}
        assert made == {"SET_VRING_BASE", "RESUME", "SET_VRING_ENABLE"}


@pytest.mark.parametrize("name", [name for name in OWN if name.startswith("in place")])
def test_resume_is_the_last_call_of_a_start(name: str) -> None:
    """What came behind it would wait for a CPU that the running queues keep busy."""
    with rig(name) as it:
        act(it, "stand_by")
        before = len(it.door.calls)
        act(it, "start")
        made = [call.partition("(")[0] for call in it.door.names()[before:]]
        assert "SET_VRING_ENABLE" in made
        assert made[-1] == "RESUME"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
@pytest.mark.parametrize("name", OWN)
def test_step_with_any_one_call_failing_leaves_the_device_off_and_startable(name: str, number: int, step: str) -> None:
    for at in range(1, calls_of(name, step) + 1):
        with rig(name) as it:
            for each in STEPS[: STEPS.index(step)]:
                act(it, each)
            it.door.fault = Fault(at, number)
            with suppress(VhostVdpaError):
                act(it, step)
            failed = str(it.door.failed)
            where = f"{step} with call {at} failing: {failed}"
            assert it.door.batch_asid is None, f"{where}: its batch is still open"
            if it.procedure.state is State.PASSTHROUGH:
                assert it.runs(), f"{where}, which was tolerated"
                continue
            assert it.device_is_off() or failed.startswith("SET_STATUS(0"), where
            if not failed.startswith("SET_STATUS(0"):
                it.start(State.PASSTHROUGH)
                assert it.runs(), f"after {where}: {it.door.unreachable_rings()}"


@pytest.mark.parametrize("name", OWN)
def test_device_that_is_ready_can_be_reset_and_closed(name: str) -> None:
    with rig(name) as it:
        act(it, "stand_by")
        it.procedure.reset()
        assert not it.door.status
        act(it, "stand_by")


@pytest.mark.parametrize("name", OWN)
def test_standing_ready_leaks_no_map_and_no_iova(name: str) -> None:
    with rig(name) as it:
        seen = []
        for _ in range(3):
            for step in STEPS:
                act(it, step)
            it.procedure.reset()
            seen.append([dict(space) for space in it.door.tree])
        assert seen[1] == seen[2]
