# SPDX-License-Identifier: MIT
"""The guest at work: a thread per pair that sends, receives and accounts.

Pausing it is what pausing a guest's CPU is to a driver: nothing is told to
it, it finds its rings as the device left them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .._cdefs import lib
from .nic import GuestNic, NicPair, Window

_SLICE_NS = 200_000_000


class Traffic:
    """Traffic on all pairs of a NIC."""

    def __init__(self, nic: GuestNic) -> None:
        self._nic = nic
        self._threads: list[threading.Thread] = []

    @property
    def running(self) -> bool:
        """Whether the guest runs."""
        return bool(self._threads)

    @property
    def dead(self) -> list[int]:
        """The pairs whose thread ended although the guest runs."""
        return [number for number, thread in enumerate(self._threads) if not thread.is_alive()]

    def run(self) -> None:
        """Let the guest run."""
        if self._threads:
            return
        for pair in self._nic.pairs:
            pair.c.stop = 0
            thread = threading.Thread(target=_serve, args=(pair,), name=f"guest-nic-{pair.c.flow}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def tell_to_pause(self) -> None:
        """Tell the guest to stop, and do not wait for it: :meth:`pause` does."""
        for pair in self._nic.pairs:
            pair.c.stop = 1
            os.eventfd_write(pair.wake, 1)

    def pause(self) -> None:
        """Stop the guest where it is. Twice is no error."""
        self.tell_to_pause()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._threads.clear()

    def stop_sending(self, timeout: float) -> bool:
        """Only receive from now on; whether everything sent arrived within ``timeout`` seconds."""
        for pair in self._nic.pairs:
            pair.c.sending = 0
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if all(pair.c.received >= pair.c.sent for pair in self._nic.pairs):
                return True
            time.sleep(0.01)
        return False

    @contextmanager
    def watching(self, window: Window) -> Iterator[None]:
        """Take the block's time as a window; see :meth:`window_gap`."""
        for pair in self._nic.pairs:
            pair.begin_window(window)
        try:
            yield
        finally:
            for pair in self._nic.pairs:
                pair.end_window(window)

    def window_gap(self, window: Window) -> float | None:
        """Return the longest time without a frame that touches a window, in ms; None if a pair has none yet."""
        gaps = [pair.window_gap(window) for pair in self._nic.pairs]
        known = [gap for gap in gaps if gap is not None]
        return max(known) if known and len(known) == len(gaps) else None

    def longest_gap(self, begin: int, end: int) -> float | None:
        """Return the longest time without a frame, in ms, of those that touch begin..end (CLOCK_MONOTONIC ns).

        None if that is not known: only the longest of all are kept. A time
        that matters is watched beforehand, see :meth:`watching`.
        """
        touching = [
            gap_end - gap_begin
            for pair in self._nic.pairs
            for gap_begin, gap_end in pair.gaps()
            if gap_begin <= end and gap_end >= begin
        ]
        return max(touching) / 1e6 if touching else None


def _serve(pair: NicPair) -> None:
    while not pair.c.stop:
        lib.nic_run(pair.c, time.monotonic_ns() + _SLICE_NS)
