# SPDX-License-Identifier: MIT
"""What a migration needs of a guest, and no more: any guest that has it can be sent, saved and received.

A guest is memory and one set of virtqueues per device. Its state moves as sections of bytes that only its own
:class:`GuestKind` can decode; SHAPE names that kind, so the other side finds the decoder by name.
:mod:`pyvhostvdpa.guest.synthetic` is one implementation.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol, TypeVar

from ..base.errors import MigrationRefused
from ..device.net import State, VdpaNetDevice
from ..device.work import Work
from ..memory.guest import GuestMemory
from ..memory.mapped import ProgressCallback
from ..net.control_queue import NetGuestControl
from ..net.guest_config import GuestConfig
from ..virtqueue.layout import GuestQueue
from .shape import DeviceShape, GuestShape


class Window(enum.IntEnum):
    """Times whose longest gap is always known, however many longer ones there are outside."""

    SWITCH = 0
    """The switch of the device to shadow virtqueues."""
    START = 1
    """The start in passthrough that ends a migration: on the destination, or again on the source."""


class Section(Protocol):
    """A part of a stopped guest's state, decoded."""

    def encode(self) -> bytes:
        """Return it as bytes that the guest's kind decodes."""


class Sections(Protocol):
    """A guest's state as C writes, checks and takes it."""

    c: Any
    """A ``struct guest_sections``."""
    room: int
    """Bytes that all sections take at most."""

    def prepare(self, own: Callable[[], bytes]) -> None:
        """Make what the guest's own section needs beside C: ``own`` returns it, it fits, and nothing is taken yet.

        Raises :class:`~pyvhostvdpa.MissingFeature` for want of resources.
        """


class DeviceSection(Section, Protocol):
    """The part of the state that belongs to one device."""

    @property
    def shape(self) -> DeviceShape:
        """What a device must be like to continue from it; :class:`~pyvhostvdpa.guest.shape.BadState` if unknown."""


class Guest(Protocol):
    """A guest on one or more devices, which it knows by number only.

    Everything with a body here is a default that an implementation inherits.
    """

    kind: str
    """Names the :class:`GuestKind` that decodes its state; at most 32 bytes, printable."""
    memory: GuestMemory
    """All memory that its devices may reach."""
    can_pause: bool
    """Whether :meth:`pause` and :meth:`run` act. If not, another process pauses the guest."""

    # -- what a device works on ----------------------------------------------------

    def queues(self, number: int) -> Sequence[GuestQueue]:
        """Return the data queues on device ``number``, by index."""

    def control(self, number: int) -> NetGuestControl | None:
        """Return the control queue on device ``number`` and the state set through it; None without one."""
        return None

    def config(self, number: int) -> GuestConfig | None:
        """Return what the guest sees of device ``number`` beside its queues; None if it does not matter."""
        return None

    def start(self, number: int, device: VdpaNetDevice, mode: State = State.PASSTHROUGH) -> None:
        """Start ``device``, to which the guest's memory is attached, as the guest's device ``number``.

        ``mode`` is passthrough or shadow. Raises what :meth:`~pyvhostvdpa.VdpaNetDevice.start_passthrough` raises.
        """
        device.guest_config = self.config(number)
        start = device.start_shadow if mode is State.SHADOW else device.start_passthrough
        start(self.queues(number), self.control(number))

    def stand_by(self, number: int, device: VdpaNetDevice) -> str:
        """Prepare ``device`` for a :meth:`start` in passthrough; return how far that went, in words."""
        device.guest_config = self.config(number)
        return device.stand_by(self.queues(number), self.control(number))

    def prepare_start(self, number: int, device: VdpaNetDevice) -> Work | None:
        """Return :meth:`start` in passthrough of a device that stands by, prepared; None if it cannot be."""
        return device.prepare_start(self.queues(number), self.control(number))

    # -- its CPUs --------------------------------------------------------------------

    def run(self) -> None:
        """Let the guest run; nothing if another process does that. Idempotent."""

    def pause(self) -> None:
        """Return once no CPU of the guest runs. Idempotent.

        A guest that another process pauses (:attr:`can_pause`) raises
        :class:`~pyvhostvdpa.MigrationRefused` while it runs.
        """

    # -- as data ---------------------------------------------------------------------

    def shapes(self) -> tuple[DeviceShape, ...]:
        """Return what a destination's devices must be like, by number."""

    def outline(self) -> Sequence[DeviceSection]:
        """Return what is known of each device's part while the guest runs; empty if nothing is.

        A destination makes its devices ready with it (:meth:`GuestKind.expect`).
        """
        return ()

    def state(self) -> tuple[Section, Sequence[DeviceSection]]:
        """Return everything but memory; the guest must be paused and its devices stopped."""

    def rest(self) -> tuple[Section, Sequence[Section]]:
        """Return, in the same situation as :meth:`state`, what the :meth:`outline` lacked; :meth:`load` takes it.

        By default that is everything.
        """
        return self.state()

    def load(self, guest: Section, devices: Sequence[Section], shapes: Sequence[DeviceShape]) -> None:
        """Load :meth:`state` or :meth:`rest` of the guest that had this outline; its memory must be there.

        Checks and raises as :meth:`GuestKind.restore` does. A kind whose
        :meth:`outline` is empty is never asked.
        """
        raise NotImplementedError

    def sections(self) -> Sections | None:
        """Return :meth:`rest` for C, or, of a guest that is expected, :meth:`load`; None if that cannot be done.

        It is for the situation that the guest is in, with a control queue
        that is held, and holds until that changes.
        """
        return None

    def rehearse(self, arriving: bool) -> None:
        """Go through what :meth:`rest` does, or for an ``arriving`` guest :meth:`load`, without any effect.

        So nothing of it is done for the first time while the guest is paused.
        It may run, unless it is ``arriving``. By default nothing is done.
        Raises :class:`~pyvhostvdpa.VhostVdpaError`, which means nothing.
        """

    def shift_clock(self, ns: int) -> None:
        """Move the times that the guest remembers to another host's clock, by any ``ns``; raises nothing."""

    def forget_clock(self) -> None:
        """Count no time that the guest spent in a file as time without a frame; raises nothing."""

    # -- what is observed of it --------------------------------------------------------

    def watching(self, window: Window, number: int | None = None) -> AbstractContextManager[None]:
        """Take the block's time as a window of device ``number``, or of all; a guest that sees no gaps ignores it."""
        return nullcontext()

    def close(self) -> None:
        """End the guest and its memory; no device may have it any more. Idempotent."""


G = TypeVar("G", bound=Guest)
G_co = TypeVar("G_co", bound=Guest, covariant=True)


class GuestKind(Protocol[G_co]):
    """Makes guests of one kind from their state, which comes from a peer or from a file.

    Everything is checked before a guest is returned: after that nothing can
    fail because of what the state holds.
    """

    def decode_guest(self, data: bytes) -> Section:
        """Return the part that belongs to no device; :class:`~pyvhostvdpa.StreamCorrupt` if that is not what it is."""

    def decode_rest(self, data: bytes) -> Section:
        """Return the part of one device in :meth:`Guest.rest`; :class:`~pyvhostvdpa.StreamCorrupt` if invalid."""
        return self.decode_device(data)

    def decode_device(self, data: bytes) -> DeviceSection:
        """Return the part of one device, or of its outline; :class:`~pyvhostvdpa.StreamCorrupt` if it is neither."""

    def restore(
        self, memory: GuestMemory, guest: Section, devices: Sequence[DeviceSection], shapes: Sequence[DeviceShape]
    ) -> G_co:
        """Return the guest in ``memory``, which it then owns, not running.

        ``guest`` and ``devices`` are what this kind has decoded, ``shapes``
        what SHAPE promised. Raises :class:`~pyvhostvdpa.StreamCorrupt` if
        they do not fit each other or the memory, and
        :class:`~pyvhostvdpa.MissingFeature` for want of resources here; the
        memory stays its owner's then.
        """

    def expect(self, memory: GuestMemory, outline: Sequence[DeviceSection], shapes: Sequence[DeviceShape]) -> G_co:
        """Return the guest that will come into ``memory``, which is still zeros; see :meth:`Guest.load`.

        Raises what :meth:`restore` raises.
        """


Kinds = Mapping[str, GuestKind[G]]
"""The kinds of guest that one side knows, by name."""


def kind_of(shape: GuestShape, kinds: Kinds[G]) -> GuestKind[G]:
    """Return the decoder for a guest of this shape; :class:`~pyvhostvdpa.MigrationRefused` for an unknown kind."""
    try:
        return kinds[shape.kind]
    except KeyError:
        raise MigrationRefused(
            f"the guest is of kind {shape.kind!r}; this side can run: {', '.join(sorted(kinds)) or 'none'}",
            hint="receive it with the program, or the version of pyvhostvdpa, that started it",
        ) from None


# -- guests whose traffic is measured ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """Every frame accounted for. ``lost`` is final once nothing is in flight any more."""

    sent: int
    received: int
    lost: int
    duplicated: int
    corrupted: int
    reordered: int

    @classmethod
    def total(cls, counts: Iterable[FrameCounts]) -> FrameCounts:
        """Return the sum of each count."""
        return cls(*(sum(each) for each in zip(*map(astuple, counts), strict=True)))

    def to_dict(self) -> dict[str, int]:
        """Return the counts for JSON."""
        return asdict(self)


class TrafficGuest(Guest, Protocol):
    """A guest that sends frames to itself and accounts for each: what a report of a migration is made from."""

    @property
    def running(self) -> bool:
        """Whether it runs."""

    def use_pairs(self, number: int, path: str) -> None:
        """Do what a driver does once its device, at ``path``, runs: take all its queues into use."""

    def announce(self) -> None:
        """Announce the move to its networks (virtio 1.3, 5.1.6.5.4)."""

    def drain(self, seconds: float) -> bool:
        """Send no more; return whether everything sent arrived within ``seconds``."""

    def counts(self) -> FrameCounts:
        """Return the counts of all its frames."""

    def bad_pages(self) -> int:
        """Return how many pages do not hold what the guest wrote there; it must be paused."""

    def window_gap(self, window: Window) -> float | None:
        """Return the longest time without a frame that touches a window, in ms; None if that is unknown."""


class NewGuest(Protocol):
    """A guest that can be started: what it takes, and how to make it."""

    @property
    def memory(self) -> int:
        """Bytes."""

    @property
    def pairs(self) -> int:
        """Queue pairs on each device."""

    def check(self) -> None:
        """Raise :class:`~pyvhostvdpa.MigrationRefused` if there can be no such guest; opens and allocates nothing."""

    def create(self, devices: Sequence[VdpaNetDevice], progress: ProgressCallback) -> TrafficGuest:
        """Return the guest for ``devices``, not running; ``progress`` gets the bytes allocated since its last call."""
