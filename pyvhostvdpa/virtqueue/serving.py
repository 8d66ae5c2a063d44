# SPDX-License-Identifier: MIT
"""What serves a guest's rings while the device works on others: all that a procedure needs to know of it.

A procedure (:mod:`pyvhostvdpa.device.procedure`) starts and stops devices; how
elements get from the guest's ring to the device's and back is not its
business. The shadow virtqueue (:mod:`~pyvhostvdpa.virtqueue.shadow`) is one
way; the other (:mod:`~pyvhostvdpa.virtqueue.used`) leaves the guest's
descriptors where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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
    def through(self) -> bool:
        """Whether the device works on the guest's own ring, which then is in the position of passthrough."""

    @property
    def base(self) -> int:
        """From where the device has to start, once :meth:`take_up` was called."""

    def addresses(self, driver: int, device: int) -> tuple[int, int, int]:
        """Return where the device finds descriptors, avail and used ring.

        ``driver`` and ``device`` are the IOVAs of the two areas of ``layout`` at :attr:`area`; guest memory is at
        IOVA = GPA where that matters.
        """

    @property
    def broken(self) -> str:
        """Why the queue cannot be served any more; "" while it is healthy."""

    @property
    def in_flight(self) -> Sequence[int]:
        """The guest's heads that the device has and has not used, oldest first."""

    def take_up(self) -> None:
        """Start again, before the device runs: the guest's ring is read on from where its used index stands now."""

    def reaches(self, gpa: int, size: int) -> bool:
        """Whether the device has a buffer of the guest that lies in this range. No thread may be serving the queue."""

    def memory_changed(self) -> None:
        """Follow the guest's memory, of which regions came or went. No thread may be serving the queue."""

    def notify_by(self, queue: GuestQueue) -> None:
        """Have the guest notify, and be notified, by the eventfds of ``queue``, which is the same ring.

        No thread may be serving the queue. ``queue.call`` may be -1.
        """

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


class TakeOver(Protocol):
    """Stops a device's threads and takes its queues over, as a part of a job that C does."""

    def fill(self, job: Any) -> None:
        """Put it into a ``struct device_job``."""

    def broken(self) -> str:
        """After the job: which queue is broken and why; "" for none."""

    def bases(self) -> list[int]:
        """After the job: what :meth:`RingServer.republish` returns, of each queue that is served."""


class ServerThreads(Protocol):
    """The threads in which the ring servers of one device run."""

    @property
    def running(self) -> bool:
        """Whether all of them serve their queues."""

    def start(self) -> None:
        """Start every thread."""

    def stop(self) -> None:
        """End every thread. The queues keep their state."""

    def prepare_take_over(self) -> TakeOver | None:
        """Return what does in one go: keep the threads from the queues, drain each, republish each.

        Of the queues that they serve, not of others (:attr:`RingServer.through`).
        None if there is no such thing: then these are called one by one.
        """


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """How rings are served.

    ``threads`` at most; ``busy_poll`` is for how many seconds a thread keeps
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
    servers of one device, in the order of service, from
    the options, an eventfd to raise when a queue breaks, or -1, and how many
    in a row one thread serves if there are several.
    ``relays`` returns of a queue, by index, whether it is served: of others the
    device works on the guest's own ring (:attr:`RingServer.through`).
    ``in_place`` says that the device fetches descriptors from the guest's own
    table: guest memory has to be at IOVA = GPA where it looks for rings.
    ``name`` is its name for users.
    """

    queue: Callable[[GuestQueue, GuestMemory, int, int, Translation | None], RingServer]
    threads: Callable[[Sequence[RingServer], ServingOptions, int, int], ServerThreads]
    relays: Callable[[int], bool] = lambda _: True
    in_place: bool = False
    name: str = "full"


if not TYPE_CHECKING:

    def __getattr__(name):
        """Return what had another name in an earlier release (PEP 562)."""
        if name != "RelayOptions":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn("RelayOptions is called ServingOptions now", DeprecationWarning, stacklevel=2)
        return ServingOptions
