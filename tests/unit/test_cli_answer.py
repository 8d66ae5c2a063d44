"""The first sentence of each result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pyvhostvdpa.bench.ladder.report import Floor, LadderReport, RowResult, Run
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS
from pyvhostvdpa.cli import answer
from pyvhostvdpa.guest.protocol import FrameCounts
from pyvhostvdpa.migration.report import STAYED, MigrationReport, ReceivedReport
from pyvhostvdpa.migration.sent import SendResult
from pyvhostvdpa.trace.downtime import Downtimes
from pyvhostvdpa.trace.gap import Piece, StopToRun

FRAMES = FrameCounts(1_195_109, 1_195_109, 0, 0, 0, 0)
PLACE = {
    "accelerator": "tcg",
    "devices": {"source": {"path": "/dev/vhost-vdpa-0"}, "destination": {"path": "/dev/vhost-vdpa-1"}},
}


def moved(**changes: Any) -> MigrationReport:
    made = MigrationReport(
        outcome="migrated",
        sent=SendResult(),
        frames=FRAMES,
        bad_pages=0,
        parts={},
        downtimes=Downtimes({"a": 23.4}, {"a": 4.7}),
        gap_switch_ms=None,
        gap_back_ms=None,
        gap_move_ms=None,
        phases={},
        drops={},
        environment=PLACE,
        stopped=StopToRun((Piece("gap.pause", 0, 46_020_000),)),
    )
    return replace(made, **changes)


def one_line(text: str) -> str:
    assert all(len(line) <= 80 for line in text.splitlines())
    return " ".join(text.split())


def test_migration_is_one_sentence_with_both_devices_frames_and_times() -> None:
    assert one_line(answer.migration(moved())) == (
        "Moved the guest from /dev/vhost-vdpa-0 to /dev/vhost-vdpa-1: 1,195,109 frames, none lost; it was stopped for "
        "46 ms, the switch to shadow virtqueues (DT1) took 23 ms and the stop (DT2) took 4.7 ms."
    )


def test_migration_names_what_was_lost() -> None:
    said = one_line(answer.migration(moved(frames=FrameCounts(1000, 997, 3, 0, 1, 0))))
    assert "1,000 frames, 3 lost, 1 corrupted; it" in said


def test_migration_that_did_not_happen_reports_where_the_guest_is() -> None:
    said = answer.migration(moved(outcome=STAYED, stopped=None))
    assert one_line(said) == "The guest stayed on /dev/vhost-vdpa-0: 1,195,109 frames, none lost."


def test_received_guest_is_one_sentence_with_source_devices_and_frames() -> None:
    place = {"devices": {"a": {"path": "/dev/vhost-vdpa-1"}, "b": {"path": "/dev/vhost-vdpa-3"}}}
    report = ReceivedReport("id", "unix:/run/there", FRAMES, 0, {}, None, "", "", {}, {}, place)
    assert one_line(answer.received(report)) == (
        "The guest from unix:/run/there ran on /dev/vhost-vdpa-1, /dev/vhost-vdpa-3: 1,195,109 frames, none lost."
    )


def test_virtual_time_is_marked() -> None:
    said = one_line(answer.migration(moved(environment={**PLACE, "accelerator": "icount"})))
    assert "stopped for 46 virtual ms" in said
    assert "took 4.7 virtual ms" in said
    assert "virtual" in answer.clock(True)
    assert answer.clock(False) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0.0071, "0.007 ms"), (8.66, "8.7 ms"), (46.02, "46 ms"), (61931.1, "61,931 ms")]
)
def test_milliseconds_of_a_sentence_have_few_digits(value: float, text: str) -> None:
    assert answer.ms(value) == text


def row(name: str, ms: float) -> RowResult:
    gap = StopToRun((Piece("gap.pause", 0, round(ms * 1e6)),))
    downtimes = {"dt1": [1.0], "dt2": [1.0], "dest": [1.0]}
    return RowResult(
        LADDER_ROWS[name], [Run(downtimes, {"dt1": [], "dt2": [], "dest": []}, FRAMES, gap, Floor(1.0, 1.0))]
    )


def ladder(*rows: RowResult, clock: str = "virtual") -> LadderReport:
    return LadderReport(
        rows=rows,
        devices=2,
        pairs=2,
        memory=1 << 30,
        regions=4,
        charged=None,
        profile=None,
        clock=clock,
        environment={},
    )


def test_ladder_leads_with_the_best_row() -> None:
    names = list(LADDER_ROWS)
    first, last = LADDER_ROWS[names[0]].title, LADDER_ROWS[names[-1]].title
    said = one_line(answer.ladder(ladder(row(names[0], 61_931.1), row(names[-1], 8.7))))
    assert said == (
        f"The guest is stopped for 8.7 virtual ms with {last!r}, 7,119 times less than the 61,931 virtual ms of "
        f"{first!r}."
    )


def test_ladder_without_a_row_is_reported() -> None:
    assert answer.ladder(ladder(RowResult(LADDER_ROWS["baseline"], impossible="no SUSPEND"))).startswith("No row")
