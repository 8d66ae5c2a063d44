"""What mapping costs on a device, for a comparison of kernels, drivers and firmware.

tools/lab run --devices vdpa_hwsim -- python3 -m pytest tests/benchmarks/device --benchmark-autosave
tools/lab run --devices vdpa_hwsim --kernel latest -- python3 -m pytest tests/benchmarks/device --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyvhostvdpa import VdpaNetDevice
from pyvhostvdpa.bench.map import run
from pyvhostvdpa.bench.memory import BenchMemory, Page, PhysicalLayout
from pyvhostvdpa.bench.plan import MapBenchOptions, MessagePlace, Mode, Point, messages
from pyvhostvdpa.chardev.burst import PreparedMessages

SIZE = 2 << 20
ROUNDS = 10


# small pages allocated in order come in other runs in every boot; a huge page is one, and shuffled pages are as many
LAYOUTS = {"contiguous": (Page.LARGE, PhysicalLayout.CONTIGUOUS), "scattered": (Page.SMALL, PhysicalLayout.SCATTERED)}


@pytest.fixture(scope="module", params=LAYOUTS)
def memory(request: pytest.FixtureRequest) -> Iterator[BenchMemory]:
    page, layout = LAYOUTS[request.param]
    with BenchMemory(SIZE, page, layout) as made:
        yield made


def bursts(device: VdpaNetDevice, memory: BenchMemory, mode: Mode, regions: int) -> list[PreparedMessages]:
    pieces = MessagePlace(device.iotlb.limits, memory.layout).pieces(Point(memory.size, regions))
    made = []
    for unmap in (False, True):
        each = messages(mode, pieces, memory.hva, 0, unmap)
        burst = PreparedMessages(len(each))
        for message in each:
            burst.add(message)
        made.append(burst)
    return made


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: str(mode.value))
@pytest.mark.parametrize("regions", [1, 16], ids=lambda regions: f"{regions} regions")
def test_map(benchmark: BenchmarkFixture, device: VdpaNetDevice, memory: BenchMemory, mode: Mode, regions: int) -> None:
    device.iotlb.make_room(memory.size)
    maps, unmaps = bursts(device, memory, mode, regions)
    mapped = []

    def prepare() -> None:
        if mapped:
            unmaps.send(device.chardev)
        mapped[:] = [True]

    benchmark.pedantic(maps.send, args=(device.chardev,), setup=prepare, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["runs"] = memory.runs(0, memory.size)
    device.close()


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: str(mode.value))
def test_unmap(benchmark: BenchmarkFixture, device: VdpaNetDevice, memory: BenchMemory, mode: Mode) -> None:
    device.iotlb.make_room(memory.size)
    maps, unmaps = bursts(device, memory, mode, 16)

    def prepare() -> None:
        maps.send(device.chardev)

    benchmark.pedantic(unmaps.send, args=(device.chardev,), setup=prepare, rounds=ROUNDS)
    device.close()


def test_timed_maps_lead_to_memory(path: str) -> None:
    """The same maps, each tried with frames."""
    report = run(path, MapBenchOptions(memory=(SIZE,), regions=(1, 16), repeat=1))
    assert len(report.results) == 6
