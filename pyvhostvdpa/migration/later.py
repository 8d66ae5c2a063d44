# SPDX-License-Identifier: MIT
"""Words that can wait: they are written a moment later, by a thread, and not while a guest is paused for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..base.closing import Closing

_SECONDS = 0.05
"""Longer than most guests are paused."""


class Later(Closing):
    """Calls what it is given, in order, within a twentieth of a second, or when it is closed."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="words", daemon=True)
        self._thread.start()

    def __call__(self, write: Callable[[], None]) -> None:
        """Have ``write`` called; at once after :meth:`close`."""
        self._waiting.append(write)
        if self._closed.is_set():
            self.flush()

    def flush(self) -> None:
        """Call what is waiting now."""
        with self._writing:
            while self._waiting:
                self._waiting.popleft()()

    def _serve(self) -> None:
        # it looks instead of being woken: being woken is what takes time
        while not self._closed.wait(_SECONDS):
            self.flush()

    def close(self) -> None:
        """Call what is waiting, and end the thread. Idempotent."""
        self._closed.set()
        self._thread.join()
        self.flush()
