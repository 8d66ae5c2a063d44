"""A session of vhost-user in a thread: a device double below it, a scripted front-end above."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from leaks import nothing_left_behind
from served_double import ServedDouble
from vhost_front_end import EVERY, MEMORY, FrontEnd

from pyvhostvdpa.base.errors import OutOfOrder
from pyvhostvdpa.device.net import State
from pyvhostvdpa.memory.guest import Gpa, GuestMemory
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.vhost_user.backend import Backend
from pyvhostvdpa.vhost_user.channel import FrontEndGone, MessageChannel
from pyvhostvdpa.vhost_user.messages import ProtocolError, ProtocolFeature, Request
from pyvhostvdpa.vhost_user.options import BackendOptions
from pyvhostvdpa.vhost_user.session import FrontEndSession

P = ProtocolFeature


MINIMAL = P.LOG_SHMFD
"""What the simplest front-end that can migrate uses: no answers, no status, no slots, no GPAs, one pair."""
MODERN, OLD = EVERY, P.MQ | P.LOG_SHMFD | P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS | P.DEVICE_STATE


class Rig:
    """A session in a thread, a device double below it, a scripted front-end above."""

    def __init__(self, use: ProtocolFeature = MODERN, **options: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        trace = Trace()
        self.device = ServedDouble(trace)
        self.memory = GuestMemory.empty()
        self.backend = Backend(self.device, self.memory, trace, BackendOptions(**options), self._report)
        self.connect(use)

    def _report(self, event: str, fields: Any) -> None:
        if event != "message":
            self.events.append((event, dict(fields)))

    def connect(self, use: ProtocolFeature) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs.settimeout(10)
        self.session = FrontEndSession(self.backend, MessageChannel(ours))
        self.front = FrontEnd(theirs, use)
        self.ended: Exception | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                select.select([self.session.channel], [], [])
                self.session.serve_one()
        except (FrontEndGone, ProtocolError) as e:
            self.ended = e
        except BaseException as e:
            self.ended = AssertionError(repr(e))
            raise
        finally:
            self.session.close()

    def join(self) -> Exception:
        """Wait for the session to end by itself; why it did."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert self.ended is not None
        return self.ended

    def disconnect(self) -> None:
        self.front.close()
        assert isinstance(self.join(), FrontEndGone)

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def close(self) -> None:
        self.front.close()
        self._thread.join(10)
        assert not isinstance(self.ended, AssertionError), self.ended
        self.backend.close()
        self.memory.close()


@contextmanager
def rig(use: ProtocolFeature = MODERN, **options: Any) -> Iterator[Rig]:
    """A rig that leaves no descriptor and no thread behind."""
    with nothing_left_behind(), closing(Rig(use, **options)) as made:
        yield made


@contextmanager
def running(use: ProtocolFeature = MODERN, **options: Any) -> Iterator[Rig]:
    """A rig whose front-end has started the device."""
    with rig(use, **options) as r:
        r.front.connect()
        r.front.start()
        yield r


def marks_of_all(r: Rig) -> list[bool]:
    """A list that grows when all pages of the guest are marked as written, which is not done then."""
    marked: list[bool] = []
    r.backend.dirty_log._memory.mark_all = lambda: marked.append(True)  # type: ignore[method-assign]
    return marked


def refuse_a_stop(r: Rig) -> None:
    """Have the device refuse the next stop, and continue."""
    real = r.device.stop

    def refuse(then: State | None = None) -> None:
        r.device.stop = real  # type: ignore[method-assign]
        raise OutOfOrder("uses descriptors out of order")

    r.device.stop = refuse  # type: ignore[method-assign]


def number(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


@contextmanager
def memory_of(r: Rig) -> Iterator[None]:
    """Have the back-end's memory as large as the front-end's: the double maps nothing."""
    old, r.backend.dirty_log._memory = r.backend.dirty_log._memory, GuestMemory([(Gpa(0), MEMORY)])
    try:
        yield
    finally:
        r.backend.dirty_log._memory.close()
        r.backend.dirty_log._memory = old


def transfer(r: Rig, load: bool, data: bytes = b"") -> tuple[bytes, int]:
    """Move the back-end's state through a pipe; what came out, and what CHECK_DEVICE_STATE answers."""
    reading, writing = os.pipe()
    fd = reading if load else writing
    answer = struct.unpack("=Q", r.front.ask(Request.SET_DEVICE_STATE_FD, state(int(load), 0), [fd]))[0]
    os.close(fd)
    received = b""
    if answer == 256:
        if load:
            os.write(writing, data)
        else:
            while piece := os.read(reading, 4096):
                received += piece
    os.close(writing if load else reading)
    return received, r.front.number(Request.CHECK_DEVICE_STATE)
