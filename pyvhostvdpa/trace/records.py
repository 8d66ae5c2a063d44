# SPDX-License-Identifier: MIT
"""A trace as it was recorded, as JSON lines, to be read back: for what another process recorded.

The first line has the schema and how many events were dropped, each other one
an event's fields in their order (:class:`pyvhostvdpa.trace.Event`).
"""

from __future__ import annotations

import json
from typing import TextIO

from ..base.errors import VhostVdpaError
from .recorder import Event, Trace

SCHEMA = "pyvhostvdpa/trace/records/1"


def write(trace: Trace, file: TextIO) -> None:
    """Write all records."""
    for line in ({"schema": SCHEMA, "dropped": trace.dropped}, *trace.events):
        json.dump(line, file)
        file.write("\n")


def read(file: TextIO) -> list[Event]:
    """Return what :func:`write` wrote; VhostVdpaError if that is something else."""
    return read_all(file)[0]


def read_all(file: TextIO) -> tuple[list[Event], int]:
    """Return what :func:`write` wrote, and how many events are missing; VhostVdpaError if that is something else."""
    try:
        head, *lines = [json.loads(line) for line in file]
        if not isinstance(head, dict) or head.get("schema") != SCHEMA:
            raise ValueError(f"schema {SCHEMA} is missing")
        return [Event(*line) for line in lines], int(head.get("dropped", 0))
    except (ValueError, TypeError) as e:
        raise VhostVdpaError(f"{file.name} is no file of records: {e}") from e
