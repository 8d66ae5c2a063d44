"""A hostile front-end without a device: any bytes, descriptors and orders of messages against a session.

    hostile_front_end.py -r COUNT [SEED]     random inputs, the same for the same seed
    hostile_front_end.py FILE...             inputs that were found before
    hostile_front_end.py --fuzz [OPTION...]  libFuzzer (atheris); its options and corpus folders follow

An input is a list of steps: messages that are right, edited, raw, with descriptors of any kind, in any order, and
failures of the device. Whatever comes, the session ends in order or continues, the device double sees nothing that is
against its rules (it asserts them), no descriptor and no thread is left, and the next front-end is served.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import select
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# it is run as a program too, and PYTHONSAFEPATH keeps its own folder out of sys.path
sys.path.insert(0, str(Path(__file__).parent))

if "--fuzz" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["pyvhostvdpa"]):
        for module in ("session", "backend", "state", "rings", "memory"):
            importlib.import_module(f"pyvhostvdpa.vhost_user.{module}")

from served_double import ServedDouble
from vhost_front_end import EVERY, MEMORY, RING, FrontEnd, KiB, MiB

from pyvhostvdpa.base.errors import KernelError, MapRejected, MissingFeature, OutOfOrder, QueueBroken
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.vhost_user import channel
from pyvhostvdpa.vhost_user.backend import Backend
from pyvhostvdpa.vhost_user.channel import FrontEndGone, MessageChannel
from pyvhostvdpa.vhost_user.features import LOG_ALL, PROTOCOL_OFFER
from pyvhostvdpa.vhost_user.messages import HEADER, SHAPES, ProtocolError, Request
from pyvhostvdpa.vhost_user.options import BackendOptions
from pyvhostvdpa.vhost_user.session import FrontEndSession

MAX_STEPS = 64
_REQUESTS = tuple(SHAPES)
_NUMBERS = (0, 1, 2, 3, 4, 7, 15, 64, 255, 256, 257, 1 << 16, 1 << 32, MEMORY, (1 << 64) - 1)
_ERRORS = (QueueBroken("q"), OutOfOrder("o"), MapRejected("m"), MissingFeature("f"), KernelError(5, "k"))
_FAILING = ("start", "stop", "negotiate", "add_memory", "remove_memory", "set_eventfds", "set_log", "command", "reset")


class Input:
    """Takes numbers from an input; 0 behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def number(self) -> int:
        chosen = self.take()
        return _NUMBERS[chosen] if chosen < len(_NUMBERS) else chosen << 8 | self.take()

    def bytes(self, count: int) -> bytes:
        return bytes(self.take() for _ in range(count))


class Attack:
    """One session and what its front-end does to it, in one thread: each message is served when it was sent."""

    def __init__(self, data: bytes) -> None:
        self._input = Input(data)
        trace = Trace(0)
        self.device = ServedDouble(trace)
        self.memory = GuestMemory.empty()
        self.backend = Backend(self.device, self.memory, trace, BackendOptions(), lambda *_: None)
        self._files: list[int] = []

    def run(self) -> None:
        # twice: the second front-end finds what the first one left
        for _ in range(2):
            self._session()
        self.device.fails.clear()
        self.backend.begin_session()
        assert not self.device.regions, "memory is left mapped"
        for fd in self._files:
            os.close(fd)
        self.backend.close()
        self.memory.close()

    def _session(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        # a fault of the device that comes from the end of the session before
        self.device.fails.clear()
        self.front = FrontEnd(theirs)
        self.front.protocol = PROTOCOL_OFFER
        session = FrontEndSession(self.backend, MessageChannel(ours, 0.0))
        try:
            self._steps(session)
        except (FrontEndGone, ProtocolError):
            pass
        finally:
            theirs.close()
            session.close()

    def _steps(self, session: FrontEndSession) -> None:
        steps = (self._right, self._right, self._right, self._edited, self._raw, self._fault, self._order)
        for _ in range(MAX_STEPS):
            if not self._input:
                return
            with suppress(BlockingIOError):
                steps[self._input.take() % len(steps)]()
            while select.select([session.channel], [], [], 0)[0]:
                session.serve_one()
            if self._input.take() % 8 == 0:
                self.backend.tick()
            # replies are not looked at, only taken
            with suppress(BlockingIOError):
                while self._theirs.recv(1 << 16):
                    pass

    # -- steps ----------------------------------------------------------------------

    def _send(self, request: int, payload: bytes, fds: list[int]) -> None:
        flags = 1 if self._input.take() % 4 == 0 else 9
        self.front.send(request, payload, fds, flags)

    def _right(self) -> None:
        request = _REQUESTS[self._input.take() % len(_REQUESTS)]
        self._send(request, self._payload(request), self._descriptors(request))

    def _edited(self) -> None:
        request = _REQUESTS[self._input.take() % len(_REQUESTS)]
        payload = bytearray(self._payload(request))
        for _ in range(self._input.take() % 4):
            if payload:
                payload[self._input.take() % len(payload)] = self._input.take()
        count = self._input.take() % 10
        self._send(request, bytes(payload), [self._any_file() for _ in range(count)])

    def _raw(self) -> None:
        head = HEADER.pack(self._input.take() % 50, self._input.take() % 16, self._input.number() & 0xFFFFFFFF)
        self.front.raw(head + self._input.bytes(self._input.take() % 48))

    def _fault(self) -> None:
        name = _FAILING[self._input.take() % len(_FAILING)]
        self.device.fails[name] = _ERRORS[self._input.take() % len(_ERRORS)]

    def _order(self) -> None:
        """Part of a right order, so that a short input can make the device run."""
        self._send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", PROTOCOL_OFFER), [])
        self._send(Request.SET_FEATURES, struct.pack("=Q", self.backend.offer.features & ~LOG_ALL), [])
        memory = self._memory()
        for gpa, size, offset in self.front.layout:
            self._send(Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", gpa, size, gpa, offset), [memory])
        for index in range(2 * (1 + self._input.take() % 2)):
            self._send(Request.SET_VRING_NUM, struct.pack("=II", index, RING), [])
            self._send(Request.SET_VRING_ADDR, self.front.address(index), [])
            self._send(Request.SET_VRING_ENABLE, struct.pack("=II", index, 1), [])
            self._send(Request.SET_VRING_KICK, struct.pack("=Q", index), [self._eventfd()])
        self._send(Request.SET_STATUS, struct.pack("=Q", 15), [])

    # -- payloads and descriptors -------------------------------------------------------

    def _payload(self, request: Request) -> bytes:
        take, number = self._input.take, self._input.number
        makers: dict[Request, Callable[[], bytes]] = {
            Request.SET_FEATURES: self._features,
            Request.SET_PROTOCOL_FEATURES: lambda: struct.pack("=Q", PROTOCOL_OFFER & ~(1 << take() % 32)),
            Request.SET_MEM_TABLE: self._table,
            Request.ADD_MEM_REG: lambda: bytes(8) + self._region(),
            Request.REM_MEM_REG: lambda: bytes(8) + self._region(),
            Request.SET_LOG_BASE: lambda: struct.pack("=QQ", number(), number() % 8192),
            Request.SET_VRING_ADDR: lambda: self.front.address(take() % 6, log=bool(take() % 2)),
            Request.SET_DEVICE_STATE_FD: lambda: struct.pack("=II", take() % 2, 0),
            Request.SET_STATUS: lambda: struct.pack("=Q", (0, 8, 15, 4, 256)[take() % 5]),
        }
        if request in makers:
            return makers[request]()
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            return struct.pack("=Q", take() % 6)
        if request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
            return struct.pack("=II", take() % 6, (0, 1, RING, 64, 7, 1 << 16)[take() % 6])
        if request is Request.GET_VRING_BASE:
            return struct.pack("=II", take() % 6, 0)
        return struct.pack("=Q", number()) if request in (Request.SEND_RARP, Request.NET_SET_MTU) else b""

    def _features(self) -> bytes:
        features = self.backend.offer.features & ~(1 << self._input.take() % 64)
        return struct.pack("=Q", features if self._input.take() % 2 else features & ~LOG_ALL)

    def _region(self) -> bytes:
        choice = self._input.take()
        layout = [*self.front.layout, (1 << 32, MiB, 0), (1 << 33, 4 * KiB, 0), (2 * MiB, MiB, 0)]
        gpa, size, offset = layout[choice % len(layout)]
        return struct.pack("=QQQQ", gpa, size, gpa, offset)

    def _table(self) -> bytes:
        count = self._input.take() % 4
        return struct.pack("=II", count, 0) + b"".join(self._region() for _ in range(count))

    def _descriptors(self, request: Request) -> list[int]:
        if request is Request.SET_MEM_TABLE:
            return [self._memory() for _ in range(self._input.take() % 4)]
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            return [self._eventfd()]
        if SHAPES[request].fds[1] == 1:
            return [self._any_file()]
        return []

    def _any_file(self) -> int:
        makers = (self._memory, self._memory, self._eventfd, self._pipe, self._small)
        return makers[self._input.take() % len(makers)]()

    def _keep(self, fd: int) -> int:
        self._files.append(fd)
        return fd

    def _memory(self) -> int:
        if self.front.memory < 0:
            self.front.memory = self._keep(os.memfd_create("guest"))
            os.ftruncate(self.front.memory, MEMORY)
        return self.front.memory

    def _small(self) -> int:
        fd = self._keep(os.memfd_create("small"))
        os.ftruncate(fd, 4 * KiB)
        return fd

    def _eventfd(self) -> int:
        return self._keep(os.eventfd(0, os.EFD_NONBLOCK))

    def _pipe(self) -> int:
        reading, writing = os.pipe2(os.O_NONBLOCK)
        self._files += [reading, writing]
        return (reading, writing)[self._input.take() % 2]


def run(data: bytes) -> None:
    """Try one input."""
    before = len(os.listdir("/proc/self/fd"))
    Attack(data).run()
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


def main() -> None:
    logging.disable()
    assert EVERY
    channel.DEADLINE = 0.0
    words = sys.argv[1:]
    if words[:1] == ["-r"]:
        generator = random.Random(int(words[2]) if len(words) > 2 else 0)
        for _ in range(int(words[1])):
            run(generator.randbytes(generator.randrange(8, 400)))
        return
    if words[:1] == ["--fuzz"]:
        atheris.Setup([sys.argv[0], *words[1:]], run)
        atheris.Fuzz()
        return
    for name in words:
        run(Path(name).read_bytes())


if __name__ == "__main__":
    main()
