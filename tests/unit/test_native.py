"""The C core built on its own: under sanitizers with arbitrary input, and by instruction count."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
TARGETS = {
    "svq_fuzz": ("svq", "ring", "memory"),
    "ctrl_fuzz": ("ctrl", "memory"),
    "pages_fuzz": ("pages", "sum", "memory"),
    "relay_bench": ("svq", "memory"),
    "log_race": ("svq", "ctrl", "memory"),
}
"""Programs of tests/native, and the sources of the package that each is built with."""
INPUTS = int(os.environ.get("PYVHOSTVDPA_FUZZ_INPUTS", "5000"))
"""Each is a program of about 150 steps."""

SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUDGET = {1: 200, 4: 250, 64: 300}
"""Instructions per element relayed both ways, by memory regions."""


def build(tmp_path: Path, name: str, *flags: str) -> Path:
    program = tmp_path / name
    sources = [NATIVE / f"{name}.c", *(ROOT / "cdefs" / f"{source}.c" for source in TARGETS[name])]
    includes = [f"-I{ROOT / 'cdefs'}", f"-I{NATIVE}"]
    subprocess.run(["cc", "-std=gnu11", "-Wall", "-Wextra", *flags, *includes, *sources, "-o", program], check=True)
    return program


@pytest.mark.parametrize("target", ["svq_fuzz", "ctrl_fuzz"])
def test_arbitrary_guests_and_devices_under_sanitizers(tmp_path: Path, target: str) -> None:
    fuzz = build(tmp_path, target, *SANITIZED)
    corpus = sorted((NATIVE / "corpus" / target.removesuffix("_fuzz")).iterdir())
    subprocess.run([fuzz, *corpus], check=True)
    done = subprocess.run([fuzz, "-r", str(INPUTS), "1"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{INPUTS} inputs")


def test_arbitrary_frames_and_sets_of_pages_under_sanitizers(tmp_path: Path) -> None:
    fuzz = build(tmp_path, "pages_fuzz", *SANITIZED)
    done = subprocess.run([fuzz, str(INPUTS)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{INPUTS} inputs")


def test_a_dirty_log_may_end_while_both_kinds_of_queues_mark_pages(tmp_path: Path) -> None:
    race = build(tmp_path, "log_race", "-O0", "-pthread")
    done = subprocess.run([race, "2000000"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2000000 elements\n"), done.stderr


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind, which counts instructions, is not installed")
@pytest.mark.parametrize("regions", BUDGET)
def test_an_element_costs_few_instructions(tmp_path: Path, regions: int, capsys: pytest.CaptureFixture[str]) -> None:
    program = build(tmp_path, "relay_bench", "-O2")
    tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={tmp_path / 'callgrind.out'}"]
    tool += ["--toggle-collect=relay_forward", "--toggle-collect=relay_return"]
    done = subprocess.run([*tool, program, str(regions), "500"], check=True, capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    assert collected, done.stderr
    instructions = int(collected[1]) / int(done.stdout)
    with capsys.disabled():
        print(f"\n{instructions:.1f} instructions per element both ways, {regions} regions, bursts of 64")
    assert instructions <= BUDGET[regions]
