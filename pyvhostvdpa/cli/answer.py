# SPDX-License-Identifier: MIT
"""The first words of a result: one sentence that says what came out, before any table."""

from __future__ import annotations

from .table import wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..bench.ladder.report import LadderReport, RowResult
    from ..guest.protocol import FrameCounts
    from ..migration.report import MigrationReport, ReceivedReport, SentReport

_VIRTUAL = "icount"


def wrapped(text: str) -> str:
    """Return a sentence in lines of 80 columns."""
    return wrap(text, "", "", 80)


def is_virtual(environment: Mapping[str, Any]) -> bool:
    """Return whether times are virtual: the VM's clock counts instructions."""
    return environment.get("accelerator") == _VIRTUAL


def ms(value: float, virtual: bool = False) -> str:
    """Return milliseconds for a sentence: three digits, and marked if they are virtual."""
    digits = max(0, 2 - len(str(int(value)))) if value >= 1 else 3
    return f"{value:,.{digits}f} {'virtual ' if virtual else ''}ms"


def lost(frames: FrameCounts) -> str:
    """Return how many frames there were and what became of them."""
    bad = [f"{value:,} {name}" for name, value in _bad(frames) if value]
    return f"{frames.sent:,} frames, {', '.join(bad) or 'none lost'}"


def _bad(frames: FrameCounts) -> Sequence[tuple[str, int]]:
    return (
        ("lost", frames.lost),
        ("duplicated", frames.duplicated),
        ("corrupted", frames.corrupted),
        ("out of order", frames.reordered),
    )


def migration(report: MigrationReport) -> str:
    """Return what came of a migration on this machine."""
    virtual = is_virtual(report.environment)
    paths = {role: each["path"] for role, each in report.environment["devices"].items()}
    source, destination = paths.get("source", "the source"), paths.get("destination", "the destination")
    if report.stopped is None:
        return wrapped(f"The guest stayed on {source}: {lost(report.frames)}.")
    costs = [("the switch to shadow virtqueues (DT1)", report.downtimes.dt1), ("the stop (DT2)", report.downtimes.dt2)]
    parts = " and ".join(f"{name} took {ms(value, virtual)}" for name, value in costs if value is not None)
    moved = f"Moved the guest from {source} to {destination}: {lost(report.frames)}; "
    return wrapped(f"{moved}it was stopped for {ms(report.stopped.ms, virtual)}{f', {parts}' if parts else ''}.")


def sent(report: SentReport, stayed: bool) -> str:
    """Return what came of sending a guest; what the destination made of its frames is known there."""
    devices = ", ".join(each["path"] for each in report.environment["devices"].values())
    if stayed:
        return wrapped(f"The guest stayed on {devices}: {lost(report.frames)}.")
    cost = report.downtimes.dt2
    took = f"; stopping it took {ms(cost, is_virtual(report.environment))} (DT2)" if cost is not None else ""
    return wrapped(f"Sent the guest from {devices}: {report.frames.sent:,} frames until then{took}.")


def received(report: ReceivedReport) -> str:
    """Return what came of receiving a guest."""
    devices = ", ".join(each["path"] for each in report.environment["devices"].values())
    return wrapped(f"The guest from {report.source} ran on {devices}: {lost(report.frames)}.")


def ladder(report: LadderReport) -> str:
    """Return what the best row gains on the first one that ran."""
    rows = [row for row in report.rows if row.stop_to_run_ms is not None]
    virtual = report.clock == "virtual"
    if not rows:
        return "No row of the ladder is possible on these devices."
    best = min(rows, key=_stopped)
    first = rows[0]
    said = f"The guest is stopped for {ms(_stopped(best), virtual)} with {best.plan.title!r}"
    if first is not best:
        said += f", {_stopped(first) / _stopped(best):,.0f} times less than the {ms(_stopped(first), virtual)} of "
        said += repr(first.plan.title)
    return wrapped(f"{said}.")


def _stopped(row: RowResult) -> float:
    return row.stop_to_run_ms or 0.0


def clock(virtual: bool) -> str:
    """Return a line on what the times are; "" if they are what a clock on the wall shows."""
    return "all times are virtual: the VM's clock counts instructions (tools/lab run --icount)" if virtual else ""
