# SPDX-License-Identifier: MIT
"""Plain tables: aligned columns, numbers to the right."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTHING = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a head, two spaces between columns."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    numeric = [_is_numeric([row[i] for row in rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (head, *rows)
    )


def _is_numeric(column: Sequence[str]) -> bool:
    """Whether a column has numbers, and nothing else but places where one is missing."""
    return all(_is_number(text) or text == _NOTHING for text in column) and any(map(_is_number, column))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).isdigit()
