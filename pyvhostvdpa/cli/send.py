# SPDX-License-Identifier: MIT
"""``vhost-vdpa send``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..base.errors import MigrationEnded
from ..guest.synthetic import KINDS
from ..host import mgmt
from ..migration.endpoint import Address, check_listening, check_security, connect
from ..migration.report import STAYED, SentReport, frames_when
from ..migration.saved import check_room
from ..migration.session import Receiving, Sending, check_devices
from ..trace import gap
from ..trace.recorder import Trace
from . import answer, tracing
from .options import DEVICE, refuse_unused
from .peer import (
    ADDRESS,
    NOTES,
    PART,
    SENDING,
    ProgressPrinter,
    add_options,
    add_sending_options,
    add_tls_options,
    drops_note,
    frames_table,
    gap_lines,
    guest_options,
    milliseconds,
    procedures_line,
    rounds_table,
    send_options,
    tls,
)
from .receive import show
from .table import table
from .units import seconds

EPILOG = f"""\
{NOTES}
examples:
  vhost-vdpa send vdpa0 --to unix:/run/there --memory 4G --write 20M --hash
  vhost-vdpa send vdpa0 --to tcp:host:4444 --tls-cert c.pem --tls-key k.pem --tls-ca ca.pem
  vhost-vdpa send vdpa0 --resume guest-0123456789ab-source.saved

exit status: 0 if the guest was sent; 1 if not, with the reason and where the guest is; 2 wrong usage; 130 if cancelled
"""
DESCRIPTION = (
    "Start a guest with traffic in passthrough on DEV, and migrate it to the other end of a stream. "
    "The devices are reset: run it on devices that are not in use. Ctrl-C cancels: the guest continues here."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("devices", metavar="DEV", nargs="+", help=f"{DEVICE}; one per NIC of the guest")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", metavar=ADDRESS, help="where 'vhost-vdpa receive' listens")
    where.add_argument("--resume", metavar="FILE", type=Path, help="start the guest saved in FILE here instead")
    add_sending_options(parser, downtime="300")
    parser.add_argument(
        "--seconds", type=seconds, default="5", help="traffic before, and after if it stays (default %(default)s)"
    )
    add_tls_options(parser)
    add_options(parser)
    tracing.add_options(parser)
    tracing.add_spans_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Send and print the report."""
    phases = SENDING if arguments.resume is None else SENDING | {"destination": "traffic in passthrough"}
    with tracing.writing(arguments) as trace, ProgressPrinter(phases) as progress:
        send = _send if arguments.resume is None else _resume
        return send(arguments, trace, progress)


_OF_A_NEW_GUEST = ("memory", "pairs", "frame_size", "write", "limit", "downtime", "hash", "shadow", "spans")
_OF_THE_STREAM = ("tls_cert", "tls_key", "tls_ca", "insecure_plain")


def _resume(arguments: argparse.Namespace, trace: Trace, progress: ProgressPrinter) -> int:
    refuse_unused(arguments, (*_OF_A_NEW_GUEST, *_OF_THE_STREAM), "with --resume: the guest comes from the file")
    receiving = Receiving(
        [mgmt.chardev_of(each) for each in arguments.devices],
        arguments.seconds,
        arguments.state,
        progress.phase,
        progress.tell,
        trace=trace,
        control_deadline=arguments.control_deadline,
        drain=arguments.drain,
        procedure=arguments.procedure,
        kinds=KINDS,
    )
    return show(receiving.start_saved(arguments.resume), arguments.json)


def _send(arguments: argparse.Namespace, trace: Trace, progress: ProgressPrinter) -> int:
    address, security = Address.parse(arguments.to), tls(arguments)
    check_security(address, security, arguments.insecure_plain)
    if security is not None:
        # bad files are reported now, before a guest runs
        security.context(server=False)
    paths = [mgmt.chardev_of(each) for each in arguments.devices]
    options = guest_options(arguments)
    check_devices(paths)
    check_room(arguments.state, options.memory)
    # a guest that ran for minutes in vain is not what was asked for
    check_listening(address)
    sending = Sending(
        paths=paths,
        connect=lambda cancel: connect(address, security, cancel.fileno()),
        guest_options=options,
        options=send_options(arguments),
        seconds=arguments.seconds,
        observer=progress.phase,
        tell=progress.tell,
        trace=trace,
        procedure=arguments.procedure,
        shadow=arguments.shadow,
    )
    try:
        report = sending.run()
    except MigrationEnded as e:
        if e.report is not None:
            _print(e.report, arguments, trace)
        raise
    _print(report, arguments, trace)
    return 0


def _print(report: SentReport, arguments: argparse.Namespace, trace: Trace) -> None:
    tracing.print_report(arguments, trace, report.to_dict(), lambda: _summary(report))


def _summary(report: SentReport) -> str:
    stopped = gap.join(report.steps)
    tables = [answer.sent(report, report.outcome == STAYED)]
    tables += [gap_lines(stopped, report.sent.last, PART)] if stopped is not None else []
    if report.sent.switched:
        tables.append(
            table(
                ["", "downtime ms"],
                [
                    ["DT1, switch to shadow virtqueues", milliseconds(report.downtimes.dt1)],
                    ["DT2, stop on the source", milliseconds(report.downtimes.dt2)],
                ],
            )
        )
    if report.sent.rounds:
        tables.append(rounds_table(report.sent.rounds))
    frames = frames_table(frames_when(report.outcome, report.frames))
    hashed = [f"memory hash {report.sent.hash}, the same on both sides"] if report.sent.hash else []
    return "\n\n".join(
        [
            *tables,
            frames,
            "\n".join(
                [
                    procedures_line(report.procedure),
                    drops_note(report.drops),
                    report.outcome,
                    *hashed,
                    *report.warnings,
                ]
            ),
        ]
    )
