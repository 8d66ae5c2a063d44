# SPDX-License-Identifier: MIT
"""A trace as it was recorded, as JSON lines, to be read back: for what another process recorded.

The first line has the schema and how many events were dropped, each other one
an event's fields in their order (:class:`pyvhostvdpa.trace.Event`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TextIO

from ..base.errors import VhostVdpaError
from .recorder import DEFAULT_LIMIT, Event, Trace

SCHEMA = "pyvhostvdpa/trace/records/1"


def write(trace: Trace, file: TextIO, about: Mapping[str, Any] | None = None) -> None:
    """Write all records. ``about`` describes a recording, under that name in the first line."""
    head = {"schema": SCHEMA, "dropped": trace.dropped, **({"about": about} if about else {})}
    for line in (head, *trace.events):
        json.dump(line, file)
        file.write("\n")


def read(file: TextIO) -> list[Event]:
    """Return what :func:`write` wrote; VhostVdpaError if that is something else."""
    return read_all(file)[0]


def read_all(file: TextIO) -> tuple[list[Event], int]:
    """Return what :func:`write` wrote, and how many events are missing; VhostVdpaError if that is something else."""
    trace, _ = read_recording(file)
    return trace.events, trace.dropped


def read_recording(file: TextIO) -> tuple[Trace, dict[str, Any]]:
    """Return what :func:`write` wrote, and what it says of itself; VhostVdpaError if it is something else."""
    try:
        head, *lines = [json.loads(line) for line in file] or [None]
        if not isinstance(head, dict) or head.get("schema") != SCHEMA:
            raise ValueError(f"schema {SCHEMA} is missing")
        trace = Trace(max(DEFAULT_LIMIT, len(lines)))
        trace.events = [Event(*line) for line in lines]
        trace.dropped = int(head.get("dropped", 0))
        return trace, dict(head.get("about", {}))
    except (ValueError, TypeError) as e:
        raise VhostVdpaError(f"{file.name} is not a recording: {e}") from e
