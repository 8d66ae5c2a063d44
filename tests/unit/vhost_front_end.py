"""A scripted vhost-user front-end: any message, right or wrong, and the usual orders of QEMU."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyvhostvdpa.vhost_user.features import LOG_ALL, PROTOCOL_FEATURES
from pyvhostvdpa.vhost_user.messages import HEADER, ProtocolFeature, Request
from pyvhostvdpa.virtqueue.layout import GuestQueue

NEED_REPLY = 8
KiB, MiB = 1 << 10, 1 << 20
MEMORY = 4 * MiB
USER = 0x7F00_0000_0000
"""Where the front-end says that it has guest memory."""
RING = 256
ANSWERED = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_VRING_BASE,
        Request.GET_STATUS,
        Request.SET_LOG_BASE,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
        Request.GET_CONFIG,
    }
)
EVERY = ProtocolFeature(0xFFFFFFFF)
NONE = ProtocolFeature(0)


LAYOUT = ((0, 640 * KiB, 0), (MiB, MEMORY - MiB, MiB))
"""QEMU's: one file, a hole below 1 MiB."""


def status_of(path: str, seconds: float = 20) -> dict[str, Any]:
    """What the server of a socket says of itself."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(seconds)
        asking.connect(f"{path}.status")
        data = b""
        while piece := asking.recv(1 << 16):
            data += piece
    found: dict[str, Any] = json.loads(data)
    return found


class Refused(Exception):
    """The back-end answered with an error."""


@dataclass
class FrontEnd:
    """One end of a connection. ``use`` are the protocol features that it knows."""

    connection: socket.socket
    use: ProtocolFeature = EVERY
    memory: int = -1
    kicks: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    protocol: ProtocolFeature = NONE
    features: int = 0
    layout: Sequence[tuple[int, int, int]] = LAYOUT
    """GPA, bytes and offset in the file of each region."""
    queues: Sequence[GuestQueue] = ()
    """Rings of a driver, with its eventfds; without them the rings are unused."""

    # -- messages -----------------------------------------------------------------

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.connection.sendmsg([data], rights)

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        self.raw(HEADER.pack(request, flags, len(payload)) + payload, fds)

    def receive(self, request: int) -> bytes:
        header = self._exactly(HEADER.size)
        got, flags, size = HEADER.unpack(header)
        assert (got, flags) == (request, 5), f"{got} {flags:#x} instead of an answer to {request}"
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.connection.recv(size - len(data))
            if not more:
                raise ConnectionError("the back-end closed the connection")
            data += more
        return data

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        self.send(request, payload, fds)
        return self.receive(request)

    def number(self, request: int, payload: bytes = b"") -> int:
        return int(struct.unpack("=Q", self.ask(request, payload))[0])

    def set(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), ack: bool = True) -> None:
        """Send what changes something; with an acknowledgement if one was negotiated."""
        if ack and ProtocolFeature.REPLY_ACK in self.protocol:
            self.send(request, payload, fds, 1 | NEED_REPLY)
            [answer] = struct.unpack("=Q", self.receive(request))
            if answer:
                raise Refused(Request(request).name)
        else:
            self.send(request, payload, fds)

    def barrier(self) -> None:
        self.number(Request.GET_FEATURES)

    # -- orders -------------------------------------------------------------------

    def connect(self) -> None:
        """Negotiate the protocol, and say of the rings what QEMU says first."""
        self.offered = self.number(Request.GET_FEATURES)
        if self.offered & PROTOCOL_FEATURES and self.use:
            self.protocol = ProtocolFeature(self.number(Request.GET_PROTOCOL_FEATURES)) & self.use
            self.set(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", self.protocol), ack=False)
        if ProtocolFeature.MQ in self.protocol:
            self.pairs = self.number(Request.GET_QUEUE_NUM)
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol:
            self.slots = self.number(Request.GET_MAX_MEM_SLOTS)
        self.set(Request.SET_OWNER, ack=False)

    def rings(self, count: int = 2) -> None:
        """Eventfds for the rings; CALL and ERR come before everything else."""
        for index in range(len(self.kicks), count):
            queue = self.queues[index] if self.queues else None
            self.kicks.append(os.dup(queue.kick) if queue else os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.calls.append(os.dup(queue.call) if queue else os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self.eventfd(Request.SET_VRING_CALL, index, self.calls[index])
            self.eventfd(Request.SET_VRING_ERR, index, self.calls[index])

    def eventfd(self, request: Request, index: int, fd: int) -> None:
        self.set(request, struct.pack("=Q", index if fd >= 0 else index | 256), [fd] if fd >= 0 else [])

    def enable(self, index: int, on: bool) -> None:
        self.set(Request.SET_VRING_ENABLE, struct.pack("=II", index, on))

    def acknowledge(self, features: int | None = None, log: bool = False, ack: bool = False) -> None:
        if features is not None:
            self.features = features & ~LOG_ALL
        self.set(Request.SET_FEATURES, struct.pack("=Q", self.features | LOG_ALL * log), ack=ack)

    @property
    def guest_addresses(self) -> bool:
        return ProtocolFeature.GPA_ADDRESSES in self.protocol

    def user(self, gpa: int) -> int:
        return gpa if self.guest_addresses else USER + gpa

    def region(self, gpa: int, size: int, offset: int) -> bytes:
        return struct.pack("=QQQQ", gpa, size, self.user(gpa), offset)

    def share(self) -> None:
        """Share guest memory, region by region or as a table."""
        if self.memory < 0:
            self.memory = os.memfd_create("guest")
            os.ftruncate(self.memory, MEMORY)
        regions = [self.region(*each) for each in self.layout]
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol:
            for each in regions:
                self.set(Request.ADD_MEM_REG, bytes(8) + each, [self.memory])
        else:
            table = struct.pack("=II", len(regions), 0) + b"".join(regions)
            self.set(Request.SET_MEM_TABLE, table, [self.memory] * len(regions))

    def place(self, index: int) -> GuestQueue:
        """Where a ring is."""
        if self.queues:
            return self.queues[index]
        desc = MiB + index * 64 * KiB
        return GuestQueue(index, RING, desc, desc + 16 * RING, desc + 32 * KiB, -1, -1)

    def address(self, index: int, log: bool = False) -> bytes:
        ring = self.place(index)
        place = [self.user(each) for each in (ring.desc, ring.used, ring.avail)]
        return struct.pack("=IIQQQQ", index, int(log), *place, ring.used if log else 0)

    def ring(self, index: int, base: int = 0) -> None:
        """Set one ring up as QEMU does before a start."""
        self.set(Request.SET_VRING_NUM, struct.pack("=II", index, self.place(index).num), ack=False)
        self.set(Request.SET_VRING_BASE, struct.pack("=II", index, base), ack=False)
        self.set(Request.SET_VRING_ADDR, self.address(index), ack=False)
        self.eventfd(Request.SET_VRING_KICK, index, self.kicks[index])
        self.eventfd(Request.SET_VRING_CALL, index, self.calls[index])

    def set_status(self, status: int) -> None:
        if ProtocolFeature.STATUS in self.protocol:
            self.set(Request.SET_STATUS, struct.pack("=Q", status))

    def start(self, pairs: int = 1, share: bool = True, log: bool = False, bases: Sequence[int] = ()) -> None:
        """DRIVER_OK, in QEMU's order."""
        self.rings(2 * pairs)
        for pair in range(pairs):
            self.enable(2 * pair, True)
            self.enable(2 * pair + 1, True)
            self.acknowledge(self.features or self.offered, log=log)
            if pair == 0:
                self.set_status(8)
                if share:
                    self.share()
            for index in (2 * pair, 2 * pair + 1):
                self.ring(index, bases[index] if bases else 0)
        self.set_status(0xF)
        self.barrier()

    def stop(self, rings: int = 2) -> list[int]:
        """GET_VRING_BASE of every ring, then status 0."""
        bases = []
        for index in range(rings):
            got, base = struct.unpack("=II", self.ask(Request.GET_VRING_BASE, struct.pack("=II", index, 0)))
            assert got == index
            bases.append(base)
        self.set_status(0)
        return bases

    def log(self, size: int | None = None) -> int:
        """Give the back-end a dirty log; its descriptor."""
        if size is None:
            size = -(-max(gpa + length for gpa, length, _ in self.layout) // (8 * 4096))
        fd = os.memfd_create("vhost-log")
        os.ftruncate(fd, max(size, 4096))
        try:
            answer = self.ask(Request.SET_LOG_BASE, struct.pack("=QQ", size, 0), [fd])
            if len(answer) != 16:
                raise Refused("SET_LOG_BASE")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def start_logging(self, rings: int = 2) -> int:
        """Everything that QEMU does at the start of a migration."""
        fd = self.log()
        self.acknowledge(log=True, ack=True)
        for index in range(rings):
            self.set(Request.SET_VRING_ADDR, self.address(index, log=True))
        return fd

    def stop_logging(self, rings: int = 2) -> None:
        """What QEMU does when a migration was cancelled."""
        self.acknowledge()
        for index in range(rings):
            self.set(Request.SET_VRING_ADDR, self.address(index), ack=False)
        self.barrier()

    def close(self) -> None:
        self.connection.close()
        for fd in [*self.kicks, *self.calls, *([self.memory] if self.memory >= 0 else [])]:
            os.close(fd)
        self.kicks, self.calls, self.memory = [], [], -1
