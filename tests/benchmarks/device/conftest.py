"""Benchmarks on a real device: the one named by PYVHOSTVDPA_BENCH_DEVICE, or /dev/vhost-vdpa-0."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pyvhostvdpa import VdpaNetDevice
from pyvhostvdpa.host.mgmt import chardev_of


@pytest.fixture(scope="session")
def path() -> str:
    return chardev_of(os.environ.get("PYVHOSTVDPA_BENCH_DEVICE", "/dev/vhost-vdpa-0"))


@pytest.fixture
def device(path: str) -> Iterator[VdpaNetDevice]:
    with VdpaNetDevice(path) as opened:
        yield opened
