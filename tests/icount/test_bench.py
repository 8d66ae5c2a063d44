"""What mapping costs in virtual time: quadratic without a batch, as the device counts it; and what Python adds."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hwsim
import pytest

from pyvhostvdpa import VdpaNetDevice
from pyvhostvdpa.base.uapi import Access, IotlbType
from pyvhostvdpa.bench.map import run
from pyvhostvdpa.bench.memory import BenchMemory, PhysicalLayout
from pyvhostvdpa.bench.plan import MapBenchOptions, Mode
from pyvhostvdpa.chardev.burst import PreparedMessages
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.memory.guest import PAGE_SIZE

SOURCE = Path(__file__).parents[2] / "tools" / "bench" / "iotlb_burst.c"
MESSAGES = 1024
IOVA = 4 << 30
US = 1_000


@pytest.fixture
def sim() -> Iterator[hwsim.HwSim]:
    made = hwsim.add("hw0")
    yield made
    hwsim.remove("hw0")


@pytest.fixture
def plain_c(tmp_path: Path) -> Path:
    program = tmp_path / "iotlb_burst"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
    return program


def from_c(program: Path, device: str, repeat: int, how: str = "write") -> list[int]:
    words = [str(program), device, str(MESSAGES), str(repeat), how]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def from_python(path: str, repeat: int) -> list[int]:
    """The whole public call for prepared messages, between two looks at the clock in Python."""
    took = []
    with VdpaNetDevice(path) as device, BenchMemory(MESSAGES * PAGE_SIZE) as memory:
        device.iotlb.make_room(memory.size)
        maps, unmaps, begin, end = (
            PreparedMessages(MESSAGES),
            PreparedMessages(MESSAGES),
            PreparedMessages(1),
            PreparedMessages(1),
        )
        first = IotlbMessage(IotlbType.UPDATE, 0, IOVA, PAGE_SIZE, memory.hva, int(Access.RW))
        maps.add_pieces(first, MESSAGES, 2 * PAGE_SIZE, uaddr_step=PAGE_SIZE)
        gone = IotlbMessage(IotlbType.INVALIDATE, 0, IOVA, PAGE_SIZE)
        unmaps.add_pieces(gone, MESSAGES, 2 * PAGE_SIZE, uaddr_step=0)
        begin.add(IotlbMessage(IotlbType.BATCH_BEGIN, 0))
        end.add(IotlbMessage(IotlbType.BATCH_END, 0))
        for _ in range(repeat):
            begin.send(device.chardev)
            t = time.monotonic_ns()
            maps.send(device.chardev)
            took.append(time.monotonic_ns() - t)
            unmaps.send(device.chardev)
            end.send(device.chardev)
    return took


def test_a_burst_from_python_takes_what_a_plain_c_program_takes(sim: hwsim.HwSim, plain_c: Path) -> None:
    c = from_c(plain_c, sim.chardev, 5)
    python = from_python(sim.chardev, 5)
    c += from_c(plain_c, sim.chardev, 5)
    python += from_python(sim.chardev, 5)
    ratio = sorted(python)[5] / sorted(c)[5]
    print(f"{MESSAGES} map messages: C {sorted(c)[5] / US:.1f} us, Python {sorted(python)[5] / US:.1f} us: {ratio:.4f}")
    print(f"all, in us: C {[n // US for n in c]}, Python {[n // US for n in python]}")
    assert ratio <= 1.03


QUADRATIC = MapBenchOptions(
    memory=tuple(n * PAGE_SIZE for n in (32, 64, 128, 256, 512)),
    regions=(1,),
    layout=PhysicalLayout.SCATTERED,
    modes=(Mode.BATCH, Mode.UNBATCHED),
    repeat=3,
)


def test_without_a_batch_the_cost_is_quadratic_and_the_device_counts_the_same(sim: hwsim.HwSim) -> None:
    report = run(sim.chardev, QUADRATIC)
    curves = report.fits()
    for r in report.results:
        print(f"{r.mode.value}: {r.runs} runs, {r.set_maps} set_map, {r.map_ns.median / US:.0f} us")
        assert r.set_maps == (r.runs if r.mode is Mode.UNBATCHED else 1)
    print({mode: curve.in_words() for mode, curve in curves.items()})
    batch, unbatched = curves["batch"], curves["unbatched"]
    assert batch.worst < 0.1
    assert unbatched.worst < 0.1
    # at 512 runs nearly all of it is the quadratic part; in a batch there is next to none
    assert unbatched.quadratic * 512 * 512 > 0.8 * unbatched.at(512)
    assert batch.quadratic * 512 * 512 < 0.2 * batch.at(512)
    gain = report.gain()
    assert gain is not None
    assert gain[0].map_ns.median > 20 * gain[1].map_ns.median


@pytest.mark.parametrize("runs", [64, 256])
def test_the_time_without_a_batch_is_the_time_that_the_device_was_in_set_map(sim: hwsim.HwSim, runs: int) -> None:
    sim.write("cost/set_map_entry_ns", 5 * US)
    one = MapBenchOptions((runs * PAGE_SIZE,), (1,), layout=PhysicalLayout.SCATTERED, modes=(Mode.UNBATCHED,), repeat=1)
    sim.write("reset_stats", 1)
    [r] = run(sim.chardev, one).results
    counted = {key: int(value) for key, value in sim.read("stats").items()}
    # twice mapped (once to warm up) and unmapped, and the proof's own rings
    entries = 2 * sum(k + 1 for k in range(1, r.runs + 1)) + 2 + 1
    assert counted["set_map"] == 2 * r.runs + 2 + 1
    assert counted["map_entries"] == entries
    assert counted["set_map_charged_ns"] == entries * 5 * US
    once = (counted["set_map_ns"] - 3 * 5 * US) / 2
    print(f"{r.runs} runs: measured {r.map_ns.median / US:.0f} us, the device says {once / US:.0f} us")
    assert r.map_ns.median == pytest.approx(once, rel=0.05)
