"""The command line of `tools/lab`: parse, call, map failures to exit statuses."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from labkit import devices
from labkit.errors import EXIT_INTERRUPTED, LabError
from labkit.session import Request, Session

EPILOG = """exit status of run: that of COMMAND; 124 when --timeout is over, 125 when the lab itself fails (set-up, boot,
a kernel that panics), 130 on Ctrl-C. All downloads and builds are kept in $PYVHOSTVDPA_CACHE (default
/var/cache/pyvhostvdpa)."""


def _vm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel", default="6.12", metavar="X", help="Debian kernel, by the beginning of its release; or latest"
    )
    parser.add_argument(
        "--devices",
        action="append",
        default=[],
        metavar="KIND:N[,option=value…]",
        help=f"devices to make; may be repeated (default {devices.DEFAULT}; none for none; "
        f"kinds: {', '.join(devices.KINDS)})",
    )
    parser.add_argument("--cpus", type=int, default=2, metavar="N")
    parser.add_argument("--memory", default="4G", metavar="SIZE")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="auto uses KVM once proved")
    parser.add_argument("--icount", action="store_true", help="virtual time: the clock counts instructions; one CPU")
    parser.add_argument("--timeout", type=float, metavar="S", help="stop the VM when COMMAND runs longer")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable for COMMAND; may be repeated"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser for all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="tools/lab", description="Run commands in a VM with a stock Debian kernel and real vDPA devices.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = commands.add_parser("run", help="run a command in a VM", epilog=EPILOG)
    _vm_options(run)
    run.add_argument("command", nargs="*", metavar="-- COMMAND…")
    shell = commands.add_parser("shell", help="an interactive shell in a VM")
    _vm_options(shell)
    setup = commands.add_parser("setup", help="make all that a run needs, and no run")
    setup.add_argument("--kernel", default="6.12", metavar="X")
    setup.add_argument("--refresh", action="store_true", help="look for a newer kernel of the same line")
    return parser


def request(options: argparse.Namespace, command: Sequence[str]) -> Request:
    """Return what the options ask of a VM."""
    return Request(
        command=command,
        kernel=options.kernel,
        devices=options.devices,
        cpus=options.cpus,
        memory=options.memory,
        accel=options.accel,
        icount=options.icount,
        timeout=options.timeout,
        environment=parse_environment(options.env),
    )


def parse_environment(words: Sequence[str]) -> dict[str, str]:
    """Read the values of --env; a name alone takes this process's value."""
    result = {}
    for word in words:
        name, given, value = word.partition("=")
        if given:
            result[name] = value
        elif name in os.environ:
            result[name] = os.environ[name]
    return result


def _run(options: argparse.Namespace) -> int:
    if not options.command:
        raise LabError("run: no command given", "", "tools/lab run -- vdpa dev show")
    return Session().run(request(options, options.command))


def _shell(options: argparse.Namespace) -> int:
    return Session().shell(request(options, ()))


def _setup(options: argparse.Namespace) -> int:
    Session().set_up(options.kernel, "setup", options.refresh)
    return 0


ACTIONS = {"run": _run, "shell": _shell, "setup": _setup}


def _terminate(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str]) -> int:
    """Run one sub-command and return the exit status."""
    options = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        return ACTIONS[options.action](options)
    except LabError as error:
        print(error.render(), file=sys.stderr, flush=True)
        return error.status
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
