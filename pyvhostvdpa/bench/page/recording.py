# SPDX-License-Identifier: MIT
"""A recording as a page: what each device's downtimes consist of, what happened when, and what would shorten it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ...base.files import check_folder, check_writable, replace_file
from ...trace import perfetto, records
from ...trace.narrate import short
from ...trace.spans import Span, by_kind, spans
from ...trace.summary import PARTS, Summary
from .charts import CLASSES, Bar, stacked, timeline
from .page import cell, facts, figure, heading, notes, page, paragraph, wide_table, written_to

TITLE = "Where a migration's time goes: calls on vDPA devices, recorded"
_PAGE, _DATA, _TRACE, _RECORDS = "index.html", "watch.json", "recording.perfetto.json", "recording.jsonl"
_TITLES = {
    "dt1": "DT1: switching to shadow virtqueues",
    "dt2": "DT2: stopping on the source",
    "dest": "destination start: the devices there are set up and started",
}
_NOTHING = "-"


def prepare(directory: Path) -> None:
    """Raise VhostVdpaError if the page could not be written there. Nothing is made yet."""
    with written_to(directory, "vhost-vdpa report RECORDING --report DIR"):
        check_folder(directory)
        if directory.is_dir():
            for name in (_PAGE, _DATA, _TRACE, _RECORDS):
                check_writable(directory / name)


def write(summary: Summary, directory: Path) -> Path:
    """Write the page, its figures, and the recording in two formats into a folder; return the page.

    VhostVdpaError if a file cannot be written.
    """
    prepare(directory)
    with written_to(directory, "vhost-vdpa report RECORDING --report DIR"):
        directory.mkdir(parents=True, exist_ok=True)
        data = json.dumps(summary.to_dict(), indent=2) + "\n"
        text = render(summary)
        replace_file(directory / _DATA, lambda file: file.write(data))
        replace_file(directory / _TRACE, partial(perfetto.write, summary.trace))
        replace_file(directory / _RECORDS, lambda file: records.write(summary.trace, file, summary.about))
        replace_file(directory / _PAGE, lambda file: file.write(text))
    return directory / _PAGE


def render(summary: Summary) -> str:
    """Return the page."""
    measured = {
        part: {device: found for device in summary.trace.devices() if (found := spans(summary.trace, device, phases))}
        for part, phases in PARTS.items()
    }
    return page(
        TITLE,
        [
            *_headline(summary),
            _devices(summary.devices()),
            *_where(measured),
            heading("What would shorten it"),
            notes([each.text for each in summary.advice] or ["nothing that the calls show"]),
            *_when(measured),
            *_on_what(summary),
        ],
    )


def _headline(summary: Summary) -> list[str]:
    found = []
    for each in summary.to_dict()["migrations"]:
        if each["stop_to_run_ms"] is not None:
            what = f"stop to run, {short(each['source'])} to {short(each['destination'])}"
            parts = ", ".join(f"{name} {ms:,.1f} ms" for name, ms in each["stop_to_run_parts_ms"].items())
            figure_ms = f"{each['stop_to_run_ms']:,.1f} ms"
            found.append(f"<li><small>{escape(what)}</small>{figure_ms}<small>{escape(parts)}</small></li>")
    return [f'<ul class="headline">{"".join(found)}</ul>'] if found else []


def _devices(devices: Sequence[Mapping[str, Any]]) -> str:
    names = ("DT1, ms", "DT2, ms", "stop to run, ms", "ioctls", "messages", "failed")
    head = "<tr><th></th>" + "".join(f'<th class="n">{escape(name)}</th>' for name in names) + "</tr>"
    lines = []
    for each in devices:
        times = [each[name] for name in ("dt1_ms", "dt2_ms", "stop_to_run_ms")]
        cells = [cell(_NOTHING if ms is None else f"{ms:,.3f}", "n strong") for ms in times]
        cells += [cell(f"{each[name]:,}") for name in ("ioctls", "messages", "failed")]
        lines.append(f"<tr><th>{escape(short(each['device']))}</th>{''.join(cells)}</tr>")
    return wide_table(head, "\n".join(lines))


def _where(measured: Mapping[str, Mapping[str, Sequence[Span]]]) -> list[str]:
    bars = [
        Bar(f"{_TITLES[part].partition(':')[0]}, {short(device)}", by_kind(pieces))
        for part, devices in measured.items()
        for device, pieces in devices.items()
    ]
    if not bars:
        return [paragraph("No migration was recognised in these calls.")]
    return [
        heading("Where the time goes"),
        _legend(),
        figure(stacked(bars, "time by kind of call"), "By kind of call."),
    ]


def _legend() -> str:
    items = "".join(f'<li><i class="{name}"></i>{escape(kind.value)}</li>' for kind, name in CLASSES.items())
    return f'<ul class="legend">{items}</ul>'


def _when(measured: Mapping[str, Mapping[str, Sequence[Span]]]) -> list[str]:
    figures = [
        figure(timeline(lanes, f"{_TITLES[part]} over time"), _TITLES[part])
        for part, lanes in measured.items()
        if lanes
    ]
    if not figures:
        return []
    return [
        heading("What happened when"),
        paragraph("Rest the pointer on a span for the call, its arguments and its time."),
        _legend(),
        *figures,
    ]


def _on_what(summary: Summary) -> list[str]:
    links = "".join(f'<li><a href="{name}">{name}</a></li>' for name in (_DATA, _RECORDS, _TRACE))
    lost = f"{summary.lost:,} records were lost." if summary.lost else "No record was lost."
    clock = summary.about.get("clock") or {}
    return [
        heading("On what"),
        facts({"host": clock.get("host"), "lost": lost}),
        heading("Beside this page"),
        f'<ul class="notes">{links}</ul>',
        paragraph(f"{len(summary.trace.events):,} events were recorded; open {_TRACE} at ui.perfetto.dev.", "soft"),
    ]
