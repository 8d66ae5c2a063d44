# SPDX-License-Identifier: MIT
"""What the ladder says of the backend features that a recorded program left unused."""

from __future__ import annotations

from dataclasses import replace

from ...base.uapi import BackendFeature, name_list
from ...trace.advice import NOT_ACKNOWLEDGED
from ...trace.sessions import DeviceSession
from ...trace.summary import Summary
from .rows import LADDER_ROWS, spell


def with_savings(summary: Summary) -> Summary:
    """Return a summary whose advice on features that were not acknowledged has the ladder's published figures."""
    advice = []
    for each in summary.advice:
        migration = summary.found.last(each.device) if each.id == NOT_ACKNOWLEDGED else None
        said = saved(migration.source) if migration is not None else ""
        advice.append(replace(each, text=f"{each.text} {said}") if said else each)
    return replace(summary, advice=advice)


def saved(session: DeviceSession) -> str:
    """Return the published figures of the last row that a device could do and its program did not; "" without one."""
    taken = BackendFeature(session.backend_acknowledged or 0)
    there = BackendFeature(session.backend_offered or 0) | taken
    published = {row: plan for row, plan in LADDER_ROWS.items() if plan.published is not None}
    possible = [plan for plan in published.values() if plan.use & ~there == 0 and plan.use & ~taken]
    if not possible:
        return ""
    first, last = published["baseline"].published, possible[-1].published
    assert first is not None
    assert last is not None
    names = " and ".join(name_list(possible[-1].use & ~taken))
    return (
        f"The series' table (two devices, a guest of 128 GB) has DT1 {spell(first.dt1_s)} s and DT2 "
        f"{spell(first.dt2_s)} s for baseline QEMU, {spell(last.dt1_s)} s and {spell(last.dt2_s)} s with {names}."
    )
