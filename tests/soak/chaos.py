# lab: --devices vdpa_sim_net:2 --devices vdpa_hwsim:0 --memory 2G
"""300 migrations and 1,000 takes of a saved guest under random faults: network, signals, limits, devices, files.

Several storms run at once, each on a pair of devices of its own. PYVHOSTVDPA_SOAK_MIGRATIONS, PYVHOSTVDPA_SOAK_TAKES
and PYVHOSTVDPA_SOAK_SEED change how many, and which. Each migration has a seed of its own; a failure names it, and
PYVHOSTVDPA_SOAK_SEED=THAT with PYVHOSTVDPA_SOAK_MIGRATIONS=1, or THAT,ANOTHER, draws the same faults again.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
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
from pyvhostvdpa.memory.pinned import pinned_bytes

MIGRATIONS = int(os.environ.get("PYVHOSTVDPA_SOAK_MIGRATIONS", "300"))
TAKES = int(os.environ.get("PYVHOSTVDPA_SOAK_TAKES", "1000"))
GIVEN = [int(word) for word in os.environ.get("PYVHOSTVDPA_SOAK_SEED", str(time.time_ns() % 1_000_000)).split(",")]
SEED = GIVEN[0]
SEEDS = GIVEN if len(GIVEN) > 1 else range(SEED, SEED + MIGRATIONS)
TAKERS = 4
PAIRS = 3
"""Of vdpa_hwsim; one of vdpa_sim_net is added."""
FAILURES = 3
"""After so many a storm ends."""


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


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system for two guests."""
    folder.mkdir()
    lab.command("mount", "-t", "tmpfs", "-o", "size=24M,mode=0700", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _unmount(folder)


def _unmount(folder: Path) -> None:
    # what was killed there may still be going
    for _ in range(50):
        if subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    lab.command("umount", str(folder))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "state") as folder:
        yield folder


@pytest.fixture
def sims() -> Iterator[list[hwsim.HwSim]]:
    made = [hwsim.add(f"chaos{number}") for number in range(max(TAKERS, 2 * PAIRS))]
    yield made
    for sim in made:
        hwsim.remove(sim.name)


def storms(devices: storm.Devices, folder: Path, seeds: Sequence[int], pipe: Connection) -> None:
    """Migrate on a pair of devices, with one seed after the other; what came of it goes through the pipe."""
    tally, failures, begin = storm.Tally(), list[str](), time.monotonic()
    left = list(seeds)
    while left and len(failures) < FAILURES:
        weather = Storm(devices, folder)
        weather.tally = tally
        try:
            while left:
                weather.migrate(left.pop(0))
                if tally.migrations % 10 == 0:
                    print(
                        f"{devices[0][0]}: {tally.migrations} migrations, {time.monotonic() - begin:.0f} s", flush=True
                    )
        except BaseException:
            failures.append(traceback.format_exc())
            print(failures[-1], flush=True)
        finally:
            weather.close()
            storm.clear_up(devices, folder)
    pipe.send((tally, failures))


def test_migrations(hurried: None, tmp_path: Path, sims: list[hwsim.HwSim]) -> None:
    print(f"\n{len(SEEDS)} migrations, seeds {SEEDS[0]} to {SEEDS[-1]}", flush=True)
    pairs: list[storm.Devices] = [
        [(one.chardev, one), (other.chardev, other)] for one, other in zip(sims[::2], sims[1::2], strict=True)
    ]
    pairs.append([(path, None) for path in lab.DEVICES])
    fork, tally, failures = multiprocessing.get_context("fork"), storm.Tally(), list[str]()
    with ExitStack() as stack:
        running = []
        for number, devices in enumerate(pairs):
            # by the seed, so that a single one has the same kind of devices again
            seeds = [seed for seed in SEEDS if seed % len(pairs) == number]
            folder = stack.enter_context(small_disk(tmp_path / f"state{number}"))
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=storms, args=(devices, folder, seeds, theirs))
            process.start()
            theirs.close()
            running.append((process, ours))
        for process, pipe in running:
            with pipe:
                part, failed = pipe.recv()
            process.join()
            process.close()
            tally.add(part)
            failures += failed
    print(tally, flush=True)
    assert not failures, f"{len(failures)} of {tally.migrations} migrations, see above"


def test_takes(small: Path, sims: list[hwsim.HwSim]) -> None:
    print(f"\n{TAKES} takes, seed {SEED}", flush=True)
    begin, options = time.monotonic(), GuestOptions(8 << 20, ring_size=64, frame_size=128, write_rate=1 << 20)
    takers = Takers([sim.chardev for sim in sims[:TAKERS]], small, options, random.Random(SEED))
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
