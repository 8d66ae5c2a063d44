"""Measure what the page on benchmarks shows, in a VM of the lab, for one kernel.

tools/lab run --icount --devices vdpa_hwsim:0 --devices vdpa_sim_net:0 -- python3 tools/bench/scaling.py OUT.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyvhostvdpa.bench.map import run
from pyvhostvdpa.bench.memory import Page, PhysicalLayout
from pyvhostvdpa.bench.plan import MapBenchOptions, Mode

KIB, MIB = 1 << 10, 1 << 20
BUS = Path("/sys/bus/vdpa/devices")
DEBUGFS = Path("/sys/kernel/debug/vdpa_hwsim")

RUNS = MapBenchOptions(
    memory=tuple(n * 4 * KIB for n in (16, 32, 64, 128, 256, 512)),
    regions=(1,),
    layout=PhysicalLayout.SCATTERED,
    modes=(Mode.BATCH, Mode.UNBATCHED),
    repeat=2,
)
REGIONS = MapBenchOptions(memory=(MIB,), regions=(1, 4, 16, 64, 256), layout=PhysicalLayout.SCATTERED, repeat=2)
SIZES = MapBenchOptions(
    memory=tuple(n * MIB for n in (2, 8, 32, 128, 512)), regions=(1,), page=Page.LARGE, modes=(Mode.BATCH,), repeat=2
)
QUESTIONS = {"runs": RUNS, "regions": REGIONS, "sizes": SIZES}

PROFILES = ("none", "series-2023", "mlx5-2025")
SIMULATORS = {
    "vdpa_sim, pinned, set_map": {"use_va": 0, "batch_mapping": 1},
    "vdpa_sim, pinned, dma_map": {"use_va": 0, "batch_mapping": 0},
    "vdpa_sim, use_va, set_map": {"use_va": 1, "batch_mapping": 1},
    "vdpa_sim, use_va, dma_map": {"use_va": 1, "batch_mapping": 0},
}


def command(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True)


@contextmanager
def device(mgmtdev: str) -> Iterator[str]:
    """Make a device for the block; its chardev."""
    command("vdpa", "dev", "add", "name", "bench0", "mgmtdev", mgmtdev)
    try:
        while not (nodes := list((BUS / "bench0").glob("vhost-vdpa-*"))) or not Path(f"/dev/{nodes[0].name}").exists():
            time.sleep(0.01)
        yield f"/dev/{nodes[0].name}"
    finally:
        command("vdpa", "dev", "del", "bench0")


@contextmanager
def simulator(parameters: dict[str, int]) -> Iterator[str]:
    """Load vdpa_sim with parameters and make a net device."""
    command("modprobe", "-r", "vdpa_sim_net", "vdpa_sim")
    command("modprobe", "vdpa_sim", *(f"{key}={value}" for key, value in parameters.items()))
    command("modprobe", "vdpa_sim_net")
    with device("vdpasim_net") as path:
        yield path


def ask(name: str, path: str, question: str) -> dict[str, Any]:
    """Return the answer to a question on a device."""
    print(f"{name}: {question}", file=sys.stderr, flush=True)
    report = run(path, QUESTIONS[question]).to_dict()
    return {"device": name, "question": question, **{key: report[key] for key in ("results", "fits", "refused")}}


def measure() -> Iterator[dict[str, Any]]:
    """Yield every question's answer on every device."""
    if not DEBUGFS.is_dir():
        command("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug")
    for question in QUESTIONS:
        for profile in PROFILES:
            with device("vdpa_hwsim") as path:
                (DEBUGFS / "bench0" / "cost" / "profile").write_text(profile)
                yield ask(f"vdpa_hwsim, {profile}", path, question)
        for name, parameters in SIMULATORS.items():
            with simulator(parameters) as path:
                yield ask(name, path, question)


def main() -> None:
    """Measure all, and write what there is to the file named by the first argument after each answer."""
    measured = []
    for answer in measure():
        measured.append(answer)
        Path(sys.argv[1]).write_text(json.dumps({"kernel": platform.release(), "measured": measured}))


main()
