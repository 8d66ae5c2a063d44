"""Two processes that send a guest to each other, and can be held at each phase to do them harm there."""

from __future__ import annotations

import array
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.device.net import State, VdpaNetDevice
from pyvhostvdpa.guest.shape import ID_BYTES, GuestShape
from pyvhostvdpa.guest.synthetic import KINDS, GuestOptions, SyntheticGuest
from pyvhostvdpa.memory.pinned import pinned_bytes
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.destination import Arrived, Destination
from pyvhostvdpa.migration.from_file import start_saved
from pyvhostvdpa.migration.saved import SavedGuest, save
from pyvhostvdpa.migration.source import SendOptions, Source
from pyvhostvdpa.migration.stream import Channel
from pyvhostvdpa.net.features import CONTROL, SUPPORTED

DRAIN_SECONDS = 30.0
STALL_SECONDS = 20.0
RUNS_SECONDS = 3.0
"""In which a guest that runs gets a frame, on a machine with all its CPUs busy."""
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Gone(AssertionError):
    """The process ended before it answered."""


class Failed(Exception):
    """What the process raised on purpose: its class, words and hint."""

    def __init__(self, kind: str, message: str, hint: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.hint = kind, message, hint


# -- inside the process ---------------------------------------------------------------


class Worker:
    """Has a guest or has none, and does what it is told."""

    def __init__(self, control: socket.socket, folder: Path) -> None:
        self.control, self.folder = control, folder
        self.guest: SyntheticGuest | None = None
        self.devices: list[VdpaNetDevice] = []
        self.arrived: Arrived[SyntheticGuest] | None = None
        self._migrates = False
        for number in _SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """What a second signal does; a late one, which a thread of the guest takes, does nothing any more."""
        if not self._migrates:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.Signals(number))

    @contextmanager
    def interruptible(self, cancel: Cancel) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM cancel what is done here, also one from before it began; nowhere else do they."""
        with cancel.on_signals():
            self._migrates = True
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                self._migrates = False

    def tell(self, *message: Any) -> None:
        self.control.send(pickle.dumps(message))

    def serve(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 20, 1)
            if not data:
                return
            name, *arguments = pickle.loads(data)
            try:
                self.tell("done", getattr(self, name)(*arguments, *descriptors))
            except VhostVdpaError as e:
                self.tell("failed", type(e).__name__, str(e), e.hint)
            except BaseException:
                self.tell("crashed", traceback.format_exc())

    def holding(self, at: str) -> Callable[[str], None]:
        """An observer that waits at one phase until the test lets it go on."""

        def observe(phase: str) -> None:
            if phase == at:
                self.tell("phase", phase)
                self.control.recv(64)

        return observe

    def start(self, paths: list[str], options: GuestOptions, procedure: str | None = None) -> None:
        self.devices = [VdpaNetDevice(path, wanted=SUPPORTED | CONTROL, procedure=procedure) for path in paths]
        self.guest = guest = SyntheticGuest.create(self.devices, options)
        for number, device in enumerate(self.devices):
            device.attach(guest.memory)
            guest.start(number, device)
            guest.use_pairs(number, device.path)
        guest.run()

    def send(self, options: SendOptions, hold_at: str, fd: int) -> dict[str, Any]:
        assert self.guest is not None
        with Cancel() as cancel, Channel(socket.socket(fileno=fd), cancel.fileno(), stall=STALL_SECONDS) as channel:
            source = Source(self.guest, self.devices, channel, cancel, options, self.holding(hold_at))
            with self.interruptible(cancel):
                sent = source.run()
        frames = self.guest.counts()
        self.close()
        return {"rounds": len(sent.rounds), "hash": sent.hash, "frames": frames}

    def receive(self, paths: list[str], hold_at: str, procedure: str | None, fd: int) -> dict[str, Any]:
        with Cancel() as cancel, Channel(socket.socket(fileno=fd), cancel.fileno(), stall=STALL_SECONDS) as channel:
            destination = Destination(
                paths, channel, cancel, KINDS, folder=self.folder, observer=self.holding(hold_at), procedure=procedure
            )
            with self.interruptible(cancel):
                arrived = destination.run()
        return self._own(arrived)

    def take(self, path: Path, paths: list[str]) -> dict[str, Any]:
        return self._own(start_saved(path, paths, KINDS))

    def save(self) -> Path:
        """Stop the guest and save it; it is in the file and nowhere else afterwards."""
        assert self.guest is not None
        self.guest.pause()
        for device in self.devices:
            device.stop()
        own, states = self.guest.state()
        memory = self.guest.memory
        regions = tuple((region.gpa, region.size) for region in memory.regions)
        shape = GuestShape(os.urandom(ID_BYTES), "a test", regions, self.guest.shapes(), False)
        path = save(self.folder, "source", SavedGuest(shape, own, tuple(states)), memory)
        self.close()
        return path

    def runs(self) -> bool:
        """Whether frames go through a guest here within seconds; signals that came too late are forgotten."""
        while signal.sigtimedwait(_SIGNALS, 0) is not None:
            pass
        if self.guest is None:
            return False
        before, end = self.guest.counts(), time.monotonic() + RUNS_SECONDS
        while time.monotonic() < end:
            if self.guest.counts() != before:
                return True
            time.sleep(0.005)
        return False

    def _own(self, arrived: Arrived[SyntheticGuest]) -> dict[str, Any]:
        self.arrived, self.guest, self.devices = arrived, arrived.guest, arrived.devices
        return {"hash": arrived.hash, "note": arrived.note}

    def receives(self, frames: int) -> int:
        """Wait until that many more frames came back; how many the guest has had."""
        assert self.guest is not None
        assert all(device.state is State.PASSTHROUGH for device in self.devices)
        end = time.monotonic() + DRAIN_SECONDS
        goals = [nic.counts().received + frames for nic in self.guest.nics]
        while any(nic.counts().received < goal for nic, goal in zip(self.guest.nics, goals, strict=True)):
            assert time.monotonic() < end, "no traffic"
            for device in self.devices:
                device.check()
            time.sleep(0.005)
        return self.guest.counts().received

    def settle(self) -> dict[str, int]:
        """Let everything sent arrive; the account, with the pages that the guest's CPU found wrong."""
        assert self.guest is not None
        self.guest.drain(DRAIN_SECONDS)
        self.guest.pause()
        counts = self.guest.counts().to_dict()
        counts["bad_pages"] = self.guest.writer.bad_pages() if self.guest.writer is not None else 0
        for nic in self.guest.nics:
            for pair in nic.pairs:
                pair.c.sending = 1
        self.guest.run()
        return counts

    def rings(self) -> list[dict[str, int]]:
        """Where the rings of each pair and its driver stand."""
        assert self.guest is not None
        found = []
        for pair in (pair for nic in self.guest.nics for pair in nic.pairs):
            c = pair.c
            driver = {name: int(getattr(c, name)) for name in ("rx_used", "rx_avail", "tx_used", "tx_avail")}
            rings = {"rx.used": c.rx.used.idx, "tx.used": c.tx.used.idx, "ring_errors": c.ring_errors}
            found.append(driver | {name: int(value) for name, value in rings.items()})
        return found

    def close(self) -> None:
        if self.guest is None:
            return
        self.guest.pause()
        if self.arrived is not None:
            self.arrived.close()
        for device in self.devices:
            device.close()
        self.guest.close()
        self.guest, self.arrived, self.devices = None, None, []

    def drop_stopped(self) -> None:
        """End a guest that is stopped here, after its state was saved."""
        self.close()

    def resources(self) -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), pinned_bytes(), threading.active_count()

    def mappings(self) -> int:
        """Guest memory and rings that are mapped in this process."""
        return Path("/proc/self/maps").read_text().count("/memfd:")


# -- outside -----------------------------------------------------------------------------


class Peer:
    """One of the processes. It is forked from the test, which has no device open."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(120)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.control.close()
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                Worker(theirs, folder).serve()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        theirs.close()
        self.alive = True
        self._early: tuple[Any, ...] = ()

    def ask(self, name: str, *arguments: Any, fd: int | None = None) -> None:
        data = pickle.dumps((name, *arguments))
        if fd is None:
            self.control.send(data)
        else:
            self.control.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    def _message(self) -> tuple[Any, ...]:
        try:
            data = self.control.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        if not data:
            raise Gone(self.name)
        message: tuple[Any, ...] = pickle.loads(data)
        return message

    def until(self, phase: str) -> None:
        """Wait until it is held at a phase."""
        message = self._message()
        assert message == ("phase", phase), f"{self.name} did not come to {phase!r}: {message}"

    def comes_to(self, phase: str) -> bool:
        """Whether it comes to be held at a phase; if not, its end is the next message."""
        self._early = self._message()
        if self._early == ("phase", phase):
            self._early = ()
            return True
        return False

    def final(self) -> Any:
        """Wait for its end, also if it ended before it came to a phase, or crashed."""
        kind, *rest = self._early or self._message()
        self._early = ()
        if kind == "crashed":
            raise Failed(kind, rest[0], "")
        if kind == "failed":
            raise Failed(*rest)
        assert kind == "done", kind
        return rest[0]

    def go_on(self) -> None:
        self.control.send(b"on")

    def result(self) -> Any:
        """Wait for its end; Failed or Gone if that is how it ended."""
        kind, *rest = self._message()
        if kind == "failed":
            raise Failed(*rest)
        assert kind == "done", f"{self.name}: {rest[0]}"
        return rest[0]

    def call(self, name: str, *arguments: Any) -> Any:
        self.ask(name, *arguments)
        return self.result()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is alive."""
        if self.alive:
            os.kill(self.pid, number)

    def interrupt(self) -> None:
        self.signal(signal.SIGINT)

    def freeze(self) -> None:
        """Stop the process where it is."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def ended_by(self) -> int:
        """Wait for a process that is gone; the signal that ended it, 0 if it ended by itself."""
        self.alive = False
        self.control.close()
        return max(0, -os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]))

    def kill(self) -> None:
        """End it as kill -9 does, wherever it is. Twice is no error."""
        if self.alive:
            self.alive = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.control.close()
