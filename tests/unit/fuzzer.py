"""Runs a harness under libFuzzer for some minutes; the soaks call it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyvhostvdpa

MINUTES = float(os.environ.get("PYVHOSTVDPA_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("PYVHOSTVDPA_SOAK_SEED", str(time.time_ns() % 1_000_000)))


def fuzz(harness: str, options: Sequence[str], folder: Path, *corpora: Path) -> None:
    """Run a harness of this folder; fail with its last words, and the inputs that it kept, if it finds anything."""
    found = folder / "corpus"
    found.mkdir()
    program = Path(__file__).with_name(harness)
    words = [sys.executable, str(program), "--fuzz", *options, f"-max_total_time={int(MINUTES * 60)}", f"-seed={SEED}"]
    print(f"\nPYVHOSTVDPA_SOAK_SEED={SEED}")
    done = subprocess.run(
        [*words, f"-artifact_prefix={folder}/", str(found), *map(str, corpora)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(pyvhostvdpa.__file__).parents[1])},
    )
    last = "\n".join(done.stdout.splitlines()[-40:])
    inputs = {path.name: path.read_bytes().hex() for path in folder.iterdir() if path.is_file()}
    assert done.returncode == 0, f"{last}\n{inputs}"
    ran = re.search(r"Done (\d+) runs in (\d+) second", done.stdout)
    assert ran, last
    print(f"{ran[1]} inputs in {ran[2]} s")
