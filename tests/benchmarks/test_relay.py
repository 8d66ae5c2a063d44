"""What the relay costs per element, without a device.

The guest's and the device's side are written before the clock starts, so that
only the shadow virtqueue's own work is timed:
    pytest tests/benchmarks --benchmark-autosave
    pytest tests/benchmarks --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from ring_model import BASE, Model, Segment

from pyvhostvdpa._cdefs import lib

BURST = 64


@pytest.fixture(params=[1, 4, 64], ids=lambda regions: f"{regions} regions")
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    made = Model(num=256, regions=request.param, gap=1 << 20)
    yield made
    made.close()


def test_relay_a_burst_of_64_both_ways(benchmark: BenchmarkFixture, model: Model) -> None:
    regions = model.memory.regions
    for slot in range(BURST):
        region = regions[slot % len(regions)]
        model.describe(slot, [Segment(region.gpa + 0x40000, 1500, writable=True)])

    def prepare() -> None:
        model.ring.avail.idx = model.ring.used.idx = model.avail_idx = 0
        lib.svq_start(model.svq.c)
        for slot in range(BURST):
            model.publish(slot)
            element = model.svq.c.device.used.ring[slot]
            element.id, element.len = slot, 1500

    def relay() -> int:
        lib.svq_forward(model.svq.c)
        model.svq.c.device.used.idx = BURST
        return int(lib.svq_return(model.svq.c))

    moved = benchmark.pedantic(relay, setup=prepare, rounds=300)
    assert moved == BURST
    assert model.svq.c.broken == lib.SVQ_OK
    assert regions[0].gpa >= BASE
    benchmark.extra_info["ns_per_element"] = round(benchmark.stats.stats.median / BURST * 1e9, 1)
