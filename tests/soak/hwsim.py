# lab: --devices vdpa_hwsim:0
"""vdpa_hwsim: 1,000 devices that come, are used and go; 10 minutes of a client that writes what it likes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

import hostile
import unharmed
import visits
from unharmed import Usage

from pyvhostvdpa.memory.pinned import pinned_bytes

CYCLES = int(os.environ.get("PYVHOSTVDPA_SOAK_CYCLES", "1000"))
MINUTES = float(os.environ.get("PYVHOSTVDPA_SOAK_MINUTES", "10"))
SEED = int(os.environ.get("PYVHOSTVDPA_SOAK_SEED", str(time.time_ns() % 1_000_000)))
SLICE_S = 30.0
# What a kernel needs to have its caches filled, and not more at the end than at the beginning.
WARM_UP = 30
# Objects that come and go with time alone: freed lazily, or kept back by each CPU.
FLUCTUATION = 300


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """Nothing is reported in the kernel's log, nothing stays pinned, no descriptor open."""
    descriptors = len(os.listdir("/proc/self/fd"))
    with unharmed.watched_kernel():
        yield
    assert pinned_bytes() == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors


def demand_no_leak(before: Usage, times: int) -> None:
    """Less than half an object of any kind, and less than a page, for each time that something was done.

    Beyond what fluctuates: a leak shows when there were many more times than that.
    """
    kilobytes, objects = Usage.now().growth(before)
    print(f"grown: {kilobytes} kB, objects: { ({k: v for k, v in objects.items() if v > 20}) }", flush=True)
    assert [name for name, count in objects.items() if count > FLUCTUATION + times / 2] == []
    assert sum(kilobytes.values()) < 4 * times


def test_devices_come_are_used_and_go() -> None:
    for _ in range(WARM_UP):
        visits.cycle()
    before, begin = Usage.now(), time.monotonic()
    for number in range(1, CYCLES + 1):
        visits.cycle()
        if number % 50 == 0:
            print(f"{number} cycles, {time.monotonic() - begin:.0f} s", flush=True)
    demand_no_leak(before, CYCLES)


def test_a_client_that_writes_what_it_likes() -> None:
    print(f"seed {SEED}", flush=True)
    hostile.fuzz("set_map", SEED, seconds=min(SLICE_S, MINUTES * 60))
    before, end, number, rounds = Usage.now(), time.monotonic() + MINUTES * 60, 0, 0
    variants = list(hostile.VARIANTS)
    while (left := end - time.monotonic()) > 0:
        variant = variants[number % len(variants)]
        number += 1
        tally = hostile.fuzz(variant, SEED + number, seconds=min(SLICE_S, left), pairs=1 + number % 2)
        rounds += tally.rounds
        print(f"{end - time.monotonic():.0f} s left, {variant}: {tally}", flush=True)
    demand_no_leak(before, rounds)
