"""Measure stop to run on vdpa_hwsim with mlx5-2025's costs, in a VM of the lab, and print a table for each question.

tools/lab run --icount --devices vdpa_hwsim:0 --memory SIZE -- python3 tools/bench/downtime.py [QUESTION …]

Questions: ``migrate`` (a whole migration beside the ladder's best row, by pairs), ``devices``, ``memory``, ``charged``,
``regions`` (the best row by each of these, ``devices:1,8`` only for some of them), ``trace:PAIRS`` (every event of one
migration's gap) and ``row:DEVICES`` (that of the best row's). Without one: the first five. Sizes that the VM cannot
hold are said and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.bench.ladder.report import Run
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS
from pyvhostvdpa.bench.ladder.run import LadderOptions, ladder
from pyvhostvdpa.bench.ladder.stage import Simulated
from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.migration.local import MigrationOptions, migrate
from pyvhostvdpa.migration.source import SendOptions
from pyvhostvdpa.trace import gap
from pyvhostvdpa.trace.recorder import Trace

GIB, MIB = 1 << 30, 1 << 20
PROFILE = "mlx5-2025"
BEST = LADDER_ROWS["beyond"]
FRAMES = 50
REPEAT = 3
"""The median counts, of a row and of a migration: what else a single CPU has to do in a run may take some ms."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a row of the ladder is run with; sizes in bytes."""

    devices: int = 1
    pairs: int = 1
    memory: int = 256 * MIB
    charged: int = 256 * MIB
    regions: int = 4

    def __str__(self) -> str:
        return (
            f"{self.devices:7}  {self.pairs:5}  {self.memory / GIB:6.2f}  {self.charged / GIB:8.2f}  {self.regions:7}"
        )


def runs(case: Case, repeat: int = REPEAT) -> tuple[list[Run], Trace]:
    """Return the runs of the ladder's best row, and the trace of the last."""
    supply = Simulated(case.devices, case.pairs, PROFILE, case.memory, case.charged)
    options = LadderOptions(case.pairs, case.memory, case.regions, (BEST,), repeat, FRAMES)
    report, traces = ladder(supply, options)
    return list(report.rows[0].runs), traces[BEST.row]


def best_row(case: Case, repeat: int = REPEAT) -> Run:
    """Return the median run of the ladder's best row."""
    found, _ = runs(case, repeat)
    return sorted(found, key=lambda run: run.gap.ms if run.gap else 0.0)[repeat // 2]


def parts(found: gap.StopToRun) -> str:
    """Return what a gap consists of, in ms."""
    return ", ".join(f"{name} {ms:.3f}" for name, ms in found.by_phase().items())


def moved(pairs: int, memory: int = 256 * MIB, seconds: float = 1.5) -> tuple[gap.StopToRun, float, Trace]:
    """Migrate a guest with traffic; the gap, the guest's own (ms), and the trace of both sides."""
    trace = Trace()
    # one CPU sends and receives beside a guest that writes: with many pairs a short last round is never reached
    sending = SendOptions(downtime=2.0)
    options = MigrationOptions(guest=GuestOptions(memory=memory, pairs=pairs), send=sending, seconds=seconds)
    with Simulated(1, pairs, PROFILE, memory, memory).stage(BEST) as stage:
        report = migrate(stage.sources[0], stage.destinations[0], options, trace=trace)
    assert report.stopped is not None
    assert report.gap_move_ms is not None
    return report.stopped, report.gap_move_ms, trace


def without_memory(found: gap.StopToRun) -> float:
    """Return a gap without its last round of memory, in ms."""
    return found.ms - found.by_phase().get(gap.LAST_ROUND, 0.0)


def median_move(pairs: int, repeat: int = REPEAT) -> tuple[gap.StopToRun, float, list[float]]:
    """Return the median of some migrations, by the gap without its last round, and the guest's own gap in it (ms).

    And, for each of them, by how much the guest's own gap is longer (ms), in order.
    """
    moves = [moved(pairs)[:2] for _ in range(repeat)]
    longer = sorted(own - found.ms for found, own in moves)
    return (*sorted(moves, key=lambda move: without_memory(move[0]))[repeat // 2], longer)


def by_pairs() -> None:
    """Compare a whole migration with the ladder's best row."""
    print(
        "pairs  floor ms  best row ms  migrate ms  without the last round ms  times the row  guest's own gap ms"
        "  longer by ms, each time"
    )
    for pairs in (1, 16):
        row = best_row(Case(pairs=pairs))
        assert row.gap is not None
        assert row.floor is not None
        found, own, longer = median_move(pairs)
        print(
            f"{pairs:5}  {row.floor.stop_to_run:8.3f}  {row.gap.ms:11.3f}  {found.ms:10.3f}  "
            f"{without_memory(found):25.3f}  {without_memory(found) / row.gap.ms:13.2f}  {own:18.3f}  "
            f"{', '.join(f'{each:.1f}' for each in longer)}"
        )
        print(f"       row: {parts(row.gap)}")
        print(f"       migrate: {parts(found)}", flush=True)


def flat(cases: Sequence[Case]) -> None:
    """Print a row for each case, and how many times the first it takes."""
    print("devices  pairs  memory   charged  regions  stop to run ms  floor ms  times the first")
    first = None
    for case in cases:
        try:
            run = best_row(case)
        except VhostVdpaError as e:
            print(f"{case}  left out: {e}", flush=True)
            continue
        assert run.gap is not None
        assert run.floor is not None
        first = first or run.gap.ms
        print(f"{case}  {run.gap.ms:14.3f}  {run.floor.stop_to_run:8.3f}  {run.gap.ms / first:15.3f}")
        print(f"         {parts(run.gap)}", flush=True)


def events(found: gap.StopToRun, trace: Trace) -> None:
    """Print every event from the pause to the last queue running, us since the pause."""
    begin, end = found.pieces[0].begin, found.pieces[-1].end
    for piece in found.pieces:
        print(f"  {(piece.begin - begin) / 1e3:9.1f} to {(piece.end - begin) / 1e3:9.1f} us  {piece.phase}")
    for event in sorted(trace.events, key=lambda each: each.t_begin):
        if begin - 10**6 <= event.t_begin <= end + 10**6:
            print(
                f"  {(event.t_begin - begin) / 1e3:9.1f} + {(event.t_end - event.t_begin) / 1e3:8.1f} us  "
                f"{event.device} {event.phase}: {event.event}"
            )


def trace_of(pairs: int) -> None:
    """Print every event of a migration's gap."""
    found, own, trace = moved(pairs)
    print(f"stop to run {found.ms:.3f} ms, the guest's own gap {own:.3f} ms: {parts(found)}")
    events(found, trace)


def row_of(devices: int) -> None:
    """Print every event of the best row's gap."""
    [run], trace = runs(replace(BASE, devices=devices), 1)
    assert run.gap is not None
    print(f"{devices} devices: stop to run {run.gap.ms:.3f} ms: {parts(run.gap)}")
    events(run.gap, trace)


BASE = Case()
QUESTIONS: dict[str, Callable[[], None]] = {
    "migrate": by_pairs,
    "devices": lambda: flat([replace(BASE, devices=count) for count in (1, 2, 4, 8)]),
    "memory": lambda: flat([replace(BASE, memory=size, charged=size) for size in (256 * MIB, GIB, 4 * GIB)]),
    "charged": lambda: flat([replace(BASE, charged=size * GIB) for size in (8, 64, 256, 1024)]),
    "regions": lambda: flat([replace(BASE, memory=GIB, charged=GIB, regions=n) for n in (1, 4, 16, 64, 255)]),
}


def main() -> None:
    """Print the tables that were asked for."""
    names = (*QUESTIONS, "trace", "row")
    unknown = [word for word in sys.argv[1:] if word.partition(":")[0] not in names]
    if unknown:
        sys.exit(f"downtime.py: no such question: {', '.join(unknown)}\n  there are {', '.join(names)}")
    for question in sys.argv[1:] or QUESTIONS:
        name, _, number = question.partition(":")
        print(f"\n{name}", flush=True)
        if name == "trace":
            trace_of(int(number or 1))
        elif name == "row":
            row_of(int(number or 1))
        elif name == "devices" and number:
            flat([replace(BASE, devices=int(count)) for count in number.split(",")])
        else:
            QUESTIONS[name]()


if __name__ == "__main__":
    main()
