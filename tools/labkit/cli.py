"""The command line of `tools/lab`: parse, call, map failures to exit statuses."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType

from labkit import (
    arm64,
    cache,
    devices,
    ladder,
    machines,
    mutants,
    output,
    pair,
    plain,
    soak,
    status,
    testing,
    uml,
    uml_home,
    values,
)
from labkit.errors import EXIT_INTERRUPTED, EXIT_PIPE, LabError
from labkit.session import PROJECT, Request, Session

EPILOG = """exit status of run: that of COMMAND; 124 when --timeout is over, 125 when the lab itself fails (set-up,
boot, a kernel that panics), 130 on Ctrl-C. All downloads and builds are kept in $PYVHOSTVDPA_CACHE (default
/var/cache/pyvhostvdpa)."""


DEFAULT_CPUS = 2


def _machine_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--machine",
        choices=("vm", uml_home.MACHINE),
        default="vm",
        help="uml: User Mode Linux, a kernel that is a process of this machine; faster, with less in it (default vm)",
    )


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
    parser.add_argument("--cpus", type=int, metavar="N", help="default 2")
    parser.add_argument("--memory", default="4G", metavar="SIZE")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="auto uses KVM once proved")
    parser.add_argument("--icount", action="store_true", help="virtual time: the clock counts instructions; one CPU")
    parser.add_argument("--timeout", type=float, metavar="S", help="stop the VM when COMMAND runs longer")
    parser.add_argument("--vmm", action="store_true", help="with QEMU, a guest and UML in /opt/vmm (made once)")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable for COMMAND; may be repeated"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser for all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="tools/lab",
        description="Run commands in a VM with a stock Debian kernel and real vDPA devices; "
        "or, much faster, under the same kernel's source built as User Mode Linux (--machine uml).",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = commands.add_parser("run", help="run a command in a VM", epilog=EPILOG)
    _vm_options(run)
    _machine_option(run)
    run.add_argument("command", nargs="*", metavar="-- COMMAND…")
    shell = commands.add_parser("shell", help="an interactive shell in a VM")
    _vm_options(shell)
    setup = commands.add_parser("setup", help="make all that a run needs, and no run")
    setup.add_argument("--kernel", default="6.12", metavar="X")
    setup.add_argument("--vmm", action="store_true", help="also a newer QEMU, a guest and UML, in 8 to 25 minutes")
    setup.add_argument("--refresh", action="store_true", help="look for a newer kernel of the same line")
    status = commands.add_parser("status", help="what is cached, what is missing, which accelerator was proved")
    status.add_argument("--json", action="store_true")
    commands.add_parser("clean", help="remove the cache folder")
    demo = commands.add_parser("demo", help="a live migration between two vdpa_sim_net devices")
    demo.add_argument("--kernel", default="6.12", metavar="X")
    test = commands.add_parser(
        "test",
        help="checks and tests without a device, tests on the device in a VM, one report",
        usage="tools/lab test [--kernel X] [--machine uml] [--accel MODE] [--cpus N] [--memory SIZE] [--timeout S] "
        "[PYTEST ARGUMENT…]",
        epilog="Other arguments go to pytest; a path below tests/unit, tests/kernel or tests/icount selects the part; "
        "install: the README's commands on bare Debian 12 and 13.",
    )
    _vm_options(test)
    _machine_option(test)
    soak = commands.add_parser("soak", help="tests that are too long for every day; without a name: which there are")
    soak.add_argument("name", nargs="?", metavar="NAME")
    soak.add_argument(
        "--only", default="", metavar="TEXT[,TEXT…]", help="mutants: those with a TEXT in their name or file"
    )
    soak.add_argument(
        "--by-check", action="store_true", help="mutants: those that name rules of vhost-vdpa check, by these alone"
    )
    soak.add_argument("--all", action="store_true", help="arm64: all unit tests, not only what touches C")
    soak.add_argument("-k", default="", metavar="EXPRESSION", help="arm64: those tests that pytest's -k selects")
    soak.add_argument("--minutes", type=float, default=10.0, metavar="M")
    soak.add_argument(
        "--debug-kernel", action="store_true", help="User Mode Linux with KASAN and lock checking; vdpa_hwsim alone"
    )
    soak.add_argument(
        "--no-vm", action="store_true", help="on this machine's own kernel and processors: what needs no device"
    )
    _vm_options(soak)
    _machine_option(soak)
    rows = commands.add_parser(
        "ladder",
        help="the series' table, row by row, on vdpa_hwsim in virtual time",
        usage="tools/lab ladder [--kernel X] [--timeout S] [OPTION…]",
        epilog="Every other option goes to vhost-vdpa ladder: tools/lab run -- vhost-vdpa ladder --help.",
        allow_abbrev=False,
    )
    rows.add_argument("--kernel", default="6.12", metavar="X")
    rows.add_argument("--timeout", type=float, metavar="S")
    move = commands.add_parser(
        "vm",
        help="a Linux guest under a stock QEMU moves from one vDPA device to another",
        usage="tools/lab vm [--kernel X] [--icount] [--timeout S] [OPTION…]",
        epilog=f"further options:\n{machines.options()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    move.add_argument("--kernel", default="6.12", metavar="X")
    move.add_argument("--icount", action="store_true", help="virtual time: the clock counts instructions; one CPU")
    move.add_argument("--timeout", type=float, metavar="S")
    pair = commands.add_parser("pair", help="two VMs with a network between them: a 10.77.0.1, b 10.77.0.2")
    _vm_options(pair)
    pair.add_argument("command", nargs="*", metavar="-- COMMAND_A --- COMMAND_B")
    return parser


def request(options: argparse.Namespace, command: Sequence[str]) -> Request:
    """Return what the options ask of a machine."""
    machine = getattr(options, "machine", "vm")
    if machine == uml_home.MACHINE:
        plan = devices.parse(options.devices)
        uml_home.refuse(plan, cpus=options.cpus, accel=options.accel, icount=options.icount)
    return Request(
        command=command,
        kernel=options.kernel,
        devices=options.devices,
        cpus=values.cpus(DEFAULT_CPUS if options.cpus is None else options.cpus),
        memory=f"{values.memory(options.memory) >> 20}M",
        accel=options.accel,
        icount=options.icount,
        timeout=values.duration("--timeout", options.timeout),
        environment=values.variables(options.env),
        vmm=options.vmm,
        machine=machine,
    )


def _run(options: argparse.Namespace) -> int:
    if not options.command:
        raise LabError("run: no command given", "", "tools/lab run -- vdpa dev show")
    return Session().run(request(options, options.command))


def _shell(options: argparse.Namespace) -> int:
    return Session().shell(request(options, ()))


def _setup(options: argparse.Namespace) -> int:
    session = Session()
    session.set_up(options.kernel, "setup", options.refresh)
    if options.vmm:
        session.vmm().ensure()
    return 0


def _status(options: argparse.Namespace) -> int:
    session = Session()
    try:
        state = status.collect(session)
    except PermissionError as error:
        raise LabError(
            f"the cache folder {session.cache.root} cannot be read",
            f"{error.filename}: {error.strerror}. The lab makes it as root.",
            "sudo tools/lab status",
        ) from error
    print(json.dumps(state, indent=2) if options.json else status.render(state))
    return 0


def _clean(_: argparse.Namespace) -> int:
    session = Session()
    if not os.path.lexists(session.cache.root):
        session.progress.say(f"there is no cache folder {session.cache.root}")
        return 0
    freed = session.cache.clean()
    session.progress.say(f"removed {session.cache.root}, {cache.size(freed)}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    command = ["vhost-vdpa", "migrate", "/dev/vhost-vdpa-0", "/dev/vhost-vdpa-1"]
    return Session().run(Request(command=command, kernel=options.kernel), "demo")


def _test(options: argparse.Namespace) -> int:
    return testing.Run(Session(), request(options, ()), options.rest).execute()


def _soak(options: argparse.Namespace) -> int:
    if options.name is None:
        for name, path in soak.available(PROJECT).items():
            print(f"{name:<24} {soak.summary(path)}")
        print(f"{mutants.NAME:<24} {mutants.SUMMARY}")
        print(f"{plain.NAME:<24} {plain.SUMMARY}")
        print(f"{arm64.NAME:<24} {arm64.SUMMARY}")
        return 0
    if options.name == mutants.NAME:
        return mutants.run(Session(), request(options, ()), options.only, options.by_check)
    if options.name == plain.NAME:
        return plain.run(Session(), options.kernel)
    if options.name == arm64.NAME:
        return arm64.run(Session(), options.all, options.k)
    path = soak.choose(PROJECT, options.name)
    wished = build_parser().parse_args(["soak", *soak.options(path), *options.given])
    words = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "-s", *soak.tests(PROJECT, path)]
    asked = request(wished, words)
    if wished.machine == uml_home.MACHINE and wished.no_vm:
        raise LabError(
            f"--machine uml: {options.name} needs no machine",
            "It runs on this machine's own kernel.",
            f"tools/lab soak {options.name}",
        )
    values.duration("--minutes", wished.minutes, "minutes")
    minutes = {"PYVHOSTVDPA_SOAK_MINUTES": f"{wished.minutes:g}"}
    asked = replace(asked, environment={**minutes, **asked.environment})
    if wished.no_vm:
        return soak.run_in_tree(Session(), asked)
    return uml.run(Session(), asked) if wished.debug_kernel else Session().run(asked, "soak")


def _ladder(options: argparse.Namespace) -> int:
    timeout = values.duration("--timeout", options.timeout)
    return Session().run(ladder.request(options.rest, options.kernel, timeout), "ladder")


def _vm(options: argparse.Namespace) -> int:
    timeout = values.duration("--timeout", options.timeout)
    return Session().run(machines.request(options.rest, options.kernel, options.icount, timeout), "vm")


def _pair(options: argparse.Namespace) -> int:
    return pair.run(Session(), request(options, ()), options.command)


ACTIONS = {
    "run": _run,
    "shell": _shell,
    "setup": _setup,
    "status": _status,
    "clean": _clean,
    "demo": _demo,
    "test": _test,
    "soak": _soak,
    "ladder": _ladder,
    "pair": _pair,
    "vm": _vm,
}


def split_test(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of `test` into the lab's own, which come first, and pytest's."""
    own = ("--kernel", "--accel", "--cpus", "--memory", "--timeout", "--devices", "--env", "--machine")
    index = 0
    while index < len(argv):
        word = argv[index]
        if word in own:
            index += 2
        elif word in ("-h", "--help", "--icount", "--vmm") or word.startswith(tuple(f"{name}=" for name in own)):
            index += 1
        else:
            break
    rest = list(argv[index:])
    return list(argv[:index]), rest[1:] if rest[:1] == ["--"] else rest


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    words = list(argv)
    rest: list[str] = []
    if words[:1] == ["test"]:
        own, rest = split_test(words[1:])
        words = ["test", *own]
    parser = build_parser()
    if not words:
        parser.print_help()
        parser.exit()
    options, unknown = parser.parse_known_args(words)
    if options.action in ("ladder", "vm"):
        rest = unknown
    elif unknown:
        # the usage that helps is that of the sub-command
        _subparsers(parser)[options.action].error(f"unrecognized arguments: {' '.join(unknown)}")
    options.rest = rest
    options.given = words[1:]
    return options


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    [action] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(action.choices)


def _terminate(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str], act: Callable[[Sequence[str]], int] | None = None) -> int:
    """Run one sub-command and return the exit status; whatever it fails by becomes a sentence."""
    output.occupy_standard_files()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        status = (act or _act)(argv)
        sys.stdout.flush()
    except LabError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return _refuse(LabError("interrupted", status=EXIT_INTERRUPTED))
    except BrokenPipeError:
        return _refuse(LabError("the reader of the output has gone", status=EXIT_PIPE))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(LabError(f"{where}{error.strerror or error}", "", "tools/lab status"))
    except MemoryError:
        return _refuse(LabError("not enough memory", "", "end other programs, then run the same command again"))
    # messages that standard error did not take would change the status as the interpreter ends
    output.forget_unwritten()
    return status


def _act(argv: Sequence[str]) -> int:
    options = parse(argv)
    return ACTIONS[options.action](options)


def _refuse(error: LabError) -> int:
    output.say(error.render())
    output.forget_unwritten()
    return error.status
