# SPDX-License-Identifier: MIT
"""Records of facts, for modules of commands that start quickly.

As ``typing.NamedTuple``, but made in a tenth of the time: :mod:`typing` takes
as long to load as ``vhost-vdpa list`` takes to run, and compiling a
constructor for each record takes as long again. dataclasses take five times
that.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple as Record
else:
    from _collections import _tuplegetter

    class _Kind(type):
        def __new__(kind, name, bases, body):
            fields = tuple(body.pop("__annotations__", {}))
            body["_fields"] = body["__match_args__"] = fields
            body["_field_defaults"] = {field: body.pop(field) for field in fields if field in body}
            getters = {field: _tuplegetter(index, field) for index, field in enumerate(fields)}
            return super().__new__(kind, name, bases or (tuple,), {**body, **getters, "__slots__": ()})

    class Record(metaclass=_Kind):
        """A tuple with named fields: annotated names, the last ones with defaults; and methods."""

        def __new__(cls, *values, **named):
            """Return a record of values by position, then by name."""
            if len(values) > len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, {len(values)} values were given")
            rest = {**cls._field_defaults, **named}
            lacking = [field for field in cls._fields[len(values) :] if field not in rest]
            unknown = named.keys() - set(cls._fields[len(values) :])
            if lacking or unknown:
                raise TypeError(f"{cls.__name__}: missing {lacking}, unknown or given twice {sorted(unknown)}")
            return tuple.__new__(cls, [*values, *(rest[field] for field in cls._fields[len(values) :])])

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

        def __getnewargs__(self):
            return tuple(self)

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **changes):
            return type(self)(**{**self._asdict(), **changes})


__all__ = ["Record"]
