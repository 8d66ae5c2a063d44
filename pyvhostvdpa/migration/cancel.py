# SPDX-License-Identifier: MIT
"""The user's wish to stop a migration, in a form that a wait for the stream notices."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ..base.closing import Closing
from ..base.errors import MigrationCancelled
from ..base.eventfds import close_all

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check_cancelled(fd: int) -> None:
    """Raise :class:`~pyvhostvdpa.MigrationCancelled` if the :class:`Cancel` behind a descriptor is set."""
    if _is_set(fd):
        raise MigrationCancelled("cancelled")


def _is_set(fd: int, seconds: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@contextmanager
def _hearing(first: Callable[[], None], keep: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Call ``first`` on SIGINT and SIGTERM; a second one has its former effect, unless ``keep`` says otherwise.

    Only the main thread may handle signals. In another one the block runs
    without, and the owner of the main thread decides what a signal does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    heard = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard and not keep():
            restore()
            signal.raise_signal(number)
            return
        heard = True
        first()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            # without a handler (None) it was not set from Python, and could not be set again
            if handler is not None:
                before[number] = handler
                signal.signal(number, hear)
        yield
    finally:
        restore()


@contextmanager
def ending_early() -> Iterator[threading.Event]:
    """Set the event that is given out on SIGINT and SIGTERM; a second one has its former effect. It opens nothing."""
    wanted = threading.Event()
    with _hearing(wanted.set):
        yield wanted


@contextmanager
def unheard() -> Iterator[None]:
    """Let SIGINT and SIGTERM do nothing inside the block, however many come. It opens nothing."""
    with _hearing(lambda: None, lambda: True):
        yield


class Cancel(Closing):
    """An eventfd, readable once the user cancelled."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._too_late = False
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

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

    def forget(self) -> None:
        """Take back what was wanted so far."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def wait(self, seconds: float) -> bool:
        """Wait until the user cancels, for ``seconds`` at most; whether that was so."""
        return _is_set(self._fd, seconds)

    def check(self) -> None:
        """Raise :class:`~pyvhostvdpa.MigrationCancelled` if the user cancelled."""
        if self._poll.poll(0):
            raise MigrationCancelled("cancelled")

    def too_late(self) -> None:
        """From now on signals only set it, the second one too: the guest is being handed over, or was."""
        self._too_late = True

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM cancel inside the block.

        A second one has its former effect, so it ends the program, until
        :meth:`too_late`. In a thread other than the main one the block runs
        without: there :meth:`set` is the way to cancel.
        """
        with _hearing(self.set, lambda: self._too_late):
            yield

    def close(self) -> None:
        """Close the eventfd. Idempotent."""
        fd, self._fd = self._fd, -1
        close_all([fd])
