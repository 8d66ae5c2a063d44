# SPDX-License-Identifier: MIT
"""Options that more than one sub-command has, and the check that each option given has an effect."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

DEVICE = "device node, its last part, or vDPA name"
"""What DEV means, for help."""


def add_json(parser: argparse.ArgumentParser, what: str = "print JSON, and nothing else on standard output") -> None:
    """Add ``--json``."""
    parser.add_argument("--json", "-j", action="store_true", help=what)


def refuse_unused(arguments: argparse.Namespace, names: tuple[str, ...], because: str) -> None:
    """End with wrong usage if an option was given another value than its default, though it has no effect here."""
    for action in arguments.parser._actions:
        if action.dest not in names:
            continue
        default = action.default
        if isinstance(default, str) and action.type is not None:
            default = action.type(default)
        if getattr(arguments, action.dest) != default:
            arguments.parser.error(f"{action.option_strings[0]} has no effect {because}")
