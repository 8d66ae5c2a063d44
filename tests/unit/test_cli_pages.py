"""Pages as a terminal shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyvhostvdpa
from pyvhostvdpa.cli import reference
from pyvhostvdpa.cli.commands import COMMANDS, full_parser, subparsers
from pyvhostvdpa.cli.render import terminal

DOCS = Path(pyvhostvdpa.__path__[0]) / "cli" / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_page_fits_80_columns_and_shows_no_markup(page: Path) -> None:
    shown = terminal(page.read_text(), DOCS, 80)
    # a path is as long as it is
    assert [line for line in shown.splitlines() if len(line) > 80 and str(DOCS) not in line] == []
    assert "](" not in shown
    assert "**" not in shown


@pytest.mark.parametrize(
    "words", [("ioctls", ""), ("errors", ""), ("api", ""), ("api", "VhostVdpa"), ("api", "migrate")]
)
def test_reference_fits_80_columns(words: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert [line for line in reference.text(*words).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = subparsers(full_parser())[name]
    for each in (parser, *subparsers(parser).values()):
        assert [line for line in each.format_help().splitlines() if len(line) > 80] == []


def test_picture_is_named_by_its_path() -> None:
    shown = terminal("![time to map](maps.svg)", DOCS, 80)
    assert " ".join(shown.split()) == f"Picture, time to map: {DOCS}/maps.svg"


def test_table_that_is_too_wide_becomes_a_list_of_terms() -> None:
    wide = "word " * 20
    shown = terminal(f"| id | what | why |\n|---|---|---|\n| `K01` | {wide} | {wide} |\n", DOCS, 80)
    assert shown.splitlines()[0] == "K01"
    assert shown.splitlines()[1].startswith("    what: word word")
    assert "    why: word word" in shown


def test_table_that_fits_stays_one() -> None:
    assert terminal("| a | b |\n|---|---|\n| 1 | two |\n", DOCS, 80) == "a  b\n1  two"


def test_command_that_is_too_long_can_be_copied() -> None:
    line = "    vhost-vdpa migrate " + "--memory 16G " * 8
    shown = terminal(line, DOCS, 80).splitlines()
    assert len(shown) > 1
    assert all(each.endswith(" \\") for each in shown[:-1])
    assert " ".join(each.removesuffix("\\").strip() for each in shown) == line.strip()


def test_blank_lines_separate_paragraphs_and_not_list_items() -> None:
    assert terminal("one\n\n- a\n- b\n\ntwo", DOCS, 80) == "one\n\n  - a\n  - b\n\ntwo"
