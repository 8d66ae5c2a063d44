"""Two guests' memory in this process, and a socket between them for its pages."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest

from pyvhostvdpa.base.errors import StreamBroken, StreamCorrupt
from pyvhostvdpa.memory.guest import Gpa, GuestMemory
from pyvhostvdpa.migration.cancel import check_cancelled
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import (
    Buffer,
    FrameHeader,
    PageReceiver,
    PageSender,
    RoundStatistics,
    memory_hash,
    stream_sum,
)

LOW, HIGH = Gpa(1 << 30), Gpa((1 << 30) + (1 << 20))
"""The regions touch: a run must not go across."""
SIZE = 1 << 20
OTHER = 77


@dataclass
class Channel:
    """A plain socket, or with ``raw`` false one that only Python moves."""

    socket: socket.socket
    raw: bool = True
    stall: float = 30.0
    torn: bool = False
    cancel: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))

    def __post_init__(self) -> None:
        self.socket.setblocking(not self.raw)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, buffer: Buffer) -> None:
        self.socket.setblocking(True)
        self.socket.sendall(buffer)
        self.socket.setblocking(not self.raw)

    def check(self) -> None:
        check_cancelled(self.cancel)

    def receive_into(self, buffer: Buffer) -> None:
        view = memoryview(buffer)
        while view:
            got = self.socket.recv_into(view)
            if not got:
                raise StreamBroken("closed")
            view = view[got:]

    def header(self) -> FrameHeader:
        self.socket.setblocking(True)
        data = self.socket.recv(24, socket.MSG_WAITALL)
        self.socket.setblocking(not self.raw)
        if len(data) < 24:
            raise StreamBroken("no more frames")
        return FrameHeader(*struct.unpack("<IIQQ", data))

    def close(self) -> None:
        self.socket.close()
        os.close(self.cancel)


class Pair:
    """A source and a destination."""

    def __init__(self, raw: bool = True) -> None:
        self.source = GuestMemory([(LOW, SIZE), (HIGH, SIZE)])
        self.destination = GuestMemory([(LOW, SIZE), (HIGH, SIZE)])
        self.near, self.far = (Channel(end, raw) for end in socket.socketpair())
        self.receiver = PageReceiver(self.destination, self.far)

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.source.close()
        self.destination.close()

    def send(self, pages: PageSet, limit: float | None = None) -> RoundStatistics:
        """Send a set while the other side receives; both have ended then."""
        with receiving(self):
            statistics = PageSender(self.source, self.near, limit).send(pages)
            self.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))
        return statistics

    def receive(self) -> None:
        while (header := self.far.header()).type != OTHER:
            self.receiver.receive(header)

    def refuses(self, type: int, count: int, payload: bytes, sum: int | None = None, length: int | None = None) -> str:
        """Let a frame be received that is not to be; the reason that is given."""
        before = memory_hash(self.destination)
        self.near.send(payload[: self.near.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4])
        with pytest.raises(StreamCorrupt) as e:
            self.receiver.receive(
                FrameHeader(
                    type,
                    count,
                    len(payload) if length is None else length,
                    stream_sum(payload) if sum is None else sum,
                )
            )
        assert memory_hash(self.destination) == before
        return str(e.value)


class receiving:  # noqa: N801
    """The destination receives in a thread until the frame OTHER; what it raises is raised at the end."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._raised: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._pair.receive()
        except BaseException as e:
            self._raised.append(e)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        for each in self._raised:
            raise each


@pytest.fixture(params=[True, False], ids=["raw", "python"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


@pytest.fixture
def raw() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def fill(memory: GuestMemory, seed: int = 1) -> None:
    for region in memory.regions:
        part = Random(seed + region.gpa).randbytes(SIZE // 16)
        for at in range(0, region.size, len(part)):
            region.memory.buffer[at : at + len(part)] = at.to_bytes(8, "little") + part[8:]


def table(*runs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", *run) for run in runs)
