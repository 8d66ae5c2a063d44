"""Stops and starts that a device prepares: the calls that are made, and what is left when one of them fails."""

from __future__ import annotations

import errno
import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
from door_double import PAIRS, Fault
from procedure_rig import Rig, disorder, rig

from pyvhostvdpa import KernelError, OutOfOrder, QueueBroken, State, VhostVdpaError
from pyvhostvdpa.device.work import Crew, Work

IN_PLACE = ["in place", "in place without PERSIST", "in place, used", "in place, used-all"]


def do(work: Work | None) -> None:
    assert work is not None
    with Crew([work]) as crew:
        crew.begin()
        crew.do()
        crew.finish()


def stop(it: Rig) -> None:
    do(it.procedure.prepare_stop())


def start(it: Rig) -> None:
    do(it.procedure.prepare_start(it.nic.queues, it.control))


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_prepared_stop_makes_the_calls_of_a_stop_and_leaves_what_it_leaves(name: str) -> None:
    made = []
    for act in (stop, lambda it: it.stop(), lambda it: it.stop(State.PASSTHROUGH)):
        with rig(name) as it:
            it.start(State.SHADOW)
            before = len(it.door.calls)
            act(it)
            made.append(it.door.names()[before:])
            assert it.device_is_off()
            assert it.procedure.state is State.RESET
            it.start(State.PASSTHROUGH)
            assert it.runs()
            assert not it.procedure.shadows
    passed = PAIRS if name.endswith("used") else 0
    assert made == [["SUSPEND", *["GET_VRING_BASE"] * passed]] * 3


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_prepared_start_makes_the_calls_of_a_start(name: str) -> None:
    made = []
    for act in (start, lambda it: it.start(State.PASSTHROUGH)):
        with rig(name) as it:
            it.procedure.stand_by(it.nic.queues, it.control)
            before = len(it.door.calls)
            act(it)
            made.append(it.door.calls[before:])
            assert it.runs()
            assert it.procedure.state is State.PASSTHROUGH
            assert [ring.addresses for ring in it.door.vrings[:-1]] == [
                (q.desc, q.avail, q.used) for q in it.nic.queues
            ]
    assert made[0] == made[1]


def test_device_starts_at_the_used_indices_at_the_time_of_its_start() -> None:
    with rig("in place") as it:
        it.procedure.stand_by(it.nic.queues, it.control)
        work = it.procedure.prepare_start(it.nic.queues, it.control)
        for number, pair in enumerate(it.nic.pairs):
            pair.c.rx.used.idx = pair.c.rx.avail.idx = 100 + number
            pair.c.tx.used.idx = pair.c.tx.avail.idx = 200 + number
        do(work)
        bases = [ring.base for ring in it.door.vrings[:-1]]
        assert bases == [base + number for number in range(len(it.nic.pairs)) for base in (100, 200)]


def test_prepared_start_resets_the_device_if_control_state_has_changed_since() -> None:
    with rig("in place") as it:
        it.procedure.stand_by(it.nic.queues, it.control)
        work = it.procedure.prepare_start(it.nic.queues, it.control)
        assert it.control is not None
        it.control.model.vlans.add(7)
        resets = it.door.resets
        do(work)
        assert it.door.resets == resets + 1
        assert it.runs()


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_prepared_start_with_any_one_call_failing_leaves_the_device_off_and_startable(name: str, number: int) -> None:
    at, failed = 1, True
    while failed:
        with rig(name) as it:
            it.procedure.stand_by(it.nic.queues, it.control)
            work = it.procedure.prepare_start(it.nic.queues, it.control)
            it.door.fault = Fault(at, number)
            with suppress(VhostVdpaError):
                do(work)
            failed = it.door.failed is not None
            it.door.fault = None
            if it.procedure.state is not State.PASSTHROUGH:
                assert it.device_is_off(), it.door.failed
                it.start(State.PASSTHROUGH)
            assert it.runs(), it.door.failed
        at += 1
    assert at > 5


def test_device_that_cannot_be_suspended_continues_with_its_control_queue() -> None:
    with rig("in place") as it:
        it.start(State.SHADOW)
        work = it.procedure.prepare_stop()
        it.door.fault = Fault(1, errno.EIO)
        with pytest.raises(KernelError, match="SUSPEND"):
            do(work)
        assert it.procedure.state is State.SHADOW
        assert it.procedure._control is not None
        assert it.procedure._control.serving
        assert not it.device_is_off()


def test_broken_queue_is_reported_and_the_device_is_off() -> None:
    with rig("in place") as it:
        it.start(State.SHADOW)
        work = it.procedure.prepare_stop()
        shadow: Any = it.procedure.shadows[1]
        shadow.c.device.used.idx = shadow.c.device_used + 1000
        with pytest.raises(QueueBroken, match="virtqueue 1"):
            do(work)
        assert it.device_is_off()
        assert it.procedure.state is State.RESET


def test_a_prepared_stop_out_of_order_is_refused_and_the_device_continues_shadowed() -> None:
    with rig("in place, used") as it:
        it.start(State.SHADOW)
        work = it.procedure.prepare_stop()
        disorder(it, 1)
        with pytest.raises(OutOfOrder, match="virtqueue 1"):
            do(work)
        assert it.procedure.state is State.SHADOW
        assert it.runs()
        threads: Any = it.procedure._server_threads
        assert threads.running
        assert not any(thread.c.stop for thread in threads._threads)
        assert it.procedure._control is not None
        assert it.procedure._control.serving


@pytest.mark.parametrize("at", [2, 3])
def test_a_prepared_stop_that_cannot_read_a_base_leaves_the_device_off(at: int) -> None:
    with rig("in place, used") as it:
        it.start(State.SHADOW)
        work = it.procedure.prepare_stop()
        it.door.fault = Fault(at, errno.EIO)
        with pytest.raises(KernelError, match="GET_VRING_BASE"):
            do(work)
        it.door.fault = None
        assert it.device_is_off()
        assert it.procedure.state is State.RESET
        it.start(State.PASSTHROUGH)
        assert it.runs()


@pytest.mark.parametrize("state", [State.RESET, State.PASSTHROUGH])
def test_only_a_device_with_shadow_virtqueues_prepares_its_stop(state: State) -> None:
    with rig("in place") as it:
        if state is not State.RESET:
            it.start(state)
        assert it.procedure.prepare_stop() is None


def test_only_a_device_that_stands_by_prepares_its_start() -> None:
    with rig("in place") as it:
        assert it.procedure.prepare_start(it.nic.queues, it.control) is None
    with rig("direct") as it:
        it.procedure.stand_by(it.nic.queues, it.control)
        assert it.procedure.prepare_start(it.nic.queues, it.control) is None


def test_memory_added_to_a_stopped_device_wakes_none_of_its_threads() -> None:
    """A prepared stop only keeps its threads out of the rings. They must not continue: the guest may have moved."""
    with rig("in place") as it:
        it.start(State.SHADOW)
        stop(it)
        control = it.procedure._control
        assert control is not None
        it.procedure.add_regions([])
        assert it.procedure._server_threads is None
        assert not control.serving
        assert it.device_is_off()


def test_objects_that_c_reaches_by_pointers_live_as_long_as_the_work() -> None:
    with rig("in place") as it:
        it.start(State.SHADOW)
        threads: Any = it.procedure._server_threads
        take_over = threads.prepare_take_over()
        [thread] = [weakref.ref(each) for each in threads._threads]
        del threads
        with it.procedure._data_threads_paused():
            pass
        gc.collect()
        assert thread() is not None
        del take_over
