"""What the requests of a switch of modes cost on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyvhostvdpa import BackendFeature
from pyvhostvdpa.bench.guest import BenchGuest

ROUNDS = 10


@pytest.fixture
def guest(path: str) -> Iterator[BenchGuest]:
    with BenchGuest(path) as made:
        yield made


def test_start(benchmark: BenchmarkFixture, guest: BenchGuest) -> None:
    benchmark.pedantic(guest.start, setup=guest.device.reset, rounds=ROUNDS, warmup_rounds=1)
    guest.moves()


def test_suspend(benchmark: BenchmarkFixture, guest: BenchGuest) -> None:
    def prepare() -> None:
        guest.device.reset()
        guest.start()
        guest.moves()

    benchmark.pedantic(guest.device.suspend, setup=prepare, rounds=ROUNDS, warmup_rounds=1)


def test_resume(benchmark: BenchmarkFixture, guest: BenchGuest) -> None:
    assert BackendFeature.RESUME in guest.device.backend_features
    guest.start()
    benchmark.pedantic(guest.device.resume, setup=guest.device.suspend, rounds=ROUNDS, warmup_rounds=1)


def test_reset(benchmark: BenchmarkFixture, guest: BenchGuest) -> None:
    benchmark.pedantic(guest.device.reset, setup=guest.start, rounds=ROUNDS, warmup_rounds=1)
