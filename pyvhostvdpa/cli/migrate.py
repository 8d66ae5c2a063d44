# SPDX-License-Identifier: MIT
"""``vhost-vdpa migrate``."""

from __future__ import annotations

import argparse

from ..base.errors import MigrationEnded
from ..host import mgmt
from ..migration.local import MigrationOptions, migrate
from ..migration.report import STAYED, MigrationReport
from ..trace.recorder import Trace
from . import answer, tracing
from .options import DEVICE
from .peer import (
    NOTES,
    SENDING,
    ProgressPrinter,
    add_options,
    add_sending_options,
    drops_note,
    frames_table,
    gap_lines,
    guest_options,
    milliseconds,
    procedures_line,
    rounds_table,
    send_options,
    sound,
)
from .table import table
from .units import seconds

_PHASES = SENDING | {
    "start": "opening the source, allocating and mapping guest memory",
    "passthrough": "traffic in passthrough on the source",
}
EPILOG = f"""\
{NOTES}
examples:
  vhost-vdpa migrate vdpa0 vdpa1 --memory 16G --json > result.json
  vhost-vdpa migrate /dev/vhost-vdpa-0 /dev/vhost-vdpa-1 --pairs 4 --write 20M --limit 1G
  vhost-vdpa migrate vdpa0 vdpa1 --spans --trace calls.jsonl

exit status: 0 if the guest moved and no frame was lost; 1 if not, with the reason; 2 wrong usage; 130 if cancelled"""
DESCRIPTION = (
    "Start a guest in passthrough on SRC, switch it to shadow virtqueues, move it with its memory to "
    "a second process that has DST, with traffic all the time, and print what that cost: 'send' and 'receive' in "
    "one command. Both devices are reset: run it on devices that are not in use. Ctrl-C cancels: the guest "
    "continues on SRC."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("source", metavar="SRC", help=DEVICE)
    parser.add_argument("destination", metavar="DST", help="another one, with the same features")
    add_sending_options(parser, downtime="1000")
    parser.add_argument(
        "--seconds", type=seconds, default="20", help="seconds of traffic, a third in each part (default %(default)s)"
    )
    add_options(parser)
    tracing.add_options(parser)
    tracing.add_spans_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Migrate and print the report."""
    options = MigrationOptions(
        guest_options(arguments), send_options(arguments), arguments.seconds, arguments.procedure, arguments.shadow
    )
    with tracing.writing(arguments) as trace, ProgressPrinter(_PHASES) as progress:
        source, destination = mgmt.chardev_of(arguments.source), mgmt.chardev_of(arguments.destination)
        try:
            report = migrate(source, destination, options, progress.phase, trace, progress.tell)
        except MigrationEnded as e:
            if e.report is not None:
                _print(e.report, arguments, trace)
            raise
    _print(report, arguments, trace)
    return 0 if sound(report.frames, report.bad_pages) else 1


def _print(report: MigrationReport, arguments: argparse.Namespace, trace: Trace) -> None:
    tracing.print_report(arguments, trace, report.to_dict(), lambda: _summary(report))


def _summary(report: MigrationReport) -> str:
    tables = [answer.migration(report)]
    tables += [gap_lines(report.stopped, report.sent.last)] if report.stopped is not None else []
    if report.sent.switched:
        back = [] if report.outcome != STAYED else [["back to passthrough", "", milliseconds(report.gap_back_ms)]]
        rows = [
            [
                "DT1, switch to shadow virtqueues",
                milliseconds(report.downtimes.dt1),
                milliseconds(report.gap_switch_ms),
            ],
            ["DT2, stop on the source", milliseconds(report.downtimes.dt2), milliseconds(report.gap_move_ms)],
            *back,
        ]
        tables.append(table(["", "downtime ms", "guest's longest gap ms"], rows))
    tables.append(frames_table(report.frames.to_dict()))
    rows = [[name, f"{part.received:,}", f"{part.rate:,.0f}"] for name, part in report.parts.items()]
    tables.append(table(["traffic", "received", "frames/s"], rows))
    if report.sent.rounds:
        tables.append(rounds_table(report.sent.rounds))
    if report.phases:
        rows = [[name, f"{c.ms:.2f}", str(c.ioctls), str(c.iotlb_messages)] for name, c in report.phases.items()]
        tables.append(table(["phase", "ms", "ioctls", "IOTLB messages"], rows))
    return "\n\n".join([*tables, "\n".join(_notes(report))])


def _notes(report: MigrationReport) -> list[str]:
    place = report.environment
    where = f"{report.outcome}; kernel {place['kernel']}, {place['cpus']} CPUs, {place['accelerator']}"
    hashed = [f"memory hash {report.sent.hash}, the same on both sides"] if report.sent.hash else []
    wrong = [f"pages that the guest's CPU found wrong: {report.bad_pages}"] if report.bad_pages else []
    return [
        procedures_line(report.procedure),
        drops_note(report.drops),
        *hashed,
        *wrong,
        *report.warnings,
        where,
        *_after(report),
    ]


def _after(report: MigrationReport) -> list[str]:
    clock = answer.clock(answer.is_virtual(report.environment))
    more = "vhost-vdpa help migration (what keeps a guest on the source)"
    if report.stopped is not None:
        more = "vhost-vdpa help downtime (what the times mean); with --spans: every call of DT1 and DT2"
    return [*([clock] if clock else []), f"next: {more}"]
