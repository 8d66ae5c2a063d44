# SPDX-License-Identifier: MIT
"""A recording of another program as a row of the ladder."""

from __future__ import annotations

from ...base.errors import VhostVdpaError
from ...trace.downtime import DT1, DT2, total, worst
from ...trace.phases import DEST
from ...trace.summary import Summary
from .report import Counts, MeasuredRow

_PARTS = {"dt1": DT1, "dt2": DT2, "dest": DEST}


def measured_row(title: str, recording: str, summary: Summary) -> MeasuredRow:
    """Return the row of a recording's last migration: the worst device's DT1, the sums of DT2 and of the starts.

    Stop to run is from the first device's stop to the last device's start. VhostVdpaError if nothing of a migration
    was recorded.
    """
    latest = {migration.source.device: migration for migration in summary.found.migrations}.values()
    if not latest:
        raise VhostVdpaError(
            f"{recording} has no migration: no device was switched to shadow rings or moved to another one",
            hint="vhost-vdpa report RECORDING shows what it has",
        )
    dt1 = [each.dt1_ms for each in latest if each.dt1_ms is not None]
    dt2 = [each.dt2_ms for each in latest if each.dt2_ms is not None]
    moved = [(each.stop, each.start) for each in latest if each.stop is not None and each.start is not None]
    starts = [
        cost.ms
        for each in latest
        if each.destination is not None and (cost := summary.cost(each.destination.device, DEST[0])) is not None
    ]
    gap = max(start.t_last for _, start in moved) - min(stop.t_first for stop, _ in moved) if moved else None
    return MeasuredRow(
        title=title,
        recording=recording,
        dt1_ms=worst(dt1) if dt1 else None,
        dt2_ms=total(dt2) if dt2 else None,
        dest_ms=total(starts) if starts else None,
        stop_to_run_ms=None if gap is None else gap / 1e6,
        counts={name: _counts(summary, phases) for name, phases in _PARTS.items()},
        lost=summary.lost,
    )


def _counts(summary: Summary, phases: tuple[str, ...]) -> Counts:
    """Return the calls of the first device that made any in these phases."""
    for device in summary.trace.devices():
        events = [event for event in summary.trace.events if event.device == device and event.phase in phases]
        if events:
            return Counts(
                ioctls=sum(event.event.startswith("VHOST_") for event in events),
                messages=sum(event.event.startswith("IOTLB_") for event in events),
            )
    return Counts(0, 0)
