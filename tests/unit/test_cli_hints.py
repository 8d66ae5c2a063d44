"""Every hint names commands and options that exist: those of the parsers, and of no other command."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvhostvdpa
from pyvhostvdpa.base.causes import explain_all
from pyvhostvdpa.cli.commands import COMMANDS, full_parser, subparsers

PACKAGE = Path(pyvhostvdpa.__path__[0])
TOP = subparsers(full_parser())
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMAND = re.compile(r"vhost-vdpa ([a-z]+)(?: and ([a-z]+))?")
FOREIGN = re.compile(r"(?:^|[;,(] |then |or )(?:ulimit|pip|apt|modprobe|insmod|vdpa|mount|openssl|tools/lab) ")
PAGES = {page.stem for page in (PACKAGE / "cli" / "docs").glob("*.md")} | {"api", "ioctls", "errors"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def words_of(node: ast.expr) -> str:
    """Return a string as the source has it, with ``X`` for each inserted value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) if isinstance(part, ast.Constant) else "X" for part in node.values)
    if isinstance(node, ast.BinOp):
        return words_of(node.left) + words_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{words_of(node.body)}; {words_of(node.orelse)}"
    return "X"


def hints() -> Iterator[tuple[str, str]]:
    """Each hint of the package with its place."""
    for module in MODULES:
        place = str(module.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("hint", "next"):
                yield f"{place}:{node.value.lineno}", words_of(node.value)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Told":
                for argument in node.args[3:]:
                    yield f"{place}:{argument.lineno}", words_of(argument)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Bound":
                for argument in node.args[2:]:
                    yield f"{place}:{argument.lineno}", words_of(argument)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                if names in (["_REFUSALS"], ["_FILE_HINTS"]):
                    for value in node.value.values:
                        yield f"{place}:{value.lineno}", words_of(value)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "hint" and node.value is not None:
                yield f"{place}:{node.value.lineno}", words_of(node.value)
    for call, number, why in explain_all():
        yield f"base/causes.py: {call} {number}", why.hint


HINTS = sorted(set(hints()))


def parsers_of(name: str) -> list[argparse.ArgumentParser]:
    """A command's parser and those of its actions."""
    return [TOP[name], *subparsers(TOP[name]).values()]


def options_of(name: str) -> set[str]:
    return {option for parser in parsers_of(name) for action in parser._actions for option in action.option_strings}


def commands_in(text: str) -> list[str]:
    return [name for pair in COMMAND.findall(text) for name in pair if name]


def problems(place: str, hint: str) -> Iterator[str]:
    """What is wrong with a hint."""
    for part in re.split(r"; |\n", hint):
        named = commands_in(part)
        for name in named:
            if name not in COMMANDS:
                yield f"{part!r}: there is no command {name!r}"
        topic = re.search(r"vhost-vdpa help ([a-z_]+)", part)
        if topic and topic[1] not in PAGES | set(COMMANDS) | {"topic"}:
            yield f"{part!r}: there is no page {topic[1]!r}"
        options = OPTION.findall(part)
        if not options or FOREIGN.search(part):
            continue
        # a module of a command speaks of that command; everything else does not know which one is running
        here = Path(place.partition(":")[0])
        own = [here.stem] if here.parts[0] == "cli" and here.stem in COMMANDS else []
        asked = [name for name in named if name in COMMANDS] or commands_in(hint) or own or sharing(here)
        if not asked:
            yield f"{part!r}: which command has {options[0]}?"
        # a shared module's hint is for those of its commands that have the option
        shared = not own and asked == sharing(here)
        for name in asked:
            for option in options:
                if option not in options_of(name) and not (
                    shared and any(option in options_of(each) for each in asked)
                ):
                    yield f"{part!r}: vhost-vdpa {name} has no {option}"


def sharing(module: Path) -> list[str]:
    """The commands that a shared module of cli/ serves: those whose modules import it."""
    if module.parts[0] != "cli":
        return []
    return [
        name
        for name in COMMANDS
        if re.search(rf"import {module.stem}\b|from \.{module.stem} import", (PACKAGE / f"cli/{name}.py").read_text())
    ]


def test_more_than_100_hints_are_found() -> None:
    assert len(HINTS) > 100


@pytest.mark.parametrize(("place", "hint"), HINTS, ids=[place for place, _ in HINTS])
def test_hint_names_what_the_commands_have(place: str, hint: str) -> None:
    assert not list(problems(place, hint))


@pytest.mark.parametrize(
    ("place", "hint", "wrong"),
    [
        ("memory/guest.py:1", "ask for less: --memory", "which command has --memory?"),
        ("memory/guest.py:1", "vhost-vdpa receive --memory 1G", "vhost-vdpa receive has no --memory"),
        ("cli/receive.py:1", "another --downtime", "vhost-vdpa receive has no --downtime"),
        ("base/x.py:1", "vhost-vdpa lists", "there is no command 'lists'"),
        ("base/x.py:1", "vhost-vdpa help weather", "there is no page 'weather'"),
    ],
)
def test_a_wrong_hint_is_found(place: str, hint: str, wrong: str) -> None:
    [found] = problems(place, hint)
    assert wrong in found


def commands_of_examples() -> Iterator[tuple[str, str]]:
    for name in COMMANDS:
        for parser in parsers_of(name):
            for line in str(parser.epilog or "").splitlines():
                if line.startswith("  vhost-vdpa "):
                    # behind two blanks it is explained
                    for command in re.split(r"\s{2,}", line.strip())[0].split("; "):
                        words = re.split(r"\s{2,}| [|>] ", command.strip())[0]
                        yield name, words
    for line in str(full_parser().epilog).splitlines():
        if line.startswith("  vhost-vdpa "):
            yield "", re.split(r"\s{2,}", line.strip())[0]


@pytest.mark.parametrize(("name", "line"), sorted(set(commands_of_examples())), ids=lambda text: text)
def test_an_example_of_the_help_can_be_parsed(name: str, line: str) -> None:
    parsed = full_parser().parse_args(line.split()[1:])
    assert parsed.command == (name or parsed.command)


@pytest.mark.parametrize("page", sorted((PACKAGE / "cli" / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_names_commands_and_options_that_exist(page: Path) -> None:
    for line in page.read_text().splitlines():
        for found in re.finditer(r"vhost-vdpa ([a-z]+)((?: [^\s`;|&#)]+)*)", line):
            name, rest = found[1], found[2]
            if name not in COMMANDS:
                continue
            for option in OPTION.findall(rest.partition(" -- ")[0]):
                assert option in options_of(name) | {"--help"}, line
