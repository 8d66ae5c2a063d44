# lab: --debug-kernel --minutes 3
# also: tests/kernel/test_hwsim_features.py tests/kernel/test_hwsim_hostile.py tests/kernel/test_hwsim.py
# also: tests/kernel/test_hwsim_control.py -k "not migrates_with_all_its_pairs"
"""vdpa_hwsim's own tests and a hostile client, in a kernel that checks memory accesses, locks and leaks.

User Mode Linux cannot track which pages a process wrote (no userfaultfd for writes, no soft-dirty bits), so no memory
migrates there; guests that continue with another device are in test_hwsim_control.py.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

import hostile
import pytest
import visits

CYCLES = int(os.environ.get("PYVHOSTVDPA_SOAK_CYCLES", "100"))
SECONDS = float(os.environ.get("PYVHOSTVDPA_SOAK_MINUTES", "3")) * 60
SEED = int(os.environ.get("PYVHOSTVDPA_SOAK_SEED", str(time.time_ns() % 1_000_000)))


@pytest.mark.parametrize("variant", hostile.VARIANTS)
def test_a_client_that_writes_what_it_likes(variant: str) -> None:
    print(f"{variant}, seed {SEED}", flush=True)
    for pairs in (1, 2):
        seconds = SECONDS / len(hostile.VARIANTS) / 2
        print(hostile.fuzz(variant, SEED, seconds=seconds, pairs=pairs), flush=True)


def test_devices_come_are_used_and_go() -> None:
    for _ in range(CYCLES):
        visits.cycle()
