# SPDX-License-Identifier: MIT
"""Which procedure a device gets: the best that it can do, unless one is asked for.

What a device offers decides, never the version of its kernel. The choice
keeps why each better procedure was passed over, which explains a long
downtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...base.errors import MissingFeature
from ..target import Target
from .base import Procedure
from .direct import Direct
from .in_place import InPlace


@dataclass(frozen=True, slots=True)
class Choice:
    """A procedure by name, and why not a better one ("" if it is the best, or was asked for)."""

    name: str
    why_not_better: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"name": self.name, "why_not_better": self.why_not_better or None}

    def __str__(self) -> str:
        return f"{self.name} ({self.why_not_better})" if self.why_not_better else self.name


IN_PLACE = "in-place"
"""Suspend, move the rings, resume: :class:`~pyvhostvdpa.device.procedure.in_place.InPlace`."""
DIRECT = "direct"
"""Reset and start again, maps kept: :class:`~pyvhostvdpa.device.procedure.direct.Direct`."""

_MADE: dict[str, Callable[[Target], Procedure]] = {IN_PLACE: InPlace, DIRECT: Direct}

NAMES = tuple(_MADE)
"""Names of the procedures that can be asked for, best first."""


def choose(target: Target, wanted: str | None = None) -> Choice:
    """Return the best procedure that a device can do, or ``wanted``.

    Raises :class:`~pyvhostvdpa.MissingFeature` if the device cannot do what is
    wanted, or if there is no such procedure.
    """
    lacking = InPlace.lacks(target)
    if wanted is None:
        return Choice(DIRECT, f"{IN_PLACE} is not possible: {lacking}") if lacking else Choice(IN_PLACE)
    if wanted not in _MADE:
        raise MissingFeature(f"there is no procedure {wanted!r}", hint=f"there are {', '.join(NAMES)}")
    if wanted == IN_PLACE and lacking:
        raise MissingFeature(
            f"{target.path} cannot do the procedure {IN_PLACE}: {lacking}",
            hint="ask for none: the device then gets the best that it can do",
        )
    return Choice(wanted)


def make(choice: Choice, target: Target) -> Procedure:
    """Return the chosen procedure for a device."""
    return _MADE[choice.name](target)
