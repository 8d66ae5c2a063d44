# SPDX-License-Identifier: MIT
"""``vhost-vdpa migrate``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from ..errors import MigrationFailed
from ..migration import spans
from ..migration.local import Options, migrate
from ..migration.report import Report
from ..net.nic import MAX_FRAME, MIN_FRAME
from ..trace import Trace
from . import tracing
from .table import table
from .units import count, seconds, size

_PARTS = {
    "prepare": "opening both devices, allocating and mapping guest memory",
    "passthrough": "traffic in passthrough on the source",
    "switch": "switching the source to shadow virtqueues",
    "shadow": "traffic through shadow virtqueues",
    "move": "stopping the source",
    "start destination": "starting the destination",
    "destination": "traffic in passthrough on the destination",
    "back to source": "bringing the guest back to the source",
    "drain": "waiting for the last frames",
}


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "migrate",
        help="migrate a guest with traffic from one device to another",
        description="Start a guest in passthrough on SRC, switch it to shadow virtqueues, move it to DST, with "
        "traffic all the time, and tell what that cost. Both devices are reset: run it on devices that nobody uses.",
    )
    parser.add_argument("source", metavar="SRC", help="vhost-vdpa chardev, such as /dev/vhost-vdpa-0")
    parser.add_argument("destination", metavar="DST", help="another one, with the same features")
    parser.add_argument("--memory", type=size, default="1G", help="guest memory (default %(default)s)")
    parser.add_argument(
        "--seconds", type=seconds, default="20", help="seconds of traffic, a third in each part (default %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=count, default="1", help="queue pairs that the guest uses (default %(default)s)"
    )
    parser.add_argument(
        "--frame-size",
        type=count,
        default="256",
        help=f"Ethernet frame, {MIN_FRAME} to {MAX_FRAME} (default %(default)s)",
    )
    tracing.add_options(parser)
    parser.add_argument("--json", "-j", action="store_true", help="print JSON, and nothing else on standard output")
    parser.set_defaults(run=run)


class _Progress:
    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, part: str) -> None:
        elapsed = time.monotonic() - self._start
        print(f"[{elapsed:6.2f} s] {_PARTS.get(part, part)}", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Migrate and print the report."""
    options = Options(
        memory=arguments.memory, pairs=arguments.pairs, seconds=arguments.seconds, frame_size=arguments.frame_size
    )
    with tracing.writing(arguments) as trace:
        try:
            report = migrate(arguments.source, arguments.destination, options, _Progress(), trace)
        except MigrationFailed as e:
            if e.report is not None:
                _print(e.report, arguments, trace)
            raise
    _print(report, arguments, trace)
    return 0 if _sound(report) else 1


def _sound(report: Report) -> bool:
    frames = report.frames
    return not (frames.lost or frames.duplicated or frames.corrupted)


def _print(report: Report, arguments: argparse.Namespace, trace: Trace) -> None:
    if arguments.json:
        more = {"spans": spans.to_dict(trace)} if arguments.spans else {}
        print(json.dumps(report.to_dict() | more, indent=2))
        return
    print(_summary(report))
    if arguments.spans:
        print(f"\n{tracing.render_spans(trace)}")


def _summary(report: Report) -> str:
    frames = report.frames
    downtime = table(
        ["", "downtime ms", "guest's longest gap ms"],
        [
            ["DT1, switch to shadow virtqueues", f"{max(report.dt1_ms.values()):.2f}", f"{report.gap_switch_ms:.2f}"],
            ["DT2, stop on the source", f"{sum(report.dt2_ms.values()):.2f}", f"{report.gap_move_ms:.2f}"],
        ],
    )
    counts = table(
        ["frames", *frames.to_dict()],
        [["", *(f"{value:,}" for value in frames.to_dict().values())]],
    )
    parts = table(
        ["traffic", "received", "frames/s"],
        [[name, f"{part.received:,}", f"{part.rate:,.0f}"] for name, part in report.parts.items()],
    )
    phases = table(
        ["phase", "ms", "ioctls", "IOTLB messages"],
        [[name, f"{c.ms:.2f}", str(c.ioctls), str(c.iotlb_messages)] for name, c in report.phases.items()],
    )
    dropped = [f"{role} {name} {value}" for role, each in report.drops.items() for name, value in each.items() if value]
    told = "device drop counters: " + (", ".join(dropped) or "all 0" if any(report.drops.values()) else "none offered")
    place = report.environment
    where = f"{report.outcome}; kernel {place['kernel']}, {place['cpus']} CPUs, {place['accelerator']}"
    return "\n\n".join([downtime, counts, parts, phases, f"{told}\n{where}"])
