# SPDX-License-Identifier: MIT
"""What a guest's virtio-net driver knows beside what is in its memory, as plain data.

In a virtual machine all of it would be guest memory and registers. Here the
driver runs in this process, so it moves as state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..memory.guest import GuestMemory
from ..net.control import ControlModel
from ..virtqueue.layout import GuestQueue, SplitLayout
from .arena import queue_at

MAX_INDEX = 0xFFFF
SEEN_BYTES = 8192
"""Of the bitmap of sequence numbers received: one bit each of the latest 65536."""


class BadState(ValueError):
    """State that no driver of this package can have."""


@dataclass(frozen=True, slots=True)
class RingPlace:
    """A virtqueue of the guest: its index, size, and where its parts lie (GPA)."""

    index: int
    num: int
    desc: int
    avail: int
    used: int


@dataclass(frozen=True, slots=True)
class PairState:
    """One RX/TX pair: where its rings and buffers lie, the driver's indices, its traffic's account.

    ``tx_free`` are the TX slots that carry no frame, ``seen`` the bitmap of
    the sequence numbers received, ``gaps`` the longest times without a frame
    as (begin, end); times are CLOCK_MONOTONIC in ns, ``last_rx`` 0 before
    the first frame.
    """

    rx: RingPlace
    tx: RingPlace
    rx_gpa: int
    tx_gpa: int
    tx_table_gpa: int
    tx_descs: int
    frame_size: int
    window: int
    flow: int
    dst: bytes
    src: bytes
    sending: bool
    rx_avail: int
    rx_used: int
    tx_avail: int
    tx_used: int
    tx_free: tuple[int, ...]
    sent: int
    received: int
    duplicated: int
    corrupted: int
    reordered: int
    highest: int
    ring_errors: int
    last_rx: int
    seen: bytes
    gaps: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ControlDriverState:
    """The driver's side of the control queue: its ring, its two buffers, its indices."""

    ring: RingPlace
    command: int
    answer: int
    avail_idx: int
    used_idx: int
    open: int


@dataclass(frozen=True, slots=True)
class NicState:
    """A NIC as its driver knows it; ``model`` is what its control queue has set, None without one."""

    features: int
    pairs: tuple[PairState, ...]
    control: ControlDriverState | None
    model: ControlModel | None


def place_of(queue: GuestQueue) -> RingPlace:
    """Return where a queue lies, without its eventfds."""
    return RingPlace(queue.index, queue.num, queue.desc, queue.avail, queue.used)


def queue_of(place: RingPlace) -> GuestQueue:
    """Return the queue that lies there, with eventfds of its own."""
    return queue_at(place.index, place.num, place.desc, place.avail, place.used)


def check_memory(memory: GuestMemory, gpa: int, size: int) -> None:
    """Raise :class:`BadState` unless ``size`` bytes at ``gpa`` are one piece of guest memory."""
    try:
        memory.hva(gpa, size)
    except (ValueError, OverflowError) as e:
        raise BadState(f"{gpa:#x}+{size:#x} is not guest memory") from e


def check_place(memory: GuestMemory, place: RingPlace) -> None:
    """Raise :class:`BadState` unless a driver can have a ring there (virtio 1.3, 2.7)."""
    try:
        SplitLayout(place.num)
    except ValueError as e:
        raise BadState(f"virtqueue {place.index}: {e}") from e
    if place.desc % 16 or place.avail % 2 or place.used % 4:
        raise BadState(f"virtqueue {place.index}: not aligned")
    check_memory(memory, place.desc, 16 * place.num)
    check_memory(memory, place.avail, 6 + 2 * place.num)
    check_memory(memory, place.used, 6 + 8 * place.num)
