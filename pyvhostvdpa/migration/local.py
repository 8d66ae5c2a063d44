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
import re
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ..base.errors import MigrationEnded, MigrationFailed
from ..guest.nic import FrameCounts
from ..guest.synthetic import GuestOptions
from ..memory.guest import check_available
from ..trace import gap, records
from ..trace.downtime import PhaseCost
from ..trace.recorder import Trace
from .cancel import Cancel
from .endpoint import greet_started
from .report import Part, Report
from .session import Sending, SentReport, check_devices
from .source import Observer, SendOptions, Tell
from .stream import Channel

_END_SECONDS = 30.0
"""How long a destination that has lost its source, or was told to end, may take."""

_TIME = re.compile(r"\[ *[0-9.]+ s\] ")


@dataclass(frozen=True, slots=True)
class Options:
    """How to migrate: the guest, and how it is sent. ``seconds`` of traffic, a third in each part.

    ``procedure`` forces one on both devices; the best that each can do without.
    """

    guest: GuestOptions = field(default_factory=GuestOptions)
    send: SendOptions = field(default_factory=SendOptions)
    seconds: float = 20.0
    procedure: str | None = None


def migrate(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: Options | None = None,
    observer: Observer = lambda phase: None,
    trace: Trace | None = None,
    tell: Tell = lambda text: None,
) -> Report:
    """Migrate a guest with traffic from ``source`` to ``destination``; both are reset in the end.

    ``trace`` takes what passed the doors of both, also of a migration that failed; ``tell`` gets the
    words of both.
    SIGINT and SIGTERM cancel it from "connect" on until the guest is given
    away. Raises :class:`~pyvhostvdpa.MigrationRefused` before anything
    is touched, :class:`~pyvhostvdpa.MigrationFailed` or
    :class:`~pyvhostvdpa.MigrationCancelled` (with ``report``) if the
    guest stayed on the source, and whatever opening or mapping raises.
    """
    options = options or Options()
    check_devices((source, destination))
    check_available(options.guest.memory, copies=2)
    third = options.seconds / 3
    with _Destination(
        os.fspath(destination), third, options.send.folder, trace, tell, procedure=options.procedure
    ) as other:
        sending = Sending(
            [source],
            other.connect,
            options.guest,
            options.send,
            third,
            third,
            observer,
            tell,
            trace or Trace(),
            options.procedure,
        )
        try:
            sent = sending.run()
        except MigrationEnded as e:
            if e.report is not None:
                e.report = _stayed(e.report)
            raise
        observer("destination")
        return _migrated(sent, other.result())


class _Destination:
    """``vhost-vdpa receive`` in a process of its own.

    It is started before the guest is: a guest with many queues leaves little of a small machine to others.
    """

    def __init__(
        self, path: str, seconds: float, folder: Path, trace: Trace | None, tell: Tell, procedure: str | None = None
    ) -> None:
        self._argv = [sys.executable, "-m", "pyvhostvdpa", "receive", path, "--seconds", str(seconds), "--json"]
        self._argv += ["--state", str(folder)]
        self._argv += ["--procedure", procedure] if procedure is not None else []
        self._trace, self._tell = trace, tell
        self._has_guest = False
        self._last_words = ""

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
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), name="destination-words")
        self._listener.start()
        return self

    def _start(self, fd: int) -> subprocess.Popen[str]:
        argv = [*self._argv, "--listen", f"fd:{fd}"]
        if self._trace is not None:
            argv += ["--trace", str(self._records), "--trace-format", "records"]
        # of a group of its own: Ctrl-C is for the source to act on, which tells it
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[fd],
            process_group=0,
            text=True,
        )

    def connect(self, cancel: Cancel) -> Channel:
        """Return the stream to it, which is the caller's then."""
        assert self._near is not None
        near, self._near = self._near, None
        return greet_started(near, cancel.fileno())

    def _listen(self, words: IO[str]) -> None:
        """Tell what it says: of its progress the source tells until the guest is given away."""
        for line in words:
            said, progress = _TIME.subn("", line.strip(), count=1)
            if self._has_guest or not progress:
                self._last_words = said
                self._tell(f"destination: {said}")

    def result(self) -> dict[str, Any]:
        """Wait until the guest has run there and return the report."""
        assert self._process.stdout is not None
        self._has_guest = True
        said, status = self._process.stdout.read(), self._process.wait()
        try:
            return dict(json.loads(said))
        except ValueError as e:
            raise MigrationFailed(
                f"the guest was given to the destination, which then ended with status {status}: {self._last_words}"
            ) from e

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._resources, self._process as process:
            try:
                if isinstance(value, KeyboardInterrupt) or self._near is not None:
                    process.terminate()
                process.wait(_END_SECONDS)
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
        with suppress(FileNotFoundError), open(self._records, encoding="utf-8") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(0)
                self._trace.events.extend(records.read(file))
                self._trace.events.sort(key=lambda event: event.t_end)


def _stayed(sent: SentReport) -> Report:
    """Return the report of a migration whose guest stayed on the source."""
    return Report(
        outcome=sent.outcome,
        sent=sent.sent,
        frames=sent.frames,
        bad_pages=0,
        parts=sent.parts,
        dt1_ms=sent.dt1_ms,
        dt2_ms=sent.dt2_ms,
        gap_switch_ms=sent.gap_switch_ms,
        gap_move_ms=0.0,
        phases=sent.phases,
        drops={"source": _only(sent.drops)},
        environment=_with_roles(sent.environment, {"source": sent.environment}),
        procedure={"source": _only(sent.procedure)},
    )


def _migrated(sent: SentReport, received: dict[str, Any]) -> Report:
    """Return the report of both sides together."""
    parts = {name: Part(part["received"], part["seconds"]) for name, part in received["parts"].items()}
    phases = {name: PhaseCost(**phase) for name, phase in received["phases"].items()}
    both = sent.phases | phases
    first = [name for name in both if name == "dest.premap"]
    return Report(
        outcome="migrated",
        sent=sent.sent,
        frames=FrameCounts(**received["frames"]),
        bad_pages=received["bad_pages"],
        parts=sent.parts | parts,
        dt1_ms=sent.dt1_ms,
        dt2_ms=sent.dt2_ms,
        gap_switch_ms=sent.gap_switch_ms,
        gap_move_ms=received["guest_gap_ms"]["move"],
        phases={name: both[name] for name in dict.fromkeys([*first, *both])},
        drops={"source": _only(sent.drops), "destination": _only(received["device_drops"])},
        environment=_with_roles(sent.environment, {"source": sent.environment, "destination": received["environment"]}),
        stopped=gap.stop_to_run([*sent.steps, *gap.from_numbers(received["stop_to_run_steps_ns"])]),
        procedure={"source": _only(sent.procedure), "destination": _only(received["procedure"])},
    )


def _only(by_device: dict[str, Any]) -> Any:
    return next(iter(by_device.values()), {})


def _with_roles(common: dict[str, Any], sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return an environment that has devices by what they were in the migration."""
    return common | {"devices": {role: _only(side["devices"]) for role, side in sides.items()}}
