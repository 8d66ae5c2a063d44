"""vdpa_hwsim against a client that writes what it likes; tests/soak/hwsim.py does the same for longer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import hostile
import hwsim
import pytest
import unharmed
import visits

ROUNDS = 12
CYCLES = 5


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """The kernel has nothing to report in its log."""
    with unharmed.watched_kernel():
        yield


@pytest.mark.parametrize("variant", hostile.VARIANTS)
def test_client_that_writes_anything_harms_only_itself(variant: str) -> None:
    tally = hostile.fuzz(variant, seed=1, rounds=ROUNDS)
    print(variant, tally)
    assert min(tally.rounds, tally.frames, tally.faults, tally.commands, tally.maps) > 0


@pytest.mark.smoke
def test_devices_come_and_go() -> None:
    for _ in range(CYCLES):
        visits.cycle()


@pytest.mark.smoke
def test_the_module_stays_as_long_as_it_has_a_device() -> None:
    sim = hwsim.add("busy")
    try:
        refused = subprocess.run(["rmmod", "vdpa_hwsim"], capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "in use" in refused.stderr
        visits.use(sim)
    finally:
        hwsim.remove(sim.name)
