# SPDX-License-Identifier: MIT
"""Migration between two devices of one machine: both sides, the destination in a process of its own.

The guest starts in passthrough on the source, is switched to shadow
virtqueues (DT1), stopped there (DT2) and started in passthrough on the
destination, with traffic before, between and after. Nothing of it passes but
through the stream between the two processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ..base.errors import MigrationEnded, MigrationFailed, VhostVdpaError
from ..guest.protocol import FrameCounts
from ..guest.synthetic import GuestOptions
from ..memory.guest import check_available
from ..trace import gap, records
from ..trace.downtime import PhaseCost
from ..trace.phases import DEST_PREMAP
from ..trace.recorder import Trace
from .cancel import Cancel
from .common import PhaseCallback, ReportCallback, harmless, warn
from .endpoint import NoPeer, greet_started
from .order import Order
from .report import MigrationReport, Part, SentReport
from .session import Sending, check_devices
from .source import SendOptions
from .stream import Channel

_CHILD = "pyvhostvdpa.migration.child"
_FOUND_IN = str(Path(__file__).absolute().parents[2])
_UNSAFE_PATH_OFF = "-P"
"""For an interpreter that imports nothing from the working directory, which may belong to any user."""
_END_SECONDS = 30.0
"""How long a destination that has lost its source, or was asked to end, may take."""
_LAST_WORDS_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_REMIND_SECONDS = 1.0


def child_argv(order: Order) -> list[str]:
    """Return the command line of the destination's process."""
    return [sys.executable, _UNSAFE_PATH_OFF, "-m", _CHILD, order.encode()]


def child_environment() -> dict[str, str]:
    """Return its environment: it imports from where this process does, in the same order, and from nowhere else."""
    folders = [os.path.abspath(entry) for entry in sys.path if os.path.isabs(entry) or _is_own(entry)]
    # one with a separator in its name cannot be passed on, and its parts are other folders
    return {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in folders if os.pathsep not in each)}


def _is_own(entry: str) -> bool:
    """Whether an entry of sys.path is the folder that this package was found in.

    Of others that are no absolute path some are no folders either: an editable installation has such a name. The child
    would look for it in the working directory, and begin with ``sitecustomize``.
    """
    return os.path.abspath(entry) == _FOUND_IN


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """How to migrate.

    ``guest`` is the guest that is started on the source, ``send`` how it is
    sent. ``seconds`` is how long it has traffic in all: a third before the
    move, a third on shadow virtqueues, a third at the destination.
    ``procedure`` is forced on both devices; None for the best that each can do.
    ``shadow`` is how the source's queues are shadowed, one of
    :data:`pyvhostvdpa.device.shadowing.NAMES`; None for the default.
    """

    guest: GuestOptions = field(default_factory=GuestOptions)
    send: SendOptions = field(default_factory=SendOptions)
    seconds: float = 20.0
    procedure: str | None = None
    shadow: str | None = None


def migrate(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: MigrationOptions | None = None,
    observer: PhaseCallback = lambda phase: None,
    trace: Trace | None = None,
    tell: ReportCallback = lambda text: None,
) -> MigrationReport:
    """Migrate a guest with traffic from ``source`` to ``destination``, and return what was measured.

    Both are paths of vhost-vdpa chardevs, different ones that no process has
    open; both are reset in the end. ``options`` are the guest and how it is
    sent. ``observer`` is called with the name of each phase as it begins,
    ``tell`` with lines of progress of both sides; what they raise is logged.
    ``trace`` records the system calls on both devices, also of a migration
    that failed; its downtimes are DT1 and DT2 of the series "vdpa-net:
    improve migration downtime through descriptor ASID and persistent IOTLB",
    as its cover letter defines them.
    SIGINT and SIGTERM cancel it from "connect" on until the guest is given
    away; after that they end the traffic on the destination early, and the
    report is that of a migration. In a thread other than the main one they do
    what the program does with them. Raises
    :class:`~pyvhostvdpa.MigrationRefused` before anything
    is touched, :class:`~pyvhostvdpa.MigrationFailed` or
    :class:`~pyvhostvdpa.MigrationCancelled` (with ``report``) if the
    guest stayed on the source, and whatever opening or mapping raises.
    """
    options = options or MigrationOptions()
    check_devices((source, destination))
    check_available(options.guest.memory, copies=2)
    third = options.seconds / 3
    observer = harmless(observer)
    with _Destination(os.fspath(destination), third, options.send, trace, tell, options.procedure) as other:

        def afterwards(cancel: Cancel) -> None:
            observer("destination")
            other.await_result(cancel)

        sending = Sending(
            [source],
            other.connect,
            options.guest,
            options.send,
            third,
            third,
            observer,
            tell,
            Trace() if trace is None else trace,
            options.procedure,
            afterwards,
            options.shadow,
        )
        try:
            sent = sending.run()
        except MigrationEnded as e:
            if e.report is not None:
                e.report = _stayed(e.report)
            raise
        return _migrated(sent, other.result)


class _Destination:
    """The destination, :mod:`pyvhostvdpa.migration.child`, in a process of its own.

    It is started before the guest is: a guest with many queues leaves little of a small machine to others.
    """

    def __init__(
        self,
        path: str,
        seconds: float,
        options: SendOptions,
        trace: Trace | None,
        tell: ReportCallback,
        procedure: str | None = None,
    ) -> None:
        self._path, self._seconds, self._options, self._procedure = path, seconds, options, procedure
        self._trace, self._tell = trace, harmless(tell)
        self._has_guest = False
        """Whether the guest was given to it: then it must not be ended early."""
        self._silent = False
        """Whether it did not end although it was asked to."""
        self._ended = threading.Event()
        self._result: dict[str, Any] | None = None
        self._error: VhostVdpaError | None = None

    def __enter__(self) -> Self:
        with ExitStack() as unless_started:
            folder = unless_started.enter_context(tempfile.TemporaryDirectory(prefix="vhost-vdpa-"))
            self._records = Path(folder) / "records"
            near, far = socket.socketpair()
            unless_started.callback(near.close)
            with far:
                self._process = self._start(far.fileno())
            self._near: socket.socket | None = near
            self._resources = unless_started.pop_all()
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), name="destination-words")
        self._listener.start()
        return self

    def _start(self, fd: int) -> subprocess.Popen[str]:
        order = Order(
            [self._path],
            fd,
            self._seconds,
            str(self._options.folder),
            control_deadline=self._options.control_deadline,
            drain=self._options.drain,
            procedure=self._procedure,
        )
        if self._trace is not None:
            order = replace(order, records=str(self._records), limit=self._trace.limit)
        # of a group of its own: Ctrl-C is for the source to act on, which notifies it
        return subprocess.Popen(
            child_argv(order),
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=[fd],
            process_group=0,
            text=True,
        )

    def connect(self, cancel: Cancel) -> Channel:
        """Return the stream to it, which is the caller's then."""
        assert self._near is not None
        near, self._near = self._near, None
        try:
            return greet_started(near, cancel.fileno())
        except NoPeer as e:
            # its own words say why, if it had time for any
            self._ended.wait(_LAST_WORDS_SECONDS)
            raise NoPeer(f"{e}: {self._end()}", hint=self._error.hint if self._error else e.hint) from e

    def _listen(self, lines: IO[str]) -> None:
        """Read its lines: the source reports the phases until the guest is given away."""
        try:
            for line in lines:
                self._hear(line)
        finally:
            self._ended.set()

    def _hear(self, line: str) -> None:
        try:
            [(kind, content)] = json.loads(line).items()
        except (ValueError, AttributeError):
            warn(f"the process for the destination wrote {line!r}")
            return
        if kind == "result":
            self._result = content
        elif kind == "error":
            self._error = VhostVdpaError(content["message"], content["hint"])
        elif kind == "phase" and content == "running":
            self._has_guest = True
        elif kind == "log" or (kind == "tell" and self._has_guest):
            self._tell(f"destination: {content}")

    def await_result(self, cancel: Cancel) -> None:
        """Wait until the guest has run there, or a signal asked to end that early."""
        self._has_guest = True
        reminded, end = 0.0, float("inf")
        while not self._ended.wait(_LOOK_SECONDS) and (now := time.monotonic()) < end:
            if cancel.wanted and now - reminded > _REMIND_SECONDS:
                if not reminded:
                    self._tell("the guest runs on the destination already: its traffic is ended early")
                    end = now + _END_SECONDS
                reminded = now
                # heard once it lets the guest run, ignored before
                self._process.send_signal(signal.SIGINT)
        self._silent = not self._ended.is_set()

    @property
    def result(self) -> dict[str, Any]:
        """The report of the guest that ran there; without one MigrationFailed says what happened to it."""
        if self._result is None:
            error = self._error
            raise MigrationFailed(
                f"the guest was given to {self._path} and ran there: {self._end()}. It ended with that process; "
                "nothing of it is left on the source",
                hint=error.hint if error else "",
            )
        return self._result

    def _end(self) -> str:
        """How the process ended, in words; its own if it had any."""
        try:
            status = self._process.wait(_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            return f"the process for the destination ({self._path}) does not answer"
        if self._error is not None:
            return f"the destination ({self._path}) says: {self._error}"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the process for the destination ({self._path}) {how}"

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._resources, self._process as process:
            try:
                if isinstance(value, KeyboardInterrupt) or self._near is not None:
                    process.terminate()
                # a guest that runs there is not ended by a failure here
                lives = self._has_guest and not (self._silent or self._result) and isinstance(value, Exception | None)
                process.wait(None if lives else _END_SECONDS)
            except BaseException as e:
                process.kill()
                if not isinstance(e, subprocess.TimeoutExpired):
                    raise
            finally:
                self._listener.join()
                self._collect()

    def _collect(self) -> None:
        """Take what it recorded into the trace, in order of time; nothing if it was ended before it wrote that."""
        if self._trace is None:
            return
        try:
            with suppress(FileNotFoundError), open(self._records, encoding="utf-8") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(0)
                    self._trace.extend(*records.read_all(file))
        except (OSError, VhostVdpaError) as e:
            warn(f"what the destination recorded is missing from the trace: {e}")


def _stayed(sent: SentReport) -> MigrationReport:
    """Return the report of a migration whose guest stayed on the source."""
    return MigrationReport(
        outcome=sent.outcome,
        sent=sent.sent,
        frames=sent.frames,
        bad_pages=sent.bad_pages,
        parts=sent.parts,
        downtimes=sent.downtimes,
        gap_switch_ms=sent.gap_switch_ms,
        gap_move_ms=None,
        gap_back_ms=sent.gap_back_ms,
        phases=sent.phases,
        drops={"source": _only(sent.drops)},
        environment=_with_roles(sent.environment, {"source": sent.environment}),
        warnings=sent.warnings,
        procedure={"source": _only(sent.procedure)},
    )


def _migrated(sent: SentReport, received: dict[str, Any]) -> MigrationReport:
    """Return the report of both sides together."""
    parts = {name: Part(part["received"], part["seconds"]) for name, part in received["parts"].items()}
    phases = {name: PhaseCost(**phase) for name, phase in received["phases"].items()}
    both = sent.phases | phases
    first = [name for name in both if name == DEST_PREMAP]
    return MigrationReport(
        outcome="migrated",
        sent=sent.sent,
        frames=FrameCounts(**received["frames"]),
        bad_pages=received["bad_pages"],
        parts=sent.parts | parts,
        downtimes=sent.downtimes,
        gap_switch_ms=sent.gap_switch_ms,
        gap_move_ms=received["guest_gap_ms"]["move"],
        gap_back_ms=None,
        phases={name: both[name] for name in dict.fromkeys([*first, *both])},
        drops={"source": _only(sent.drops), "destination": _only(received["device_drops"])},
        environment=_with_roles(sent.environment, {"source": sent.environment, "destination": received["environment"]}),
        warnings=[*sent.warnings, *received["warnings"]],
        procedure={"source": _only(sent.procedure), "destination": _only(received["procedure"])},
        stopped=gap.stop_to_run([*sent.steps, *gap.from_numbers(received["stop_to_run_steps_ns"])]),
    )


def _only(by_device: dict[str, Any]) -> Any:
    return next(iter(by_device.values()), {})


def _with_roles(common: dict[str, Any], sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return an environment that has devices by what they were in the migration."""
    return common | {"devices": {role: _only(side["devices"]) for role, side in sides.items()}}
