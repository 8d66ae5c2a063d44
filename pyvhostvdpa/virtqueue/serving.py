# SPDX-License-Identifier: MIT
"""What serves a guest's rings while the device works on others: all that a procedure needs to know of it.

A procedure (:mod:`pyvhostvdpa.device.procedure`) starts and stops devices; how
elements get from the guest's ring to the device's and back is not its
business. The shadow virtqueue (:mod:`~pyvhostvdpa.virtqueue.shadow`) is one
way, relaying used rings alone would be another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..memory.guest import GuestMemory, Translation
from .layout import GuestQueue, RingLayout


class RingServer(Protocol):
    """Stands between one ring of the guest and the ring that the device works on."""

    @property
    def queue(self) -> GuestQueue:
        """The guest's queue."""

    @property
    def layout(self) -> RingLayout:
        """Sizes and offsets of the ring that the device works on."""

    @property
    def area(self) -> int:
        """Where that ring lies in this process, ``layout.size`` bytes."""

    @property
    def kick(self) -> int:
        """The eventfd that the device is notified by."""

    @property
    def call(self) -> int:
        """The eventfd that the device notifies by."""

    @property
    def broken(self) -> str:
        """Why the queue cannot be served any more; "" while it is healthy."""

    @property
    def in_flight(self) -> Sequence[int]:
        """The guest's heads that the device has and has not used, oldest first."""

    def take_up(self) -> None:
        """Begin anew: the device's ring empty, the guest's read on from where its used index stands now."""

    def drain(self) -> None:
        """Give the guest everything that a stopped device has used.

        Raises :class:`~pyvhostvdpa.QueueBroken` if the device's used ring is invalid.
        """

    def republish(self) -> int:
        """Write the heads in flight into the guest's avail ring again.

        Returns the base from which a device finds exactly those, then what the guest added.
        """

    def statistics(self) -> Mapping[str, int]:
        """Return what was moved so far, by the counter's name."""

    def close(self) -> None:
        """Release the eventfds; the guest's ring stays as it is. Idempotent."""


class ServerThreads(Protocol):
    """The threads in which the ring servers of one device run."""

    @property
    def running(self) -> bool:
        """Whether all of them serve their queues."""

    def start(self) -> None:
        """Start every thread."""

    def stop(self) -> None:
        """End every thread. The queues keep their state."""


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How rings are served.

    ``threads`` at most; ``busy_poll`` is for how many seconds a thread goes on
    looking when there is nothing to do, before it asks for notifications and
    sleeps.
    """

    threads: int = 1
    busy_poll: float = 0.0


@dataclass(frozen=True, slots=True)
class Serving:
    """A way of serving rings.

    ``queue`` makes the server of one queue. Its arguments are the queue, the
    guest's memory, the address of ``RingLayout.size`` bytes for the device's
    ring, the ring features negotiated (``SVQ_F_*``), and where the device has
    guest memory, None for IOVA = GPA. ``threads`` makes the threads for the
    servers of one device, RX before TX, from the options and an eventfd to
    raise when a queue breaks, or -1.
    """

    queue: Callable[[GuestQueue, GuestMemory, int, int, Translation | None], RingServer]
    threads: Callable[[Sequence[RingServer], RelayOptions, int], ServerThreads]
