"""What a recording costs the process that is recorded: the same switches with and without it, in virtual time."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hwsim
from hw_guest import HwGuest
from tracing import mounted

from pyvhostvdpa import VhostVdpa
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.net.features import CONTROL, SUPPORTED
from pyvhostvdpa.trace.downtime import DT1, DT2, milliseconds

PAIRS = 2
ROUNDS = 5
LIMIT = 0.01


@contextmanager
def recorded() -> Iterator[None]:
    """A recording of everything in a process of its own, as a user makes one."""
    argv = [sys.executable, "-m", "pyvhostvdpa", "watch", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "recording until" in process.stderr.readline()
    yield
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert '"lost_events": 0' in out


def switch_and_stop(guest: HwGuest) -> dict[str, float]:
    """DT1 and DT2 of one round, ms."""
    device = guest.device
    trace = device.trace
    trace._trace.events.clear()
    guest.switch_and_stop()
    return {name: milliseconds(trace._trace, device.path, phases) for name, phases in (("DT1", DT1), ("DT2", DT2))}


def medians(guest: HwGuest) -> dict[str, float]:
    rounds = [switch_and_stop(guest) for _ in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in rounds) for name in ("DT1", "DT2")}


def test_recording_takes_less_than_1_percent_of_a_downtime() -> None:
    """With the costs of both profiles; without costs it is printed."""
    sim = hwsim.add("watched", PAIRS, mem_scale=512)
    guest = HwGuest(sim, PAIRS, SUPPORTED | CONTROL, BackendFeature(0), procedure="direct")
    found: dict[tuple[str, str], float] = {}
    try:
        with mounted():
            for profile in ("none", "mlx5-2025", "series-2023"):
                sim.write("cost/profile", profile)
                bare = medians(guest)
                with recorded():
                    watched = medians(guest)
                for name in ("DT1", "DT2"):
                    found[profile, name] = watched[name] / bare[name] - 1
                    print(
                        f"{profile:<12} {name}: {bare[name]:10.3f} ms bare, {watched[name]:10.3f} ms recorded: "
                        f"{100 * found[profile, name]:+.2f} %"
                    )
    finally:
        guest.close()
        hwsim.remove(sim.name)
    assert all(share < LIMIT for (profile, _), share in found.items() if profile != "none"), found


def test_cost_per_call_is_printed() -> None:
    """The shortest request there is, with and without a recording."""
    sim = hwsim.add("watched")
    count = 2_000
    try:
        with mounted(), VhostVdpa(sim.chardev) as door:
            bare = statistics.median(door.repeat("VHOST_VDPA_GET_STATUS", b"", count))
            with recorded():
                watched = statistics.median(door.repeat("VHOST_VDPA_GET_STATUS", b"", count))
    finally:
        hwsim.remove(sim.name)
    print(f"an ioctl: {bare:.0f} ns bare, {watched:.0f} ns recorded: {watched - bare:.0f} ns, one per instruction")
    assert watched > bare
