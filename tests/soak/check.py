# lab: --devices vdpa_sim_net:2 --devices vdpa_hwsim:0
"""100 checks of one device in a row: nothing is left behind, no verdict changes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

import lab

from pyvhostvdpa.probe.check.engine import check
from pyvhostvdpa.probe.check.rules import catalogue

RUNS = int(os.environ.get("PYVHOSTVDPA_SOAK_CHECKS", "100"))
PROC = Path("/proc")


def processes() -> int:
    return sum(entry.name.isdecimal() for entry in PROC.iterdir())


def test_a_hundred_checks_leave_nothing_behind() -> None:
    rules = catalogue()
    first = check(lab.DEVICES[0], rules)
    before = lab.open_fds(), processes()
    for _ in range(RUNS - 1):
        found = check(lab.DEVICES[0], rules)
        assert [(r.rule.id, r.verdict) for r in found.results] == [(r.rule.id, r.verdict) for r in first.results]
        assert lab.open_fds() == before[0]
        # kernel threads come and go; rules' processes do not stay
        assert processes() <= before[1] + 20
