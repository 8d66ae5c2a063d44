# lab: --no-vm --minutes 30
"""State of a guest from a hostile source, under libFuzzer: decoded, checked, restored and run against memory."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fuzzer import fuzz

CORPUS = Path(__file__).parents[1] / "native" / "corpus" / "state"
OPTIONS = ("-max_len=193", "-len_control=0", "-reduce_inputs=0", "-timeout=60", "-print_final_stats=1")
"""Long inputs from the start, and kept long: it takes several edits at once to get past a check."""


def test_no_state_raises_anything_but_streamcorrupt_or_crashes(tmp_path: Path) -> None:
    fuzz("hostile_state.py", OPTIONS, tmp_path, CORPUS)
