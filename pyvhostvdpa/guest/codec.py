# SPDX-License-Identifier: MIT
"""How values become bytes in a migration's stream: little-endian, each length checked before it is believed."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..base.errors import StreamCorrupt

T = TypeVar("T")

_SECTION = struct.Struct("<HHI")
_LENGTH = struct.Struct("<I")


@functools.cache
def _fields(layout: str) -> struct.Struct:
    """Return the struct of a layout; a program has few of them, and making one takes longer than using it."""
    return struct.Struct("<" + layout)


class Writer:
    """Collects values."""

    def __init__(self) -> None:
        self._out = bytearray()

    def put(self, layout: str, *values: Any) -> None:
        """Add fields by their :mod:`struct` codes, without padding."""
        self._out += struct.pack("<" + layout, *values)

    def blob(self, data: bytes) -> None:
        """Add bytes behind their length."""
        self._out += _LENGTH.pack(len(data)) + data

    def optional(self, data: bytes | None) -> None:
        """Add bytes behind their length, or mark them absent."""
        self.put("B", data is not None)
        if data is not None:
            self.blob(data)

    def text(self, text: str) -> None:
        """Add UTF-8 text behind its length."""
        self.blob(text.encode())

    def each(self, items: Sequence[T], write: Callable[[T], None]) -> None:
        """Add items behind their number."""
        self.put("I", len(items))
        for item in items:
            write(item)

    def numbers(self, code: str, values: Sequence[int], each: int = 1) -> None:
        """Add numbers of one :mod:`struct` code at once, behind how many groups of ``each`` they are."""
        self.put(f"I{len(values)}{code}", len(values) // each, *values)

    def section(self, kind: int, version: int) -> bytes:
        """Return what was collected behind a head that names it: kind, version, length."""
        return _SECTION.pack(kind, version, len(self._out)) + bytes(self._out)


class Reader:
    """Takes values from untrusted bytes; :class:`StreamCorrupt` for impossible values.

    ``data`` is one whole section; ``kind`` and ``version`` are what it has to be. With ``oldest`` an earlier version
    is read as well; :attr:`version` is the one that was found.
    """

    def __init__(self, data: bytes, kind: int, version: int, what: str, oldest: int | None = None) -> None:
        self._what = what
        self._data, self._at = data, 0
        found_kind, found_version, length = _SECTION.unpack(self._take(_SECTION.size))
        if found_kind != kind:
            raise StreamCorrupt(f"{what}: section {found_kind} where {kind} belongs")
        self.version: int = found_version
        if not (version if oldest is None else oldest) <= found_version <= version:
            raise StreamCorrupt(
                f"{what}: format version {found_version}, this side knows {version}",
                hint="install the same version of pyvhostvdpa on both sides",
            )
        if length != len(data) - _SECTION.size:
            raise StreamCorrupt(f"{what}: says it has {length} bytes, has {len(data) - _SECTION.size}")

    def bad(self, why: str) -> StreamCorrupt:
        """Return the error for a value that makes no sense."""
        return StreamCorrupt(f"{self._what}: {why}")

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise self.bad(f"ends at byte {len(self._data)}, {end - len(self._data)} more belong there")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def get(self, layout: str) -> Any:
        """Return the value of one :mod:`struct` code, or a tuple for several."""
        fields = _fields(layout)
        values = fields.unpack(self._take(fields.size))
        return values if len(values) > 1 else values[0]

    def number(self, layout: str, name: str, limit: int) -> int:
        """Return a number of at most ``limit``."""
        value = int(self.get(layout))
        if value > limit:
            raise self.bad(f"{name} is {value}, at most {limit} is possible")
        return value

    def flag(self, name: str) -> bool:
        """Return a byte that is 0 or 1."""
        return bool(self.number("B", name, 1))

    def blob(self, name: str, limit: int) -> bytes:
        """Return at most ``limit`` bytes."""
        return self._take(self.number("I", f"length of {name}", limit))

    def optional(self, name: str, limit: int) -> bytes | None:
        """Return at most ``limit`` bytes, None if absent."""
        return self.blob(name, limit) if self.flag(name) else None

    def text(self, name: str, limit: int) -> str:
        """Return at most ``limit`` bytes of UTF-8, printable ones."""
        try:
            text = self.blob(name, limit).decode()
        except UnicodeDecodeError as e:
            raise self.bad(f"{name} is not UTF-8") from e
        if not text.isprintable():
            # it is shown on a user's terminal
            raise self.bad(f"{name} has characters that cannot be shown")
        return text

    def each(self, name: str, limit: int, read: Callable[[], T]) -> tuple[T, ...]:
        """Return at most ``limit`` items."""
        return tuple(read() for _ in range(self.number("I", f"number of {name}", limit)))

    def numbers(self, name: str, limit: int, code: str, each: int = 1) -> tuple[int, ...]:
        """Return at most ``limit`` groups of ``each`` numbers, in one row, as :meth:`Writer.numbers` wrote them."""
        count = self.number("I", f"number of {name}", limit)
        layout = struct.Struct(f"<{count * each}{code}")
        return layout.unpack(self._take(layout.size))

    def end(self) -> None:
        """Raise if anything is left."""
        left = len(self._data) - self._at
        if left:
            raise self.bad(f"{left} bytes behind its end")
