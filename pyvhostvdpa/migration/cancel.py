# SPDX-License-Identifier: MIT
"""The user's wish to stop a migration, in a form that a wait for the stream notices."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..base.closing import Closing
from ..base.errors import MigrationCancelled

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check_cancelled(fd: int) -> None:
    """Raise :class:`~pyvhostvdpa.MigrationCancelled` if the :class:`Cancel` behind a descriptor is set."""
    if _is_set(fd):
        raise MigrationCancelled("cancelled")


def _is_set(fd: int, seconds: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Cancel(Closing):
    """An eventfd, readable once the user cancelled."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return the descriptor, for :attr:`pyvhostvdpa.migration.stream.Channel.cancel`."""
        return self._fd

    def set(self) -> None:
        """Cancel."""
        os.eventfd_write(self._fd, 1)

    @property
    def wanted(self) -> bool:
        """Whether the user cancelled."""
        return _is_set(self._fd)

    def wait(self, seconds: float) -> bool:
        """Wait until the user cancels, for ``seconds`` at most; whether that was so."""
        return _is_set(self._fd, seconds)

    def check(self) -> None:
        """Raise :class:`~pyvhostvdpa.MigrationCancelled` if the user cancelled."""
        check_cancelled(self._fd)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM cancel inside the block; a second one ends the program as ever."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def cancel(number: int, frame: FrameType | None) -> None:
            restore()
            self.set()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in _SIGNALS:
            signal.signal(number, cancel)
        try:
            yield
        finally:
            restore()

    def close(self) -> None:
        """Close the eventfd. Twice is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
