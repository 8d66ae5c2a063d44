# SPDX-License-Identifier: MIT
"""A recording's summary as tables, for ``watch`` and ``report``."""

from __future__ import annotations

from typing import Any

from ..base.errors import VhostVdpaError
from ..trace import records
from ..trace.infer import Migration, pieces
from ..trace.narrate import short
from ..trace.phases import DEST_START, DT2_STOP
from ..trace.recorder import Trace
from ..trace.spans import Kind
from ..trace.summary import PARTS, Summary
from .commands import columns
from .table import table, wrap

_NOTHING = "-"
_TITLES = {"dt1": "DT1", "dt2": "DT2", "dest": "destination start"}
_PIECES = {DT2_STOP: "DT2", DEST_START: "destination start"}


def read(path: str) -> tuple[Trace, dict[str, Any]]:
    """Return a recording and what it says of itself; VhostVdpaError if the file is not one."""
    hint = "vhost-vdpa watch --trace FILE.jsonl writes one"
    try:
        with open(path, encoding="utf-8") as file:
            return records.read_recording(file)
    except OSError as e:
        raise VhostVdpaError(f"{path} cannot be read: {e.strerror}", hint=hint) from e
    except UnicodeDecodeError as e:
        raise VhostVdpaError(f"{path} is not a recording: it is not text", hint=hint) from e
    except VhostVdpaError as e:
        raise VhostVdpaError(str(e), hint=hint) from e


def render(summary: Summary) -> str:
    """Return everything: devices, migrations, what the downtimes consist of, advice, and what was lost."""
    parts = [_moves(summary), _devices(summary), _kinds(summary), _advice(summary), _notes(summary)]
    return "\n\n".join(part for part in parts if part)


def milliseconds(value: float | None) -> str:
    """Return ms for a table."""
    return _NOTHING if value is None else f"{value:,.3f}"


def _moves(summary: Summary) -> str:
    """Return the answer: one sentence per move; without a move, how many calls were recorded."""
    if summary.found.migrations:
        return "\n".join(wrap(_move(migration), "", "  ", columns()) for migration in summary.found.migrations)
    devices = summary.devices()
    if not devices:
        return "No call on a vhost-vdpa device was made."
    ioctls, messages = (sum(device[name] for device in devices) for name in ("ioctls", "messages"))
    counts = [(ioctls, "ioctl"), (messages, "IOTLB message"), (len(devices), "device")]
    many = [f"{count:,} {name}{'s' * (count != 1)}" for count, name in counts]
    return f"No migration was recorded: {many[0]} and {many[1]} on {many[2]}."


def _move(migration: Migration) -> str:
    source = short(migration.source.device)
    if migration.cancelled:
        took = milliseconds(migration.dt1_ms)
        return f"The guest stayed on {source}, which was switched to shadow rings and back (cancelled): DT1 {took} ms."
    gap = pieces(migration)
    if gap is None or migration.destination is None:
        switched = f"{source} was switched to shadow rings: DT1 {milliseconds(migration.dt1_ms)} ms"
        if migration.stop is None:
            return f"{switched}."
        return f"{switched}, and stopped: DT2 {milliseconds(migration.dt2_ms)} ms; no destination was recorded."
    parts = " + ".join(f"{_PIECES.get(piece.phase, piece.phase)} {milliseconds(piece.ms)}" for piece in gap.pieces)
    moved = f"The guest moved from {source} to {short(migration.destination.device)}"
    return f"{moved}; stop to run was {milliseconds(gap.ms)} ms = {parts}."


def _devices(summary: Summary) -> str:
    rows, processes = [], []
    for device in summary.devices():
        names = dict.fromkeys(f"{each['comm'] or '?'} ({each['pid'] or '?'})" for each in device["processes"])
        rows.append(
            [
                short(device["device"]),
                milliseconds(device["dt1_ms"]),
                milliseconds(device["dt2_ms"]),
                milliseconds(device["stop_to_run_ms"]),
                f"{device['ioctls']:,}",
                f"{device['messages']:,}",
                f"{device['failed']:,}",
            ]
        )
        processes.append(f"{short(device['device'])}: {', '.join(names) or _NOTHING}")
    head = ["device", "DT1 ms", "DT2 ms", "stop to\nrun ms", "ioctls", "messages", "failed"]
    held = wrap("; ".join(processes), "processes: ", "  ", columns())
    return f"{table(head, rows)}\n{held}" if rows else ""


def _kinds(summary: Summary) -> str:
    found_of = {
        f"{_TITLES[part]}\n{short(device)}": found
        for part in PARTS
        for device in summary.trace.devices()
        if (found := summary.kinds(device, part))
    }
    if not found_of:
        return ""
    kinds = [kind for kind in Kind if any(kind in found for found in found_of.values())]
    rows = [
        [kind.value, *(milliseconds(found[kind] / 1e6 if kind in found else None) for found in found_of.values())]
        for kind in kinds
    ]
    return "what they consist of, ms\n" + table(["", *found_of], rows)


def _advice(summary: Summary) -> str:
    return "\n".join(wrap(each.text, "- ", "  ", columns()) for each in summary.advice)


def _notes(summary: Summary) -> str:
    notes = []
    shadow = [f"{short(d)}: {how}" for d, how in _derived(summary).items()]
    if summary.found.migrations:
        notes.append(
            "derived from the calls: which rings are shadow rings (rings in a map of their own), and which device "
            "a guest moved to (the one that was open at the stop and ran next)"
        )
    notes += shadow
    if summary.lost:
        notes.append(f"{summary.lost:,} records were lost: figures may be too small, and calls are missing")
    else:
        notes.append("no record was lost")
    return "\n".join(wrap(note, "", "  ", columns()) for note in notes)


def _derived(summary: Summary) -> dict[str, str]:
    """Return what is not known of a device's rings."""
    return {
        session.device: "opened before the recording began, so its maps are not known"
        for session in summary.found.sessions
        if session.t_open is None
    }
