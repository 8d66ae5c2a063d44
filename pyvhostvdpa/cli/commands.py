# SPDX-License-Identifier: MIT
"""The sub-commands: their names, their parsers, and which one a command line means.

A sub-command's module is loaded when it is run, and no other: some take a
hundred times as long to load as ``list`` takes to run.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from .. import __version__
from .failure import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType
    from typing import Any, NoReturn

COMMANDS = {
    "list": "the vDPA devices of this machine",
    "doctor": "what keeps this machine from using vDPA, and the next command",
    "dev": "create, delete and show devices",
    "probe": "what a device can do, and whether a guest on it can be migrated",
    "check": "whether a device keeps to what kernel and virtio demand, rule by rule",
    "compat": "whether a guest on one device can move to another, from two probes",
    "facts": "devices and doctor's findings for Ansible and Prometheus",
    "serve": "put a virtual machine (QEMU, vhost-user) on a device",
    "migrate": "migrate a guest with traffic from one device to another",
    "send": "migrate a guest to 'vhost-vdpa receive', with its memory",
    "receive": "wait for a guest from 'vhost-vdpa send', run it",
    "watch": "record the calls of any process on vDPA devices, and what its downtime is made of",
    "report": "what recordings of 'watch' show, one or several joined",
    "ladder": "every optimization of the descriptor-ASID series, row by row, measured",
    "bench": "what maps, requests, switches and the shadow cost on a device",
    "help": "help COMMAND, pages on the interface, and the Python reference",
}
"""Every sub-command with one line."""

_DESCRIPTION = "Look at, drive and migrate vDPA devices behind /dev/vhost-vdpa-N."
_EPILOG = """\
DEV is a device node (/dev/vhost-vdpa-0), its last part (vhost-vdpa-0) or a vDPA name (vdpa0).
Opening a device resets it: list, doctor, facts, compat, dev show and probe --no-open open none.
A command may be shortened as long as it is clear (vhost-vdpa li). -j prints JSON, before or after the command;
-p is accepted with it, as JSON is always indented.

examples:
  vhost-vdpa doctor                     what is in the way on this machine
  vhost-vdpa list                       devices, drivers, holders
  vhost-vdpa probe vdpa0 --verify       what a device can do, tried on it
  vhost-vdpa migrate vdpa0 vdpa1        move a guest with traffic
  vhost-vdpa help migrate               the options of a command

exit status: 0 done; 1 an error, explained on standard error; 2 wrong usage; 130 interrupted"""

_JSON = {"-j": "--json", "--json": "--json", "-p": "", "--pretty": "", "-jp": "--json", "-pj": "--json"}
"""Options that iproute2's users type before the command. JSON is always indented here, so -p changes nothing."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, 80 columns without one."""

    def __init__(self, prog: str) -> None:
        # argparse would load shutil for this, which loads every compression
        super().__init__(prog, width=columns() - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap paragraphs; leave lines that are indented, such as examples, as they are."""
        lines: list[str] = []
        paragraph: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line and not line.startswith(" "):
                paragraph.append(line)
                continue
            if paragraph:
                lines.append(super()._fill_text(self._join(paragraph, width), width, indent))
                paragraph = []
            lines += self._example(line, width)
        return "\n".join(lines).rstrip()

    @staticmethod
    def _example(line: str, width: int) -> list[str]:
        if len(line) <= width:
            return [line]
        from .render import command  # noqa: PLC0415

        return command(line, width)

    @staticmethod
    def _join(paragraph: list[str], width: int) -> str:
        import textwrap  # noqa: PLC0415

        return textwrap.fill(" ".join(paragraph), width)


def columns() -> int:
    """Return how wide the terminal is, 80 without a terminal."""
    words = os.environ.get("COLUMNS", "")
    if words.isdecimal() and int(words) > 0:
        return int(words)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is two lines: the usage of the very sub-command, and what is wrong."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("formatter_class", Formatter)
        super().__init__(*arguments, **options)

    def usage_line(self) -> str:
        """Return how the command is called, in one line: what it takes, and options only where they are required."""
        if self.usage:
            return " ".join(str(self.usage).split())
        words = [self.prog]
        optional = False
        # a group of which one is required counts as an option that is
        required = {id(a): g for g in self._mutually_exclusive_groups if g.required for a in g._group_actions}
        told: set[int] = set()
        for action in self._actions:
            if action.option_strings:
                group = required.get(id(action))
                if group is not None:
                    if id(group) not in told:
                        told.add(id(group))
                        words.append("(" + " | ".join(_spelt(each) for each in group._group_actions) + ")")
                elif action.required:
                    words.append(_spelt(action))
                else:
                    optional = True
        words += ["[OPTIONS]"] if optional else []
        words += [_positional(action) for action in self._actions if not action.option_strings]
        return " ".join(words)

    def _print_message(self, message: str, file: Any = None) -> None:
        # what cannot be written does not change the status; until Python 3.11.3 argparse raised it
        try:
            super()._print_message(message, file)
        except OSError:
            return

    def error(self, message: str, following: str = "") -> NoReturn:
        """Print the usage of this sub-command, what is wrong and the following command; end with status 2."""
        following = following or f"{self.prog} --help"
        self.exit(2, f"usage: {self.usage_line()}\n{self.prog}: {message}\n  next: {following}\n")


def _spelt(action: argparse.Action) -> str:
    name = action.option_strings[0]
    return name if action.nargs == 0 else f"{name} {action.metavar or action.dest.upper()}"


def _positional(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return {"?": f"[{name}]", "*": f"[{name}...]", "+": f"{name}..."}.get(str(action.nargs), name)


def parser(*names: str, alone: bool = False) -> Parser:
    """Return a parser that knows the options of the sub-commands named, and of the others only their line.

    ``alone`` leaves the others out: to run one command, nothing of them is needed.
    """
    top = Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        if name in names:
            _add(commands, name)
        elif not alone:
            commands.add_parser(name, help=line, add_help=False)
    return top


def _add(commands: Any, name: str) -> None:
    """Add a sub-command with all that it takes; one that has sub-commands of its own has a ``run`` for each of them."""
    found = module(name)
    parser = commands.add_parser(name, help=COMMANDS[name], description=found.DESCRIPTION, epilog=found.EPILOG)
    parser.set_defaults(run=getattr(found, "run", None), parser=parser)
    found.add_arguments(parser)


def module(name: str) -> ModuleType:
    """Load and return the module of a sub-command."""
    return import_module(f".{name}", __package__)


def full_parser() -> Parser:
    """Return a parser with every option of every sub-command."""
    return parser(*COMMANDS)


def subparsers(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of a command's sub-commands by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def resolve(word: str, names: Sequence[str]) -> str:
    """Return the name that ``word`` is, or is an unambiguous beginning of; otherwise ``word`` itself."""
    if word in names:
        return word
    begun = [name for name in names if name.startswith(word)] if word else []
    return begun[0] if len(begun) == 1 else word


def _arranged(arguments: Sequence[str]) -> list[str]:
    """Return the command line with its command first and in full, options typed before it behind it."""
    words = list(arguments)
    early = []
    while words and words[0] in _JSON:
        early += [option for option in [_JSON[words.pop(0)]] if option]
    if words:
        words[0] = resolve(words[0], list(COMMANDS))
    if words[0:1] in (["dev"], ["bench"]) and len(words) > 1:
        words[1] = resolve(words[1], list(subparsers(subparsers(parser(words[0], alone=True))[words[0]])))
    end = words.index("--") if "--" in words else len(words)
    return [*_split(words[:end]), *early, *words[end:]]


def _split(words: Sequence[str]) -> Iterator[str]:
    """Leave out -p, and split -jp: JSON is always indented."""
    for word in words:
        if word in ("-jp", "-pj"):
            yield "-j"
        elif word not in ("-p", "--pretty"):
            yield word


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse a command line and run its sub-command; the exit status."""
    words = _arranged(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in _JSON.values():
        parser().print_help()
        return 0
    top = parser(words[0], alone=words[0] in COMMANDS)
    if words[0] not in COMMANDS and not words[0].startswith("-"):
        begun = [name for name in COMMANDS if name.startswith(words[0])]
        if len(begun) > 1:
            top.error(f"{words[0]!r} could be {' or '.join(begun)}")
        top.error(f"unknown command {words[0]!r}: one of {', '.join(COMMANDS)}")
    parsed, rest = top.parse_known_args(words)
    if rest:
        # the usage that helps is that of the sub-command
        getattr(parsed, "parser", top).error(f"unrecognized arguments: {' '.join(rest)}")
    _set_up_log()
    status: int = parsed.run(parsed)
    return status


def _set_up_log() -> None:
    """Let the package's log go to standard error, if a module was loaded that has one."""
    logging = sys.modules.get("logging")
    if logging is not None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=f"{PROGRAM}: %(message)s")
