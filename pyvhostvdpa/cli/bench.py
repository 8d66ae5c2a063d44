# SPDX-License-Identifier: MIT
"""``vhost-vdpa bench``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..base.errors import MissingFeature
from ..bench import map as bench_map
from ..bench import plot, requests, shadow, switching
from ..bench.memory import Backing, Page, PhysicalLayout
from ..bench.plan import MapBenchOptions, Mode, default_memory, in_words
from ..bench.report import FigureChange, MapReport, compare, load_report
from ..device.shadowing import NAMES as SHADOWS
from ..guest.nic import MIN_FRAME
from ..host import mgmt
from . import answer
from .failure import report as _say
from .options import DEVICE, add_json, add_shadow
from .table import table
from .units import SIZES, count, seconds, size

INTERRUPTED = 130
_MAP = """\
Time mapping and unmapping memory: by size, by number of regions (messages), in one batch, message by message, and
with a batch for each region. What a device that pins memory pays for is physically contiguous runs, so they are
counted and printed. Each map is tried with real frames before its time counts. The device is reset."""
_MAP_EPILOG = f"""\
{SIZES}

examples:
  vhost-vdpa bench map vdpa0 --memory 64M,1G --regions 1,16 --plot maps.svg
  vhost-vdpa bench map vdpa0 -j > old.json; vhost-vdpa bench map vdpa0 --compare old.json

exit status: 0; 1 when something failed, or a map did not lead to memory; 130 when interrupted, with what was measured
until then printed and marked partial. More: vhost-vdpa help benchmarks"""
_NEXT = "next: vhost-vdpa help benchmarks (what the figures mean)"
EPILOG = """\
examples:
  vhost-vdpa bench map vdpa0
  vhost-vdpa bench switch vdpa0 --pairs 1,4 -j

exit status: 0; 1 when something failed; 2 wrong usage; 130 when interrupted. More: vhost-vdpa help benchmarks"""
DESCRIPTION = "Measure what maps, requests, switches and shadowing cost on a device. The device is reset."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _register_map(kinds)
    _register_ioctl(kinds)
    _register_switch(kinds)
    _register_svq(kinds)


def _register_map(kinds: Any) -> None:
    parser = kinds.add_parser("map", help="mapping memory, batched and not", description=_MAP, epilog=_MAP_EPILOG)
    parser.add_argument("device", metavar="DEV", nargs="?", help=f"{DEVICE} (default: the only device)")
    default = MapBenchOptions()
    parser.add_argument(
        "--memory",
        type=_list(size),
        metavar="SIZE,…",
        help=f"how much (default {_sizes(Page.SMALL)}; with pages of 2M {_sizes(Page.LARGE)})",
    )
    parser.add_argument(
        "--regions",
        type=_list(count),
        default=default.regions,
        metavar="N,…",
        help=f"in how many regions, one message each (default {','.join(map(str, default.regions))})",
    )
    parser.add_argument("--page", choices=_words(Page), default="4k", help="what memory is made of (default 4k)")
    parser.add_argument(
        "--layout",
        choices=_words(PhysicalLayout),
        default="contiguous",
        help="scattered: each page far from its neighbour in physical memory; holes: 1G of IOVA without a map behind "
        "each region (default contiguous)",
    )
    parser.add_argument(
        "--backing", choices=_words(Backing), default="shared", help="a memfd, or private memory (default shared)"
    )
    parser.add_argument("--asid", type=_asid, default=0, metavar="A", help="address space (default 0)")
    parser.add_argument(
        "--mode", type=_list(_mode), default=tuple(Mode), metavar="MODE,…", help=f"of {', '.join(_words(Mode))} (all)"
    )
    parser.add_argument(
        "--repeat", type=count, default="5", metavar="K", help="times, besides once to warm up (default 5)"
    )
    add_json(parser, "print JSON, schema pyvhostvdpa/bench-map/1")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw a picture too (needs matplotlib)")
    parser.add_argument("--compare", metavar="OLD.json", help="print what got slower since then")
    parser.set_defaults(run=_run_map, parser=parser)


def _asid(text: str) -> int:
    return 0 if text == "0" else count(text)


def _sizes(page: Page) -> str:
    return ",".join(in_words(each) for each in default_memory(page))


def _list(parse: Any) -> Any:
    def parse_all(text: str) -> tuple[Any, ...]:
        return tuple(parse(word) for word in text.split(","))

    return parse_all


def _mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a mode: {text!r} (one of {', '.join(_words(Mode))})") from None


def _words(choices: Any) -> list[str]:
    return [choice.value for choice in choices]


def _run_map(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        plot.check_plot(arguments.plot)
    old = load_report(arguments.compare) if arguments.compare else None
    options = MapBenchOptions(
        memory=arguments.memory or default_memory(Page(arguments.page)),
        regions=arguments.regions,
        page=Page(arguments.page),
        layout=PhysicalLayout(arguments.layout),
        backing=Backing(arguments.backing),
        asid=arguments.asid,
        modes=arguments.mode,
        repeat=arguments.repeat,
    )
    report = bench_map.run(mgmt.chardev_of(arguments.device), options, _say)
    found = report.to_dict()
    changes = [] if old is None else list(compare(old, found))
    if arguments.json:
        compared = {} if old is None else {"compared": [change.to_dict() for change in changes]}
        print(json.dumps({**found, **compared}, indent=2))
    else:
        print(_render_map(report))
        if old is not None:
            print("\n" + _render_changes(changes, arguments.compare))
    sys.stdout.flush()
    if arguments.plot and report.results:
        _say(f"drawing {arguments.plot} (loading matplotlib first, which can take a while)")
        plot.draw(report, Path(arguments.plot))
    if report.partial:
        _say("vhost-vdpa: interrupted; the device was reset and closed")
        return INTERRUPTED
    return 0


def _render_map(report: MapReport) -> str:
    head = [
        "mode",
        "memory",
        "regions",
        "runs",
        "set_map",
        "map ms",
        "±",
        "unmap ms",
        "±",
        "us/message",
        "ms/GiB",
        "proved",
    ]
    rows = []
    for r in report.results:
        gib = r.point.bytes / (1 << 30)
        rows.append(
            [
                r.mode.value,
                in_words(r.point.bytes),
                f"{r.point.regions:,}",
                f"{r.runs:,}" if r.runs else "-",
                "-" if r.set_maps is None else f"{r.set_maps:,}",
                f"{r.map_ns.median / 1e6:.3f}",
                f"{r.map_ns.spread / 1e6:.3f}",
                f"{r.unmap_ns.median / 1e6:.3f}",
                f"{r.unmap_ns.spread / 1e6:.3f}",
                f"{r.map_ns.median / r.messages / 1e3:.1f}",
                f"{r.map_ns.median / gib / 1e6:,.0f}",
                "yes",
            ]
        )
    parts = [_map_answer(report), table(head, rows)] if rows else ["Nothing was measured."]
    lines = [
        f"{mode}: {curve.in_words()} for n runs, within {curve.worst:.0%} of the measured times"
        for mode, curve in report.fits().items()
    ]
    lines += [_odd(r.mode, r.point, what, s.outliers) for r in report.results
              for what, s in (("map", r.map_ns), ("unmap", r.unmap_ns)) if s.outliers]  # fmt: skip
    gain = report.gain()
    if gain is not None:
        slow, fast = gain
        lines.append(
            f"mapping {slow.point} ({slow.runs or slow.entries:,} runs) in one batch is "
            f"{slow.map_ns.median / fast.map_ns.median:.1f} times as fast as message by message"
        )
    parts += ["\n".join(lines)] if lines else []
    parts += ["partial: interrupted before all was measured"] if report.partial else []
    device = report.environment["device"]
    how = "frames came back whole" if report.loops else "descriptors were finished"
    parts.append(
        f"± is the distance of the quartiles of {report.options.repeat}; proved: {how} through first, middle and last "
        f"page\n{device['driver']} ({'pins memory' if device['pinned'] else 'user addresses'}), kernel "
        f"{report.environment['kernel']}, {report.environment['accelerator']}"
    )
    clock = answer.clock(answer.is_virtual(report.environment))
    parts.append("\n".join(line for line in (clock, _NEXT) if line))
    return "\n\n".join(parts)


def _map_answer(report: MapReport) -> str:
    """What the largest map takes in its quickest mode, and what a batch gains."""
    largest = max(report.results, key=lambda r: r.point.bytes)
    best = min((r for r in report.results if r.point == largest.point), key=lambda r: r.map_ns.median)
    runs = f" ({best.runs:,} physically contiguous runs)" if best.runs else ""
    took = answer.ms(best.map_ns.median / 1e6, answer.is_virtual(report.environment))
    gain = report.gain()
    faster = ""
    if gain is not None:
        slow, fast = gain
        times = slow.map_ns.median / fast.map_ns.median
        faster = f"; in one batch, {slow.point} is mapped {times:.1f} times as fast as message by message"
    return answer.wrapped(f"Mapping {best.point}{runs} takes {took} in mode {best.mode.value}{faster}.")


def _odd(mode: Mode, point: Any, what: str, outliers: tuple[int, ...]) -> str:
    values = ", ".join(f"{ns / 1e6:.3f}" for ns in outliers)
    return f"outliers: {mode.value}, {point}, {what}: {values} ms"


def _render_changes(changes: list[FigureChange], path: str) -> str:
    if not changes:
        return f"nothing in {path} was measured here too"
    rows = [
        [
            c.combination,
            c.what,
            f"{c.old / 1e6:.3f}",
            f"{c.new / 1e6:.3f}",
            f"{c.spread / 1e6:.3f}",
            f"{c.ratio:.2f}",
            c.verdict,
        ]
        for c in changes
    ]
    slower = [f"{c.combination}: {c.what} takes {c.ratio:.2f} times as long" for c in changes if c.verdict == "slower"]
    told = "slower than " + path + ":\n  " + "\n  ".join(slower) if slower else f"nothing is slower than in {path}"
    return table(["", "", "old ms", "new ms", "±", "ratio", ""], rows) + "\n\n" + told


def _add(kinds: Any, name: str, help_: str, schema: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name, help=help_, description=f"{help_.capitalize()}. The device is reset.", epilog=EPILOG
    )
    parser.add_argument("device", metavar="DEV", nargs="?", help=f"{DEVICE} (default: the only device)")
    add_json(parser, f"print JSON, schema {schema}")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _register_ioctl(kinds: Any) -> None:
    parser = _add(kinds, "ioctl", "what each cheap request takes", requests.SCHEMA, _run_ioctl)
    parser.add_argument("--count", type=count, default="1000", metavar="K", help="times each (default %(default)s)")


def _register_switch(kinds: Any) -> None:
    parser = _add(kinds, "switch", "suspend, resume, reset and start by queue pairs", switching.SCHEMA, _run_switch)
    parser.add_argument("--pairs", type=_list(count), default=(), metavar="N,…", help="(default 1, 2, 4 … all)")
    parser.add_argument("--repeat", type=count, default="5", metavar="K", help="times (default %(default)s)")


def _register_svq(kinds: Any) -> None:
    parser = _add(kinds, "svq", "frames per second and latency, passthrough and shadowed", shadow.SCHEMA, _run_svq)
    parser.add_argument("--pairs", type=count, default="1", help="queue pairs (default %(default)s)")
    parser.add_argument("--frame-size", type=count, default="256", help="Ethernet frame (default %(default)s)")
    parser.add_argument("--seconds", type=seconds, default="2", help="of traffic a round (default %(default)s)")
    parser.add_argument("--repeat", type=count, default="3", metavar="K", help="rounds (default %(default)s)")
    parser.add_argument("--frames", type=count, default="1000", help="single frames (default %(default)s)")
    add_shadow(parser, SHADOWS)


def _run_ioctl(arguments: argparse.Namespace) -> int:
    report = requests.run(mgmt.chardev_of(arguments.device), arguments.count, _say)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    had = [c for c in report.costs if not c.missing]
    rows = [[c.name, f"{c.p50 / 1e3:.2f}", f"{c.p99 / 1e3:.2f}", f"{c.worst / 1e3:.2f}"] for c in had]
    missing = [f"{c.name}: {c.missing}" for c in report.costs if c.missing]
    if had:
        slowest = max(had, key=lambda c: c.p50)
        median = sorted(c.p50 for c in had)[len(had) // 2]
        said = f"Half of {len(had)} requests take less than {median / 1e3:.2f} us; "
        print(answer.wrapped(f"{said}the slowest is {slowest.name} with {slowest.p50 / 1e3:.2f} us.") + "\n")
    print(table(["request", "p50 us", "p99 us", "max us"], rows))
    print("\n" + "\n".join([*missing, _where(report.environment)]))
    return 0


def _run_switch(arguments: argparse.Namespace) -> int:
    report = switching.run(mgmt.chardev_of(arguments.device), arguments.pairs, arguments.repeat, _say)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    rows = [
        [c.operation, str(c.pairs), f"{c.ns.median / 1e6:.3f}", f"{c.ns.spread / 1e6:.3f}", str(c.calls)]
        for c in report.costs
    ]
    if report.costs:
        most = max(c.pairs for c in report.costs)
        each = [c for c in report.costs if c.pairs == most]
        virtual = answer.is_virtual(report.environment)
        costs = ", ".join(f"{c.operation} {answer.ms(c.ns.median / 1e6, virtual)}" for c in each)
        print(answer.wrapped(f"With {most} queue pair{'s' if most > 1 else ''}: {costs}.") + "\n")
    print(table(["operation", "pairs", "ms", "±", "system calls"], rows))
    print("\n" + _where(report.environment))
    return 0


def _run_svq(arguments: argparse.Namespace) -> int:
    if not MIN_FRAME <= arguments.frame_size <= shadow.MAX_FRAME:
        raise MissingFeature(
            f"frames of {arguments.frame_size} bytes: from {MIN_FRAME} to {shadow.MAX_FRAME} are possible"
        )
    report = shadow.run(
        mgmt.chardev_of(arguments.device),
        arguments.pairs,
        arguments.frame_size,
        arguments.seconds,
        arguments.repeat,
        arguments.frames,
        _say,
        arguments.shadow,
    )
    found = report.to_dict()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = []
    for mode in found["modes"]:
        rate, latency = mode["frames_per_second"], mode["latency_ns"]
        percentiles = [f"{latency[key] / 1e3:.1f}" for key in ("p50", "p90", "p99", "max")]
        rows.append([mode["mode"], f"{rate['median']:,}", f"{rate['spread']:,}", *percentiles])
    print(f"Shadow virtqueues move {report.ratio:.2f} of the frames per second of passthrough.\n")
    print(table(["mode", "frames/s", "±", "p50 us", "p90 us", "p99 us", "max us"], rows))
    print(f"\nshadow {report.shadow}; latencies are of one frame at a time")
    print(_where(report.environment))
    return 0


def _where(place: dict[str, Any]) -> str:
    where = f"{place['device']['driver']}, kernel {place['kernel']}, {place['cpus']} CPUs, {place['accelerator']}"
    clock = answer.clock(answer.is_virtual(place))
    return "\n".join([where, *([clock] if clock else []), _NEXT])
