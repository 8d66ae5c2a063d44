# SPDX-License-Identifier: MIT
"""The guest at work: a thread per pair that sends, receives and accounts.

Pausing it is what pausing a guest's CPU is to a driver: it is not
notified, and finds its rings as the device left them. A paused thread waits and is
not ended, since that would take time while the guest is paused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .._cdefs import ffi, lib
from .nic import GuestNic, NicPair
from .nic_state import MAX_TIME
from .protocol import Window


class Cpus:
    """The threads that drive the NICs' pairs, one each; they wait until they are let run.

    They end with :meth:`end`, or when their pair is closed.
    """

    def __init__(self, pairs: Sequence[NicPair]) -> None:
        self._pairs = list(pairs)
        self._c: Any = ffi.new("struct nic_pair *[]", [pair.c for pair in self._pairs])
        self._threads: list[threading.Thread] = []
        self.running = False
        """Whether they were let run, and not paused since."""

    @property
    def dead(self) -> list[int]:
        """The pairs whose thread has ended although they should run."""
        if not self.running:
            return []
        alive = [thread.is_alive() for thread in self._threads]
        return [n for n, pair in enumerate(self._pairs) if pair.c.stop or not alive[n]]

    def make(self) -> None:
        """Make the threads, waiting; nothing if there are any. So :meth:`run` has nothing to make.

        Raises RuntimeError if a pair has the thread of another object: a paused one would run again with it, and two
        drivers on one ring corrupt it.
        """
        if self._threads:
            return
        for pair in self._pairs:
            if pair.thread is not None and pair.thread.is_alive():
                raise RuntimeError(f"{pair.thread.name} has a thread already: end() the traffic that made it")
        for pair in self._pairs:
            pair.c.stop, pair.c.quit = 1, 0
        for pair in self._pairs:
            thread = threading.Thread(target=_serve, args=(pair,), name=f"guest-nic-{pair.c.flow}", daemon=True)
            pair.thread = thread
            self._threads.append(thread)
            thread.start()

    def run(self) -> None:
        """Let them run."""
        self.make()
        self.running = True
        lib.nics_go(self._c, len(self._pairs))

    def request_pause(self) -> None:
        """Ask them to stop, and do not wait for it: :meth:`pause` does."""
        lib.nics_tell(self._c, len(self._pairs))

    def pause(self) -> None:
        """Stop them where they are: none touches a ring when this returns. Idempotent."""
        lib.nics_stop(self._c, len(self._pairs))
        self.running = False

    def send_no_more(self) -> None:
        """Have them only receive from now on; a frame that one is about to send still goes."""
        lib.nics_send_no_more(self._c, len(self._pairs))

    @property
    def have_all(self) -> bool:
        """After :meth:`send_no_more`: whether everything sent has arrived, and none of them is about to send more."""
        return bool(lib.nics_have_all(self._c, len(self._pairs)))

    def begin_window(self, window: Window) -> None:
        """See :meth:`NicPair.begin_window`."""
        lib.nics_begin_window(self._c, len(self._pairs), window, time.monotonic_ns())

    def end_window(self, window: Window) -> None:
        """See :meth:`NicPair.end_window`."""
        lib.nics_end_window(self._c, len(self._pairs), window, time.monotonic_ns())

    def shift_clock(self, ns: int) -> None:
        """See :meth:`Traffic.shift_clock`."""
        # no time is beyond MAX_TIME, so more than twice that moves it no further
        lib.nics_shift_clock(self._c, len(self._pairs), max(-2 * MAX_TIME, min(2 * MAX_TIME, ns)))

    def end(self) -> None:
        """End the threads. Idempotent."""
        if self._threads:
            lib.nics_end(self._c, len(self._pairs))
        self.running = False
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._threads.clear()


class Traffic:
    """Traffic on all pairs of a NIC."""

    def __init__(self, nic: GuestNic) -> None:
        self._nic = nic
        self._made: Cpus | None = None

    @property
    def _cpus(self) -> Cpus:
        if self._made is None:
            self._made = Cpus(self._nic.pairs)
        return self._made

    @property
    def running(self) -> bool:
        """Whether the guest runs."""
        return self._cpus.running

    @property
    def dead(self) -> list[int]:
        """The pairs whose thread has ended although the guest runs."""
        return self._cpus.dead

    def make_ready(self) -> None:
        """Make the threads, so that :meth:`run` has nothing to make."""
        self._cpus.make()

    def run(self) -> None:
        """Let the guest run."""
        self._cpus.run()

    def request_pause(self) -> None:
        """Ask the guest to pause, without waiting: :meth:`wait_until_paused` does."""
        self._cpus.request_pause()

    def wait_until_paused(self) -> None:
        """Return once a requested pause has happened."""
        self._cpus.pause()

    def pause(self) -> None:
        """Stop the guest where it is. Idempotent."""
        self._cpus.pause()

    def end(self) -> None:
        """Pause, and end the threads. Idempotent; :meth:`run` makes new ones."""
        self._cpus.end()

    def stop_sending(self, timeout: float) -> bool:
        """Only receive from now on; whether everything sent arrived within ``timeout`` seconds."""
        self._cpus.send_no_more()
        deadline = time.monotonic() + timeout
        while not self._cpus.have_all:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True

    def shift_clock(self, ns: int) -> None:
        """Move every time of the account by any ``ns``: the clock continues at another host's count.

        Raises nothing: the other host's clock comes with GO, when it is too late to refuse it.
        """
        self._cpus.shift_clock(ns)

    def begin_window(self, window: Window) -> None:
        """Begin a window; see :meth:`window_gap`."""
        self._cpus.begin_window(window)

    def end_window(self, window: Window) -> None:
        """End it."""
        self._cpus.end_window(window)

    @contextmanager
    def watching(self, window: Window) -> Iterator[None]:
        """Take the block's time as a window; see :meth:`window_gap`."""
        self._cpus.begin_window(window)
        try:
            yield
        finally:
            self._cpus.end_window(window)

    def window_gap(self, window: Window) -> float | None:
        """Return the longest time without a frame that touches a window, in ms; None if a pair has none yet."""
        gaps = [pair.window_gap(window) for pair in self._nic.pairs]
        known = [gap for gap in gaps if gap is not None]
        return max(known) if known and len(known) == len(gaps) else None

    def longest_gap(self, begin: int, end: int) -> float | None:
        """Return the longest time without a frame, in ms, of those that touch begin..end (CLOCK_MONOTONIC ns).

        None if that is not known: only the longest of all are kept. A time
        that matters must be watched before, see :meth:`watching`.
        """
        touching = [
            gap_end - gap_begin
            for pair in self._nic.pairs
            for gap_begin, gap_end in pair.gaps()
            if gap_begin <= end and gap_end >= begin
        ]
        return max(touching) / 1e6 if touching else None


def _serve(pair: NicPair) -> None:
    lib.nic_serve(pair.c)
