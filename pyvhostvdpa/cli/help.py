# SPDX-License-Identifier: MIT
"""``vhost-vdpa help``."""

from __future__ import annotations

import argparse
from typing import Any

from .commands import COMMANDS, parser, resolve, subparsers

_EPILOG = """\
examples:
  vhost-vdpa help                      the topics
  vhost-vdpa help migrate              the options of a command (and its page, if it has one)
  vhost-vdpa help dev add
  vhost-vdpa help migration            a page
  vhost-vdpa help api VhostVdpa        a class of the Python package

exit status: 0; 1 if there is no such topic"""


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "help",
        help=COMMANDS["help"],
        description="Print the help of a command, or a page; without TOPIC, list.",
        epilog=_EPILOG,
    )
    parser.add_argument("topic", metavar="TOPIC", nargs="?", help="a command, or a topic of the list")
    parser.add_argument(
        "name", metavar="NAME", nargs="?", default="", help="of a command of commands (dev add), or a class (api NAME)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the help of a command, a page, or the list of topics."""
    # the reference loads the whole package, which the help of a command does not need
    topic, name = str(arguments.topic or ""), str(arguments.name)
    command = resolve(topic, list(COMMANDS))
    if command in COMMANDS:
        return _command(command, name, arguments.parser)
    from .reference import text, topics  # noqa: PLC0415

    if topic:
        if name and topic != "api":
            arguments.parser.error(f"topic {topic} is one page, it has no {name!r}")
        print(text(topic, name))
        return 0
    lines = [f"{each:<12} {line}" for each, line in topics().items()]
    print("\n".join(["commands: vhost-vdpa help COMMAND", f"  {', '.join(COMMANDS)}", "", "topics:", *lines]))
    return 0


def _command(command: str, name: str, asked: argparse.ArgumentParser) -> int:
    found = subparsers(parser(command))[command]
    if name:
        inner = subparsers(found)
        if name not in inner:
            which = f"one of {', '.join(inner)}" if inner else "it has none"
            asked.error(f"{command} has no sub-command {name!r}: {which}")
        found = inner[name]
    found.print_help()
    if not name:
        from .reference import page  # noqa: PLC0415

        more = page(command)
        if more:
            print(f"\n{more}")
    return 0
