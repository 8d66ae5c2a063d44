# SPDX-License-Identifier: MIT
"""A page, which is Markdown, as a terminal shows it: wrapped, tables as lists of terms, pictures by their path."""

from __future__ import annotations

import re

from .table import wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PICTURE = re.compile(r"!\[([^]]*)\]\(([^)]+)\)")
_LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")
PROGRAM = re.compile(
    r"\s+(?:\w*#\s+)?(?:vhost-vdpa |tools/|vdpa |devlink|openssl|modprobe|python3|grep|uname|qemu-|-\w+ |#)"
)
"""How a line of commands begins; others are output, which stays as it is."""
_TERM = 26
"""The widest first column of a table that keeps its other columns beside it."""


def terminal(markdown: str, folder: Path, columns: int = 80) -> str:
    """Return a page in lines of at most ``columns``, unless a line is a command or an output, which stay whole.

    ``folder`` is where the page's pictures are.
    """
    lines: list[str] = []
    before = ""
    for block in _blocks(markdown):
        close = _is_item(block[0]) and _is_item(before)
        lines += ([] if close or not lines else [""]) + _shown(block, folder, columns)
        before = block[0]
    return "\n".join(lines)


def _blocks(markdown: str) -> Iterator[list[str]]:
    """Yield the lines that belong together: a heading, a paragraph, an item of a list, a table, an indented block."""
    block: list[str] = []
    fenced = False
    for line in [*markdown.splitlines(), ""]:
        fence = line.startswith("```")
        if fence or fenced:
            if fenced or block:
                block.append(line)
            else:
                block = [line]
            if fence and fenced:
                yield block
                block = []
            fenced = fenced != fence
            continue
        begins = bool(re.match(r"#+ |[-*] |\d+\. ", line))
        indented = line.startswith("    ")
        other = bool(block) and indented != block[0].startswith("    ") and not _is_item(block[0])
        if block and (not line.strip() or begins or other or block[0].startswith("#")):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _is_item(line: str) -> bool:
    return bool(re.match(r"[-*] |\d+\. ", line))


def _shown(block: list[str], folder: Path, columns: int) -> list[str]:
    first = block[0]
    if first.startswith("```"):
        return [f"    {line}" for line in block[1:-1]]
    if first.startswith("    "):
        return [part for line in block for part in command(line, columns)]
    if first.startswith("#"):
        title = _plain(first.lstrip("# "), folder)
        return [title.upper() if first.startswith("# ") else title]
    if first.startswith("|"):
        return _table(block, folder, columns)
    text = _plain(" ".join(line.strip() for line in block), folder)
    item = re.match(r"(?:[-*]|\d+\.) ", text)
    if item:
        return wrap(text[item.end() :], f"  {item[0]}", " " * (2 + item.end()), columns).splitlines()
    return wrap(text, "", "", columns).splitlines()


def command(line: str, columns: int) -> list[str]:
    """Return a command, and below it what it is for, if both do not fit in a line."""
    line = line.rstrip()
    words, meaning = re.match(r"(\s*\S(?:.*?\S)??)(?:\s{2,}(.*))?$", line).groups()  # type: ignore[union-attr]
    if len(line) <= columns or not PROGRAM.match(line):
        return [line]
    deeper = " " * (len(words) - len(words.lstrip()) + 4)
    below = wrap(meaning, deeper, deeper, columns).splitlines() if meaning else []
    if len(words) <= columns or "'" in words or words.lstrip().startswith("#"):
        return [words, *below]
    # to be copied as it is: a shell puts the lines together again
    ended = words.endswith("\\")
    lines = wrap(words.removesuffix("\\"), deeper[4:], deeper, columns - 2).splitlines()
    return [*(f"{each} \\" for each in lines[:-1]), lines[-1] + (" \\" if ended else ""), *below]


def _plain(text: str, folder: Path) -> str:
    """Return text without marks of emphasis and code; a picture is named by its file, a link by its target."""
    text = _PICTURE.sub(lambda found: f"Picture, {found[1]}: {folder / found[2]}", text)
    text = _LINK.sub(lambda found: found[1] if found[2].startswith("#") else f"{found[1]} ({found[2]})", text)
    return re.sub(r"\*\*([^*]+)\*\*|`([^`]+)`", lambda found: found[1] or found[2], text)


def _table(block: list[str], folder: Path, columns: int) -> list[str]:
    lines = [line for line in block if not re.match(r"\|[-: |]+$", line)]
    rows = [[_plain(cell.strip(), folder) for cell in _cells(line)] for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if sum(widths) + 2 * len(widths) - 2 <= columns:
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head, *body = rows
    if len(head) == 2 and widths[0] <= _TERM:
        beside = " " * (widths[0] + 2)
        return [
            line for term, text in rows for line in wrap(text, f"{term:{len(beside)}}", beside, columns).splitlines()
        ]
    lines = []
    for row in body:
        lines += wrap(row[0], "", "", columns).splitlines()
        for name, text in zip(head[1:], row[1:], strict=True):
            lines += wrap(text, f"    {name}: " if name else "    ", "      ", columns).splitlines() if text else []
    return lines


def _cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line.strip().strip("|"))
