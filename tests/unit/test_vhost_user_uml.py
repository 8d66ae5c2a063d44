"""What User Mode Linux does as a front-end that no other does (arch/um/drivers/virtio_uml.c), message by message."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from served_double import MTU
from session_rig import P, Rig, number, rig, state
from vhost_front_end import LAYOUT, MEMORY, RING, Refused

from pyvhostvdpa.base.errors import QueueBroken
from pyvhostvdpa.device.net import State
from pyvhostvdpa.net.features import CONTROL, Feature
from pyvhostvdpa.vhost_user.features import LOG_ALL, PROTOCOL_FEATURES
from pyvhostvdpa.vhost_user.messages import ProtocolFeature, Request

KNOWN = P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.INBAND_NOTIFICATIONS
NO_LOG = (1 << 64) - 1
RINGS = (0, 1)


class Uml:
    """The driver's end of two rings: it is called through sockets."""

    def __init__(self, r: Rig, kind: str) -> None:
        self.r, self.front, self.kind = r, r.front, kind
        self.pipes: list[int] = []
        self.far: list[int] = []
        """The ends that the server has, once more."""

    def pipe(self) -> int:
        """Make another pipe or socket; its end for writing."""
        if self.kind == "pipe":
            reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        else:
            ends = socket.socketpair()
            for end in ends:
                end.setblocking(False)
            reading, writing = (end.detach() for end in ends)
        self.pipes.append(reading)
        self.far.append(writing)
        return writing

    def connect(self) -> None:
        front = self.front
        front.set(Request.SET_OWNER)
        front.offered = front.number(Request.GET_FEATURES)
        front.protocol = ProtocolFeature(front.number(Request.GET_PROTOCOL_FEATURES)) & KNOWN
        # its answer is waited for as well
        front.set(Request.SET_PROTOCOL_FEATURES, number(front.protocol))
        front.acknowledge(front.offered, ack=True)

    def find_rings(self) -> None:
        front = self.front
        front.memory = os.memfd_create("physmem") if front.memory < 0 else front.memory
        os.ftruncate(front.memory, MEMORY)
        [_, region] = LAYOUT
        # one region in a table with room for two; its addresses are those of the guest
        table = struct.pack("=IIQQQQ", 1, 0, region[0], region[1], region[0], region[2]) + bytes(32)
        front.set(Request.SET_MEM_TABLE, table, [front.memory])
        for index in RINGS:
            front.eventfd(Request.SET_VRING_CALL, index, self.pipe())
            ring = front.place(index)
            front.set(Request.SET_VRING_NUM, state(index, RING))
            front.set(Request.SET_VRING_BASE, state(index, 0))
            where = struct.pack("=IIQQQQ", index, 0, ring.desc, ring.used, ring.avail, NO_LOG)
            front.set(Request.SET_VRING_ADDR, where)
        for index in RINGS:
            kick = os.eventfd(0, os.EFD_CLOEXEC)
            front.eventfd(Request.SET_VRING_KICK, index, kick)
            os.close(kick)
            front.enable(index, True)

    def called(self, index: int, seconds: float = 10) -> bool:
        """Whether a call comes, and no more of it is left."""
        if not select.select([self.pipes[index]], [], [], seconds)[0]:
            return False
        with suppress(BlockingIOError):
            while piece := os.read(self.pipes[index], 8):
                assert len(piece) == 8
        return True

    def delete_rings(self) -> None:
        for index in reversed(RINGS):
            self.front.enable(index, False)
        self.front.barrier()
        self.close()

    def close(self) -> None:
        for fd in (*self.pipes, *self.far):
            os.close(fd)
        self.pipes, self.far = [], []


KINDS = pytest.mark.parametrize("kind", ["socket", "pipe"])


@contextmanager
def uml(kind: str = "socket") -> Iterator[Uml]:
    with rig(has_config=False) as r:
        made = Uml(r, kind)
        try:
            yield made
        finally:
            made.close()


def raised(r: Rig, index: int) -> None:
    """The device raises the call of a ring."""
    os.eventfd_write(r.device.queues[index].call, 1)


@KINDS
def test_its_order_starts_the_device_and_calls_reach_it(kind: str) -> None:
    with uml(kind) as linux:
        linux.connect()
        for _ in range(2):
            # a driver that is unloaded and loaded again makes its rings anew
            linux.find_rings()
            assert linux.r.device.state is State.PASSTHROUGH
            for index in (*RINGS, *RINGS):
                raised(linux.r, index)
                assert linux.called(index)
            linux.delete_rings()
            assert linux.r.device.state is State.RESET
        assert "refused" not in linux.r.names()


def test_rings_that_are_disabled_are_reset_since_their_driver_has_taken_its_buffers_back() -> None:
    with uml() as linux:
        linux.connect()
        linux.find_rings()
        linux.r.device.forget()
        # what the rings have says nothing any more of what is in flight
        linux.r.device.fails["stop"] = QueueBroken("descriptors are used out of order")
        linux.delete_rings()
        assert linux.r.device.names() == ["reset"]
        assert linux.r.backend.failed == ""
        linux.find_rings()
        assert linux.r.device.state is State.PASSTHROUGH
        assert linux.r.device.calls[-1].what == (State.PASSTHROUGH, {0: 0, 1: 0})


@KINDS
def test_a_call_is_that_of_its_ring_and_none_is_made_up(kind: str) -> None:
    with uml(kind) as linux:
        linux.connect()
        linux.find_rings()
        assert not linux.called(0, 0.1)
        raised(linux.r, 1)
        assert linux.called(1)
        assert not linux.called(0, 0.1)


@KINDS
def test_a_call_that_finds_no_room_holds_nobody_up_and_the_next_one_comes(kind: str) -> None:
    with uml(kind) as linux:
        linux.connect()
        linux.find_rings()
        with suppress(BlockingIOError):
            while os.write(linux.far[0], bytes(8)):
                pass
        # the file is shared with the front-end, which can have writers wait
        os.set_blocking(linux.far[0], True)
        raised(linux.r, 0)
        raised(linux.r, 1)
        assert linux.called(1)
        linux.front.barrier()
        assert linux.called(0)
        raised(linux.r, 0)
        assert linux.called(0)


@KINDS
def test_an_end_that_nobody_reads_any_more_holds_nobody_up(kind: str) -> None:
    with uml(kind) as linux:
        linux.connect()
        linux.find_rings()
        os.close(linux.pipes.pop(0))
        raised(linux.r, 0)
        raised(linux.r, 1)
        assert linux.called(-1)
        linux.front.barrier()


@pytest.mark.parametrize("kind", ["socket", "pipe", "eventfd"])
def test_another_call_in_place_of_one_misses_nothing(kind: str) -> None:
    with uml() as linux:
        linux.connect()
        linux.find_rings()
        if kind == "eventfd":
            linux.pipes.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            linux.front.eventfd(Request.SET_VRING_CALL, 0, linux.pipes[-1])
        else:
            linux.kind = kind
            linux.front.eventfd(Request.SET_VRING_CALL, 0, linux.pipe())
        # what came while it was exchanged
        assert linux.called(-1)
        [what] = [call.what for call in linux.r.device.calls if call.name == "set_eventfds"]
        assert what == (0, False, True)


@KINDS
def test_calls_that_are_replaced_again_and_again_are_not_collected(kind: str) -> None:
    with uml(kind) as linux:
        linux.connect()
        linux.front.eventfd(Request.SET_VRING_CALL, 0, linux.pipe())
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            linux.front.eventfd(Request.SET_VRING_CALL, 0, linux.far[0])
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_call_that_cannot_be_passed_on_is_refused_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with uml() as linux:
        linux.connect()
        writing = linux.pipe()
        with monkeypatch.context() as patch:
            patch.setattr("pyvhostvdpa.vhost_user.piped.os.eventfd", limited)
            with pytest.raises(Refused):
                linux.front.eventfd(Request.SET_VRING_CALL, 0, writing)
        linux.far.remove(writing)
        os.close(writing)
        # nobody else can write
        assert os.read(linux.pipes[0], 8) == b""


def test_it_is_offered_what_takes_no_control_queue_and_asks_for_the_rest() -> None:
    with uml() as linux:
        linux.connect()
        offered = Feature(linux.front.offered & ~(LOG_ALL | PROTOCOL_FEATURES))
        assert not offered & (CONTROL | Feature.GUEST_ANNOUNCE | Feature.STATUS)
        assert Feature.MAC | Feature.MTU in offered
        assert linux.front.protocol == P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG

        def ask(offset: int, size: int) -> bytes:
            return linux.front.ask(Request.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))

        assert ask(0, 12) == struct.pack("=III", 0, 12, 0) + linux.r.device.config()[:12]
        assert ask(10, 2)[12:] == MTU.to_bytes(2, "little")
        # what the device does not have is an error
        assert ask(20, 10) == b""


def test_the_channel_for_requests_stays_open_until_the_front_end_leaves() -> None:
    with uml() as linux:
        linux.connect()
        for number_ in (0, 1):
            writing = linux.pipe()
            linux.front.set(Request.SET_BACKEND_REQ_FD, b"", [writing])
            linux.far.remove(writing)
            os.close(writing)
            assert not linux.called(number_, 0.1)
        # the second one took its place
        assert linux.called(0)
        linux.r.disconnect()
        assert linux.called(1)


def test_other_front_ends_are_offered_neither() -> None:
    with rig() as r:
        r.front.connect()
        assert not r.front.protocol & (P.BACKEND_REQ | P.CONFIG)
        assert not r.front.offered & Feature.MAC
