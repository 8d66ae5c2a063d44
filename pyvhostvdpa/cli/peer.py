# SPDX-License-Identifier: MIT
"""What ``migrate``, ``send`` and ``receive`` have in common: the guest, the way to the other side, progress."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.closing import Closing
from ..base.errors import MigrationRefused
from ..device import shadowing
from ..device.procedure.best import NAMES
from ..guest.nic import MAX_FRAME, MIN_FRAME
from ..guest.protocol import FrameCounts
from ..guest.synthetic import GuestOptions
from ..memory.guest import GUEST_PAGE
from ..migration.endpoint import Tls
from ..migration.later import Later
from ..migration.pages import RoundStatistics
from ..migration.saved import DEFAULT_FOLDER
from ..migration.sent import LastRound
from ..migration.source import SendOptions
from ..net.control_queue import DEFAULT_DEADLINE
from ..trace.gap import StopToRun
from .failure import report
from .options import add_json, add_seconds, add_shadow
from .table import table
from .units import SIZES, count, guest_memory, size, stream_rate

ADDRESS = "unix:PATH|tcp:HOST:PORT"
NOTES = f"{SIZES}; --seconds in seconds, --downtime in milliseconds\n"
"""On units, for help."""

SENDING = {
    "start": "starting the guest: allocating and mapping its memory",
    "passthrough": "traffic in passthrough",
    "connect": "connecting to the destination",
    "handshake": "sending the destination what the guest needs",
    "switch": "switching to shadow virtqueues",
    "shadow": "traffic through shadow virtqueues",
    "memory": "moving memory while the guest runs",
    "stop": "stopping the guest",
    "state": "moving what is left, and the devices' state",
    "ready": "waiting until the destination has loaded it",
    "go": "giving the guest away",
    "running": "waiting until it runs there",
    "back to source": "bringing the guest back to passthrough here",
    "source again": "traffic in passthrough on the source again",
    "destination": "traffic in passthrough on the destination",
    "drain": "waiting for the last frames",
}
"""The phases of sending a guest, in words."""


def add_sending_options(parser: argparse.ArgumentParser, downtime: str) -> None:
    """Add the options of a guest that is started here, and of how it is sent; ``downtime`` as by default, in ms."""
    parser.add_argument(
        "--memory", metavar="SIZE", type=guest_memory, default="1G", help="guest memory (default %(default)s)"
    )
    parser.add_argument(
        "--pairs", metavar="N", type=count, default="1", help="queue pairs of each NIC (default %(default)s)"
    )
    parser.add_argument(
        "--frame-size",
        metavar="BYTES",
        type=count,
        default="256",
        help=f"Ethernet frame, {MIN_FRAME} to {MAX_FRAME} bytes (default 256)",
    )
    parser.add_argument(
        "--write",
        metavar="SIZE",
        type=size,
        default=None,
        help="memory that the guest's CPU writes per second (default none)",
    )
    parser.add_argument(
        "--limit",
        metavar="SIZE",
        type=stream_rate,
        default=None,
        help="bytes per second on the stream while the guest runs (default as fast as it goes)",
    )
    parser.add_argument(
        "--downtime",
        metavar="MS",
        type=count,
        default=downtime,
        help="milliseconds that sending the remaining memory may take while the guest is stopped (default %(default)s)",
    )
    add_shadow(parser, shadowing.NAMES)
    parser.add_argument(
        "--hash", action="store_true", help="compare a hash of all memory on both sides while the guest is paused"
    )


def guest_options(arguments: argparse.Namespace) -> GuestOptions:
    """Return the guest to start; MigrationRefused for one that cannot be."""
    if not MIN_FRAME <= arguments.frame_size <= MAX_FRAME:
        raise MigrationRefused(f"frames of {arguments.frame_size} bytes: from {MIN_FRAME} to {MAX_FRAME} are possible")
    return GuestOptions(
        memory=arguments.memory,
        pairs=arguments.pairs,
        frame_size=arguments.frame_size,
        write_rate=arguments.write or 0,
    )


def send_options(arguments: argparse.Namespace) -> SendOptions:
    """Return how to send it."""
    return SendOptions(
        limit=arguments.limit,
        downtime=arguments.downtime / 1000,
        hashed=arguments.hash,
        folder=arguments.state,
        control_deadline=arguments.control_deadline,
        drain=arguments.drain,
    )


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a stream between hosts."""
    group = parser.add_argument_group("between hosts: TLS 1.3 with a certificate on both sides (PEM files)")
    group.add_argument("--tls-cert", metavar="FILE", help="this side's certificate")
    group.add_argument("--tls-key", metavar="FILE", help="its key")
    group.add_argument("--tls-ca", metavar="FILE", help="the authority that the other side's certificate must be of")
    group.add_argument(
        "--insecure-plain", action="store_true", help="TCP without TLS: anyone on the way can read the guest's memory"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of either side."""
    parser.add_argument(
        "--state",
        metavar="DIR",
        type=Path,
        default=DEFAULT_FOLDER,
        help="where a stopped guest is saved whose stream breaks at the hand-over (default %(default)s)",
    )
    parser.add_argument(
        "--procedure",
        choices=NAMES,
        default=None,
        help="start, switch and stop the devices in this way, for comparison (default: the best that each can do)",
    )
    answers = "how long a device may take to answer a command of its control queue"
    add_seconds(parser, "--control-deadline", DEFAULT_DEADLINE, answers)
    add_seconds(parser, "--drain", 10, "how long the last frames may take at the end")
    add_json(parser)


def procedures_line(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """Return by which procedure each device was driven, and why not by a better one, as a line."""
    each = [
        f"{device} {choice['name']}"
        + (f" ({choice['why_not_better']})" if choice["why_not_better"] else "")
        + (f", shadow {choice['shadow']}" if device != "destination" and choice.get("shadow") else "")
        for device, choice in chosen.items()
    ]
    return "procedure: " + ", ".join(each)


PART = "stop to run, this side's part"


def gap_lines(stopped: StopToRun, last: LastRound | None, title: str = "stop to run") -> str:
    """Return how long the guest was paused and what for, as lines; the last round of memory on its own."""
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in stopped.by_phase().items())
    lines = [f"{title}: {stopped.ms:.2f} ms ({parts})"]
    if last is not None:
        mib = last.pages * GUEST_PAGE / (1 << 20)
        lines.append(
            f"the last round of it: {last.pages:,} pages ({last.by_device:,} written by devices, "
            f"{last.by_cpu:,} by the guest's CPU), {mib:,.1f} MiB, {last.ms:.2f} ms"
        )
    return "\n".join(lines)


def tls(arguments: argparse.Namespace) -> Tls | None:
    """Return the TLS files, None without any; MigrationRefused for some of them only."""
    given = (arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    if not any(given):
        return None
    if not all(given):
        names = ("--tls-cert", "--tls-key", "--tls-ca")
        missing = " and ".join(name for name, value in zip(names, given, strict=True) if not value)
        raise MigrationRefused(
            f"TLS takes all of --tls-cert, --tls-key and --tls-ca; {missing} is missing",
            hint=f"add {missing}; vhost-vdpa help migration shows how to make the files with openssl",
        )
    if arguments.insecure_plain:
        raise MigrationRefused("either TLS or --insecure-plain", hint="leave out --insecure-plain")
    return Tls(*given)


class ProgressPrinter(Closing):
    """Phases and words, with the time since the start, on standard error, a moment later; all of it once closed."""

    def __init__(self, phases: dict[str, str]) -> None:
        self._later = Later()
        self._start = time.monotonic()
        self._phases = phases

    def phase(self, name: str) -> None:
        """Print that a phase begins."""
        self.tell(self._phases.get(name, name))

    def tell(self, text: str) -> None:
        """Print a progress line."""
        now = time.monotonic()
        self._later(lambda: report(f"[{now - self._start:6.2f} s] {text}"))

    def close(self) -> None:
        """Print what waits. Idempotent."""
        self._later.close()


def frames_table(frames: Mapping[str, int | None]) -> str:
    """Return the counts of frames as a table."""
    cells = ("unknown" if value is None else f"{value:,}" for value in frames.values())
    return table(["frames", *frames], [["", *cells]])


def milliseconds(ms: float | None) -> str:
    """Return a time for a table."""
    return "unknown" if ms is None else f"{ms:.2f}"


def drops_note(drops: Mapping[str, Mapping[str, int] | None]) -> str:
    """Return the devices' own counters of lost frames, by device or its role, as a line."""
    found = []
    for which, counters in drops.items():
        if counters is None:
            found.append(f"{which} unknown")
        else:
            found += [f"{which} {name} {value}" for name, value in counters.items() if value]
    return "device drop counters: " + (", ".join(found) or ("all 0" if any(drops.values()) else "none offered"))


def rounds_table(rounds: Sequence[RoundStatistics]) -> str:
    """Return what moving memory took as a table."""
    return table(
        ["round", "pages", "of zeros", "MiB on the stream", "seconds"],
        [
            [str(n), f"{r.pages:,}", f"{r.zero_pages:,}", f"{r.bytes / (1 << 20):,.1f}", f"{r.seconds:.2f}"]
            for n, r in enumerate(rounds, 1)
        ],
    )


def sound(frames: FrameCounts, bad_pages: int | None = 0) -> bool:
    """Whether nothing was lost, duplicated or corrupted."""
    return not (frames.lost or frames.duplicated or frames.corrupted or bad_pages)
