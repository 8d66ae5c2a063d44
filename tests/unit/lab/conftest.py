"""The lab's own tests: they import `labkit` from tools/ and never start a VM or touch the network."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
from labkit.cache import VARIABLE, Cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for one test."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return Cache()
