# SPDX-License-Identifier: MIT
"""The options ``--trace`` and ``--spans`` of every command that drives a device."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ..base.errors import VhostVdpaError
from ..trace import events, perfetto, records, spans
from ..trace.recorder import Trace, describe
from .table import table

log = logging.getLogger(__name__)


def _write_spans(trace: Trace, file: TextIO) -> None:
    json.dump({"schema": spans.SCHEMA, **spans.to_dict(trace)}, file, indent=2)
    file.write("\n")


_FORMATS: dict[str, Callable[[Trace, TextIO], None]] = {
    "perfetto": perfetto.write,
    "events": events.write,
    "spans": _write_spans,
    "records": records.write,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a sub-command's parser."""
    parser.add_argument("--trace", metavar="FILE", help="write what passed the devices' doors, failed or not, to FILE")
    parser.add_argument(
        "--trace-format",
        choices=sorted(_FORMATS),
        help="perfetto: open it at ui.perfetto.dev; events: QEMU's trace events, one JSON object a line; "
        "spans: what DT1 and DT2 are made of; records: everything as it was recorded, for programs "
        "(default: events for FILE.jsonl, else perfetto)",
    )


def add_spans_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of a command that has downtimes."""
    parser.add_argument("--spans", action="store_true", help="print the spans that make up DT1 and DT2, too")


def print_report(
    arguments: argparse.Namespace, trace: Trace, report: dict[str, Any], summary: Callable[[], str]
) -> None:
    """Print a report as JSON or for people, with the spans if they were asked for."""
    if arguments.json:
        more = {"spans": spans.to_dict(trace)} if arguments.spans else {}
        print(json.dumps(report | more, indent=2))
        return
    print(summary())
    if arguments.spans:
        print(f"\n{render_spans(trace)}")


@contextmanager
def writing(arguments: argparse.Namespace) -> Iterator[Trace]:
    """Give out a trace, and write it in the end: after an error it says what led to it."""
    trace = Trace()
    if arguments.trace:
        _write(arguments.trace, lambda file: None)
    try:
        yield trace
    except BaseException:
        try:
            _save(arguments, trace)
        except VhostVdpaError as e:
            # the error on its way is the one to be told
            log.warning("%s", e)
        raise
    _save(arguments, trace)


def _save(arguments: argparse.Namespace, trace: Trace) -> None:
    if not arguments.trace:
        return
    chosen = arguments.trace_format or ("events" if arguments.trace.endswith(".jsonl") else "perfetto")
    _write(arguments.trace, lambda file: _FORMATS[chosen](trace, file))
    if chosen != "records":
        dropped = f", {trace.dropped} older ones were dropped" if trace.dropped else ""
        print(f"trace of {len(trace.events)} events{dropped}: {arguments.trace} ({chosen})", file=sys.stderr)


def _write(path: str, content: Callable[[TextIO], None]) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            content(file)
    except OSError as e:
        raise VhostVdpaError(f"{path} cannot be written: {e.strerror}", hint="name another file with --trace") from e


def render_spans(trace: Trace) -> str:
    """Return the spans of DT1 and DT2 as tables, each with its sums."""
    parts = []
    for name, devices in spans.downtimes(trace).items():
        for device, pieces in devices.items():
            parts += [f"{name.upper()} of {device}", _render_list(pieces), _render_sums(pieces)]
    return "\n\n".join(parts)


def _render_list(pieces: Sequence[spans.Span]) -> str:
    rows = [
        [
            f"{(piece.t_begin - pieces[0].t_begin) / 1e6:.3f}",
            f"{piece.ns / 1e6:.3f}",
            piece.phase,
            piece.kind.value,
            f"{piece.event} {describe(piece.fields)}".strip(),
        ]
        for piece in pieces
    ]
    return table(["at ms", "ms", "phase", "kind", "call"], rows)


def _render_sums(pieces: Sequence[spans.Span]) -> str:
    total = sum(piece.ns for piece in pieces)
    sums = [*((kind.value, ns) for kind, ns in spans.by_kind(pieces).items()), ("all", total)]
    return table(["kind", "ms", "%"], [[kind, f"{ns / 1e6:.3f}", f"{100 * ns / total:.1f}"] for kind, ns in sums])
