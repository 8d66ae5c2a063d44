# SPDX-License-Identifier: MIT
"""IOTLB messages prepared in one buffer and sent by C, so that Python does nothing per message.

This is the bare wire: no mirror, no check before a write, no cause for a
refusal. :class:`pyvhostvdpa.chardev.iotlb.AddressSpace` has all of that; a burst is
for what sends the same maps many times, or more maps than should be held in
memory at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import KernelError
from ..base.uapi import IotlbType, MessageFormat
from .door import VhostVdpa
from .message import IotlbMessage, IotlbWriteError

CHUNK = 1024
"""Messages in a buffer by default: 72 KiB."""

_MESSAGE = struct.Struct("=IIQQQBB6x32x")
"""``struct vhost_msg_v2``: type, asid, then iova, size, uaddr, perm and type of ``struct vhost_iotlb_msg``."""


@dataclass(frozen=True, slots=True)
class BurstResult:
    """What became of a burst: how many messages, and CLOCK_MONOTONIC before the first and after the last, in ns."""

    messages: int
    begin: int
    end: int

    @property
    def ns(self) -> int:
        """How long it took."""
        return self.end - self.begin


class PreparedMessages:
    """At most ``capacity`` messages in a buffer that is allocated once.

    They can be sent any number of times. ValueError if more are added.
    """

    def __init__(self, capacity: int = CHUNK) -> None:
        self.capacity = capacity
        self._buffer = bytearray(capacity * _MESSAGE.size)
        self._view = ffi.from_buffer(self._buffer)
        self._messages = ffi.cast("struct vhost_msg_v2 *", self._view)
        self._c: Any = ffi.new("struct iotlb_burst *", {"messages": self._messages})

    def __len__(self) -> int:
        return int(self._c.count)

    def add(self, message: IotlbMessage) -> None:
        """Put a message at the end."""
        at = self._room(1)
        m = message
        _MESSAGE.pack_into(
            self._buffer, at * _MESSAGE.size, MessageFormat.V2, m.asid, m.iova, m.size, m.uaddr, m.perm, m.type
        )
        self._c.count = at + 1

    def add_pieces(self, first: IotlbMessage, count: int, step: int, uaddr_step: int | None = None) -> None:
        """Put ``count`` messages at the end, made of ``first`` by moving IOVA and address on by ``step`` each time.

        ``uaddr_step`` is for addresses that move on by something else.
        """
        at = self._room(count)
        self.add(first)
        lib.iotlb_repeat(self._messages + at, count, step, step if uaddr_step is None else uaddr_step)
        self._c.count = at + count

    def _room(self, count: int) -> int:
        at = int(self._c.count)
        if count < 1 or at + count > self.capacity:
            raise ValueError(f"{count} more messages: {at} of {self.capacity} are in the buffer")
        return at

    def clear(self) -> None:
        """Empty the buffer, to fill it again."""
        self._c.count = 0

    def message(self, index: int) -> IotlbMessage:
        """Return a message as it stands in the buffer."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        _, asid, iova, size, uaddr, perm, kind = _MESSAGE.unpack_from(self._buffer, index * _MESSAGE.size)
        return IotlbMessage(IotlbType(kind), asid, iova, size, uaddr, perm)

    def send(self, chardev: VhostVdpa) -> BurstResult:
        """Write all messages, one system call each.

        Raises :class:`~pyvhostvdpa.chardev.message.IotlbWriteError` for the first
        that the kernel refuses; those before it are in force, and a batch
        that was begun is open (``chardev.batch_asid``).
        """
        c = self._c
        c.done = c.error = 0
        try:
            chardev.send_prepared(c)
        except KernelError as e:
            raise IotlbWriteError(e.errno or 0, self.message(c.done), c.done) from e
        return BurstResult(c.count, c.begin, c.end)


def send_all(chardev: VhostVdpa, messages: Iterable[IotlbMessage], chunk: int = CHUNK) -> BurstResult:
    """Build and send any number of messages in the memory of one buffer of ``chunk`` messages.

    ``applied`` of the :class:`~pyvhostvdpa.chardev.message.IotlbWriteError` that it
    may raise counts all that are in force.
    """
    burst = PreparedMessages(chunk)
    sent = begin = end = 0
    for message in messages:
        burst.add(message)
        if len(burst) == chunk:
            begin, end, sent = _flush(chardev, burst, begin, sent)
    if len(burst):
        begin, end, sent = _flush(chardev, burst, begin, sent)
    return BurstResult(sent, begin, end)


def _flush(chardev: VhostVdpa, burst: PreparedMessages, begin: int, before: int) -> tuple[int, int, int]:
    try:
        sent = burst.send(chardev)
    except IotlbWriteError as e:
        raise IotlbWriteError(e.errno or 0, e.rejected, before + e.applied) from e
    burst.clear()
    return begin or sent.begin, sent.end, before + sent.messages
