# SPDX-License-Identifier: MIT
"""``vhost-vdpa compat``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..base.errors import MissingFeature
from ..probe.compat import SCHEMA, Comparison, GuestDemands, compare, require_probe
from .commands import columns
from .options import add_json
from .table import wrap
from .units import SIZES, count, guest_memory

EPILOG = f"""\
{SIZES}

examples:
  vhost-vdpa compat a.json b.json               (vhost-vdpa probe DEV -j > a.json)
  vhost-vdpa compat a.json b.json --memory 16G  compare the range of addresses too

exit status: 0 if the guest can move, 1 if not, or if a file does not come from 'probe --json'"""
DESCRIPTION = (
    "Compare two devices, each by what 'vhost-vdpa probe --json' printed of it, here or on another "
    "host: can a guest on the first move to the second? Opens nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("source", metavar="A.json", help="the device that the guest is on")
    parser.add_argument("destination", metavar="B.json", help="the device that it is to move to")
    parser.add_argument(
        "--guest",
        choices=("any", "migrate"),
        default="any",
        help="any: a guest that uses all that the source offers; migrate: the guest of 'vhost-vdpa migrate' (default "
        "%(default)s)",
    )
    parser.add_argument("--pairs", metavar="N", type=count, help="queue pairs of the guest (default all; migrate: 1)")
    parser.add_argument("--memory", metavar="SIZE", type=guest_memory, help="guest memory (default: not compared)")
    add_json(parser, f"print JSON, schema {SCHEMA}")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print."""
    synthetic = arguments.guest == "migrate"
    pairs = arguments.pairs or (1 if synthetic else None)
    guest = GuestDemands(everything=not synthetic, pairs=pairs, memory=arguments.memory)
    found = compare(_read(arguments.source), _read(arguments.destination), guest)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else _render(found))
    return 0 if found.fits else 1


def _read(path: str) -> dict[str, Any]:
    hint = f"vhost-vdpa probe DEV --json > {path}"
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as e:
        raise MissingFeature(f"{path} cannot be read: {e.strerror}", hint=hint) from e
    except ValueError as e:
        raise MissingFeature(f"{path} is not JSON: {e}", hint=hint) from e
    if not isinstance(found, dict):
        raise MissingFeature(f"{path} is not a JSON object", hint=hint)
    require_probe(found, path)
    return found


def _render(found: Comparison) -> str:
    wide = columns()
    which = f"from {found.source} to {found.destination}"
    if found.fits:
        lines = [f"A guest can move {which}: nothing stands in the way."]
    else:
        fields = ", ".join(dict.fromkeys(each.field for each in found.obstacles))
        lines = [wrap(f"A guest cannot move {which}, because of: {fields}.", "", "", wide), ""]
        for each in found.obstacles:
            values = f" {each.source or '-'} on the source, {each.destination or '-'} on the destination"
            known = values if each.source or each.destination else ""
            lines.append(
                wrap(f"{each.field}:{known}; {each.why}" if known else f"{each.field}: {each.why}", "  ", "    ", wide)
            )
    lines += ["", *(wrap(note, "note: ", "      ", wide) for note in found.notes)] if found.notes else []
    after = found.command or ("vhost-vdpa migrate SRC DST" if found.fits else _fix(found))
    return "\n".join([*lines, "", f"next: {after}"])


def _fix(found: Comparison) -> str:
    fixes = [each.fix for each in found.obstacles if each.fix and each.fix != "recreate"]
    return fixes[0] if fixes else "vhost-vdpa help hardware (what a device needs)"
