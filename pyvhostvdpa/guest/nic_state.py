# SPDX-License-Identifier: MIT
"""What a guest's virtio-net driver knows beside what is in its memory, as plain data.

In a virtual machine all of it would be guest memory and registers. Here the
driver runs in this process, so it moves as state of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..memory.guest import GuestMemory
from ..net.control import GUEST_OFFLOADS, BadCommand, ControlModel, check_hash_config, rss_pairs
from ..net.control_queue import BUFFER_SIZE
from ..net.features import Feature
from ..virtqueue.layout import GuestQueue, SplitLayout
from .arena import queue_at
from .shape import BadState

MAX_INDEX = 0xFFFF
DESCRIPTOR = 16
"""Bytes of a descriptor (virtio 1.3, 2.7.5)."""
SEEN_BYTES = 8192
"""Of the bitmap of sequence numbers received: one bit each of the latest 65536."""
MAX_TIME = 1 << 61
"""Nanoseconds, before or after a clock's start: two such times can be subtracted in 64 bits."""

Extent = tuple[str, int, int]
"""Guest memory that a driver uses: the field that names it, GPA, bytes."""


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
    """A NIC as its driver knows it; ``model`` is the state set through its control queue, None without one."""

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


def queue_at_rest(place: RingPlace) -> GuestQueue:
    """Return the queue that lies there without eventfds: to be looked at only."""
    return GuestQueue(place.index, place.num, place.desc, place.avail, place.used, -1, -1)


def check_memory(memory: GuestMemory, field: str, gpa: int, size: int) -> None:
    """Raise :class:`BadState` naming ``field`` unless ``size`` bytes at ``gpa`` are one piece of guest memory."""
    try:
        memory.hva(gpa, size)
    except (ValueError, OverflowError) as e:
        raise BadState(f"{field} {gpa:#x}+{size:#x} is not guest memory") from e


def check_place(memory: GuestMemory, place: RingPlace) -> None:
    """Raise :class:`BadState` unless a driver can have a ring there (virtio 1.3, 2.7)."""
    name = f"virtqueue {place.index}:"
    try:
        SplitLayout(place.num)
    except ValueError as e:
        raise BadState(f"{name} {e}") from e
    if place.desc % DESCRIPTOR or place.avail % 2 or place.used % 4:
        raise BadState(
            f"{name} desc {place.desc:#x}, avail {place.avail:#x} or used {place.used:#x} is not aligned "
            "to 16, 2 and 4 bytes"
        )
    for field, gpa, size in extents_of(place):
        check_memory(memory, field, gpa, size)


def extents_of(place: RingPlace) -> list[Extent]:
    """Return the memory of a ring, with both event fields."""
    name = f"virtqueue {place.index}:"
    return [
        (f"{name} desc", place.desc, DESCRIPTOR * place.num),
        (f"{name} avail", place.avail, 6 + 2 * place.num),
        (f"{name} used", place.used, 6 + 8 * place.num),
    ]


def check_disjoint(extents: Iterable[Extent]) -> None:
    """Raise :class:`BadState` if two of them overlap: a driver that writes one would change the other."""
    for (field, gpa, size), (other, at, _) in pairwise(sorted(extents, key=lambda each: each[1])):
        if gpa + size > at:
            raise BadState(f"{field} {gpa:#x}+{size:#x} and {other} {at:#x} overlap")


def check_disjoint_from(extents: Sequence[Extent], one: Extent) -> None:
    """Raise :class:`BadState` if one overlaps any of others, which are in order of address and disjoint."""
    at = bisect_left(extents, one[1], key=lambda each: each[1])
    check_disjoint([*extents[max(0, at - 1) : at + 1], one])


def check_model(model: ControlModel, features: Feature, pairs: int) -> None:
    """Raise :class:`BadState` unless a device with ``features`` and ``pairs`` pairs may be brought to this state.

    It is replayed when the device starts, which is too late to find that
    a command is malformed or too long (virtio 1.3, 5.1.6.5).
    """
    name = "control model:"
    if model.features != features:
        raise BadState(f"{name} features {int(model.features):#x} are not the NIC's {int(features):#x}")
    if not 1 <= model.pairs <= pairs:
        raise BadState(f"{name} {model.pairs} pairs in use of {pairs}")
    wanted = {"rss": Feature.RSS, "hash_config": Feature.HASH_REPORT, "offloads": Feature.CTRL_GUEST_OFFLOADS}
    for field, feature in wanted.items():
        if getattr(model, field) is not None and feature not in features:
            raise BadState(f"{name} {field} is set without the feature {feature.name}")
    if model.offloads is not None and model.offloads & ~int(features & GUEST_OFFLOADS):
        raise BadState(f"{name} offloads {model.offloads:#x} were not negotiated")
    _check_hashing(model, pairs)
    longest = max(map(len, model.replay()), default=0)
    if longest > BUFFER_SIZE:
        raise BadState(f"{name} a command of {longest} bytes, at most {BUFFER_SIZE} are possible")


def _check_hashing(model: ControlModel, pairs: int) -> None:
    try:
        used = rss_pairs(model.rss) if model.rss is not None else 1
        if model.hash_config is not None:
            check_hash_config(model.hash_config)
    except BadCommand as e:
        raise BadState(f"control model: rss or hash_config: {e}") from e
    if not 1 <= used <= pairs:
        raise BadState(f"control model: rss uses {used} transmit queues of {pairs}")
