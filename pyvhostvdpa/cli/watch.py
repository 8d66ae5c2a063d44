# SPDX-License-Identifier: MIT
"""``vhost-vdpa watch``."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..base.errors import VhostVdpaError
from ..bench.ladder.savings import with_savings
from ..bench.page import recording as recording_page
from ..host import mgmt
from ..trace import clocks, live, spans
from ..trace.narrate import Narrator
from ..trace.recorder import Event
from ..trace.sessions import Followers
from ..trace.summary import Summary, summarize
from ..trace.surroundings import Facts
from . import tracing
from .failure import PROGRAM
from .failure import report as tell
from .options import DEVICE, add_json
from .recording import render
from .units import count, seconds

EPILOG = """\
It issues no call on a device and changes nothing in a process: the kernel's own trace probes on the vhost-vdpa driver
record each call, in a tracing instance of their own, which is removed at the end. It needs root.

examples:
  vhost-vdpa watch                              every device, until Ctrl-C
  vhost-vdpa watch --trace qemu.jsonl -- ./migrate.sh
  vhost-vdpa watch --device vdpa0 vdpa1 --for 60 --json > qemu.json

'vhost-vdpa report' prints a recording again or joins those of two hosts, 'vhost-vdpa ladder --with' shows it beside the
ladder's rows, and 'vhost-vdpa help watch' has a real example: where QEMU's 27 seconds go.

exit status: 0; with a command, its own; 1 if recording is not possible here, with the reason; 2 wrong usage"""


_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DESCRIPTION = (
    "Record every ioctl and IOTLB message that any process makes on vhost-vdpa devices, print what "
    "happens while it happens, and at the end what the downtimes are made of: until Ctrl-C, the end of COMMAND, or "
    "--for SECONDS."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--device", metavar="DEV", nargs="+", default=[], help=f"only these devices ({DEVICE})")
    parser.add_argument("--pid", metavar="PID", nargs="+", type=count, default=[], help="only calls of these processes")
    parser.add_argument("--for", dest="limit", metavar="SECONDS", type=seconds, help="end after so long")
    tracing.add_options(parser, recording=True)
    tracing.add_spans_option(parser)
    parser.add_argument("--report", metavar="DIR", type=Path, help="write a page with charts, and the trace, there")
    add_json(parser, "print JSON, and nothing else on standard output: COMMAND's goes to standard error")
    parser.add_argument("argv", metavar="-- COMMAND", nargs="*", help="run this, and end with it")


class _Ending:
    """Whether the recording is to end: a signal, the time, or the command's end."""

    def __init__(self) -> None:
        self._until: float | None = None
        self.signalled = False
        self.command: subprocess.Popen[bytes] | None = None

    def begin(self, limit: float | None) -> None:
        """Count the time from now on."""
        self._until = None if limit is None else time.monotonic() + limit

    def __call__(self) -> bool:
        """Look."""
        if self.command is not None and self.command.poll() is not None:
            return True
        # a signal goes to the command as well: what it does to end is still of interest
        over = self._until is not None and time.monotonic() >= self._until
        return over or (self.signalled and self.command is None)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and a terminal that goes away for the end: probes must not stay behind."""

        def note(number: int, frame: object) -> None:
            if self.signalled and self.command is not None:
                # the second time: do not wait for the command
                self.command = None
            elif self.command is not None and number != signal.SIGINT:
                # Ctrl-C is sent to both by the terminal
                with contextlib.suppress(OSError):
                    self.command.send_signal(number)
            self.signalled = True

        # behind nohup(1) a terminal may go away
        taken = [each for each in _ENDS if signal.getsignal(each) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(arguments: argparse.Namespace) -> int:
    """Record, and print the summary."""
    if arguments.report:
        recording_page.prepare(arguments.report)
    devices = [mgmt.chardev_of(each) for each in arguments.device]
    ending = _Ending()
    with tracing.writing(arguments, recording=True) as trace, contextlib.ExitStack() as signals:
        # from before anything is made until all of it is removed
        signals.enter_context(ending.on_signals())
        with live.Watch(devices, arguments.pid) as watch:
            ending.begin(arguments.limit)
            started = time.monotonic_ns()
            about = {"clock": clocks.now(), "probes": watch.forms, "started_ns": started}
            arguments.about = about
            _say_begin(arguments)
            try:
                status = _record(arguments, watch, ending, started)
            finally:
                # whatever goes wrong from here on, it is saved
                trace.events, trace.dropped = watch.trace.events, watch.trace.dropped
        signals.close()
        summary = with_savings(summarize(watch.trace, about))
        trace.events, trace.dropped = summary.trace.events, summary.trace.dropped
        _print(arguments, summary)
    if arguments.report:
        page = recording_page.write(summary, arguments.report)
        tell(f"{PROGRAM}: the report is in {page}")
    return status


def _say_begin(arguments: argparse.Namespace) -> None:
    until = "the command's end" if arguments.argv else f"{arguments.limit:g} s" if arguments.limit else "Ctrl-C"
    holders = [f"{path} (pid {pid})" for path, pid in live.holders()]
    open_now = f"; open already: {', '.join(holders)}" if holders else ""
    tell(f"{PROGRAM}: recording until {until}{open_now}")


def _record(arguments: argparse.Namespace, watch: live.Watch, ending: _Ending, started: int) -> int:
    narrator, facts, followers = Narrator(), Facts(), Followers()

    def show(lines: Iterable[tuple[int, str]]) -> None:
        for t, words in lines:
            tell(f"[{(t - started) / 1e9:9.3f} s] {words}")

    def see(event: Event) -> None:
        follower, episode = followers.feed(event)
        show(narrator.lines(event, follower, episode))
        for note in facts.notes(event, follower, episode):
            watch.trace.append(note)

    status = 0
    if arguments.argv and not ending.signalled:
        ending.command = _start(arguments)
    command = ending.command
    # behind the start of the command, which would inherit it
    with live.standing_back():
        live.follow(watch, ending, see, lambda now: show(narrator.idle(now, watch.busy)))
    show(narrator.idle())
    if watch.reloaded:
        tell(f"{PROGRAM}: vhost_vdpa was loaded again meanwhile: calls since then are not in this recording")
    for thread, device, name in watch.unfinished:
        tell(f"{PROGRAM}: {device}: {name} by thread {thread} had not ended")
    if command is not None:
        code = command.poll()
        if code is None:
            tell(f"{PROGRAM}: {arguments.argv[0]} (pid {command.pid}) is still running")
        else:
            status = code if code >= 0 else 128 - code
    return status


def _start(arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(arguments.argv, stdout=sys.stderr.fileno() if arguments.json else None)
    except OSError as e:
        raise VhostVdpaError(
            f"{arguments.argv[0]} cannot be run: {e.strerror}", hint="name a program and its arguments behind --"
        ) from e


def _print(arguments: argparse.Namespace, summary: Summary) -> None:
    if arguments.json:
        more = {"spans": spans.to_dict(summary.trace)} if arguments.spans else {}
        print(json.dumps(summary.to_dict() | more, indent=2))
        return
    print(render(summary))
    if arguments.spans:
        print(f"\n{tracing.render_spans(summary.trace)}")
