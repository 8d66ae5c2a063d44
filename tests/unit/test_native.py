"""The C core built on its own: under sanitizers with arbitrary input, and by instruction count."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import native_programs
import pytest
from native_programs import NATIVE, RACING, SANITIZED

INPUTS = int(os.environ.get("PYVHOSTVDPA_FUZZ_INPUTS", "5000"))
"""Each is a program of about 150 steps."""

BUDGET = {1: 200, 4: 250, 64: 300}
"""Instructions per element relayed both ways, by memory regions."""
USED_BUDGET = {4: 70, 64: 90}
"""The same of a receive queue whose descriptors are the guest's own."""


def built(tmp_path: Path, name: str, *flags: str) -> Path:
    """Return a program: from the folder of programs that are there, or a new one."""
    if folder := os.environ.get(native_programs.BUILT):
        return Path(folder, name)
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("a C compiler, which builds the program, is not installed")
    return native_programs.build(tmp_path, name, *flags)


@pytest.mark.parametrize("target", ["svq_fuzz", "ctrl_fuzz"])
def test_arbitrary_guests_and_devices_under_sanitizers(tmp_path: Path, target: str) -> None:
    fuzz = built(tmp_path, target, *SANITIZED)
    corpus = sorted((NATIVE / "corpus" / target.removesuffix("_fuzz")).iterdir())
    subprocess.run([fuzz, *corpus], check=True)
    done = subprocess.run([fuzz, "-r", str(INPUTS), "1"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{INPUTS} inputs")


def test_arbitrary_frames_and_sets_of_pages_under_sanitizers(tmp_path: Path) -> None:
    fuzz = built(tmp_path, "pages_fuzz", *SANITIZED)
    done = subprocess.run([fuzz, str(INPUTS)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{INPUTS} inputs")


def test_a_dirty_log_may_end_while_both_kinds_of_queues_mark_pages(tmp_path: Path) -> None:
    race = built(tmp_path, "log_race", *RACING)
    done = subprocess.run([race, "2000000"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2000000 elements\n"), done.stderr


def instructions(tmp_path: Path, regions: int, *how: str, bursts: int = 500) -> float:
    """Count what an element of relay_bench takes both ways."""
    program = built(tmp_path, "relay_bench", "-O2")
    tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={tmp_path / 'callgrind.out'}"]
    tool += ["--toggle-collect=relay_forward", "--toggle-collect=relay_return"]
    command = [*tool, str(program), str(regions), str(bursts), *how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    assert collected, done.stderr
    return int(collected[1]) / int(done.stdout)


NEEDS_VALGRIND = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="valgrind, which counts instructions, is not installed"
)


@NEEDS_VALGRIND
@pytest.mark.parametrize("regions", BUDGET)
def test_an_element_costs_few_instructions(tmp_path: Path, regions: int, capsys: pytest.CaptureFixture[str]) -> None:
    count = instructions(tmp_path, regions)
    with capsys.disabled():
        print(f"\n{count:.1f} instructions per element both ways, {regions} regions, bursts of 64")
    assert count <= BUDGET[regions]


@NEEDS_VALGRIND
@pytest.mark.parametrize("regions", USED_BUDGET)
def test_an_element_whose_descriptor_stays_costs_fewer(
    tmp_path: Path, regions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most buffers lie on pages that are dirty already: in a run that is long enough for that."""
    count = instructions(tmp_path, regions, "used", bursts=2000)
    with capsys.disabled():
        print(f"\n{count:.1f} instructions per relayed used element both ways, {regions} regions, bursts of 64")
    assert count <= USED_BUDGET[regions]
