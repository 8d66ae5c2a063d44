"""A vhost-user session on a real device object above a double of its door: the calls that reach the kernel.

Every call is made to fail once: the session answers or ends, what follows works or the device is left reset, and the
next front-end is served.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from door_double import OFFERED, PAIRS, DoorDouble, Fault
from vhost_front_end import EVERY, MEMORY, FrontEnd, MiB, Refused

from pyvhostvdpa import GuestMemory, State, VdpaNetDevice
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.net.control import Rx
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.vhost_user.backend import Backend
from pyvhostvdpa.vhost_user.channel import FrontEndGone, MessageChannel
from pyvhostvdpa.vhost_user.filters import RxFilter
from pyvhostvdpa.vhost_user.messages import ProtocolError, ProtocolFeature, Request
from pyvhostvdpa.vhost_user.options import BackendOptions
from pyvhostvdpa.vhost_user.session import FrontEndSession

P = ProtocolFeature
KINDS = {
    "in place": ALL_BACKEND_FEATURES,
    "without RESUME": ALL_BACKEND_FEATURES & ~BackendFeature.RESUME,
    "without PERSIST": ALL_BACKEND_FEATURES & ~BackendFeature.IOTLB_PERSIST,
    "without DESC_ASID": ALL_BACKEND_FEATURES & ~BackendFeature.DESC_ASID,
    "without SUSPEND": ALL_BACKEND_FEATURES & ~(BackendFeature.SUSPEND | BackendFeature.RESUME),
}
STRIDE = int(os.environ.get("PYVHOSTVDPA_FAULT_STRIDE", "4"))
"""Every so manieth call fails; 1 for all of them, which takes 40 s."""
Doors = list[DoorDouble]


class Rig:
    """A device, its back-end, and one front-end at a time."""

    def __init__(self, doors: Doors, advertised: BackendFeature = ALL_BACKEND_FEATURES) -> None:
        doors.append(DoorDouble(OFFERED, advertised))
        self.door = doors[-1]
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.device = VdpaNetDevice("/dev/vhost-vdpa-double", wanted=None)
        self.memory = GuestMemory.empty()
        options = BackendOptions()
        self.backend = Backend(self.device, self.memory, Trace(), options, self._report)

    def _report(self, event: str, fields: Any) -> None:
        if event == "message":
            return
        self.events.append((event, dict(fields)))

    @contextmanager
    def started(self) -> Iterator[FrontEnd]:
        """A front-end that has started the device."""
        with self.front() as front:
            front.connect()
            front.start()
            yield front

    @contextmanager
    def front(self, use: ProtocolFeature = EVERY) -> Iterator[FrontEnd]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs.settimeout(20)
        session = FrontEndSession(self.backend, MessageChannel(ours))
        errors: list[BaseException] = []

        def serve() -> None:
            try:
                while True:
                    select.select([session.channel], [], [])
                    session.serve_one()
            except (FrontEndGone, ProtocolError):
                pass
            except BaseException as e:
                errors.append(e)
            finally:
                session.close()

        thread = threading.Thread(target=serve)
        thread.start()
        front = FrontEnd(theirs, use)
        try:
            yield front
        finally:
            front.close()
            thread.join(20)
        assert not errors, errors
        assert not thread.is_alive()

    def runs(self, rings: int, mode: State = State.PASSTHROUGH) -> bool:
        ready = [index for index, ring in enumerate(self.door.vrings[: 2 * PAIRS]) if ring.ready]
        reachable = not self.door.unreachable_rings()
        return self.door.running and reachable and self.device.state is mode and len(ready) == rings

    def close(self) -> None:
        self.backend.close()
        self.device.close()
        self.memory.close()


@pytest.fixture
def make(doors: Doors) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def build(advertised: BackendFeature = ALL_BACKEND_FEATURES) -> Rig:
        made.append(Rig(doors, advertised))
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [1, 2])
def test_device_runs_through_start_stop_log_cancel_and_stop(make: Callable[..., Rig], kind: str, pairs: int) -> None:
    rig = make(KINDS[kind])
    rings = 2 * pairs
    with rig.front() as front:
        front.connect()
        if pairs == 1:
            front.offered &= ~int(Feature.MQ)
        front.start(pairs)
        assert rig.runs(rings)
        for _ in range(2):
            assert front.stop(rings) == [0] * rings
            assert not rig.door.running
            front.start(pairs, share=False)
            assert rig.runs(rings)
        for _ in range(2):
            os.close(front.start_logging(rings))
            assert rig.runs(rings, State.SHADOW)
            front.stop_logging(rings)
            assert rig.runs(rings)
        os.close(front.start_logging(rings))
        front.stop(rings)
        front.start(pairs, share=False)
        assert rig.runs(rings)
    assert not rig.door.running
    assert all(not tree for tree in rig.door.device_maps)


def test_a_stop_is_a_suspend_and_a_start_a_resume(make: Callable[..., Rig]) -> None:
    rig = make()
    with rig.started() as front:
        rig.door.calls.clear()
        front.stop()
        names = [name for name in rig.door.names() if name not in ("GET_VRING_BASE", "GET_CONFIG")]
        assert names == ["SUSPEND"]
        rig.door.calls.clear()
        front.start(share=False)
        names = rig.door.names()
        assert "RESUME" in names
        assert not [name for name in names if name.startswith("IOTLB") or name in ("SET_FEATURES", "SET_STATUS")]


def test_a_switch_maps_nothing_and_resets_nothing(make: Callable[..., Rig]) -> None:
    rig = make()
    with rig.started() as front:
        rig.door.calls.clear()
        os.close(front.start_logging())
        names = rig.door.names()
        assert not [name for name in names if name.startswith("IOTLB") or name == "SET_STATUS"]


def test_guest_memory_is_mapped_in_one_batch(make: Callable[..., Rig]) -> None:
    rig = make()
    with rig.front() as front:
        front.connect()
        rig.door.calls.clear()
        front.start()
        begins = [call for call in rig.door.calls if call.name == "IOTLB_BATCH_BEGIN" and call.arguments[0] == 0]
        assert len(begins) == 1


def test_eventfds_of_a_stopped_device_are_given_at_the_next_start(make: Callable[..., Rig]) -> None:
    rig = make()
    with rig.started() as front:
        front.stop()
        before = [(ring.kick, ring.call) for ring in rig.door.vrings[:2]]
        front.start(share=False)
        after = [(ring.kick, ring.call) for ring in rig.door.vrings[:2]]
        assert all(old != new for old, new in zip(before, after, strict=True))
        for ring in rig.door.vrings[:2]:
            os.fstat(ring.kick)
            os.fstat(ring.call)


def test_a_filter_that_is_known_before_the_device_runs_is_reported_as_well(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.backend.set_filter(RxFilter(b"\x52\x54\0\0\0\1", (), (), False, False, dict.fromkeys(Rx, False)))
    assert rig.events == [("filter", {"mac": "52:54:00:00:00:01", "refused": 0, "set": False})]


def test_hot_plug_while_the_device_runs(make: Callable[..., Rig]) -> None:
    rig = make()
    with rig.started() as front:
        more = os.memfd_create("dimm")
        os.ftruncate(more, MiB)
        region = bytes(8) + front.region(1 << 32, MiB, 0)
        front.set(Request.ADD_MEM_REG, region, [more])
        assert rig.door.translate(0, 1 << 32, MiB) is not None
        front.set(Request.REM_MEM_REG, region)
        assert rig.door.translate(0, 1 << 32, MiB) is None
        assert rig.runs(2)
        with pytest.raises(Refused):
            front.set(Request.REM_MEM_REG, bytes(8) + front.region(*front.layout[1]))
        assert rig.runs(2)
        os.close(more)


def test_pages_of_used_rings_are_in_the_log_when_the_device_has_stopped(make: Callable[..., Rig]) -> None:
    rig = make()
    with rig.started() as front:
        log = front.start_logging()
        front.stop()
        content = os.pread(log, MEMORY // 4096 // 8, 0)
        os.close(log)
        for index in (0, 1):
            page = front.place(index).used // 4096
            assert content[page // 8] >> page % 8 & 1


def scenario(rig: Rig) -> None:
    """What a front-end does in a long life; an error of the back-end is an answer, and it continues."""
    with rig.front() as front:
        steps: list[Callable[[], object]] = [
            front.connect,
            lambda: front.start(2),
            lambda: front.enable(2, False),
            lambda: front.enable(3, False),
            lambda: front.enable(2, True),
            lambda: front.enable(3, True),
            lambda: front.stop(4),
            lambda: front.start(2, share=False),
            lambda: os.close(front.start_logging(4)),
            lambda: os.close(front.log()),
            lambda: front.stop_logging(4),
            lambda: os.close(front.start_logging(4)),
            lambda: front.stop(4),
            lambda: front.set(Request.RESET_DEVICE),
            lambda: front.start(1, share=False),
        ]
        for step in steps:
            with suppress(Refused):
                try:
                    step()
                except (ConnectionError, BrokenPipeError):
                    return


@pytest.mark.parametrize("kind", KINDS)
def test_any_call_may_fail_once(doors: Doors, kind: str) -> None:
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    at, failed = 1 + list(KINDS).index(kind) % STRIDE, True
    while failed:
        rig = Rig(doors, KINDS[kind])
        rig.door.fault = Fault(at, errno.EIO)
        scenario(rig)
        failed = rig.door.failed is not None
        before = rig.door.failed, [*rig.events]
        rig.door.fault = None
        assert not rig.door.running, before
        # whatever it was, the next front-end finds a device
        rig.events.clear()
        with rig.front() as front:
            front.connect()
            try:
                front.start(2)
            except (Refused, ConnectionError) as e:
                raise AssertionError(f"call {at}, {before}: {rig.events}") from e
            assert rig.runs(4), before
        rig.close()
        assert len(os.listdir("/proc/self/fd")) == fds, (at, before)
        assert threading.active_count() == threads, (at, before)
        at += STRIDE
    assert at > 60
