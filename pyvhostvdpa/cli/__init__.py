# SPDX-License-Identifier: MIT
"""``vhost-vdpa``: one module per sub-command, each parses, calls and prints.

Exit status: 0 done, 1 an error that was explained, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from ..base.errors import MigrationCancelled, VhostVdpaError
from . import bench as bench_command
from . import dev as dev_command
from . import doctor as doctor_command
from . import help as help_command
from . import ladder as ladder_command
from . import list as list_command
from . import migrate as migrate_command
from . import probe as probe_command
from . import receive as receive_command
from . import send as send_command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vhost-vdpa",
        description="Look at, drive and migrate vDPA devices behind /dev/vhost-vdpa-N.",
        epilog="Opening a device resets it. Every table has --json. New here: vhost-vdpa help start",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    list_command.register(commands)
    doctor_command.register(commands)
    dev_command.register(commands)
    probe_command.register(commands)
    migrate_command.register(commands)
    send_command.register(commands)
    receive_command.register(commands)
    ladder_command.register(commands)
    bench_command.register(commands)
    help_command.register(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="vhost-vdpa: %(message)s")
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except VhostVdpaError as e:
        print(f"vhost-vdpa: {e}", file=sys.stderr)
        if e.hint:
            print(f"  next: {e.hint}", file=sys.stderr)
        return 130 if isinstance(e, MigrationCancelled) else 1
    except KeyboardInterrupt:
        # everything was closed on the way here; a second Ctrl-C must not
        # print a traceback over the result
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("vhost-vdpa: interrupted; the devices were reset and closed", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
