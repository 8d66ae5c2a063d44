# SPDX-License-Identifier: MIT
"""Options that more than one sub-command has, and the check that each option given has an effect."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

DEVICE = "device node, its last part, or vDPA name"
"""What DEV means, for help."""


def add_json(parser: argparse._ActionsContainer, what: str = "print JSON, and nothing else on standard output") -> None:
    """Add ``--json``."""
    parser.add_argument("--json", "-j", action="store_true", help=what)


def add_seconds(parser: argparse.ArgumentParser, name: str, default: float, what: str) -> None:
    """Add an option for a time in seconds; ``what`` is its help, without the default."""
    # not every command that has options has one of these
    from .units import seconds  # noqa: PLC0415

    parser.add_argument(
        name, metavar="SECONDS", type=seconds, default=str(default), help=f"{what} (default %(default)s)"
    )


def add_shadow(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    """Add ``--shadow``; ``names`` are :data:`pyvhostvdpa.device.shadowing.NAMES`, which not every command loads."""
    parser.add_argument(
        "--shadow",
        choices=names,
        default=None,
        help="how queues are shadowed: every descriptor copied (full), the rings of all queues relayed (used-all), or "
        "those of receive queues only, for a device that is known to send in order (used); default: what suits the "
        "procedure, used-all in general (vhost-vdpa help shadow)",
    )


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
