# SPDX-License-Identifier: MIT
"""``vhost-vdpa report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..bench.ladder.savings import with_savings
from ..bench.page import recording as recording_page
from ..trace import clocks, spans
from ..trace.summary import summarize
from . import recording, tracing
from .failure import PROGRAM
from .failure import report as tell
from .options import add_json

EPILOG = """\
examples:
  vhost-vdpa report qemu.jsonl                      what a recording shows
  vhost-vdpa report source.jsonl destination.jsonl  both hosts of a migration, on the first one's clock
  vhost-vdpa report qemu.jsonl --report out/        with a page

exit status: 0; 1 if a file is not a recording; 2 wrong usage"""
DESCRIPTION = (
    "Print what 'vhost-vdpa watch --trace FILE.jsonl' recorded. Several recordings are joined on the "
    "first one's clock, and the offset is reported."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("recordings", metavar="RECORDING", nargs="+", help="a file that 'watch --trace' wrote")
    tracing.add_options(parser, recording=True)
    tracing.add_spans_option(parser)
    parser.add_argument("--report", metavar="DIR", type=Path, help="write a page with charts, and the trace, there")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Read, join and print."""
    if arguments.report:
        recording_page.prepare(arguments.report)
    with tracing.writing(arguments, recording=True) as trace:
        names = _names(arguments)
        found = [(name, *recording.read(path)) for name, path in zip(names, arguments.recordings, strict=True)]
        joined = clocks.join(found)
        about = dict(found[0][2]) | ({"joined": joined.clocks} if len(found) > 1 else {})
        arguments.about = about
        summary = with_savings(summarize(joined.trace, about))
        trace.events, trace.dropped = summary.trace.events, summary.trace.dropped
        if arguments.json:
            more = {"spans": spans.to_dict(summary.trace)} if arguments.spans else {}
            print(json.dumps(summary.to_dict() | more, indent=2))
        else:
            print("\n\n".join([*_clocks(joined), recording.render(summary)]))
            if arguments.spans:
                print(f"\n{tracing.render_spans(summary.trace)}")
    if arguments.report:
        tell(f"{PROGRAM}: the report is in {recording_page.write(summary, arguments.report)}")
    return 0


def _names(arguments: argparse.Namespace) -> list[str]:
    """Return a name for each recording: its file's, with as many folders in front as tell it from the others."""
    paths = [Path(path).resolve() for path in arguments.recordings]
    if len(set(paths)) < len(paths):
        arguments.parser.error("a recording is named twice")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        for last in ("stem", "name"):
            names = ["/".join([*path.parts[-count:-1], getattr(path, last)]) for path in paths]
            if len(set(names)) == len(names):
                return names
    return [str(path) for path in paths]


def _clocks(joined: clocks.Joined) -> list[str]:
    if len(joined.clocks) < 2:
        return []
    lines = [_clock(each) for each in joined.clocks[1:]]
    if any(each["uncertain_ms"] != 0 for each in joined.clocks[1:]):
        lines.append("a time from one host to the other, as stop to run is, is as exact as that")
    return ["\n".join(lines)]


def _clock(clock: dict[str, Any]) -> str:
    if not clock["offset_ns"]:
        return f"{clock['recording']} has the same clock"
    off = clock["uncertain_ms"]
    sure = "how exact is not known: a host's clock is not synchronised" if off is None else f"exact to {off:.3f} ms"
    return f"{clock['recording']} (host {clock['host']}): clock offset {clock['offset_ns'] / 1e9:+.6f} s, {sure}"
