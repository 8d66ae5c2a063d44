# SPDX-License-Identifier: MIT
"""``vhost-vdpa send``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import MigrationEnded, MigrationRefused
from ..migration.endpoint import Address, check_security, connect
from ..migration.guest import GuestOptions
from ..migration.session import Receiving, Sending, SentReport
from ..migration.source import SendOptions
from ..net.nic import MAX_FRAME, MIN_FRAME
from .peer import ADDRESS, Progress, add_options, frames_table, tls
from .receive import show
from .table import table
from .units import count, seconds, size

_PHASES = {
    "start": "starting the guest: allocating and mapping its memory",
    "connect": "connecting to the destination",
    "handshake": "telling the destination what the guest needs",
    "switch": "switching to shadow virtqueues",
    "memory": "moving memory while the guest runs",
    "stop": "stopping the guest",
    "state": "moving what is left, and the devices' state",
    "ready": "waiting until the destination has loaded it",
    "go": "giving the guest away",
    "running": "waiting until it runs there",
    "back to source": "bringing the guest back to passthrough here",
    "source again": "traffic in passthrough on the source again",
    "destination": "traffic in passthrough",
    "drain": "waiting for the last frames",
}


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "send",
        help="migrate a guest to 'vhost-vdpa receive', with its memory",
        description="Start a guest with traffic in passthrough on DEV, and migrate it to the other end of a stream. "
        "The devices are reset: run it on devices that nobody uses. Ctrl-C cancels: the guest goes on here.",
    )
    parser.add_argument("devices", metavar="DEV", nargs="+", help="vhost-vdpa chardev, one a NIC of the guest")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", metavar=ADDRESS, help="where 'vhost-vdpa receive' listens")
    where.add_argument("--resume", metavar="FILE", type=Path, help="start the guest saved in FILE here instead")
    parser.add_argument("--memory", type=size, default="1G", help="guest memory (default %(default)s)")
    parser.add_argument("--pairs", type=count, default="1", help="queue pairs of each NIC (default %(default)s)")
    parser.add_argument(
        "--seconds", type=seconds, default="5", help="traffic before, and after if it stays (default %(default)s)"
    )
    parser.add_argument(
        "--frame-size", type=count, default="256", help=f"Ethernet frame, {MIN_FRAME} to {MAX_FRAME} (default 256)"
    )
    parser.add_argument(
        "--write", metavar="BYTES/s", type=size, default=None, help="memory that the guest's CPU writes (default none)"
    )
    parser.add_argument("--limit", metavar="BYTES/s", type=size, default=None, help="of the stream while it runs")
    parser.add_argument(
        "--downtime", metavar="MS", type=count, default="300", help="that memory may take at the end (default 300)"
    )
    parser.add_argument(
        "--hash", action="store_true", help="compare a hash of all memory on both sides while the guest stands still"
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Send and print the report."""
    progress = Progress(_PHASES)
    if arguments.resume is not None:
        receiving = Receiving(arguments.devices, arguments.seconds, arguments.state, progress.phase, progress.tell)
        return show(receiving.take(arguments.resume), arguments.json)
    address, security = Address.parse(arguments.to), tls(arguments)
    check_security(address, security, arguments.insecure_plain)
    if arguments.frame_size > MAX_FRAME or arguments.frame_size < MIN_FRAME:
        raise MigrationRefused(f"frames of {arguments.frame_size} bytes: from {MIN_FRAME} to {MAX_FRAME} are possible")
    sending = Sending(
        paths=arguments.devices,
        connect=lambda cancel: connect(address, security, cancel.fileno()),
        guest_options=GuestOptions(
            memory=arguments.memory,
            pairs=arguments.pairs,
            frame_size=arguments.frame_size,
            write_rate=arguments.write or 0,
        ),
        options=SendOptions(
            limit=arguments.limit, downtime=arguments.downtime / 1000, hashed=arguments.hash, folder=arguments.state
        ),
        seconds=arguments.seconds,
        observer=progress.phase,
        tell=progress.tell,
    )
    try:
        report = sending.run()
    except MigrationEnded as e:
        if e.report is not None:
            _print(e.report, arguments.json)
        raise
    _print(report, arguments.json)
    return 0


def _print(report: SentReport, as_json: bool) -> None:
    print(json.dumps(report.to_dict(), indent=2) if as_json else _summary(report))


def _summary(report: SentReport) -> str:
    downtime = table(
        ["", "downtime ms"],
        [
            ["DT1, switch to shadow virtqueues", f"{max(report.dt1_ms.values(), default=0):.2f}"],
            ["DT2, stop on the source", f"{sum(report.dt2_ms.values()):.2f}"],
        ],
    )
    rounds = table(
        ["round", "pages", "of zeros", "MiB on the stream", "seconds"],
        [
            [str(n), f"{r.pages:,}", f"{r.zero_pages:,}", f"{r.bytes / (1 << 20):,.1f}", f"{r.seconds:.2f}"]
            for n, r in enumerate(report.sent.rounds, 1)
        ],
    )
    hashed = f"\nmemory hash {report.sent.hash}, the same on both sides" if report.sent.hash else ""
    return "\n\n".join([downtime, rounds, frames_table(report.frames), f"{report.outcome}{hashed}"])
