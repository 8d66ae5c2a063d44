# SPDX-License-Identifier: MIT
"""The guest's NIC: a virtio-net driver in guest memory, one RX/TX pair each.

It does what a driver does and no more: once it is set up, it does not know
whether its rings are shadowed, nor which device it is on.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from .._cdefs import ffi, lib
from ..device.net import VdpaNetDevice
from ..device.shadowing import USED
from ..memory.guest import GuestMemory
from ..net.control import ControlModel
from ..net.features import Feature, offered_to_guest, ring_bits
from ..net.guest_config import GuestConfig
from ..virtqueue.layout import GuestQueue, map_queue
from .arena import GuestArena, close_queue, place_queue
from .control_driver import CONTROL_RING, ControlDriver, check_driver, driver_extents
from .nic_state import (
    MAX_INDEX,
    MAX_TIME,
    SEEN_BYTES,
    Extent,
    NicState,
    PairState,
    check_disjoint,
    check_memory,
    check_model,
    check_place,
    extents_of,
    place_of,
    queue_of,
)
from .protocol import FrameCounts, Window
from .shape import BadState

FRAME_BUFFER = 2048
"""Bytes per frame buffer, virtio_net_hdr included."""
_HEADER, _HASH_HEADER = 12, 20
"""Bytes of virtio_net_hdr: with VERSION_1, and with HASH_REPORT (virtio 1.3, 5.1.6)."""
MIN_FRAME, MAX_FRAME = 60, FRAME_BUFFER - _HASH_HEADER

_BROADCAST = b"\xff" * 6
_SOURCE = b"\x52\x54\x91\x76\x64\x01"
TABLE_SIZE = 32
"""Bytes of an indirect table of two descriptors."""
_MAX_COUNT = (1 << 63) - 1

_GAP = struct.Struct("=qq")
"""``struct nic_gap``: begin and end."""
_COPIED = (
    *("tx_descs", "frame_size", "window", "flow", "rx_avail", "rx_used", "tx_avail", "tx_used", "sent", "received"),
    *("duplicated", "corrupted", "reordered", "highest", "ring_errors", "last_rx"),
)
"""What the C structure and :class:`PairState` have alike."""
_FIXED = ("tx_descs", "frame_size", "window", "flow")
"""Of these, what does not change while the driver runs."""


@dataclass(frozen=True, slots=True)
class NicOptions:
    """How the guest's driver sets its NIC up.

    ``chained`` sends each frame as two descriptors, header and frame, as
    drivers without ``VIRTIO_F_ANY_LAYOUT`` do; with ``INDIRECT_DESC`` they
    are in a table. ``rx_relayed`` says that a device may be shadowed with its
    receive queues relayed and its transmit queues not, see
    :func:`window_of`. ``control_index`` is the control queue's index, None for
    a NIC without; ``control_ring`` is how many descriptors that queue has.
    """

    pairs: int = 1
    ring_size: int = 256
    frame_size: int = 256
    chained: bool = True
    features: Feature = Feature.VERSION_1
    control_index: int | None = None
    control_ring: int = CONTROL_RING
    rx_relayed: bool = False

    @classmethod
    def fitting(cls, device: VdpaNetDevice, pairs: int = 1, ring_size: int = 256, frame_size: int = 256) -> Self:
        """Return the options of a driver that asks its device: rings of at most ``ring_size`` that each queue takes."""
        index = device.groups.control_index
        return cls(
            pairs=pairs,
            ring_size=min(ring_size, device.largest_ring(range(2 * pairs))),
            frame_size=frame_size,
            features=device.features,
            control_index=index,
            control_ring=CONTROL_RING if index is None else min(CONTROL_RING, device.largest_ring([index])),
            rx_relayed=device.shadow == USED,
        )


def window_of(ring_size: int, rx_relayed: bool) -> int:
    """Return how many frames a pair may have in flight so that its device has a receive buffer for each.

    A guest with ``n`` in flight needs ``n`` buffers in passthrough. Through a relay, buffers that it posts again reach
    the device late: it needs twice as many where both queues are relayed, three times as many where only the receive
    queue is (``rx_relayed``). tests/unit/test_backpressure_model.py tries all orders.
    """
    return max(ring_size // (3 if rx_relayed else 2), 1)


class NicPair:
    """RX queue ``2 * number``, TX queue ``2 * number + 1``, and their traffic.

    ``window`` is the most frames in flight (:func:`window_of`), so that a
    device which drops for want of a buffer has no reason to.
    """

    def __init__(self, memory: GuestMemory, rx: GuestQueue, tx: GuestQueue) -> None:
        self.rx, self.tx = rx, tx
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.thread: threading.Thread | None = None
        """What drives it, if anything ever did: one thread at a time (:class:`~pyvhostvdpa.guest.traffic.Cpus`)."""
        self._memory = memory
        self._tx_free = ffi.new("uint16_t[]", tx.num)
        p: Any = ffi.new("struct nic_pair *")
        self.c = p
        for ring, queue in ((p.rx, rx), (p.tx, tx)):
            map_queue(ring, queue, memory)
        p.tx_free = self._tx_free
        p.buffer_size = FRAME_BUFFER
        p.rx_kick, p.rx_call, p.tx_kick, p.tx_call = rx.kick, rx.call, tx.kick, tx.call
        p.wake = self.wake
        p.sending = 1

    @classmethod
    def place(cls, memory: GuestMemory, arena: GuestArena, number: int, options: NicOptions) -> Self:
        """Set a pair up as a driver does that starts."""
        ring_size, frame_size = options.ring_size, options.frame_size
        if not MIN_FRAME <= frame_size <= MAX_FRAME:
            raise ValueError(f"frame size {frame_size} is not within {MIN_FRAME}..{MAX_FRAME}")
        rx, tx = 2 * number, 2 * number + 1
        pair = cls._open(memory, lambda: place_queue(arena, rx, ring_size), lambda: place_queue(arena, tx, ring_size))
        try:
            pair._place(arena, number, options)
        except BaseException:
            pair.close()
            raise
        return pair

    @classmethod
    def _open(cls, memory: GuestMemory, rx: Callable[[], GuestQueue], tx: Callable[[], GuestQueue]) -> Self:
        """Open all descriptors of a pair, or none."""
        with ExitStack() as unless_made:
            queues = []
            for make in (rx, tx):
                queues.append(make())
                unless_made.callback(close_queue, queues[-1])
            pair = cls(memory, *queues)
            unless_made.pop_all()
        return pair

    def _place(self, arena: GuestArena, number: int, options: NicOptions) -> None:
        buffers = options.ring_size * FRAME_BUFFER
        # spread out, so that traffic proves the map's middle and end
        spread = arena.size // 2 // options.pairs
        rx_gpa = arena.allocate(buffers, at=arena.start + spread * (options.pairs + number))
        tx_gpa = arena.allocate(buffers)
        p = self.c
        p.tx_descs = 2 if options.chained else 1
        table = 0
        if Feature.INDIRECT_DESC in options.features:
            # one slot of the ring, two descriptors in its table
            p.tx_descs = 1
            table = arena.allocate(TABLE_SIZE * options.ring_size)
        self._point(rx_gpa, tx_gpa, table, options.features)
        p.frame_size = options.frame_size
        p.window = window_of(options.ring_size, options.rx_relayed)
        p.flow = number + 1
        p.dst, p.src = list(_BROADCAST), list(_SOURCE)
        lib.nic_start(p)

    def _point(self, rx_gpa: int, tx_gpa: int, table: int, features: Feature) -> None:
        p, memory = self.c, self._memory
        p.features = ring_bits(features)
        p.header = _HASH_HEADER if Feature.HASH_REPORT in features else _HEADER
        p.rx_gpa, p.tx_gpa = rx_gpa, tx_gpa
        p.rx_hva = ffi.cast("uint8_t *", memory.hva(rx_gpa, self.rx.num * FRAME_BUFFER))
        p.tx_hva = ffi.cast("uint8_t *", memory.hva(tx_gpa, self.tx.num * FRAME_BUFFER))
        if Feature.INDIRECT_DESC in features:
            p.tx_table_gpa = table
            p.tx_tables = ffi.cast("struct vring_desc *", memory.hva(table, TABLE_SIZE * self.tx.num))

    @classmethod
    def restore(cls, memory: GuestMemory, state: PairState, features: Feature) -> Self:
        """Resume a driver from a state that :func:`check_nic` accepted."""
        pair = cls._open(memory, lambda: queue_of(state.rx), lambda: queue_of(state.tx))
        pair._load(state, features)
        return pair

    def outline(self) -> PairState:
        """Return where this pair's driver has everything, and nothing of what it does: it may run."""
        moving: dict[str, Any] = {name: 0 for name in _COPIED if name not in _FIXED}
        return dataclasses.replace(self.state(), sending=False, tx_free=(), seen=bytes(SEEN_BYTES), gaps=(), **moving)

    def load(self, state: PairState, features: Feature) -> None:
        """Load the state of the driver of an :meth:`outline`, once :func:`check_nic` accepted it.

        Raises :class:`BadState` if it is not that driver.
        """
        if (state.rx, state.tx) != (place_of(self.rx), place_of(self.tx)):
            raise BadState(f"pair of flow {state.flow}: its rings are not at their announced addresses")
        self._load(state, features)

    def _load(self, state: PairState, features: Feature) -> None:
        self._point(state.rx_gpa, state.tx_gpa, state.tx_table_gpa, features)
        p = self.c
        for name in _COPIED:
            setattr(p, name, getattr(state, name))
        p.dst, p.src = list(state.dst), list(state.src)
        p.sending = int(state.sending)
        p.tx_free_count = len(state.tx_free)
        p.tx_free[0 : len(state.tx_free)] = state.tx_free
        ffi.buffer(p.seen)[:] = state.seen
        gaps = ffi.buffer(p.gaps)
        gaps[:] = bytes(len(gaps))
        for number, gap in enumerate(state.gaps):
            _GAP.pack_into(gaps, number * _GAP.size, *gap)

    def state(self) -> PairState:
        """Return what this pair's driver knows; it must be paused."""
        p = self.c
        return PairState(
            rx=place_of(self.rx),
            tx=place_of(self.tx),
            rx_gpa=int(p.rx_gpa),
            tx_gpa=int(p.tx_gpa),
            tx_table_gpa=int(p.tx_table_gpa),
            dst=bytes(p.dst),
            src=bytes(p.src),
            sending=bool(p.sending),
            tx_free=tuple(p.tx_free[0 : p.tx_free_count]),
            seen=bytes(ffi.buffer(p.seen)),
            gaps=tuple(self.gaps()),
            **{name: int(getattr(p, name)) for name in _COPIED},
        )

    @property
    def queues(self) -> tuple[GuestQueue, GuestQueue]:
        """RX, then TX."""
        return self.rx, self.tx

    def counts(self) -> FrameCounts:
        """Return the account of this pair's frames."""
        p = self.c
        return FrameCounts(
            sent=p.sent,
            received=p.received,
            lost=p.sent - p.received,
            duplicated=p.duplicated,
            corrupted=p.corrupted + p.ring_errors,
            reordered=p.reordered,
        )

    def gaps(self) -> list[tuple[int, int]]:
        """Return the longest times without a frame as (begin, end), CLOCK_MONOTONIC ns."""
        return [(begin, end) for begin, end in _GAP.iter_unpack(ffi.buffer(self.c.gaps)) if end]

    def begin_window(self, window: Window) -> None:
        """Remember, from now on, the longest time without a frame that touches the window."""
        lib.nic_begin_window(self.c, window, time.monotonic_ns())

    def end_window(self, window: Window) -> None:
        """End the window now; a gap that began within it counts whenever it ends."""
        lib.nic_end_window(self.c, window, time.monotonic_ns())

    def window_gap(self, window: Window) -> float | None:
        """Return the longest time without a frame that touches the window, in ms; None if no such gap has ended."""
        longest = self.c.windows[window].longest
        return (longest.end - longest.begin) / 1e6 if longest.end else None

    def close(self) -> None:
        """End the thread that drives the pair, and close the eventfds.

        The thread is waited for: until it has left, it may look at the eventfds and at guest memory.
        """
        lib.nics_end(ffi.new("struct nic_pair *[]", [self.c]), 1)
        if self.thread is not None and self.thread.ident is not None:
            self.thread.join()
        close_queue(self.rx)
        close_queue(self.tx)
        os.close(self.wake)


def check_nic(memory: GuestMemory, state: NicState) -> list[Extent]:
    """Raise :class:`BadState` unless a driver can resume from this state: it reaches guest memory and nothing else.

    The message names the field. Returns the guest memory that the driver uses.
    """
    features = Feature(state.features)
    if not state.pairs:
        raise BadState("pairs: a NIC has at least one")
    if (state.control is None) != (state.model is None):
        raise BadState("control driver and control model: one without the other")
    extents = []
    for number, pair in enumerate(state.pairs):
        _check_pair(memory, number, pair, features)
        extents += _pair_extents(number, pair, features)
    if state.control is not None and state.model is not None:
        if state.control.ring.index < 2 * len(state.pairs):
            raise BadState(f"control queue: index {state.control.ring.index} is a data queue's")
        check_driver(memory, state.control, features)
        check_model(state.model, features, len(state.pairs))
        extents += driver_extents(state.control)
    check_disjoint(extents)
    return extents


def _pair_extents(number: int, state: PairState, features: Feature) -> list[Extent]:
    extents = [
        *extents_of(state.rx),
        *extents_of(state.tx),
        (f"pair {number}: rx_gpa", state.rx_gpa, state.rx.num * FRAME_BUFFER),
        (f"pair {number}: tx_gpa", state.tx_gpa, state.tx.num * FRAME_BUFFER),
    ]
    if Feature.INDIRECT_DESC in features:
        extents.append((f"pair {number}: tx_table_gpa", state.tx_table_gpa, state.tx.num * TABLE_SIZE))
    return extents


def _check_pair(memory: GuestMemory, number: int, state: PairState, features: Feature) -> None:
    if (state.rx.index, state.tx.index) != (2 * number, 2 * number + 1):
        raise BadState(f"pair {number} has virtqueues {state.rx.index} and {state.tx.index}")
    check_place(memory, state.rx)
    check_place(memory, state.tx)
    for field, gpa, size in _pair_extents(number, state, features):
        check_memory(memory, field, gpa, size)
    name = f"pair {number}:"
    if not MIN_FRAME <= state.frame_size <= MAX_FRAME:
        raise BadState(f"{name} frame_size {state.frame_size} is not within {MIN_FRAME}..{MAX_FRAME}")
    if state.window > lib.NIC_WINDOW:
        raise BadState(f"{name} window {state.window}, at most {lib.NIC_WINDOW} frames can be distinguished")
    _check_slots(name, state, features)
    _check_counters(name, state)


def _check_slots(name: str, state: PairState, features: Feature) -> None:
    step, num, free = state.tx_descs, state.tx.num, state.tx_free
    if step not in (1, 2) or step > num or (step > 1 and Feature.INDIRECT_DESC in features):
        raise BadState(f"{name} tx_descs {step} in a ring of {num}")
    if len(set(free)) != len(free) or any(slot % step or slot + step > num for slot in free):
        raise BadState(f"{name} tx_free: its free TX slots are not slots of its ring")
    received = (state.rx_avail - state.rx_used) & MAX_INDEX
    sent = (state.tx_avail - state.tx_used) & MAX_INDEX
    if received > state.rx.num:
        raise BadState(f"{name} rx_avail {state.rx_avail}, rx_used {state.rx_used}: they differ by more than the ring")
    if len(free) + sent > num // step:
        raise BadState(
            f"{name} tx_avail {state.tx_avail}, tx_used {state.tx_used}, tx_free {len(free)}: "
            f"more slots than the {num // step} of its ring"
        )


def _check_counters(name: str, state: PairState) -> None:
    if max(state.received, state.highest) > state.sent:
        raise BadState(f"{name} received {state.received}, highest {state.highest}, but sent {state.sent}")
    for field in ("sent", "duplicated", "corrupted", "reordered", "ring_errors"):
        if getattr(state, field) > _MAX_COUNT:
            raise BadState(f"{name} {field} {getattr(state, field)} cannot have been counted")
    if not -MAX_TIME <= state.last_rx <= MAX_TIME:
        raise BadState(f"{name} last_rx {state.last_rx} is not a time")
    if len(state.seen) != SEEN_BYTES or len(state.gaps) > lib.NIC_GAPS:
        raise BadState(f"{name} seen of {len(state.seen)} bytes, {len(state.gaps)} gaps")
    for begin, end in state.gaps:
        if not -MAX_TIME <= begin <= end <= MAX_TIME:
            raise BadState(f"{name} gaps: {begin} to {end} is not a time")


class GuestNic:
    """All pairs of the guest's NIC, and its control queue if it negotiated one."""

    def __init__(self, memory: GuestMemory, options: NicOptions | None = None, arena: GuestArena | None = None) -> None:
        options = options or NicOptions()
        self.memory = memory
        self.features = options.features
        self.pairs: list[NicPair] = []
        self.control: ControlDriver | None = None
        self.config = GuestConfig(offered_to_guest(options.features))
        try:
            self._place(options, arena or GuestArena(memory))
        except BaseException:
            self.close()
            raise

    def _place(self, options: NicOptions, arena: GuestArena) -> None:
        if options.control_index is not None:
            self.control = ControlDriver.place(self.memory, arena, options.control_index, options.control_ring)
            self.control.use_ring_features(self.memory, options.features)
        for number in range(options.pairs):
            self.pairs.append(NicPair.place(self.memory, arena, number, options))

    @classmethod
    def restore(cls, memory: GuestMemory, state: NicState) -> Self:
        """Resume a NIC whose rings and buffers are in ``memory``; :class:`BadState` if they cannot be there."""
        check_nic(memory, state)
        nic = cls.__new__(cls)
        nic.memory, nic.features = memory, Feature(state.features)
        nic.pairs, nic.control = [], None
        nic.config = GuestConfig(offered_to_guest(nic.features))
        try:
            if state.control is not None:
                nic.control = ControlDriver.restore(memory, state.control, nic.features)
            for pair in state.pairs:
                nic.pairs.append(NicPair.restore(memory, pair, nic.features))
        except BaseException:
            nic.close()
            raise
        return nic

    def outline(self, model: ControlModel | None) -> NicState:
        """Return where the driver has everything, and what its control queue has set so far; it may run."""
        driver = self.control.state() if self.control is not None else None
        control = dataclasses.replace(driver, avail_idx=0, used_idx=0, open=0) if driver is not None else None
        return NicState(int(self.features), tuple(pair.outline() for pair in self.pairs), control, model)

    def load(self, state: NicState) -> None:
        """Load the state of the driver that this is the :meth:`outline` of; :class:`BadState` for another driver's."""
        if state.features != int(self.features) or len(state.pairs) != len(self.pairs):
            raise BadState("it is not the announced NIC")
        if (state.control is None) != (self.control is None):
            raise BadState("its control queue is not as announced")
        for pair, told in zip(self.pairs, state.pairs, strict=True):
            pair.load(told, self.features)
        if self.control is not None and state.control is not None:
            self.control.load(state.control)

    def state(self, model: ControlModel | None) -> NicState:
        """Return what the NIC's driver knows, which must be paused, and what its control queue has set."""
        return NicState(
            features=int(self.features),
            pairs=tuple(pair.state() for pair in self.pairs),
            control=self.control.state() if self.control is not None else None,
            model=model,
        )

    @property
    def queues(self) -> list[GuestQueue]:
        """Every data queue, by index."""
        return [queue for pair in self.pairs for queue in pair.queues]

    def counts(self) -> FrameCounts:
        """Return the sum over all pairs."""
        return FrameCounts.total(pair.counts() for pair in self.pairs)

    def close(self) -> None:
        """Close what the NIC opened; the memory is its owner's."""
        while self.pairs:
            self.pairs.pop().close()
        if self.control is not None:
            self.control.close()
            self.control = None
        self.config.close()
