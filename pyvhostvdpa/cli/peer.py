# SPDX-License-Identifier: MIT
"""What ``send`` and ``receive`` have in common: the way to the other side, progress."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..errors import MigrationRefused
from ..migration.endpoint import Tls
from ..migration.saved import DEFAULT_FOLDER
from ..net.nic import FrameCounts
from .table import table

ADDRESS = "unix:PATH|tcp:HOST:PORT"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of either side."""
    group = parser.add_argument_group("between hosts: TLS 1.3 with a certificate on both sides (PEM files)")
    group.add_argument("--tls-cert", metavar="FILE", help="this side's certificate")
    group.add_argument("--tls-key", metavar="FILE", help="its key")
    group.add_argument("--tls-ca", metavar="FILE", help="the authority that the other side's certificate must be of")
    group.add_argument(
        "--insecure-plain", action="store_true", help="TCP without TLS: whoever is on the way reads the guest's memory"
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        type=Path,
        default=DEFAULT_FOLDER,
        help="where a stopped guest is saved whose stream breaks at the hand-over (default %(default)s)",
    )
    parser.add_argument("--json", "-j", action="store_true", help="print JSON, and nothing else on standard output")


def tls(arguments: argparse.Namespace) -> Tls | None:
    """Return the TLS files, None without any; MigrationRefused for some of them only."""
    given = (arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    if not any(given):
        return None
    if not all(given):
        raise MigrationRefused("TLS takes all of --tls-cert, --tls-key and --tls-ca")
    if arguments.insecure_plain:
        raise MigrationRefused("either TLS or --insecure-plain")
    return Tls(*given)


class Progress:
    """Phases and words, with the time since the start, on standard error."""

    def __init__(self, phases: dict[str, str]) -> None:
        self._start = time.monotonic()
        self._phases = phases

    def phase(self, name: str) -> None:
        """Tell that a phase begins."""
        self.tell(self._phases.get(name, name))

    def tell(self, text: str) -> None:
        """Tell anything."""
        print(f"[{time.monotonic() - self._start:6.2f} s] {text}", file=sys.stderr, flush=True)


def frames_table(frames: FrameCounts) -> str:
    """Return the account of frames as a table."""
    return table(["frames", *frames.to_dict()], [["", *(f"{value:,}" for value in frames.to_dict().values())]])


def sound(frames: FrameCounts, bad_pages: int = 0) -> bool:
    """Whether nothing was lost, duplicated or corrupted."""
    return not (frames.lost or frames.duplicated or frames.corrupted or bad_pages)
