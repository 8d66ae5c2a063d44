# SPDX-License-Identifier: MIT
"""The ladder as a page: the table, where each row's time goes, what happened when, and on what.

Made of the report as its JSON schema ``pyvhostvdpa/ladder/1`` has it, and of
the traces; whatever the report does not have is left out, and said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ...base.files import check_folder, check_writable, replace_file
from ...trace import events, perfetto
from ...trace.phases import DEST
from ...trace.recorder import Trace
from ...trace.spans import Kind, Span, downtimes, spans
from . import stopped
from .charts import CLASSES, Bar, stacked, sums, timeline
from .page import cell, facts, figure, heading, notes, page, paragraph, wide_table, written_to
from .stopped import RowJson

TITLE = "What a live migration's downtime is made of"
_PAGE = "index.html"
_DATA = "ladder.json"
_MEASURES = {
    "dt1": ("DT1", "DT1: switching to shadow virtqueues", True),
    "dt2": ("DT2", "DT2: stopping on the source", False),
    "dest": (
        "destination start",
        "destination start: setting up and starting the devices at the destination; not part of DT1 or DT2",
        False,
    ),
}
_DWARFED = 1 / 8
"""Bars that are shorter than this part of the longest are shown again, larger."""
_NOTHING = "-"
_COUNTS = {"ioctls": "ioctls", "messages": "messages", "set_maps": "set_map", "heavy": "heavy"}
_KINDS = {
    Kind.SUSPEND: "SUSPEND",
    Kind.BASES: "GET_VRING_BASE",
    Kind.RESET: "SET_STATUS 0",
    Kind.GUEST_MEMORY: "IOTLB messages to an address space that holds guest memory",
    Kind.RINGS: "IOTLB messages to one that holds rings and buffers only",
    Kind.DRIVER_OK: "SET_STATUS with DRIVER_OK",
    Kind.REPLAY: "waiting for the answers to the control queue's commands",
    Kind.ENABLE: "SET_VRING_ENABLE",
    Kind.OTHER: "the rest of the ioctls",
    Kind.BETWEEN: "this program's own work, and the scheduler's",
}


def prepare(directory: Path) -> None:
    """Raise VhostVdpaError before a run of minutes that would end at a folder that cannot be written.

    Nothing is made yet: a run that fails leaves the page of the last one.
    """
    with written_to(directory, "vhost-vdpa ladder --report DIR"):
        check_folder(directory)
        if directory.is_dir():
            for file in (directory / _PAGE, directory / _DATA):
                check_writable(file)


def write(report: Mapping[str, Any], traces: Mapping[str, Trace], directory: Path) -> Path:
    """Write ``index.html``, ``ladder.json`` and each row's trace in two formats into ``directory``; return the page.

    ``report`` is of schema ``pyvhostvdpa/ladder/1``; ``traces`` has one run of
    each row that was possible. Raises :class:`~pyvhostvdpa.VhostVdpaError`
    if a file cannot be written.
    """
    prepare(directory)
    index = directory / _PAGE
    with written_to(directory, "vhost-vdpa ladder --report DIR"):
        directory.mkdir(parents=True, exist_ok=True)
        text, data = render(report, traces), json.dumps(report, indent=2) + "\n"
        replace_file(directory / _DATA, lambda file: file.write(data))
        for row, trace in traces.items():
            replace_file(directory / f"{row}.perfetto.json", partial(perfetto.write, trace))
            replace_file(directory / f"{row}.events.jsonl", partial(events.write, trace))
        replace_file(index, lambda file: file.write(text))
    return index


def render(report: Mapping[str, Any], traces: Mapping[str, Trace]) -> str:
    """Return the page."""
    measured = {row: _measure(trace) for row, trace in traces.items()}
    rows: Sequence[RowJson] = report["rows"]
    return page(
        TITLE,
        [
            paragraph(_conditions(report), "soft"),
            *_headline(rows),
            *stopped.section(rows),
            *_tables(rows),
            *_measured(report.get("measured") or ()),
            *_where(rows, measured),
            *_when(rows, measured),
            *_on_what(report, rows, traces),
        ],
    )


def _measure(trace: Trace) -> dict[str, dict[str, list[Span]]]:
    """Return the spans of each measure by device."""
    start = {device: spans(trace, device, DEST) for device in trace.devices()}
    return {**downtimes(trace), "dest": {device: pieces for device, pieces in start.items() if pieces}}


def _conditions(report: Mapping[str, Any]) -> str:
    parts = []
    if "devices" in report and "pairs" in report:
        parts.append(f"{report['devices']} devices of {report['pairs']} queue pairs each")
    if report.get("memory_bytes"):
        charged = f", charged as {_gib(report['charged_bytes'])}" if report.get("charged_bytes") else ""
        parts.append(f"{_gib(report['memory_bytes'])} of guest memory in {report['regions']} regions{charged}")
    if "profile" in report:
        parts.append(f"cost profile {report['profile']}" if report["profile"] else "no cost profile")
    if "clock" in report:
        parts.append(f"{report['clock']} time")
    return "; ".join(parts)


def _gib(size: int) -> str:
    return f"{size / 2**30:g} GiB"


def _headline(rows: Sequence[RowJson]) -> list[str]:
    """The best row first, then the first and the last row of the series beside each other, if both were measured."""
    by_name = {row["row"]: row for row in rows}
    found = _best(rows)
    if not {"baseline", "batch"} <= set(by_name):
        return [f'<ul class="headline">{"".join(found)}</ul>'] if found else []
    for name in ("dt1", "dt2"):
        before, after = (_milliseconds(by_name[row], name) for row in ("baseline", "batch"))
        if before and after:
            what = f"{_MEASURES[name][0]}, {_title(by_name['baseline'])} to {_title(by_name['batch'])}"
            change = f"{_seconds(before)} s → {_seconds(after)} s"
            found.append(f"<li><small>{escape(what)}</small>{change}<small>{before / after:.1f} x faster</small></li>")
    return [f'<ul class="headline">{"".join(found)}</ul>'] if found else []


def _best(rows: Sequence[RowJson]) -> list[str]:
    """How long the guest is stopped in the best row, and how much less that is than in the first."""
    stopped = [(float(row["stop_to_run_ms"]), row) for row in rows if row.get("stop_to_run_ms")]
    if len(stopped) < 2:
        return []
    (first, baseline), (best, row) = stopped[0], min(stopped, key=lambda each: each[0])
    what = f"guest stopped, {_title(baseline)} to {_title(row)}"
    change = f"{first:,.0f} ms → {best:,.1f} ms"
    return [f"<li><small>{escape(what)}</small>{change}<small>{first / best:,.0f} x less</small></li>"]


def _title(row: RowJson) -> str:
    return str(row.get("title") or row["row"])


# -- the tables ----------------------------------------------------------------


def _tables(rows: Sequence[RowJson]) -> list[str]:
    return [
        paragraph(
            "DT1 is the time that switching a device to shadow virtqueues takes, at the start of a migration; DT2 the "
            "time that stopping it on the source takes. Both as the series “vdpa-net: improve migration downtime "
            "through descriptor ASID and persistent IOTLB” defines them, whose cover letter has the published figures. "
            "DT1 is that of the worst device, DT2 the sum of all devices. Destination start is the time that setting "
            "up and starting the devices at the destination takes; it is in neither."
        ),
        _downtime_table(rows),
        notes(_remarks(rows)),
        heading("What was called, per device"),
        paragraph(
            "set_map and heavy are what the device counted: how often it was given a new address space, and how "
            "often one that held guest memory, before or after."
        ),
        _call_table(rows),
    ]


def _measured(rows: Sequence[RowJson]) -> list[str]:
    """Other programs beside the rows, from recordings of their calls."""
    if not rows:
        return []
    names = ("stop to run, ms", "DT1, ms", "DT2, ms", "destination start, ms")
    head = "<tr><th></th>" + "".join(f'<th class="n">{escape(name)}</th>' for name in names) + "</tr>"
    lines = []
    for row in rows:
        values = [row[name] for name in ("stop_to_run_ms", "dt1_ms", "dt2_ms", "dest_ms")]
        cells = (cell(_NOTHING if ms is None else f"{ms:,.1f}", "n strong") for ms in values)
        lines.append(f"<tr><th>{escape(row['title'])}</th>{''.join(cells)}</tr>")
    return [
        heading("Other programs, recorded"),
        paragraph("What vhost-vdpa watch recorded of their calls, by the same definitions."),
        wide_table(head, "\n".join(lines)),
    ]


def _downtime_table(rows: Sequence[RowJson]) -> str:
    columns = ("measured", "published", "faster")
    head = _heads({"DT1, s": columns, "DT2, s": columns, "destination start, s": ("measured",)})
    return wide_table(head, "\n".join(_downtime_row(row, rows) for row in rows))


def _downtime_row(row: RowJson, rows: Sequence[RowJson]) -> str:
    cells = []
    for name in ("dt1", "dt2"):
        ms = _milliseconds(row, name)
        mark = " *" if name == "dt1" and ms is not None and row.get("dt1_explained") is False else ""
        cells += [
            cell(_seconds(ms) + mark, "n g strong"),
            cell(_published_text(row, name)),
            cell(_faster(row, rows, name)),
        ]
    return _row(row, [*cells, cell(_seconds(_milliseconds(row, "dest")), "n g")])


def _call_table(rows: Sequence[RowJson]) -> str:
    head = _heads({short: tuple(_COUNTS.values()) for short, *_ in _MEASURES.values()})
    body = (_row(row, [cell(*each) for name in _MEASURES for each in _counts(row, name)]) for row in rows)
    return wide_table(head, "\n".join(body), "dense")


def _heads(groups: Mapping[str, Sequence[str]]) -> str:
    """Two rows of heads: groups of columns, and the columns."""
    above = "".join(f'<th class="m g" colspan="{len(columns)}">{escape(name)}</th>' for name, columns in groups.items())
    below = "".join(
        f'<th class="{"n" if place else "n g"}">{escape(column)}</th>'
        for columns in groups.values()
        for place, column in enumerate(columns)
    )
    return f"<tr><th></th>{above}</tr><tr><th></th>{below}</tr>"


def _row(row: RowJson, cells: Sequence[str]) -> str:
    kind = "" if _milliseconds(row, "dt1") is not None else ' class="no"'
    return f"<tr{kind}><th>{escape(_title(row))}</th>{''.join(cells)}</tr>"


def _milliseconds(row: RowJson, name: str) -> float | None:
    value = (row.get(f"{name}_ms") or {}).get("worst" if name == "dt1" else "sum")
    return None if value is None else float(value)


def _seconds(ms: float | None) -> str:
    return _NOTHING if ms is None else f"{ms / 1000:.3f}"


def _published(row: RowJson, name: str) -> tuple[float, float] | None:
    """What was published, in ns: low and high."""
    value = (row.get("published") or {}).get(f"{name}_s")
    if value is None:
        return None
    low, high = value if isinstance(value, list | tuple) else (value, value)
    return low * 1e9, high * 1e9


def _published_text(row: RowJson, name: str) -> str:
    found = _published(row, name)
    if found is None:
        return _NOTHING
    return " to ".join(f"{ns / 1e9:g}" for ns in dict.fromkeys(found))


def _faster(row: RowJson, rows: Sequence[RowJson], name: str) -> str:
    baseline = next((_milliseconds(each, name) for each in rows if each["row"] == "baseline"), None)
    own = _milliseconds(row, name)
    return f"{baseline / own:.1f} x" if baseline and own else _NOTHING


def _counts(row: RowJson, name: str) -> list[tuple[str, str]]:
    """The counts with the classes of their cells; a device that does not count has question marks."""
    each = [(row.get(what) or {}).get(name) for what in _COUNTS]
    unknown = _NOTHING if all(value is None for value in each) else "?"
    return [(unknown if v is None else str(v), "n" if place else "n g") for place, v in enumerate(each)]


def _remarks(rows: Sequence[RowJson]) -> list[str]:
    found = []
    if any(row.get("dt1_explained") is False and _milliseconds(row, "dt1") is not None for row in rows):
        found.append(
            "* The calls of these rows do not account for the published DT1. It is printed as it was measured, and "
            "nothing was tuned to it."
        )
    for row in rows:
        if row.get("impossible"):
            found.append(f"{_title(row)}: not possible on these devices: {row['impossible']}")
        elif row.get("left_out"):
            found += [f"{_title(row)}: ran without {what}: {why}" for what, why in row["left_out"].items()]
        if row.get("alike") is False:
            found.append(f"{_title(row)}: not every device made the same calls; those of the first are shown")
        if row.get("note"):
            found.append(f"{_title(row)}: {row['note']}")
    if any(text == "?" for row in rows for name in _MEASURES for text, _ in _counts(row, name)):
        found.append("?: these devices do not count")
    return found


# -- where the time goes -----------------------------------------------------------


def _where(rows: Sequence[RowJson], measured: Mapping[str, Any]) -> list[str]:
    parts = [
        heading("Where the time goes"),
        paragraph("One run of each row, from the trace of its system calls."),
        _legend(),
    ]
    for name, (short, what, worst) in _MEASURES.items():
        if not any(each[name] for each in measured.values()):
            continue
        bars = [_bar(row, measured.get(row["row"]), name, worst) for row in rows]
        marks = " A tick or bracket marks what was published." if any(bar.published for bar in bars) else ""
        caption = f"{what}; {'the worst device' if worst else 'the sum of all devices'}.{marks}"
        parts.append(figure(stacked(bars, f"{short} by row and kind of call"), caption))
        parts += _larger(short, bars)
        parts.append(_numbers(short, bars))
    return parts


def _larger(short: str, bars: Sequence[Bar]) -> list[str]:
    """The short bars again, on a scale of their own, if they are dwarfed by the long ones."""
    longest = max(bar.total for bar in bars)
    small = [bar for bar in bars if 0 < bar.total < longest * _DWARFED]
    if len(small) < 2:
        return []
    return [figure(stacked(small, f"{short} of the short rows by kind of call"), f"{short}: the short rows, larger.")]


def _legend() -> str:
    items = "".join(
        f'<li title="{escape(_KINDS[kind])}"><i class="{name}"></i>{escape(kind.value)}</li>'
        for kind, name in CLASSES.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _bar(row: RowJson, spans_of: Mapping[str, Any] | None, name: str, worst: bool) -> Bar:
    parts = sums(spans_of[name], worst) if spans_of else {}
    absent = "" if parts else "not possible on these devices" if row.get("impossible") else "not measured"
    return Bar(_title(row), parts, _published(row, name), absent)


def _numbers(short: str, bars: Sequence[Bar]) -> str:
    """The same as a table, for calculations."""
    kinds = [kind for kind in Kind if any(bar.parts.get(kind) for bar in bars)]
    head = "<tr><th></th>" + "".join(f'<th class="n">{escape(name)}</th>' for name in [*kinds, "all"]) + "</tr>"
    body = "".join(
        f"<tr><th>{escape(bar.label)}</th>"
        + "".join(cell(f"{bar.parts.get(kind, 0) / 1e6:.2f}") for kind in kinds)
        + cell(f"{bar.total / 1e6:.2f}", "n strong")
        + "</tr>"
        for bar in bars
        if bar.parts
    )
    return f"<details><summary>{short} in ms</summary>{wide_table(head, body, 'dense')}</details>"


# -- what happened when --------------------------------------------------------------


def _when(rows: Sequence[RowJson], measured: Mapping[str, Any]) -> list[str]:
    parts = [
        heading("What happened when"),
        paragraph(
            "Each row on a scale of its own, each device from its own begin; the devices follow one another. Above the "
            "calls is the phase. Rest the pointer on a span for the call, its arguments and its time."
        ),
        _legend(),
    ]
    for row in rows:
        if row["row"] not in measured:
            continue
        figures = [
            figure(timeline(lanes, f"{_MEASURES[name][0]} of {_title(row)} over time"), _MEASURES[name][1])
            for name, lanes in measured[row["row"]].items()
            if lanes
        ]
        parts.append(f'<section class="row">{heading(_title(row), 3)}{"".join(figures)}</section>')
    return parts


# -- on what ---------------------------------------------------------------------


def _on_what(report: Mapping[str, Any], rows: Sequence[RowJson], traces: Mapping[str, Trace]) -> list[str]:
    place = dict(report.get("environment") or {})
    devices = place.pop("devices", {})
    parts = [heading("On what"), facts({**place, "clock": report.get("clock"), "cost profile": report.get("profile")})]
    named = devices.items() if isinstance(devices, Mapping) else enumerate(devices)
    for name, device in named:
        parts += [heading(f"Device: {name}", 3), facts(device if isinstance(device, Mapping) else {"": device})]
    links = "".join(_files(_title(row), escape(row["row"])) for row in rows if row["row"] in traces)
    files = f'<ul class="notes"><li>All figures: <a href="ladder.json">ladder.json</a></li>{links}</ul>'
    total = sum(len(trace.events) for trace in traces.values())
    return [*parts, heading("Beside this page"), files, paragraph(f"{total:,} events were recorded.", "soft")]


def _files(title: str, row: str) -> str:
    timeline_file, events_file = f"{row}.perfetto.json", f"{row}.events.jsonl"
    return (
        f'<li>{escape(title)}: <a href="{timeline_file}">{timeline_file}</a> (open it at ui.perfetto.dev), '
        f'<a href="{events_file}">{events_file}</a> (trace events of QEMU, one per line)</li>'
    )
