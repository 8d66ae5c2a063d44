# SPDX-License-Identifier: MIT
"""What a session needs of an opened device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..base.uapi import BackendFeature
from ..device.net import State
from ..memory.guest import FileRegion, GuestMemory
from ..memory.log import SharedLog
from ..net.control_queue import NetGuestControl
from ..net.features import Feature
from ..trace.recorder import DeviceTrace
from ..virtqueue.layout import GuestQueue


class Device(Protocol):
    """What is needed of an opened device; :class:`~pyvhostvdpa.device.net.VdpaNetDevice` has it."""

    offered: Feature
    backend_features: BackendFeature
    features: Feature
    ring_sizes: tuple[int, ...]

    @property
    def path(self) -> str:
        """The chardev's path."""

    @property
    def state(self) -> State:
        """What the device is doing."""

    @property
    def trace(self) -> DeviceTrace:
        """The recorder of its calls."""

    @property
    def target(self) -> Any:
        """Its door, address spaces and groups."""

    @property
    def procedure(self) -> Any:
        """How it is started, stopped and switched."""

    def config(self) -> bytes:
        """Return the configuration space."""

    def negotiate(self, wanted: Feature) -> Feature:
        """Negotiate; return what was taken."""

    def attach(self, memory: GuestMemory) -> None:
        """Give it guest memory."""

    def add_memory(self, regions: Sequence[FileRegion]) -> None:
        """Add regions to guest memory."""

    def remove_memory(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Take regions of guest memory away."""

    def map_memory(self) -> None:
        """Map what was added, now."""

    def stand_by(self, queues: Sequence[GuestQueue], control: NetGuestControl | None = None) -> str:
        """Set it up for queues and suspend it; return how far that went."""

    def start(
        self,
        mode: State,
        queues: Sequence[GuestQueue],
        control: NetGuestControl | None = None,
        bases: Mapping[int, int] | None = None,
    ) -> None:
        """Start it."""

    def stop(self, then: State | None = None) -> None:
        """Suspend it and take its queues over."""

    def halt(self) -> None:
        """Reset it and take its queues over."""

    def reset(self) -> None:
        """Reset it."""

    def bases(self) -> Mapping[int, int]:
        """Return where the queues of a stopped device stand."""

    def set_eventfds(self, index: int, kick: int | None = None, call: int | None = None) -> None:
        """Exchange the eventfds of a running queue."""

    def set_log(self, log: SharedLog | None) -> None:
        """Exchange the dirty log."""

    def command(self, data: bytes) -> int:
        """Send a control command; return its answer."""

    def check(self) -> None:
        """Raise if a queue or the device failed."""
