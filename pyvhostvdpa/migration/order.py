# SPDX-License-Identifier: MIT
"""The order for the destination process of ``migrate``.

Apart from :mod:`pyvhostvdpa.migration.child`, which runs as a program and so must not be imported first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from ..net.control_queue import DEFAULT_DEADLINE
from ..trace.recorder import DEFAULT_LIMIT


@dataclass(frozen=True, slots=True)
class Order:
    """What to receive: on which devices, from which inherited socket, for how many seconds it then runs.

    ``folder`` is where it is saved in need, ``records`` a file for what passed
    the devices' doors, "" for none. ``limit`` is how many events that keeps.
    ``control_deadline`` and ``drain`` in seconds, as in
    :class:`pyvhostvdpa.migration.source.SendOptions`.
    ``procedure`` is forced on the devices, None for the best that each can do.
    """

    paths: Sequence[str]
    fd: int
    seconds: float
    folder: str
    records: str = ""
    limit: int = DEFAULT_LIMIT
    control_deadline: float = DEFAULT_DEADLINE
    drain: float = 10.0
    procedure: str | None = None

    def encode(self) -> str:
        """Return it as the process's argument."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, argument: str) -> Self:
        """Return the order in a process's argument."""
        return cls(**json.loads(argument))
