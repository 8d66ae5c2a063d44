"""Guest memory moves about as fast as plain C can copy it.

Guarded is the CPU time of the busier side, which sets the pace where each has
a core; by the clock it is printed too, but that measures the machine's other work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bench" / "memory.py"


def test_the_mover_keeps_up_with_plain_c(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(SCRIPT), "--memory", "128", "--repeat", "9", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["rows"]}
    ratio = result["mover_to_plain"]
    with capsys.disabled():
        speeds = ", ".join(f"{name} {row['gb_per_s']:.2f}" for name, row in rows.items())
        print(f"\nGB/s: {speeds}; mover to plain C {ratio['cpu']:.2f} by CPU time, {ratio['clock']:.2f} by the clock")
    assert list(rows) == ["plain C", "page mover", "page mover, TLS", "sendfile"]
    assert ratio["cpu"] >= 0.9
