"""Pre-copy within one process: a guest's memory, its copy, and a socket between them."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.memory import GUEST_PAGE, GuestMemory
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import Buffer, PageReceiver, PageSender, RoundStatistics

END = 7
FRAME = struct.Struct("<IIQQ")


@dataclass
class Channel:
    socket: socket.socket
    raw: bool = True
    cancel: int = -1
    torn: bool = False
    stall: float = 60.0

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, buffer: Buffer) -> None:
        raise AssertionError("C sends on a raw channel")

    def receive_into(self, buffer: Buffer) -> None:
        raise AssertionError("C receives on a raw channel")


@dataclass(frozen=True)
class Header:
    type: int
    count: int
    length: int
    sum: int


class Copy:
    """A second memory of the same layout, and the mover that fills it."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = GuestMemory([(region.gpa, region.size) for region in memory.regions])
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._sender = PageSender(memory, Channel(self._near))
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        receiver = PageReceiver(self.memory, Channel(self._far))
        while (header := Header(*FRAME.unpack(self._far.recv(24, socket.MSG_WAITALL)))).type != END:
            receiver.receive(header)

    def move(self, pages: PageSet) -> RoundStatistics:
        return self._sender.send(pages)

    def finish(self) -> None:
        """Wait until all that was sent is in the copy."""
        self._near.setblocking(True)
        self._near.sendall(FRAME.pack(END, 0, 0, 0))
        self._thread.join()

    def close(self) -> None:
        if self._thread.is_alive():
            self.finish()
        self._near.close()
        self._far.close()
        self.memory.close()


@contextmanager
def copying(memory: GuestMemory) -> Iterator[Copy]:
    copy = Copy(memory)
    try:
        yield copy
    finally:
        copy.close()


class GuestCpu:
    """Writes whole pages in turn, in a thread."""

    def __init__(self, memory: GuestMemory, offset: int, pages: int, rate: int) -> None:
        self.first = memory.regions[0].gpa + offset
        self.pages = pages
        area = ffi.cast("uint8_t *", memory.hva(self.first, pages * GUEST_PAGE))
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.c = ffi.new("struct guest_writer *", {"area": area, "pages": pages, "rate": rate, "wake": self._wake})
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        self.c.stop = 0
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        while not self.c.stop:
            lib.guest_writer_run(self.c, time.monotonic_ns() + 1_000_000_000)

    def pause(self) -> None:
        self.c.stop = 1
        os.eventfd_write(self._wake, 1)
        if self._thread:
            self._thread.join()
        self._thread = None

    @contextmanager
    def running(self) -> Iterator[None]:
        self.run()
        try:
            yield
        finally:
            self.pause()

    def close(self) -> None:
        self.pause()
        os.close(self._wake)
