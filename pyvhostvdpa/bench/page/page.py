# SPDX-License-Identifier: MIT
"""A page that stands alone: no script, nothing fetched; for a screen by day or night, and for paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ...base.errors import VhostVdpaError

PACKAGE = __name__.rpartition(".")[0]


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole HTML document."""
    style = (resources.files(PACKAGE) / "page.css").read_text()
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body>",
            "</html>",
            "",
        ]
    )


@contextmanager
def written_to(directory: Path, command: str) -> Iterator[None]:
    """Explain an error of the block, which writes files to ``directory`` as ``command`` asked for."""
    try:
        yield
    except OSError as e:
        raise VhostVdpaError(
            f"{e.filename or directory} cannot be written: {e.strerror}", hint=f"{command} with another folder"
        ) from e


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def notes(lines: Sequence[str]) -> str:
    """Return remarks as a list, nothing without remarks."""
    if not lines:
        return ""
    return '<ul class="notes">\n' + "\n".join(f"<li>{escape(each)}</li>" for each in lines) + "\n</ul>"


def figure(drawing: str, caption: str) -> str:
    """Return a drawing with words above it; a narrow screen scrolls it."""
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="wide">{drawing}</div></figure>'


def facts(pairs: Mapping[str, Any]) -> str:
    """Return names with their values."""
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(_plain(value))}</dd>" for name, value in pairs.items())
    return "<dl>\n" + "\n".join(rows) + "\n</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(each) for each in value)
    return "unknown" if value is None else str(value)


def wide_table(head: str, body: str, kind: str = "") -> str:
    """Return a table; a narrow screen scrolls it."""
    return f'<div class="wide"><table class="{kind}"><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def cell(text: str, kind: str = "n") -> str:
    """Return a cell of CSS classes, of a number if none are given."""
    return f'<td class="{kind}">{escape(text)}</td>'
