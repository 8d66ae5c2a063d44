# SPDX-License-Identifier: MIT
"""``vhost-vdpa help``."""

from __future__ import annotations

import argparse

from .commands import COMMANDS, Parser, columns, parser, resolve, subparsers
from .table import wrap

EPILOG = """\
examples:
  vhost-vdpa help                      the topics
  vhost-vdpa help migrate              the options of a command (and its page, if it has one)
  vhost-vdpa help dev add
  vhost-vdpa help migration            a page
  vhost-vdpa help api VhostVdpa        a class of the Python package

exit status: 0; 1 if there is no such topic"""
DESCRIPTION = "Print the help of a command, or a page; without TOPIC, list."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("topic", metavar="TOPIC", nargs="?", help="a command, or a topic of the list")
    parser.add_argument(
        "name", metavar="NAME", nargs="?", default="", help="of a command of commands (dev add), or a class (api NAME)"
    )


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
            arguments.parser.error(f"topic {topic} is one page, it has no {name!r}", f"vhost-vdpa help {topic}")
        print(text(topic, name))
        return 0
    wide = columns()
    lines = [wrap(line, f"{each:<12} ", f"{'':13}", wide) for each, line in topics().items()]
    commands = wrap(", ".join(COMMANDS), "  ", "  ", wide)
    print("\n".join(["commands: vhost-vdpa help COMMAND", commands, "", "topics:", *lines]))
    return 0


def _command(command: str, name: str, asked: Parser) -> int:
    found = subparsers(parser(command))[command]
    if name:
        inner = subparsers(found)
        if name not in inner:
            which = f"one of {', '.join(inner)}" if inner else "it has none"
            asked.error(f"{command} has no sub-command {name!r}: {which}", f"vhost-vdpa help {command}")
        found = inner[name]
    found.print_help()
    if not name:
        from .reference import page  # noqa: PLC0415

        more = page(command)
        if more:
            print(f"\n{more}")
    return 0
