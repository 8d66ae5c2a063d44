# lab: --no-vm
"""Random schedules of guest, shadow virtqueue and device: as many programs as asked for, 20,000 if not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import test_svq_schedules as schedules


def test_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "PROGRAMS", int(os.environ.get("PYVHOSTVDPA_SOAK_PROGRAMS", "20000")))
    schedules.test_any_schedule_loses_nothing_and_keeps_the_free_slots_whole()
