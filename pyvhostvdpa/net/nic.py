# SPDX-License-Identifier: MIT
"""The guest's NIC: a virtio-net driver in guest memory, one RX/TX pair each.

It does what a driver does and no more: it does not know whether its rings
are shadowed, nor which device it is on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .._cdefs import ffi, lib
from ..memory import GuestMemory
from ..virtqueue.driver import GuestArena, place_queue
from ..virtqueue.layout import GuestQueue, map_queue
from .control_driver import ControlDriver
from .features import Feature, offered_to_guest, ring_bits
from .guest_config import GuestConfig

BUFFER_SIZE = 2048
"""Bytes per frame buffer, virtio_net_hdr included."""
MIN_FRAME, MAX_FRAME = 60, BUFFER_SIZE - 12

_BROADCAST = b"\xff" * 6
_SOURCE = b"\x52\x54\x91\x76\x64\x01"


@dataclass(frozen=True, slots=True)
class NicOptions:
    """How the guest's driver sets its NIC up.

    ``chained`` sends each frame as two descriptors, header and frame, as
    drivers without ``VIRTIO_F_ANY_LAYOUT`` do; with ``INDIRECT_DESC`` they
    are in a table. ``control_index`` is the control queue's index, None for
    a NIC without.
    """

    pairs: int = 1
    ring_size: int = 256
    frame_size: int = 256
    chained: bool = True
    features: Feature = Feature.VERSION_1
    control_index: int | None = None


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """Every frame accounted for. ``lost`` is final once nothing is in flight any more."""

    sent: int
    received: int
    lost: int
    duplicated: int
    corrupted: int
    reordered: int

    def to_dict(self) -> dict[str, int]:
        """Return the counts for JSON."""
        return {
            "sent": self.sent,
            "received": self.received,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "corrupted": self.corrupted,
            "reordered": self.reordered,
        }


class NicPair:
    """RX queue ``2 * number``, TX queue ``2 * number + 1``, and their traffic.

    ``window`` is the most frames in flight; it stays below the RX buffers
    posted, so that a device which drops for want of a buffer has no reason to.
    """

    def __init__(self, memory: GuestMemory, arena: GuestArena, number: int, options: NicOptions) -> None:
        ring_size, frame_size = options.ring_size, options.frame_size
        if not MIN_FRAME <= frame_size <= MAX_FRAME:
            raise ValueError(f"frame size {frame_size} is not within {MIN_FRAME}..{MAX_FRAME}")
        self.rx = place_queue(arena, 2 * number, ring_size)
        self.tx = place_queue(arena, 2 * number + 1, ring_size)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        buffers = ring_size * BUFFER_SIZE
        region = memory.regions[0]
        # spread out, so that traffic proves the map's middle and end
        spread = region.size // 2 // options.pairs
        rx_gpa = arena.take(buffers, at=region.gpa + spread * (options.pairs + number))
        tx_gpa = arena.take(buffers)
        self._tx_free = ffi.new("uint16_t[]", ring_size)
        p: Any = ffi.new("struct nic_pair *")
        self.c = p
        for ring, queue in ((p.rx, self.rx), (p.tx, self.tx)):
            map_queue(ring, queue, memory)
        p.tx_free = self._tx_free
        p.tx_descs = 2 if options.chained else 1
        p.features = ring_bits(options.features)
        if Feature.INDIRECT_DESC in options.features:
            # one slot of the ring, two descriptors in its table
            p.tx_descs = 1
            p.tx_table_gpa = arena.take(32 * ring_size)
            p.tx_tables = ffi.cast("struct vring_desc *", memory.hva(p.tx_table_gpa, 32 * ring_size))
        p.rx_gpa, p.tx_gpa = rx_gpa, tx_gpa
        p.rx_hva = ffi.cast("uint8_t *", memory.hva(rx_gpa, buffers))
        p.tx_hva = ffi.cast("uint8_t *", memory.hva(tx_gpa, buffers))
        p.buffer_size, p.frame_size = BUFFER_SIZE, frame_size
        p.window = max(ring_size // 2, 1)
        p.flow = number + 1
        p.dst, p.src = list(_BROADCAST), list(_SOURCE)
        p.rx_kick, p.rx_call = self.rx.kick, self.rx.call
        p.tx_kick, p.tx_call = self.tx.kick, self.tx.call
        p.wake = self.wake
        p.sending = 1
        lib.nic_start(p)

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
        return [(g.begin, g.end) for g in self.c.gaps if g.end]

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.rx.kick, self.rx.call, self.tx.kick, self.tx.call, self.wake):
            os.close(fd)


class GuestNic:
    """All pairs of the guest's NIC, and its control queue if it negotiated one."""

    def __init__(self, memory: GuestMemory, options: NicOptions | None = None) -> None:
        options = options or NicOptions()
        self.memory = memory
        self.options = options
        self.pairs: list[NicPair] = []
        self.control: ControlDriver | None = None
        arena = GuestArena(memory)
        if options.control_index is not None:
            self.control = ControlDriver(memory, arena, options.control_index)
            self.control.use_ring_features(memory, options.features)
        for number in range(options.pairs):
            self.pairs.append(NicPair(memory, arena, number, options))
        self.config = GuestConfig(offered_to_guest(options.features))

    @property
    def queues(self) -> list[GuestQueue]:
        """Every data queue, by index."""
        return [queue for pair in self.pairs for queue in pair.queues]

    def counts(self) -> FrameCounts:
        """Return the sum over all pairs."""
        each = [pair.counts() for pair in self.pairs]
        return FrameCounts(*(sum(getattr(c, field) for c in each) for field in FrameCounts.__slots__))

    def close(self) -> None:
        """Close what the NIC opened; the memory is its owner's."""
        while self.pairs:
            self.pairs.pop().close()
        if self.control is not None:
            self.control.close()
            self.control = None
        self.config.close()
