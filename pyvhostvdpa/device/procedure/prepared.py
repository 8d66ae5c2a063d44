# SPDX-License-Identifier: MIT
"""What :mod:`~pyvhostvdpa.device.procedure.in_place` prepares while a device runs."""

from __future__ import annotations

from dataclasses import dataclass

from ...chardev.calls import PreparedCalls
from ...virtqueue.layout import GuestQueue
from ...virtqueue.rings import GuestRings
from ...virtqueue.serving import RingServer, TakeOver
from ..kind import GuestControl

Addresses = tuple[int, int, int]
"""Of a ring, as the device sees them: descriptors, avail ring, used ring."""
Face = tuple[Addresses, "GuestQueue | RingServer"]
"""What a device gets for a queue: its ring, and the object with the eventfds for kick and call."""


@dataclass(frozen=True, slots=True)
class Move:
    """What moves a suspended device to other rings: the list, and where in it the bases are."""

    calls: PreparedCalls
    bases: tuple[int, ...]
    given: dict[int, Face]
    """What the device has of each queue afterwards."""


@dataclass(slots=True)
class PreparedStart:
    """A start of a device that stands by; ``anew`` if it turned out that it has to be started from a reset."""

    move: Move
    queues: tuple[GuestQueue, ...]
    control: GuestControl | None
    rings: GuestRings
    """What C remembers the rings in: the device may be given others before the start."""
    anew: bool = False


@dataclass(frozen=True, slots=True)
class PreparedStop:
    """A stop of a shadowed device: its calls and where in them bases are read, and what becomes of its queues."""

    calls: PreparedCalls
    places: tuple[int, ...]
    take_over: TakeOver
    passed: GuestRings | None
    """The rings that the device works on itself while others are relayed."""
