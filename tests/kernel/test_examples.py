"""Every example runs as it stands, on a real device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pyvhostvdpa.cli.examples

EXAMPLES = sorted(p.stem for p in Path(pyvhostvdpa.cli.examples.__path__[0]).glob("[!_]*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(devices: tuple[str, str], name: str) -> None:
    module = f"pyvhostvdpa.cli.examples.{name}"
    done = subprocess.run([sys.executable, "-m", module, devices[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""
