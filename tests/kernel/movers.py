"""Pre-copy within one process: a guest's memory, its copy, and a socket between them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.memory.guest import GUEST_PAGE, GuestMemory
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import PageReceiver, PageSender, RoundStatistics
from pyvhostvdpa.migration.stream import Channel, Frame

PATIENCE = 600.0
"""Seconds between two sets that a test may take."""


class Copy:
    """A second memory of the same layout, and the mover that fills it."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = GuestMemory([(region.gpa, region.size) for region in memory.regions])
        self._near, self._far = (Channel(end, stall=60.0) for end in socket.socketpair())
        self._sender = PageSender(memory, self._near)
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        receiver = PageReceiver(self.memory, self._far)
        while (header := self._far.receive_header(PATIENCE)).type != Frame.FINAL:
            receiver.receive(header)

    def move(self, pages: PageSet) -> RoundStatistics:
        return self._sender.send(pages)

    def read_through(self, c_map: Any) -> None:
        """Read the original where C says that it is."""
        self._sender.read_through(c_map)

    def finish(self) -> None:
        """Wait until all that was sent is in the copy."""
        self._near.send_frame(Frame.FINAL)
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
