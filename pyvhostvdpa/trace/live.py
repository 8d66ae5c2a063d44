# SPDX-License-Identifier: MIT
"""A recording under way: the kernel's buffer is read periodically, and its content becomes a trace.

Nothing is asked of a device and nothing is changed in a process. Reading is a thread's work, since a buffer that is
not emptied in time loses records; what it read is put together on request.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ..base.closing import Closing
from .recorder import Event, Trace
from .tracefs import Drained, Instance
from .watch import Assembler, Surroundings

PERIOD = 0.05
"""Seconds between two looks at the buffer."""
LIMIT = 1_000_000
"""Events that are kept; beyond that the oldest are dropped, and counted."""


@contextlib.contextmanager
def standing_back() -> Iterator[None]:
    """Let this thread run when nothing else wants the processor: what records must not delay what is recorded.

    It keeps a small share of a processor that is always busy, so that a buffer is emptied even then.
    """
    thread = threading.get_native_id()
    policy, parameters = os.sched_getscheduler(thread), os.sched_getparam(thread)
    niceness = os.getpriority(os.PRIO_PROCESS, thread)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread, 19)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
            os.sched_setscheduler(thread, policy, parameters)


def open_files(pid: int, proc: Path = Path("/proc")) -> list[tuple[int, str]]:
    """Return the vhost-vdpa chardevs that a process has open: descriptor and path."""
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(proc / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(proc / str(pid) / "fd" / fd)
                if target.startswith("/dev/vhost-vdpa-"):
                    found.append((int(fd), target))
    return sorted(found)


def holders(proc: Path = Path("/proc")) -> list[tuple[str, int]]:
    """Return which process has which vhost-vdpa chardev open, by path."""
    pids = [int(name) for name in os.listdir(proc) if name.isdigit()]
    return sorted({(path, pid) for pid in pids for _, path in open_files(pid, proc)})


class _Files:
    """Which device a file of the kernel is, where probes record nothing but its address."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def device_of(self, pid: int, file: int) -> str:
        """Return the only device of a process that is not known by another address yet."""
        if file not in self._known:
            taken = set(self._known.values())
            free = [path for _, path in open_files(pid) if path not in taken]
            if len(set(free)) != 1:
                return ""
            self._known[file] = free[0]
        return self._known[file]

    def forget(self, file: int) -> None:
        """A file was closed: its address may be another's from now on."""
        self._known.pop(file, None)


def _driver(folder: Path = Path("/sys/module/vhost_vdpa")) -> int:
    """Return what tells the driver as it is loaded now from one that is loaded later; 0 without one."""
    try:
        return folder.stat().st_ino
    except OSError:
        return 0


class Watch(Closing):
    """Record every call on vhost-vdpa devices, of all processes or of some, from now on.

    ``devices`` are paths (/dev/vhost-vdpa-N), ``pids`` processes; empty for all. Raises MissingFeature where that is
    not possible, with the next command.
    """

    def __init__(
        self,
        devices: Collection[str] = (),
        pids: Collection[int] = (),
        instance: Instance | None = None,
        period: float = PERIOD,
    ) -> None:
        self.trace = Trace(LIMIT)
        self._devices, self._pids = frozenset(devices), frozenset(pids)
        self._driver = _driver()
        self._instance = instance or Instance()
        files = _Files()
        self._assembler = Assembler(
            Surroundings(self._instance.process_of, files.device_of, self._wanted, files.forget)
        )
        self._period = period
        self._drained: list[Drained] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: OSError | None = None
        self._reader = threading.Thread(target=self._read, name="watch-reader", daemon=True)
        self._reader.start()

    def _wanted(self, device: str, pid: int) -> bool:
        return (not self._devices or device in self._devices) and (not self._pids or pid in self._pids)

    def _read(self) -> None:
        with standing_back():
            self._read_on()

    def _read_on(self) -> None:
        while not self._ended.wait(self._period):
            try:
                drained = self._instance.drain()
            except OSError as e:
                self._error = e
                return
            with self._lock:
                if not drained.pages and self._drained and not self._drained[-1].pages:
                    self._drained.pop()
                self._drained.append(drained)

    def events(self) -> list[Event]:
        """Return the events since the last call; they are added to :attr:`trace`."""
        if self._error is not None:
            raise self._error
        with self._lock:
            taken, self._drained = self._drained, []
        return [event for drained in taken for event in self._put_together(drained)]

    def _put_together(self, drained: Drained, everything: bool = False) -> list[Event]:
        found = list(self._assembler.events(self._instance.records(drained, everything)))
        for event in found:
            self.trace.append(event)
        return found

    def stop(self) -> list[Event]:
        """End the recording, once; return the rest of its events. The trace counts what was lost as dropped."""
        if not self._ended.is_set():
            self._instance.stop()
            self._ended.set()
            self._reader.join()
        rest = self._instance.drain()
        # one drain takes at most the buffer's size
        while (more := self._instance.drain()).pages:
            rest.pages.extend(more.pages)
        found = [*self.events(), *self._put_together(rest, everything=True)]
        self.trace.dropped += self.lost
        self._instance.close()
        return found

    @property
    def lost(self) -> int:
        """How many records did not fit into the kernel's buffer, or calls are incomplete."""
        return self._instance.lost + self._assembler.unmatched

    @property
    def unfinished(self) -> list[tuple[int, str, str]]:
        """Calls that have begun and not ended: thread, device, name."""
        return self._assembler.unfinished()

    @property
    def reloaded(self) -> bool:
        """Whether the driver was removed meanwhile, or loaded again: probes do not come back with it."""
        return _driver() != self._driver

    @property
    def busy(self) -> set[str]:
        """Devices that have a call under way."""
        return {device for _, device, _ in self._assembler.unfinished()}

    @property
    def forms(self) -> dict[str, str]:
        """Each probe as the kernel took it."""
        return self._instance.forms

    def close(self) -> None:
        """End the recording and remove its probes. Idempotent."""
        self._ended.set()
        if self._reader.is_alive() and self._reader is not threading.current_thread():
            self._reader.join()
        self._instance.close()


def follow(watch: Watch, ended: Callable[[], bool], see: Callable[[Event], None], idle: Callable[[int], None]) -> None:
    """Show each event as it comes until ``ended``; then end the recording and show the rest.

    ``idle`` is called with the time, CLOCK_MONOTONIC in ns, when there is nothing new.
    """
    while not ended():
        now = time.monotonic_ns()
        found = watch.events()
        for event in found:
            see(event)
        if not found:
            idle(now)
        time.sleep(PERIOD)
    for event in watch.stop():
        see(event)
