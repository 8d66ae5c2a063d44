# SPDX-License-Identifier: MIT
"""``vhost-vdpa help``."""

from __future__ import annotations

import argparse
from typing import Any

from .reference import text, topics


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "help",
        help="pages on the interface, and the Python reference",
        description="Print a page; without TOPIC, list.",
    )
    parser.add_argument("topic", metavar="TOPIC", nargs="?")
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="with topic api: a class or function")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a page or the list of topics."""
    if arguments.topic:
        print(text(arguments.topic, arguments.name))
        return 0
    for name, line in topics().items():
        print(f"{name:<12} {line}")
    return 0
