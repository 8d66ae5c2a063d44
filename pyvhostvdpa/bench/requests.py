# SPDX-License-Identifier: MIT
"""``bench ioctl``: what each cheap request takes on a device that is set up and not running.

Each is made from C, again and again, between two looks at the clock, so that
what Python adds to a call is not in the figure.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..base.causes import errno_text
from ..base.errors import KernelError
from ..base.uapi import IOCTLS, Status, VdpaConfig, VringAddr, VringFile, VringState
from ..device.net import VdpaNetDevice
from ..memory.guest import DEFAULT_GPA
from .report import device_environment
from .stats import percentile

SCHEMA = "pyvhostvdpa/bench-ioctl/1"
_WARM_UP = 10
_READY = Status.ACKNOWLEDGE | Status.DRIVER
_MISSING = (errno.EOPNOTSUPP, errno.ENOTTY)


@dataclass(frozen=True, slots=True)
class RequestCost:
    """One request: how often it was made and what it took, in ns; ``missing`` is why it is not served."""

    name: str
    count: int
    p50: float = 0.0
    p99: float = 0.0
    worst: int = 0
    missing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        if self.missing:
            return {"name": self.name, "missing": self.missing}
        ns = {"p50_ns": round(self.p50), "p99_ns": round(self.p99), "max_ns": self.worst}
        return {"name": self.name, "count": self.count, **ns}


@dataclass(frozen=True, slots=True)
class RequestReport:
    """All of them, by name."""

    environment: dict[str, Any]
    costs: list[RequestCost]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its schema has it."""
        return {"schema": SCHEMA, "ioctls": [c.to_dict() for c in self.costs], "environment": self.environment}


def run(
    path: str | os.PathLike[str], count: int = 1000, observer: Callable[[str], None] = lambda words: None
) -> RequestReport:
    """Measure; the device is reset. Raises what opening raises, and what a request fails with that the device has."""
    with VdpaNetDevice(path) as device:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            device.chardev.set_status(_READY)
            requests = list(_cheap(device, fd))
            observer(f"{len(requests)} requests, {count} times each")
            costs = [_measure(device, name, argument, count) for name, argument in requests]
            return RequestReport(device_environment(device), costs)
        finally:
            # the kernel keeps what is bound until the device is closed
            device.close()
            os.close(fd)


def _cheap(device: VdpaNetDevice, eventfd: int) -> Iterator[tuple[str, bytes]]:
    """Yield the requests that change nothing, or nothing but what is set again at each start."""
    config = bytes(VdpaConfig(0, 6)) + bytes(6)
    ring = DEFAULT_GPA
    arguments = {
        "VHOST_SET_FEATURES": int(device.features).to_bytes(8, "little"),
        "VHOST_SET_BACKEND_FEATURES": int(device.backend_features).to_bytes(8, "little"),
        "VHOST_VDPA_SET_STATUS": bytes([_READY]),
        "VHOST_VDPA_GET_CONFIG": config,
        "VHOST_SET_VRING_NUM": bytes(VringState(0, min(256, device.max_ring))),
        "VHOST_SET_VRING_ADDR": bytes(VringAddr(0, 0, ring, ring + 0x2000, ring + 0x1000, 0)),
        "VHOST_SET_VRING_KICK": bytes(VringFile(0, eventfd)),
        "VHOST_SET_VRING_CALL": bytes(VringFile(0, eventfd)),
        "VHOST_SET_VRING_ERR": bytes(VringFile(0, eventfd)),
        "VHOST_VDPA_SET_CONFIG_CALL": eventfd.to_bytes(4, "little"),
    }
    for name, row in IOCTLS.items():
        if not row.rejected and name not in _DEAR:
            yield name, arguments.get(name, b"")


_DEAR = frozenset(
    (
        "VHOST_SET_OWNER",
        "VHOST_SET_MEM_TABLE",
        "VHOST_SET_VRING_ENDIAN",
        "VHOST_GET_VRING_ENDIAN",
        "VHOST_SET_FORK_FROM_OWNER",
        "VHOST_VDPA_SET_CONFIG",
        "VHOST_VDPA_SUSPEND",
        "VHOST_VDPA_RESUME",
    )
)
"""What is made once, changes the device, has no meaning here, or has a benchmark of its own."""


def _measure(device: VdpaNetDevice, name: str, argument: bytes, count: int) -> RequestCost:
    try:
        device.chardev.repeat(name, argument, _WARM_UP)
    except KernelError as e:
        if e.errno in _MISSING:
            return RequestCost(name, 0, missing=errno_text(e.errno or 0))
        raise
    took = device.chardev.repeat(name, argument, count)
    return RequestCost(name, count, percentile(took, 50), percentile(took, 99), max(took))
