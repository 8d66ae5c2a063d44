# SPDX-License-Identifier: MIT
"""The devices that a row of the ladder runs on: made for it by vdpa_hwsim, or given."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from ...base.errors import MigrationRefused
from ...chardev.door import can_be_opened, check_path
from ...device.procedure.series import Optimization
from ...host import mgmt
from .. import hwsim
from .rows import LadderRow

_FIRST_MAC = 0x525491A1C200


@dataclass(frozen=True, slots=True)
class Stage:
    """Chardevs of as many sources as destinations. ``keeps_maps`` if no reset makes them drop a map."""

    sources: Sequence[str]
    destinations: Sequence[str]
    keeps_maps: bool = False


class Supply(Protocol):
    """Where stages come from. ``profile`` and ``charged`` (bytes) are ``None`` where the device has its own costs."""

    profile: str | None
    charged: int | None

    def stage(self, plan: LadderRow) -> AbstractContextManager[Stage]:
        """Return devices for one run of a row, which owns them for the block."""


class Simulated:
    """Makes vdpa_hwsim devices for each run and deletes them afterwards.

    ``memory`` bytes of guest memory are charged as if they were ``charged``.
    """

    def __init__(self, devices: int, pairs: int, profile: str, memory: int, charged: int) -> None:
        scale, rest = divmod(charged, memory)
        if rest or not 1 <= scale <= hwsim.MAX_SCALE:
            raise MigrationRefused(
                f"{memory} bytes cannot be charged as {charged}: it has to be 1 to {hwsim.MAX_SCALE} times as much",
                hint="vhost-vdpa ladder --memory 1G --charge 128G",
            )
        if not hwsim.loaded():
            raise hwsim.not_loaded()
        self.profile: str | None = profile
        self.charged: int | None = charged
        self._devices, self._pairs, self._scale = devices, pairs, scale
        self._heavy_min = memory // 2

    @contextmanager
    def stage(self, plan: LadderRow) -> Iterator[Stage]:
        """Make devices with what the row needs of the parent."""
        keeps = Optimization.KEEP_AT_SWITCH in plan.switches
        wanted = {
            "cost_profile": self.profile,
            "mem_scale": self._scale,
            "heavy_min": self._heavy_min,
            "clean_map": "N" if keeps else "Y",
        }
        with ExitStack() as stack:
            stack.enter_context(hwsim.parameters(wanted))
            paths = [stack.enter_context(self._device(number)) for number in range(2 * self._devices)]
            yield Stage(paths[: self._devices], paths[self._devices :], keeps)

    @contextmanager
    def _device(self, number: int) -> Iterator[str]:
        # a source and its destination have the same address, as the guest takes it along
        mac = (_FIRST_MAC + number % self._devices).to_bytes(6, "big").hex(":")
        name = f"ladder{number}"
        mgmt.add_device(name, hwsim.MODULE, "mac", mac, "max_vqp", str(self._pairs))
        try:
            yield mgmt.wait_for_chardev(name)
        finally:
            mgmt.delete_device(name, can_be_opened)


class Given:
    """Uses the same devices for each run: the first half are sources."""

    profile: str | None = None
    charged: int | None = None

    def __init__(self, chardevs: Sequence[str | os.PathLike[str]]) -> None:
        paths = [mgmt.chardev_of(each) for each in chardevs]
        for path in paths:
            check_path(path)
            if mgmt.holders(path):
                raise mgmt.busy(path)
        if len(paths) < 2 or len(paths) % 2 or len({mgmt.device_number(path) for path in paths}) != len(paths):
            raise MigrationRefused(
                f"{len(paths)} devices were given: it takes as many destinations as sources, all different",
                hint="vhost-vdpa ladder --on SOURCE… DESTINATION…; vhost-vdpa list shows the devices",
            )
        self._paths = paths

    @contextmanager
    def stage(self, plan: LadderRow) -> Iterator[Stage]:
        """Return the devices; opening them resets them."""
        half = len(self._paths) // 2
        yield Stage(self._paths[:half], self._paths[half:])
