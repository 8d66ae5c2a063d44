"""Stop to run with the costs of a real device: what software adds to them, for a whole migration and for many devices.

`tools/bench/downtime.py` prints the tables that these bounds are of.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hwsim
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

import downtime
from downtime import Case

from pyvhostvdpa.bench.ladder.report import Run


def ms(run: Run) -> float:
    assert run.gap is not None
    return run.gap.ms


@pytest.mark.parametrize(("pairs", "times"), [(1, 3.0), (16, 1.5)])
def test_a_migration_takes_little_more_than_the_best_row(pairs: int, times: float) -> None:
    """Without its last round of memory; the median of as many migrations as the row has runs: one CPU does it all."""
    hwsim.load()
    row = ms(downtime.best_row(Case(pairs=pairs)))
    found, own, _ = downtime.median_move(pairs)
    took = downtime.without_memory(found)
    print(f"{pairs} pairs: row {row:.3f}, migrate {took:.3f} ms without memory: {took / row:.2f} times; {found.ms:.3f}")
    print(f"the guest's own gap {own:.3f} ms")
    assert took <= times * row


def test_eight_devices_stand_still_little_longer_than_one() -> None:
    hwsim.load()
    one, eight = (ms(downtime.best_row(Case(devices=devices))) for devices in (1, 8))
    print(f"1 device {one:.3f}, 8 devices {eight:.3f} ms: {eight / one:.2f} times")
    assert eight <= 1.5 * one
