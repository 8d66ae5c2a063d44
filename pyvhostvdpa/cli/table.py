# SPDX-License-Identifier: MIT
"""Plain tables: aligned columns, numbers to the right."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTHING = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a head, two spaces between columns; a name in the head may have several lines."""
    deep = max(name.count("\n") for name in head)
    heads = list(zip(*([""] * (deep - name.count("\n")) + name.split("\n") for name in head), strict=True))
    widths = [max(len(row[i]) for row in (*heads, *rows)) for i in range(len(head))]
    numeric = [_is_numeric([row[i] for row in rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (*heads, *rows)
    )


def wrap(text: str, first: str, rest: str, columns: int) -> str:
    """Return text in lines of at most so many columns, behind ``first`` in the first line and ``rest`` in others.

    A word that is longer than a line gets a line of its own, whole: it may be a path or a command to copy.
    """
    lines, line = [], first
    for word in text.split():
        if line.strip() and len(line) + len(word) + (line[-1:] != " ") > columns and line not in (first, rest):
            lines.append(line.rstrip())
            line = rest
        line += word if line in (first, rest) else f" {word}"
    return "\n".join([*lines, line.rstrip()])


def _is_numeric(column: Sequence[str]) -> bool:
    """Whether a column has numbers, and nothing else but places where one is missing."""
    return all(_is_number(text) or text == _NOTHING for text in column) and any(map(_is_number, column))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).isdigit()
