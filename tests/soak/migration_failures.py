"""Every fault at every phase boundary of a migration between two processes."""

# lab: --devices vdpa_hwsim:0 --env PYVHOSTVDPA_EVERY_FAULT=1

from __future__ import annotations

import subprocess
import sys


def test_every_fault_at_every_phase_boundary() -> None:
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernel/test_migration_failures.py"]
    assert subprocess.run(argv, check=False).returncode == 0
