"""Each rule of check is in the table of tests/kernel/check_table.py: a fault that it catches, or why there is none."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

import check_table
from check_table import CAUGHT, FAULTS, NOTICED, UNBROKEN

from pyvhostvdpa.probe.check.rules import catalogue

HWSIM = Path(__file__).parents[2] / "tools" / "vdpa_hwsim"
RULES = {rule.id for rule in catalogue()}


def test_table_has_every_rule_and_no_other() -> None:
    assert check_table.rows().keys() == RULES


def test_table_has_a_rule_either_as_caught_or_with_a_reason() -> None:
    assert not {rule for rules in CAUGHT.values() for rule in rules} & UNBROKEN.keys()
    assert CAUGHT.keys() | NOTICED.keys() == FAULTS.keys()
    assert {rule for rules in NOTICED.values() for rule in rules} <= RULES


def test_table_shows_that_most_rules_can_fail() -> None:
    assert len(UNBROKEN) < len(RULES) / 8


def test_fault_switches_exist_and_are_documented() -> None:
    source, page = (HWSIM / "debugfs.c").read_text(), (HWSIM / "README.md").read_text()
    for fault in FAULTS.values():
        if fault.switch:
            assert f'= "{fault.switch}",' in source
            assert f"{fault.switch}`" in page


def test_table_as_text_has_a_line_per_rule() -> None:
    assert len(check_table.text().splitlines()) == len(RULES)
