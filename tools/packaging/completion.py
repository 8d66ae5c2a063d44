"""Write completion for bash and zsh, from the parsers, by shtab: completion.py FOLDER."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import shtab

from pyvhostvdpa.cli.commands import full_parser, subparsers

# The devices are read when Tab is pressed: nodes as paths, and the names that vdpa gave.
PREAMBLE = {
    "bash": """
_vhost_vdpa_devices() {
  local node name found=()
  for node in /dev/vhost-vdpa-*; do [ -e "$node" ] && found+=("$node"); done
  for name in /sys/bus/vdpa/devices/*; do [ -e "$name" ] && found+=("${name##*/}"); done
  compgen -W "${found[*]}" -- "$1"
}
""",
    "zsh": """
_vhost_vdpa_devices() {
  local -a found
  found=(/dev/vhost-vdpa-*(N) /sys/bus/vdpa/devices/*(N:t))
  compadd -a found
}
""",
}
DEVICES = {"bash": "_vhost_vdpa_devices", "zsh": "_vhost_vdpa_devices"}
METAVARS = {"DEV", "SRC", "DST"}


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield all arguments of a parser and of those below it."""
    yield from parser._actions
    for inner in subparsers(parser).values():
        yield from actions(inner)


def main(folder: Path) -> None:
    """Write both."""
    folder.mkdir(parents=True, exist_ok=True)
    parser = full_parser()
    for action in actions(parser):
        if action.metavar in METAVARS:
            action.complete = DEVICES  # type: ignore[attr-defined]
        elif action.metavar in ("FILE", "FILE.svg", "OLD.json"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    for shell, preamble in PREAMBLE.items():
        (folder / f"vhost-vdpa.{shell}").write_text(shtab.complete(parser, shell, preamble=preamble))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
