# SPDX-License-Identifier: MIT
"""``vhost-vdpa receive``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..guest.synthetic import KINDS
from ..host import mgmt
from ..migration.endpoint import Address, Inherited, Listener, check_security
from ..migration.report import ReceivedReport
from ..migration.session import Receiving
from ..trace.gap import join
from ..trace.recorder import Trace
from . import answer, tracing
from .options import DEVICE, refuse_unused
from .peer import (
    ADDRESS,
    PART,
    ProgressPrinter,
    add_options,
    add_tls_options,
    drops_note,
    frames_table,
    gap_lines,
    milliseconds,
    procedures_line,
    sound,
    tls,
)
from .units import seconds

_PHASES = {
    "handshake": "a source has connected",
    "map": "allocating and mapping guest memory",
    "memory": "receiving memory",
    "load": "loading the guest",
    "ready": "ready, waiting for the source to give it away",
    "start": "starting the devices",
    "running": "the guest runs here",
    "destination": "traffic in passthrough",
    "drain": "waiting for the last frames",
}
EPILOG = """\
--seconds in seconds

examples:
  vhost-vdpa receive vdpa1 --listen unix:/run/there
  vhost-vdpa receive vdpa1 --listen tcp:0.0.0.0:4444 --tls-cert c.pem --tls-key k.pem --tls-ca ca.pem
  vhost-vdpa receive vdpa1 --take guest-0123456789ab-destination.saved

exit status: 0 if the guest ran here and no frame was lost; 1 if not, with the reason and where the guest is; 2 wrong
usage; 130 if cancelled"""
DESCRIPTION = (
    "Wait for a source, receive its guest with its memory on DEV, let it run with its traffic, and "
    "account for every frame since it was first started. The devices are reset: run it on devices that are "
    "not in use."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("devices", metavar="DEV", nargs="+", help=f"{DEVICE}; in the source's order")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--listen",
        metavar=ADDRESS,
        help="where to wait for 'vhost-vdpa send'; fd:N is a connected Unix socket that this process inherits",
    )
    where.add_argument("--take", metavar="FILE", type=Path, help="start the guest saved in FILE instead")
    parser.add_argument("--seconds", type=seconds, default="5", help="traffic once it runs (default %(default)s)")
    add_tls_options(parser)
    add_options(parser)
    tracing.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Receive and print the report."""
    with tracing.writing(arguments) as trace, ProgressPrinter(_PHASES) as progress:
        if arguments.take is not None:
            refuse_unused(arguments, _OF_THE_STREAM, "with --take: there is no stream")
            return show(_receiving(arguments, trace, progress).start_saved(arguments.take), arguments.json)
        with _listener(arguments) as listener:
            report = _receiving(arguments, trace, progress).receive(listener)
        return show(report, arguments.json)


_OF_THE_STREAM = ("tls_cert", "tls_key", "tls_ca", "insecure_plain")


def _receiving(arguments: argparse.Namespace, trace: Trace, progress: ProgressPrinter) -> Receiving:
    paths = [mgmt.chardev_of(each) for each in arguments.devices]
    return Receiving(
        paths,
        arguments.seconds,
        arguments.state,
        progress.phase,
        progress.tell,
        trace,
        arguments.control_deadline,
        arguments.drain,
        arguments.procedure,
        kinds=KINDS,
    )


def _listener(arguments: argparse.Namespace) -> Listener | Inherited:
    inherited = Inherited.parse(arguments.listen)
    if inherited is not None:
        refuse_unused(arguments, _OF_THE_STREAM, "on a socket that this process inherits")
        return Inherited(inherited)
    address, security = Address.parse(arguments.listen), tls(arguments)
    check_security(address, security, arguments.insecure_plain)
    return Listener(address, security)


def show(report: ReceivedReport, as_json: bool) -> int:
    """Print what a guest did here; the exit status."""
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(f"{answer.received(report)}\n")
        gap = f"the guest's longest gap at the move, ms: {milliseconds(report.gap_move_ms)}"
        pages = f"pages that its CPU found wrong: {report.bad_pages}"
        hashed = f"\nmemory hash {report.hash}, the same on both sides" if report.hash else ""
        rate = report.parts["destination"].rate
        if (stopped := join(report.steps)) is not None:
            print(gap_lines(stopped, None, PART), end="\n\n")
        lines = [
            gap,
            pages,
            f"{rate:,.0f} frames/s here",
            procedures_line(report.procedure),
            drops_note(report.drops) + hashed,
            *report.warnings,
        ]
        print(f"{frames_table(report.frames.to_dict())}\n\n" + "\n".join(lines))
    return 0 if sound(report.frames, report.bad_pages) else 1
