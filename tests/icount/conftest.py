"""Tests in virtual time: the clock counts instructions, so that what they measure is not the machine's load."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))


@pytest.fixture(autouse=True, scope="session")
def virtual_time() -> None:
    accelerator = os.environ.get("PYVHOSTVDPA_LAB_ACCEL")
    assert accelerator == "icount", f"run by `tools/lab test tests/icount`, not with {accelerator}"
