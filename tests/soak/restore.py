# lab: --memory 2G --devices none
"""State of a guest from a hostile source, under libFuzzer: decoded, checked, restored and run against memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyvhostvdpa

TESTS = Path(__file__).parents[1]
HARNESS = TESTS / "unit" / "hostile_state.py"
CORPUS = TESTS / "native" / "corpus" / "state"
MINUTES = float(os.environ.get("PYVHOSTVDPA_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("PYVHOSTVDPA_SOAK_SEED", str(time.time_ns() % 1_000_000)))
OPTIONS = ("-max_len=64", "-len_control=0", "-reduce_inputs=0", "-timeout=60", "-print_final_stats=1")
"""Long inputs from the start, and kept long: it takes several edits at once to get past a check."""


def test_no_state_raises_anything_but_streamcorrupt_or_crashes(tmp_path: Path) -> None:
    found = tmp_path / "corpus"
    found.mkdir()
    words = [sys.executable, str(HARNESS), "--fuzz", *OPTIONS, f"-max_total_time={int(MINUTES * 60)}", f"-seed={SEED}"]
    print(f"\nPYVHOSTVDPA_SOAK_SEED={SEED}")
    done = subprocess.run(
        [*words, f"-artifact_prefix={tmp_path}/", str(found), str(CORPUS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(pyvhostvdpa.__file__).parents[1])},
    )
    last = "\n".join(done.stdout.splitlines()[-40:])
    inputs = {path.name: path.read_bytes().hex() for path in tmp_path.iterdir() if path.is_file()}
    assert done.returncode == 0, f"{last}\n{inputs}"
    ran = re.search(r"Done (\d+) runs in (\d+) second", done.stdout)
    assert ran, last
    print(f"{ran[1]} inputs in {ran[2]} s")
