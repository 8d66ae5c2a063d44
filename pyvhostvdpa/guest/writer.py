# SPDX-License-Identifier: MIT
"""The synthetic guest's CPU: it writes memory, and knows what must be in it."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from .._cdefs import ffi, lib
from ..memory.guest import PAGE_SIZE, GuestMemory

_SLICE_NS = 200_000_000
MAX_RATE = 1 << 32
"""Pages per second: more than memory takes, and what is owed of them in a slice still fits 64 bits."""


class GuestWriter:
    """A CPU that writes ``pages`` pages from ``gpa`` on in turn, ``rate`` of them a second.

    What a page holds follows from the number of the write, so
    :meth:`bad_pages` can check at any time whether memory is what it should be.
    """

    def __init__(self, memory: GuestMemory, gpa: int, pages: int, rate: int, written: int = 0) -> None:
        self.gpa = gpa
        c: Any = ffi.new("struct guest_writer *")
        c.area = ffi.cast("uint8_t *", memory.hva(gpa, pages * PAGE_SIZE))
        c.pages, c.rate, c.written = pages, rate, written
        c.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.c = c
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Let it write."""
        self._end()
        if self._thread is None:
            self.c.stop = 0
            self._thread = threading.Thread(target=self._serve, name="guest-cpu", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while not self.c.stop:
            lib.guest_writer_run(self.c, time.monotonic_ns() + _SLICE_NS)

    def pause(self) -> None:
        """Stop it between two pages. Idempotent."""
        # its thread ends later, without a wait here
        lib.guest_writer_stop(self.c)

    def _end(self) -> None:
        """Wait for the end of a thread that was asked to pause."""
        if self._thread is not None and self.c.stop:
            os.eventfd_write(self.c.wake, 1)
            if self._thread.ident is not None:
                self._thread.join()
            self._thread = None

    def bad_pages(self) -> int:
        """Count the pages that do not hold what was written there last; it must be paused."""
        return int(lib.guest_writer_check(self.c))

    def close(self) -> None:
        """Close what it opened."""
        self.pause()
        self._end()
        os.close(self.c.wake)
