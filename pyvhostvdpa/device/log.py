# SPDX-License-Identifier: MIT
"""What a device writes, reported to another process while it runs: the dirty log of a front-end.

Shadow virtqueues mark each page of a device-writable buffer before the
guest sees the buffer as used. A thread moves the marks into the other process's bitmap;
what it has not moved yet is moved when the queues are stopped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence

from .._cdefs import lib
from ..base.errors import MissingFeature, VhostVdpaError
from ..memory.guest import GuestMemory, Region
from ..memory.log import SharedLog, bytes_up_to
from ..virtqueue.layout import GuestQueue

INTERVAL = 0.1
"""Seconds between two times that marks are moved: a front-end looks once for each round of memory."""

log = logging.getLogger(__name__)


class DirtyLog:
    """The log into which the pages go that are marked in ``memory``; none at first."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._log: SharedLog | None = None
        self._using = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def active(self) -> bool:
        """Whether there is a log."""
        return self._log is not None

    def replace(self, other: SharedLog | None) -> None:
        """Move marks into ``other`` from now on, or mark no more; not one bit goes into the old log any more.

        Raises :class:`~pyvhostvdpa.MissingFeature`, with nothing changed, if no thread can be started.
        """
        if other is not None:
            self._begin()
        with self._using:
            old = self._log
            if other is not None and old is None:
                self._memory.start_dirty_log()
            self._log = other
            if other is None and old is not None:
                self._memory.stop_dirty_log()
                old.publish()
        if other is None:
            self.end()

    def _begin(self) -> None:
        if self._thread is None:
            self._ended.clear()
            thread = threading.Thread(target=self._serve, name="dirty-log", daemon=True)
            try:
                thread.start()
            except RuntimeError as e:
                raise MissingFeature(f"dirty pages cannot be logged: {e}", hint="end other processes: ulimit -u") from e
            self._thread = thread

    def _serve(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                self._publish()
            except VhostVdpaError as e:
                log.warning("dirty pages are reported at the next stop only: %s", e)
                return

    def _publish(self) -> None:
        with self._using:
            if self._log is not None:
                self._log.publish()

    def check_holds(self, regions: Iterable[Region]) -> None:
        """Raise MissingFeature if the log has no bits for these regions."""
        need = max((bytes_up_to(region.end) for region in regions), default=0)
        if self._log is not None and self._log.size < need:
            raise MissingFeature(
                f"the dirty log has {self._log.size:#x} bytes, this guest memory needs {need:#x}",
                hint="replace the log by a larger one first: set_log()",
            )

    def flush(self, written: Sequence[GuestQueue]) -> None:
        """Move every mark. ``written`` are rings that the device has used itself: their used rings are marked."""
        for queue in written:
            lib.memory_mark(self._memory.c_map, *queue.parts[2])
        self._publish()

    def end(self) -> None:
        """End the thread. Idempotent."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
