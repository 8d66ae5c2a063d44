"""Shadow virtqueues move nearly as many frames as the device does without them, side by side in one run."""

from __future__ import annotations

import time

import hwsim
import pytest
from hw_guest import HwGuest

from pyvhostvdpa import State
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.bench import shadow as bench
from pyvhostvdpa.bench.stats import percentile
from pyvhostvdpa.device.shadowing import USED, USED_ALL
from pyvhostvdpa.net.features import CONTROL, SUPPORTED

FRAME = 1500
WINDOW = 64
"""Frames in flight on a pair: the guest sends bursts of as many."""
ROUNDS, SECONDS = 3, 1.0
AT_LEAST = 0.8
MOST_LATENCY = 1.3
IDLE = 0.001


def frames_per_second(guest: HwGuest) -> float:
    guest.receives(200)
    before, begin = guest.nic.counts().received, time.monotonic()
    time.sleep(SECONDS)
    guest.device.check()
    return (guest.nic.counts().received - before) / (time.monotonic() - begin)


@pytest.mark.parametrize("pairs", [1, 4])
def test_shadowing_costs_a_fifth_of_the_frames_at_most(pairs: int) -> None:
    sim = hwsim.add("hw0", pairs)
    guest = HwGuest(sim, pairs, SUPPORTED | CONTROL, BackendFeature(0))
    speeds: dict[State, list[float]] = {State.PASSTHROUGH: [], State.SHADOW: []}
    try:
        for pair in guest.nic.pairs:
            pair.c.frame_size, pair.c.window = FRAME, WINDOW
        guest.restart_driver()
        guest.start()
        guest.use_all_pairs()
        guest.traffic.run()
        for _ in range(2 * ROUNDS):
            speeds[guest.device.state].append(frames_per_second(guest))
            guest.switch()
        guest.settle()
    finally:
        guest.close()
        hwsim.remove(sim.name)
    passthrough, shadow = (sum(each) / ROUNDS for each in (speeds[State.PASSTHROUGH], speeds[State.SHADOW]))
    print(
        f"{pairs} pairs: {passthrough:.0f} frames/s in passthrough, {shadow:.0f} shadowed, "
        f"{shadow / passthrough:.3f} of it; {speeds}"
    )
    assert shadow / passthrough >= AT_LEAST


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize(("frame", "at_least"), [(1500, 0.97), (64, 0.92)])
def test_relaying_rings_alone_is_nearly_as_fast_as_passthrough(pairs: int, frame: int, at_least: float) -> None:
    sim = hwsim.add("hw0", pairs)
    try:
        report = bench.run(sim.chardev, pairs, frame, seconds=0.5, rounds=ROUNDS, frames=300, shadow=USED)
    finally:
        hwsim.remove(sim.name)
    passthrough, shadow = (percentile(cost.latencies, 50) for cost in report.costs)
    print(f"{pairs} pairs, {frame} bytes: {report.ratio:.3f} of the frames, latency {shadow / passthrough:.2f} times")
    assert report.ratio >= at_least
    assert shadow <= MOST_LATENCY * passthrough


@pytest.mark.parametrize("shadow", [USED, USED_ALL])
def test_an_idle_relay_uses_no_cpu(shadow: str) -> None:
    """It looks each second for what nobody tells of; in virtual time the load of this machine is not counted."""
    sim = hwsim.add("hw0", 4)
    guest = HwGuest(sim, 4, SUPPORTED | CONTROL, BackendFeature(0), shadow=shadow)
    try:
        guest.start(State.SHADOW)
        time.sleep(0.5)
        begin, cpu = time.monotonic(), time.process_time()
        time.sleep(10)
        used, passed = time.process_time() - cpu, time.monotonic() - begin
        print(f"{shadow}: {100 * used / passed:.4f} % of a CPU, idle")
        assert used < IDLE * passed
    finally:
        guest.close()
        hwsim.remove(sim.name)
