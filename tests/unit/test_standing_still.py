"""What a guest that stands still does not wait for: threads that end, things made a second time, long traces."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from procedure_rig import Rig, rig
from session_rig import rig as session_rig
from test_prepared_work import stop as prepared_stop
from test_procedures import give_one

from pyvhostvdpa import State
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.trace.recorder import Event, Trace
from pyvhostvdpa.vhost_user import backend

IN_PLACE = ["in place", "in place, used", "in place, used-all"]


def serving(it: Rig) -> bool:
    threads = it.procedure._server_threads
    return threads is not None and threads.running


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("then", [None, State.SHADOW])
def test_a_stop_for_good_does_not_wait_for_threads_to_end(name: str, then: State | None) -> None:
    with rig(name) as it:
        it.start(State.SHADOW)
        it.stop(then)
        assert it.procedure.state is State.RESET
        assert it.device_is_off()
        assert serving(it), "a thread was waited for"
        it.procedure.reset()
        assert it.procedure._server_threads is None


def test_a_device_that_goes_on_at_once_is_stopped_with_its_start_prepared() -> None:
    with rig("in place") as it:
        it.start(State.SHADOW)
        it.stop(State.PASSTHROUGH)
        assert not serving(it)
        assert State.PASSTHROUGH in it.procedure._moving  # type: ignore[attr-defined]
        it.start(State.PASSTHROUGH)
        assert it.runs()


@pytest.mark.parametrize("act", [Rig.stop, prepared_stop])
def test_heads_are_handed_back_once(act: Callable[[Rig], None]) -> None:
    """Whoever has the rings behind the stop may have changed them when the device is closed."""
    with rig("in place") as it:
        give_one(it)
        act(it)
        ring = ffi.cast("uint16_t *", it.memory.hva(it.nic.queues[1].avail))
        heads = [0x55] * it.nic.queues[1].num
        for slot, head in enumerate(heads):
            ring[2 + slot] = head
        it.procedure.halt()
        assert [int(ring[2 + slot]) for slot in range(len(heads))] == heads


def test_rings_of_a_guest_that_brings_its_eventfds_are_not_mapped_again() -> None:
    with rig("in place") as it:
        it.procedure.stand_by(it.nic.queues, it.control)
        rings = it.procedure._guest_rings
        kicks = [os.dup(queue.kick) for queue in it.nic.queues]
        queues = [replace(queue, kick=kick) for queue, kick in zip(it.nic.queues, kicks, strict=True)]
        it.procedure.start(State.PASSTHROUGH, queues, it.control)
        assert it.procedure._guest_rings is rings
        assert rings is not None
        assert rings.queues == tuple(queues)
        assert [ring.kick for ring in it.door.vrings[:-1]] == kicks
        it.stop()
        # another ring is another ring
        moved = [replace(queue, num=queue.num // 2) for queue in queues]
        it.procedure.start(State.PASSTHROUGH, moved, it.control)
        assert it.procedure._guest_rings is not rings
        it.procedure.reset()
        for kick in kicks:
            os.close(kick)


def test_features_that_were_accepted_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with session_rig() as r:
        r.front.connect()
        r.front.start()
        real, looked = backend.for_device, []

        def look(*given: Any) -> Any:
            looked.append(given)
            return real(*given)

        monkeypatch.setattr(backend, "for_device", look)
        r.front.acknowledge(ack=True)
        assert not looked
        features = r.front.features
        r.disconnect()
        # another front-end: its control queue is made for it
        r.connect(r.front.use)
        r.front.connect()
        r.front.acknowledge(features, ack=True)
        assert r.backend.control_model is not None
        assert len(looked) == 1


def event(at: int) -> Event:
    return Event(at, at, "device", "", "note", {}, None)


def test_events_that_are_made_later_come_in_their_place() -> None:
    trace = Trace()
    trace.append(event(5))
    trace.append_later(lambda: [event(7), event(6)])
    assert [each.t_end for each in trace.events] == [5, 6, 7]
    trace.append_later(lambda: [event(1), event(9)])
    trace.append(event(8))
    assert [each.t_end for each in trace.events] == [1, 5, 6, 7, 8, 9]
