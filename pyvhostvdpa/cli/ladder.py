# SPDX-License-Identifier: MIT
"""``vhost-vdpa ladder``."""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Self

from ..base.errors import MissingFeature
from ..bench.ladder.measured import measured_row
from ..bench.ladder.report import Counts, LadderReport, MeasuredRow, RowResult
from ..bench.ladder.rows import LADDER_ROWS, LadderRow, ladder_row, spell
from ..bench.ladder.run import LadderOptions, ladder
from ..bench.ladder.stage import Given, Simulated, Supply
from ..bench.page import ladder as report_page
from ..device.shadowing import NAMES as SHADOWS
from ..memory.guest import PAGE_SIZE
from ..trace.summary import summarize
from . import answer, recording
from .failure import report as tell
from .options import DEVICE, add_json, add_shadow, refuse_unused
from .table import table
from .units import SIZES, count, guest_memory, size

_DOWNTIMES = ("dt1", "dt2", "dest")
_UNEXPLAINED = (
    "* DT1 of these rows is not explained by the calls that they make: nothing in the row changes the source's switch "
    "by as much as was published (vhost-vdpa help ladder). Measured as it comes, not tuned."
)
EPILOG = f"""\
{SIZES}

examples:
  vhost-vdpa ladder --report out/               all rows on vdpa_hwsim, a page
  vhost-vdpa ladder --on vdpa0 vdpa1 --rows baseline,ours
  vhost-vdpa ladder --memory 1G --charge 128G   a multiple of the memory
  vhost-vdpa ladder --with "QEMU=qemu.jsonl"    a recording as a row beside them

exit status: 0 if every frame arrived and all devices of a row made the same calls; 1 if not, or if it failed; 2 wrong
usage; 130 if interrupted"""
DESCRIPTION = (
    "Migrate a guest with traffic once per row of the series' table, each row with the ioctls and "
    "IOTLB messages of QEMU with those patches, and print the downtimes beside the published ones. Devices are "
    "made and deleted by vdpa_hwsim; with --on, those given are used, and reset: run it on devices that are "
    "not in use."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add = parser.add_argument
    add("--devices", metavar="N", type=count, default="2", help="NICs of the guest (default %(default)s)")
    add("--pairs", metavar="N", type=count, default="2", help="queue pairs of each (default %(default)s)")
    add("--memory", metavar="SIZE", type=guest_memory, default="1G", help="guest memory (default %(default)s)")
    add("--charge", metavar="SIZE", type=size, default="128G", help="what it is charged as (default %(default)s)")
    add("--regions", metavar="N", type=count, default="4", help="pieces of guest memory (default %(default)s)")
    add("--profile", metavar="NAME", default="series-2023", help="cost profile of vdpa_hwsim (default %(default)s)")
    parser.add_argument(
        "--rows",
        type=_rows,
        default=",".join(LADDER_ROWS),
        metavar="ROW,…",
        help=f"which of: {', '.join(LADDER_ROWS)}, with commas between them (default: all)",
    )
    parser.add_argument(
        "--repeat", metavar="N", type=count, default="1", help="runs of each row, the median counts (default 1)"
    )
    parser.add_argument(
        "--on",
        nargs="+",
        metavar="DEV",
        help=f"run on these devices instead ({DEVICE}): the sources, then as many destinations",
    )
    parser.add_argument(
        "--with",
        dest="recordings",
        metavar="[TITLE=]RECORDING",
        nargs="+",
        default=[],
        help="rows from what 'vhost-vdpa watch --trace FILE.jsonl' recorded",
    )
    parser.add_argument("--report", metavar="DIR", type=Path, help="write a page with charts, and the traces, there")
    add_shadow(parser, SHADOWS)
    add_json(parser)


def _rows(text: str) -> list[LadderRow]:
    try:
        return [ladder_row(row.strip()) for row in text.split(",")]
    except MissingFeature as e:
        raise argparse.ArgumentTypeError(f"{e}; {e.hint}") from e


_SILENCE = 10.0
"""Seconds after which a step that is still under way is repeated."""


class _RowProgress:
    """What begins, with the time since the start; a long step is repeated every few seconds."""

    def __init__(self) -> None:
        self._start = self._began = time.monotonic()
        self._words = ""
        self._changed = threading.Condition()
        self._ended = False
        self._reminder = threading.Thread(target=self._remind, name="ladder-progress")

    def __enter__(self) -> Self:
        self._reminder.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._reminder.join()

    def __call__(self, words: str) -> None:
        with self._changed:
            self._began, self._words = time.monotonic(), words
            self._changed.notify()
        tell(f"[{self._began - self._start:7.1f} s] {words}")

    def _remind(self) -> None:
        with self._changed:
            while not self._ended:
                if not self._changed.wait(_SILENCE) and self._words:
                    now = time.monotonic()
                    tell(f"[{now - self._start:7.1f} s]   still: {self._words}, for {now - self._began:.0f} s")


def run(arguments: argparse.Namespace) -> int:
    """Run the ladder and print it."""
    memory = -(-arguments.memory // PAGE_SIZE) * PAGE_SIZE
    supply: Supply
    measured = [_measured(each) for each in arguments.recordings]
    if arguments.report:
        report_page.prepare(arguments.report)
    if arguments.on:
        refuse_unused(arguments, ("devices", "charge", "profile"), "with --on: these devices are as they are")
        supply = Given(arguments.on)
    else:
        supply = Simulated(arguments.devices, arguments.pairs, arguments.profile, memory, arguments.charge)
    options = LadderOptions(
        pairs=arguments.pairs,
        memory=memory,
        regions=arguments.regions,
        rows=arguments.rows,
        repeat=arguments.repeat,
        shadow=arguments.shadow,
    )
    with _RowProgress() as progress:
        report, traces = ladder(supply, options, progress)
    report = replace(report, measured=measured)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else _render(report))
    if arguments.report:
        page = report_page.write(report.to_dict(), traces, arguments.report)
        tell(f"vhost-vdpa: the report is in {page}")
    return 0 if report.sound else 1


def _measured(text: str) -> MeasuredRow:
    """Read a recording before minutes are spent on the rows that it is to stand beside."""
    title, mark, path = text.rpartition("=")
    trace, about = recording.read(path)
    summary = summarize(trace, about)
    names = dict.fromkeys(session.comm for session in summary.found.sessions if session.comm)
    return measured_row((title if mark else ", ".join(names)) + ", measured", path, summary)


def _render(report: LadderReport) -> str:
    parts = [answer.ladder(report), _conditions(report), _downtimes(report), _parts(report), _calls(report)]
    more = f"{answer.clock(report.clock == 'virtual')}\nnext: vhost-vdpa help ladder (what each row does)".lstrip()
    return "\n\n".join(part for part in [*parts, *_notes(report), more] if part)


def _conditions(report: LadderReport) -> str:
    place = report.environment
    charged = f", charged as {report.charged / 2**30:g} GiB" if report.charged else ""
    profile = f"costs: profile {report.profile} of vdpa_hwsim" if report.profile else "costs: the devices' own"
    return (
        f"{report.devices} devices of {report.pairs} pairs and a control queue each, "
        f"{report.memory / 2**30:g} GiB of guest memory in {report.regions} regions{charged}\n"
        f"{profile}; {report.clock} time; kernel {place['kernel']}, {place['accelerator']}"
    )


def _downtimes(report: LadderReport) -> str:
    rows = []
    for row in report.rows:
        published = row.plan.published
        faster = row.speedup(report.baseline)
        mark = "" if published is None or published.dt1_explained or row.dt1_ms is None else " *"
        rows.append(
            [
                row.plan.title,
                _gap(row),
                _seconds(row.dt1_ms) + mark,
                _published(published.dt1_s if published else None),
                _times(faster["dt1"]),
                _seconds(row.dt2_ms),
                _published(published.dt2_s if published else None),
                _times(faster["dt2"]),
            ]
        )
    for other in report.measured:
        gap = "-" if other.stop_to_run_ms is None else f"{other.stop_to_run_ms:,.1f}"
        rows.append([other.title, gap, _seconds(other.dt1_ms), "-", "-", _seconds(other.dt2_ms), "-", "-"])
    return table(["", "stop to run ms", "DT1 s", "published", "faster", "DT2 s", "published", "faster"], rows)


def _gap(row: RowResult) -> str:
    if row.stop_to_run_ms is None:
        return "-"
    times = row.ratio()["stop_to_run"]
    return f"{row.stop_to_run_ms:,.1f}" + (f" ({times:,.1f} x floor)" if times is not None else "")


def _seconds(ms: float | None) -> str:
    return "-" if ms is None else f"{ms / 1000:.3f}"


def _published(value: float | tuple[float, float] | None) -> str:
    return "-" if value is None else spell(value)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} x"


def _parts(report: LadderReport) -> str:
    """What stop to run consists of, and what the devices take of it whatever is done."""
    rows = []
    for row in report.rows:
        floor = row.floor
        if row.stop_to_run_ms is None:
            continue
        parts = ", ".join(f"{name} {ms:,.2f}" for name, ms in row.parts().items())
        dt1 = row.ratio()["switch"]
        switch = "-" if floor is None else f"{floor.switch:,.2f}" + ("" if dt1 is None else f" (DT1 is {dt1:,.1f} x)")
        rows.append([row.plan.row, switch, "-" if floor is None else f"{floor.stop_to_run:,.2f}", parts])
    if not rows:
        return ""
    return "ms that the devices take for themselves, and what stop to run consists of\n" + table(
        ["", "floor of a switch", "of stop to run", "stop to run"], rows
    )


def _calls(report: LadderReport) -> str:
    rows = [[row.plan.row, *(_three(row.counts(downtime)) for downtime in _DOWNTIMES)] for row in report.rows]
    rows += [[row.title, *(_three(row.counts[downtime]) for downtime in _DOWNTIMES)] for row in report.measured]
    return "per device: ioctls / messages / set_maps / heavy set_maps\n" + table(
        ["", "DT1", "DT2", "destination"], rows
    )


def _three(counts: Counts | None) -> str:
    if counts is None:
        return "-"
    each = (counts.ioctls, counts.messages, counts.set_maps, counts.heavy)
    return " / ".join("?" if value is None else str(value) for value in each)


def _notes(report: LadderReport) -> list[str]:
    notes = []
    if any(
        row.dt1_ms is not None and row.plan.published and not row.plan.published.dt1_explained for row in report.rows
    ):
        notes.append(_UNEXPLAINED)
    notes += [f"{row.plan.row} is not possible here: {row.impossible}" for row in report.rows if row.impossible]
    notes += [
        f"{row.plan.row} ran without {switch}: {why}"
        for row in report.rows
        if not row.impossible
        for switch, why in row.left_out.items()
    ]
    notes += [f"{row.plan.row}: the devices' calls differ" for row in report.rows if row.runs and not row.alike]
    notes += [
        f"{row.title}: {row.lost:,} records were lost: its figures may be too small"
        for row in report.measured
        if row.lost
    ]
    if report.measured or any(
        counts and counts.set_maps is None for counts in (row.counts("dt1") for row in report.rows)
    ):
        notes.append("?: these devices do not count")
    notes.append(_frames(report))
    return notes


def _frames(report: LadderReport) -> str:
    frames = [run.frames for row in report.rows for run in row.runs]
    total = {
        name: sum(getattr(each, name) for each in frames)
        for name in ("sent", "received", "lost", "duplicated", "corrupted")
    }
    return "frames: " + ", ".join(f"{value:,} {name}" for name, value in total.items())
