# lab: --devices vdpa_sim_net:2 --devices vdpa_hwsim:0 --memory 2G
"""300 migrations and 1,000 takes of a saved guest under random faults: network, signals, limits, devices, files.

PYVHOSTVDPA_SOAK_MIGRATIONS, PYVHOSTVDPA_SOAK_TAKES and PYVHOSTVDPA_SOAK_SEED change how many, and which. Each
migration has a seed of its own; a failure names it, and PYVHOSTVDPA_SOAK_SEED=THAT with PYVHOSTVDPA_SOAK_MIGRATIONS=1
draws the same faults again.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

import hwsim
import lab
import peers
import storm
import unharmed
from storm import Storm
from takers import Takers

from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.memory.guest import pinned_bytes

MIGRATIONS = int(os.environ.get("PYVHOSTVDPA_SOAK_MIGRATIONS", "300"))
TAKES = int(os.environ.get("PYVHOSTVDPA_SOAK_TAKES", "1000"))
SEED = int(os.environ.get("PYVHOSTVDPA_SOAK_SEED", str(time.time_ns() % 1_000_000)))
TAKERS = 4


@pytest.fixture(autouse=True)
def nothing_is_harmed() -> Iterator[None]:
    """The kernel's log is clean; nothing stays pinned; no process and no descriptor is left."""
    descriptors = lab.open_fds()
    with unharmed.watched_kernel():
        yield
    assert pinned_bytes() == 0
    assert lab.open_fds() == descriptors
    assert _children() == []


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes forked from here on wait for seconds in place of a minute."""
    monkeypatch.setattr("pyvhostvdpa.migration.common.HAND_OVER_SECONDS", storm.PATIENCE)
    monkeypatch.setattr("pyvhostvdpa.migration.fence.MARGIN", storm.MARGIN)
    monkeypatch.setattr("pyvhostvdpa.migration.source.MARGIN", storm.MARGIN)
    monkeypatch.setattr(peers, "STALL_SECONDS", storm.STALL)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system for two guests."""
    folder = tmp_path / "state"
    folder.mkdir()
    lab.command("mount", "-t", "tmpfs", "-o", "size=24M,mode=0700", "tmpfs", str(folder))
    yield folder
    # what was killed there may still be going
    for _ in range(50):
        if subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    lab.command("umount", str(folder))


@pytest.fixture
def sims() -> Iterator[list[hwsim.HwSim]]:
    made = [hwsim.add(f"chaos{number}") for number in range(TAKERS)]
    yield made
    for sim in made:
        hwsim.remove(sim.name)


def test_migrations(hurried: None, small: Path, sims: list[hwsim.HwSim]) -> None:
    begin, done = time.monotonic(), 0
    print(f"\n{MIGRATIONS} migrations, seeds {SEED} to {SEED + MIGRATIONS - 1}", flush=True)
    kinds = [[(sims[0].chardev, sims[0]), (sims[1].chardev, sims[1])], [(path, None) for path in lab.DEVICES]]
    tally = storm.Tally()
    while done < MIGRATIONS:
        # by the seed, so that a single one has the same devices again
        kind = (SEED + done) // 10 % len(kinds)
        weather = Storm(kinds[kind], small)
        weather.tally = tally
        try:
            while done < MIGRATIONS and (SEED + done) // 10 % len(kinds) == kind:
                weather.migrate(SEED + done)
                done += 1
        finally:
            weather.close()
        print(f"{done} migrations, {time.monotonic() - begin:.0f} s", flush=True)
    print(tally, flush=True)


def test_takes(small: Path, sims: list[hwsim.HwSim]) -> None:
    print(f"\n{TAKES} takes, seed {SEED}", flush=True)
    begin, options = time.monotonic(), GuestOptions(8 << 20, ring_size=64, frame_size=128, write_rate=1 << 20)
    takers = Takers([sim.chardev for sim in sims], small, options, random.Random(SEED))
    told = 0
    try:
        while takers.tally.takes < TAKES:
            takers.round()
            if takers.tally.takes - told >= 100:
                told = takers.tally.takes
                takers.is_sound()
                print(f"{takers.tally}, {time.monotonic() - begin:.0f} s", flush=True)
        takers.is_sound()
    finally:
        takers.close()
    print(takers.tally, flush=True)
