"""`python3 -m labvm` inside the lab's VM: moves a guest and prints what came of it."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from labvm import backends, calls, flood, move, network, report
from labvm.machine import GuestMachine, vmms
from labvm.network import Costs, NotReady
from labvm.qmp import QmpError

COMPARED = ("series-2023", "mlx5-2025")
PROFILES = ("none", *COMPARED)
_UNITS = {"M": 20, "G": 30}


def _size(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper())
    if unit is None or not text[:-1].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 128M or 128G")
    return int(text[:-1]) << unit


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    result = argparse.ArgumentParser(
        prog="tools/lab vm", description="Move a guest between two QEMUs on two vDPA devices.", allow_abbrev=False
    )
    result.add_argument("--qemu", metavar="VERSION", help="QEMU to use (default: the newest that is there)")
    result.add_argument("--backend", action="append", choices=backends.BACKENDS, help="default: serve")
    result.add_argument("--compare", action="store_true", help="virtual time: all back-ends, costs of 2023 and 2025")
    result.add_argument("--profile", action="append", choices=PROFILES, help="costs of the devices (default: none)")
    result.add_argument("--guest-memory", type=_size, default=128 << 20, metavar="SIZE")
    result.add_argument("--charge", type=_size, default=128 << 30, metavar="SIZE", help="charged as so much memory")
    result.add_argument("--looped", action="store_true", help="on vdpa_sim_net, which loops frames back")
    result.add_argument("--flood", type=int, metavar="FRAMES", help="moves nothing: how fast the guest sends so many")
    result.add_argument("--seconds", type=float, default=3.0, help="traffic before the move and after it")
    result.add_argument("--json", action="store_true")
    result.add_argument("--keep", metavar="DIR", help="keep QEMU's logs and the logs of its calls there")
    return result


def plans(options: argparse.Namespace) -> list[move.Plan]:
    """Return the moves to make, one after the other."""
    wished = backends.BACKENDS if options.compare else (backends.SERVE,)
    profiles = COMPARED if options.compare else ("none",)
    guest = GuestMachine(memory=options.guest_memory)
    return [
        move.Plan(
            options.qemu or vmms()[-1],
            backend,
            options.looped,
            Costs(profile, options.guest_memory, options.charge),
            guest,
            options.seconds,
        )
        for profile in options.profile or profiles
        for backend in options.backend or wished
    ]


def keep(folder: Path, target: Path) -> None:
    """Copy the files of a move; its sockets cannot lie in a folder of the host, nor its sparse logs be sparse there."""
    (target / folder.name).mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix == ".calls":
            calls.shorten(path)
        if path.is_file():
            shutil.copyfile(path, target / folder.name / path.name)


def _flood(options: argparse.Namespace, say: move.Say) -> int:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, plan in enumerate(plans(options)):
            folder = Path(name) / str(number)
            folder.mkdir()
            rows.append(flood.run(plan, folder, say, options.flood))
    if options.json:
        print(json.dumps({"schema": flood.SCHEMA, "rows": rows}, indent=2))
    else:
        for row in rows:
            used = "" if row["process_cpu_ms"] is None else f"; {row['process_cpu_ms']} ms of CPU in serve's process"
            print(f"{row['backend']}: {row['frames']:,} frames, {row['frames_per_s']:,} a second{used}")
    return 0


def main() -> int:
    """Move guests; 0 if each arrived whole."""
    options = parser().parse_args()
    network.give_way()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:7.2f} s] {text}", file=sys.stderr, flush=True)

    outcomes: list[move.Outcome] = []
    try:
        if options.flood:
            return _flood(options, say)
        with tempfile.TemporaryDirectory() as name:
            for number, plan in enumerate(plans(options)):
                folder = Path(name) / f"{number}-{plan.backend}-{plan.costs.profile}"
                folder.mkdir()
                try:
                    outcomes.append(move.run(plan, folder, say))
                    if not options.json:
                        print(report.render(outcomes[-1]) + "\n", flush=True)
                finally:
                    if options.keep:
                        keep(folder, Path(options.keep))
    except (NotReady, QmpError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [report.row(outcome) for outcome in outcomes]
    if options.json:
        print(json.dumps({"schema": report.SCHEMA, "rows": rows}, indent=2))
    elif len(rows) > 1:
        print(report.compare(rows))
    return 0 if all(report.faults(row) == [] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
