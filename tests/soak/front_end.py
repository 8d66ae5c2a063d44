# lab: --no-vm --minutes 30
"""A hostile vhost-user front-end, under libFuzzer: any messages, files and orders, with failing devices."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fuzzer import fuzz

OPTIONS = ("-max_len=2048", "-len_control=0", "-timeout=60", "-print_final_stats=1")


def test_no_front_end_crashes_a_session_or_leaves_anything_behind(tmp_path: Path) -> None:
    fuzz("hostile_front_end.py", OPTIONS, tmp_path)
