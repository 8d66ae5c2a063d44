# SPDX-License-Identifier: MIT
"""The options ``--trace`` and ``--spans`` of every command that drives a device."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ..base.errors import VhostVdpaError
from ..base.files import check_writable, replace_file
from ..trace import events, perfetto, records, spans
from ..trace.recorder import Trace, describe
from .failure import PROGRAM, report
from .table import table


def _write_spans(trace: Trace, file: TextIO) -> None:
    json.dump({"schema": spans.SCHEMA, **spans.to_dict(trace)}, file, indent=2)
    file.write("\n")


_FORMATS: dict[str, Callable[[Trace, TextIO], None]] = {
    "perfetto": perfetto.write,
    "events": events.write,
    "spans": _write_spans,
    "records": records.write,
}


def add_options(parser: argparse.ArgumentParser, recording: bool = False) -> None:
    """Add the options to a sub-command's parser. A recording is kept as records by default, to be read back."""
    lines = "records" if recording else "events"
    parser.add_argument("--trace", metavar="FILE", help="write every call to the devices, failed or not, to FILE")
    parser.add_argument(
        "--trace-format",
        choices=sorted(_FORMATS),
        help="perfetto: open it at ui.perfetto.dev; events: QEMU's trace events, one JSON object per line; "
        "spans: what DT1 and DT2 are made of; records: everything as it was recorded, for programs; needs --trace "
        f"(default: {lines} for FILE.jsonl, else perfetto)",
    )


def add_spans_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of a command that has downtimes."""
    parser.add_argument("--spans", action="store_true", help="print the spans that make up DT1 and DT2, too")


def print_report(
    arguments: argparse.Namespace, trace: Trace, found: dict[str, Any], summary: Callable[[], str]
) -> None:
    """Print a report as JSON or for people, with the spans if they were asked for."""
    if arguments.json:
        more = {"spans": spans.to_dict(trace)} if arguments.spans else {}
        print(json.dumps(found | more, indent=2))
        return
    print(summary())
    if arguments.spans:
        print(f"\n{render_spans(trace)}")


@contextmanager
def writing(arguments: argparse.Namespace, recording: bool = False) -> Iterator[Trace]:
    """Give out a trace, and write it in the end: after an error it says what led to it.

    Until then the file is as it was, and it stays so if no device was
    opened. What a ``recording`` says of itself is ``arguments.about``.
    """
    lines = "records" if recording else "events"
    trace = Trace()
    _check(arguments)
    try:
        yield trace
    except BaseException:
        try:
            _save(arguments, trace, lines)
        except VhostVdpaError as e:
            # the error on its way is the one that decides
            report(f"{PROGRAM}: {e}")
        raise
    _save(arguments, trace, lines)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse a file that cannot be written before the run that would be for nothing."""
    if arguments.trace_format and not arguments.trace:
        arguments.parser.error("--trace-format needs --trace FILE")
    if arguments.trace == "-":
        arguments.parser.error("--trace takes a file, since standard output has the report (./- for a file named -)")
    if arguments.trace:
        try:
            check_writable(arguments.trace)
        except OSError as e:
            raise _unwritable(arguments.trace, e) from e


def _save(arguments: argparse.Namespace, trace: Trace, lines: str) -> None:
    if not arguments.trace or not trace.events:
        return
    chosen = arguments.trace_format or (lines if arguments.trace.endswith(".jsonl") else "perfetto")
    about = getattr(arguments, "about", None)
    if chosen == "records" and about is not None:
        _write(arguments.trace, lambda file: records.write(trace, file, about))
    else:
        _write(arguments.trace, lambda file: _FORMATS[chosen](trace, file))
    if chosen != "records" or about is not None:
        dropped = f", {trace.dropped} older ones were dropped" if trace.dropped else ""
        report(f"trace of {len(trace.events)} events{dropped}: {arguments.trace} ({chosen})")


def _write(path: str, content: Callable[[TextIO], None]) -> None:
    try:
        replace_file(path, content)
    except OSError as e:
        raise _unwritable(path, e) from e


def _unwritable(path: str, error: OSError) -> VhostVdpaError:
    return VhostVdpaError(f"{path} cannot be written: {error.strerror}", hint="name another file with --trace")


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
