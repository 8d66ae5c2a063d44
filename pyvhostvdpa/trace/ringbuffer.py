# SPDX-License-Identifier: MIT
"""The kernel's trace buffer as it is read from ``trace_pipe_raw``: pages of records with times in nanoseconds.

Source: include/linux/ring_buffer.h (``enum ring_buffer_type``), kernel/trace/ring_buffer.c (flags of a page), and the
files ``events/header_page``, ``events/header_event`` and each event's ``format``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

Value = int | str

_PAGE = struct.Struct("=QQ")
"""Time of the first record, and bytes of records with two flags; the commit is a long of 64 bits here."""
_MISSED = 1 << 31
_MISSED_COUNT = 1 << 30
_LENGTH = (1 << 27) - 1
_WORD = struct.Struct("=I")
_DELTA_BITS = 27
_PADDING, _EXTEND, _STAMP = 29, 30, 31
_STAMP_TOP = 0x1F << 59
"""A record with an absolute time has 59 bits of it; the bits above are those of the page's time."""

_FIELD = re.compile(r"field:(.+?)\s*([A-Za-z_]\w*)(\[\d*\])?;\s*offset:(\d+);\s*size:(\d+);\s*signed:(\d);")
_UNUSED = ("common_", "__probe_")
"""The thread is read for all events alike; the rest says nothing here."""
_THREAD = struct.Struct("=H2xi")
"""The begin of every record: the event's number, and the thread (``struct trace_entry``)."""
_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}


class Record(NamedTuple):
    """One record: when (ns of the buffer's clock), by which thread, which probe, with which values."""

    t: int
    thread: int
    name: str
    values: dict[str, Value]


class Format:
    """How the records of one event are laid out, from its ``format`` file."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        number = re.search(r"^ID: (\d+)$", text, re.MULTILINE)
        if number is None:
            raise ValueError(f"the format of event {name} has no ID")
        self.id = int(number.group(1))
        names, codes, self._strings, at = [], ["="], [], 0
        for kind, field, _, offset, size, signed in _FIELD.findall(text):
            if field.startswith(_UNUSED):
                continue
            if int(offset) < at:
                raise ValueError(f"the format of event {name} has overlapping fields")
            codes.append("x" * (int(offset) - at))
            code = _CODES[int(size)]
            codes.append(code if int(signed) else code.upper())
            names.append(field)
            at = int(offset) + int(size)
            if kind.startswith("__data_loc"):
                self._strings.append(field)
        self._names = tuple(names)
        self._struct = struct.Struct("".join(codes))

    def values(self, page: bytes, at: int) -> dict[str, Value]:
        """Return the fields of the record that begins at a place of a page."""
        # there may be hundreds of thousands: nothing is checked that the constructor has settled
        found: dict[str, Value] = dict(zip(self._names, self._struct.unpack_from(page, at)))  # noqa: B905
        for field in self._strings:
            place = int(found[field])
            start = at + (place & 0xFFFF)
            found[field] = page[start : start + (place >> 16)].split(b"\0")[0].decode("utf-8", "replace")
        return found


class Decoder:
    """Pages to records. ``missed`` counts what the kernel dropped between pages, if it reports that."""

    def __init__(self, formats: list[Format]) -> None:
        self._formats = {each.id: each for each in formats}
        self.missed = 0

    def page(self, page: bytes) -> Iterator[Record]:
        """Yield the records of one page, in their order."""
        t, commit = _PAGE.unpack_from(page)
        top = t & _STAMP_TOP
        length = commit & _LENGTH
        end = _PAGE.size + length
        if commit & _MISSED:
            counted = commit & _MISSED_COUNT and end + 8 <= len(page)
            self.missed += struct.unpack_from("=q", page, end)[0] if counted else 1
        at = _PAGE.size
        while at + 4 <= end:
            head = _WORD.unpack_from(page, at)[0]
            kind, delta = head & 0x1F, head >> 5
            at += 4
            if kind == _PADDING:
                if not delta:
                    return
                # a discarded record: its length stands behind the head, and its time counts
                t += delta
                at += _WORD.unpack_from(page, at)[0]
            elif kind == _EXTEND:
                t += delta + (_WORD.unpack_from(page, at)[0] << _DELTA_BITS)
                at += 4
            elif kind == _STAMP:
                t = (delta + (_WORD.unpack_from(page, at)[0] << _DELTA_BITS)) | top
                at += 4
            else:
                t += delta
                size = kind * 4
                if not kind:
                    size = _WORD.unpack_from(page, at)[0] - 4
                    at += 4
                record = self._record(t, page, at)
                if record is not None:
                    yield record
                at += size

    def _record(self, t: int, page: bytes, at: int) -> Record | None:
        number, thread = _THREAD.unpack_from(page, at)
        layout = self._formats.get(number)
        return None if layout is None else Record(t, thread, layout.name, layout.values(page, at))
