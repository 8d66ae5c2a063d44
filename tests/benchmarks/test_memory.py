"""How fast guest memory moves, beside a plain C program that sends the same bytes with the same checksum."""

from __future__ import annotations

import pytest
from memory import Run, ratio, table, take_turns

SIZE, TURNS, STARTS = 64 << 20, 11, 3


def test_memory_moves_at_nine_tenths_of_plain_c_or_more(capsys: pytest.CaptureFixture[str]) -> None:
    """CPU seconds of the busier side are compared, the median of pairs that ran one after the other.

    With a CPU for each process that side sets the pace. Waiting for a CPU is
    in no process's account, caches that others use meet both of a pair, and
    new processes are started in case one pair meets some for long.
    """
    runs: dict[str, list[Run]] = {}
    for _ in range(STARTS):
        for kind, taken in take_turns(SIZE, TURNS, lambda text: None).items():
            runs.setdefault(kind, []).extend(taken)
    with capsys.disabled():
        print(f"\n{table(runs, SIZE)}")
    assert ratio(runs, "busier") >= 0.9
