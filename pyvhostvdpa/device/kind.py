# SPDX-License-Identifier: MIT
"""What a procedure knows of a kind of device: how its control queue is served, and how its data queues belong together.

A procedure starts and stops queues. That some of them receive, that a control
queue sets MAC addresses, and what has to be restored after a reset is the
device kind's: :mod:`pyvhostvdpa.device.net_kind` is the one that there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..memory.guest import GuestMemory
from ..trace.recorder import DeviceTrace
from ..virtqueue.layout import GuestQueue, RingLayout


class GuestControl(Protocol):
    """A control queue, and the state that commands have set so far."""

    @property
    def queue(self) -> GuestQueue | None:
        """The guest's queue, None if another process handles its commands."""

    @property
    def index(self) -> int:
        """The queue's index."""

    @property
    def num(self) -> int:
        """Descriptors."""

    def remember(self) -> object:
        """Return the state as it is now; the guest may keep changing it."""

    def is_at(self, remembered: object) -> bool:
        """Whether a device that has this state has what the guest has set."""


class ControlArea(Protocol):
    """Where our side of a control queue lies: ring, then buffers."""

    @property
    def layout(self) -> RingLayout:
        """Sizes and offsets of the ring."""

    @property
    def hva(self) -> int:
        """Where it lies in this process."""

    @property
    def iova(self) -> int:
        """Where the device has it."""

    @property
    def size(self) -> int:
        """Bytes of everything."""

    @property
    def device_area(self) -> int:
        """Offset of what the device writes of the ring."""

    @property
    def commands(self) -> int:
        """Offset of the buffer that the device reads."""

    @property
    def answers(self) -> int:
        """Offset of the buffer that the device writes."""


class ControlServer(Protocol):
    """Serves a guest's control queue and drives the device's."""

    queue: GuestQueue | None
    index: int
    model: Any
    died: bool
    failed: str
    kick: int
    call: int

    @property
    def area(self) -> ControlArea:
        """Our memory."""

    @property
    def serving(self) -> bool:
        """Whether the guest is served."""

    def handle(self, data: bytes) -> int:
        """Carry out one command on the running device, and remember what it sets; return the answer."""

    def replay(self) -> None:
        """Bring the device, just started, to the guest's state."""

    def take_up(self) -> None:
        """Read the guest's ring on from its used index."""

    def fill(self, job: Any) -> None:
        """Have a ``struct device_job`` do what :meth:`take_up` does."""

    def notify_by(self, kick: int, call: int) -> None:
        """Have the guest notify, and be notified, by these eventfds; it must not be served."""

    def start(self) -> None:
        """Serve the guest."""

    def hold(self) -> None:
        """Take no command any more, behind the one that is being carried out; :meth:`stop` may come later."""

    def stop(self) -> None:
        """Serve it no more, behind the command that is being carried out."""

    def close(self) -> None:
        """Stop, and close the eventfds."""


class GuestView(Protocol):
    """What the guest sees of its device beside its queues."""

    @property
    def call(self) -> int:
        """The configuration interrupt, an eventfd."""

    def connect(self, below: Any, model: Any) -> None:
        """Put a device that just started below the guest, with its control queue's state."""

    def disconnect(self) -> None:
        """Take the device away."""


@dataclass(frozen=True, slots=True)
class ControlPlace:
    """Where the control queue's rings for the device are made, and how they are served.

    ``deadline`` is how many seconds the device may take without an answer, ``ring`` the ring features negotiated
    (``SVQ_F_*``), ``config_call`` an eventfd to raise when the queue fails, or -1.
    """

    layout: RingLayout
    hva: int
    iova: int
    deadline: float
    ring: int
    config_call: int


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device.

    ``ring_bits`` returns the ring features (``SVQ_F_*``) among negotiated
    ones. ``control_size`` is how many bytes the device's control queue takes with
    a ring of that layout, ``control`` makes it; ``deadline`` is the default of
    :attr:`ControlPlace.deadline`. ``together`` is how many data queues in a
    row one thread serves if there are several. ``completes`` returns of a data
    queue, by index, whether a device that works completes what it is given,
    ``writes`` whether it writes anything but the used ring.
    """

    ring_bits: Callable[[int], int]
    control_size: Callable[[RingLayout], int]
    control: Callable[[Any, GuestMemory, ControlPlace, DeviceTrace], ControlServer]
    deadline: float
    together: int
    completes: Callable[[int], bool]
    writes: Callable[[int], bool]


def remember(control: GuestControl | None) -> object:
    """Return what the guest's control queue has set so far."""
    return None if control is None else control.remember()


def is_at(remembered: object, control: GuestControl | None) -> bool:
    """Whether a device that knows this knows what the guest has set."""
    return remembered is None if control is None else control.is_at(remembered)
