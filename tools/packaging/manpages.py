"""Write a man page for `vhost-vdpa` and for each of its sub-commands, from their parsers: manpages.py FOLDER."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pyvhostvdpa import __version__
from pyvhostvdpa.cli.commands import COMMANDS, Parser, full_parser, subparsers

SECTION = 8
TOP = "vhost-vdpa"


def names() -> Iterator[tuple[str, Parser, str]]:
    """Yield the name of each page, its parser, and what stands behind the name."""
    top = full_parser()
    yield TOP, top, "look at, drive and migrate vDPA devices"
    for name, parser in subparsers(top).items():
        assert isinstance(parser, Parser)
        yield f"{TOP}-{name}", parser, COMMANDS[name]
        helps = {each.dest: each.help or "" for each in choices(parser)}
        for inner, action in subparsers(parser).items():
            assert isinstance(action, Parser)
            yield f"{TOP}-{name}-{inner}", action, helps[inner]


def choices(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the sub-commands of a parser with their lines."""
    return [each for action in parser._actions if action.nargs == argparse.PARSER for each in action._get_subactions()]


def roff(text: str) -> str:
    """Return text that troff prints as it is."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return re.sub(r"^(?=[.'])", r"\\&", escaped, flags=re.MULTILINE)


def filled(text: str) -> list[str]:
    """Return paragraphs as troff wraps them, and indented lines as they are."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith(" "):
            lines += [".RS 4", ".nf", *(roff(line.strip()) for line in block.splitlines()), ".fi", ".RE"]
        else:
            lines += [".PP", roff(" ".join(block.split()))]
    return lines


def parts(epilog: str) -> dict[str, list[str]]:
    """Return what an epilog says, by section."""
    found: dict[str, list[str]] = {"NOTES": [], "EXAMPLES": [], "EXIT STATUS": []}
    for block in re.split(r"\n\s*\n", epilog.strip()):
        if block.startswith("examples:"):
            for line in block.splitlines()[1:]:
                command, _, meaning = re.sub(r"\s{2,}", "\0", line.strip()).partition("\0")
                found["EXAMPLES"] += [".TP", f".B {roff(command)}", roff(meaning) if meaning else "\\&"]
        elif block.startswith("exit status:"):
            found["EXIT STATUS"] += [roff(" ".join(block.removeprefix("exit status:").split()))]
        else:
            found["NOTES"] += filled(block)
    return found


def options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the sections of arguments and options."""
    formatter = parser._get_formatter()
    lines: list[str] = []
    for group in parser._action_groups:
        actions = [each for each in group._group_actions if each.help != argparse.SUPPRESS]
        if not actions:
            continue
        title = {"positional arguments": "ARGUMENTS", "options": "OPTIONS"}.get(str(group.title), str(group.title))
        lines.append(f".SH {roff(title.upper())}")
        for action in actions:
            if action.nargs == argparse.PARSER:
                for each in action._get_subactions():
                    lines += [".TP", f".B {roff(each.dest)}", roff(str(each.help or ""))]
                continue
            words = formatter._format_action_invocation(action)
            # Python 3.13 colours what goes to a terminal
            words = re.sub(r"\x1b\[[0-9;]*m", "", words)
            help_ = formatter._expand_help(action) if action.help else ""
            lines += [".TP", f".B {roff(words)}", roff(" ".join(help_.split())) or "\\&"]
    return lines


def page(name: str, parser: Parser, line: str, others: list[str]) -> str:
    """Return one page."""
    stamp = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    said = parts(str(parser.epilog or ""))
    synopsis = parser.usage_line() if name != TOP else f"{TOP} [-j] COMMAND [OPTIONS] …"
    lines = [
        f'.TH {roff(name.upper())} {SECTION} {stamp} "pyvhostvdpa {__version__}" "vDPA devices"',
        ".SH NAME",
        f"{roff(name)} \\- {roff(line)}",
        ".SH SYNOPSIS",
        f".B {roff(synopsis)}",
        ".SH DESCRIPTION",
        *filled(str(parser.description or line)),
        *options(parser),
    ]
    for section in ("NOTES", "EXAMPLES", "EXIT STATUS"):
        if said[section]:
            lines += [f".SH {section}", *said[section]]
    related = [each for each in others if each != name and (TOP in (name, each) or each.startswith(f"{name}-"))]
    # `vhost-vdpa help` has the pages that are too long for this
    refer = ", ".join([*(f"{roff(each)}({SECTION})" for each in related), f"vdpa({SECTION})"])
    lines += [
        ".SH SEE ALSO",
        refer,
        ".PP",
        f"{roff(TOP)} help lists pages on migration, downtime, benchmarks and more.",
    ]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    every = list(names())
    for name, parser, line in every:
        (folder / f"{name}.{SECTION}").write_text(page(name, parser, line, [each for each, _, _ in every]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
