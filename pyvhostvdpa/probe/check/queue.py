# SPDX-License-Identifier: MIT
"""One virtqueue of the device under test, with a driver in C that follows every order (``cdefs/trial.h``)."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..._cdefs import ffi, lib
from ...memory.mapped import SharedMemory
from ...virtqueue.layout import SplitLayout, fill_vring
from .rule import Broken

NEXT: int = lib.VRING_DESC_F_NEXT
WRITE: int = lib.VRING_DESC_F_WRITE
INDIRECT: int = lib.VRING_DESC_F_INDIRECT
NO_INTERRUPT: int = lib.VRING_AVAIL_F_NO_INTERRUPT


@dataclass(frozen=True, slots=True)
class Place:
    """Memory that the device may reach: where it sees it, and where this process does."""

    iova: int
    offset: int
    size: int
    memory: SharedMemory

    @property
    def hva(self) -> int:
        """The address in this process."""
        return self.memory.hva + self.offset

    def write(self, data: bytes, at: int = 0) -> None:
        """Write ``data`` from byte ``at`` on."""
        with self.memory.buffer as buffer:
            buffer[self.offset + at : self.offset + at + len(data)] = data

    def read(self, size: int | None = None, at: int = 0) -> bytes:
        """Return ``size`` bytes from byte ``at`` on."""
        with self.memory.buffer as buffer:
            return bytes(buffer[self.offset + at : self.offset + (self.size if size is None else at + size)])

    def part(self, at: int, size: int) -> Place:
        """Return a part of it."""
        return Place(self.iova + at, self.offset + at, size, self.memory)


class Desc(NamedTuple):
    """One descriptor, as virtio 1.3, 2.7.5 has it."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0


class Used(NamedTuple):
    """One element of the used ring."""

    id: int
    length: int


class Queue:
    """Queue ``index`` with ``num`` descriptors in ``ring``; ``base`` is where both indices begin."""

    def __init__(self, index: int, num: int, ring: Place, base: int = 0) -> None:
        self.index, self.num, self.ring = index, num, ring
        layout = SplitLayout(num)
        self.desc, self.avail, self.used = (
            ring.iova,
            ring.iova + layout.avail_offset,
            ring.iova + layout.driver_area,
        )
        self.c: Any = ffi.new("struct trial_queue *")
        fill_vring(self.c.ring, num, ring.hva, ring.hva + layout.avail_offset, ring.hva + layout.driver_area)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.c.kick, self.c.call = self.kick_fd, self.call_fd
        self.free = 0
        """The descriptor that :meth:`add` writes next."""
        self.begin(base)

    def begin(self, base: int = 0) -> None:
        """Empty the ring; both indices begin at ``base``."""
        lib.trial_begin(self.c, base)
        self.free = 0

    # -- what the driver does -------------------------------------------------------

    def write(self, at: int, descs: Sequence[Desc]) -> None:
        """Write descriptors as they are, from ``at`` on."""
        lib.trial_write(self.c.ring.desc, at, ffi.new("struct trial_desc[]", [tuple(d) for d in descs]), len(descs))

    def table(self, place: Place, descs: Sequence[Desc]) -> None:
        """Write a table of descriptors at another place, for an indirect one."""
        table = ffi.cast("struct vring_desc *", place.hva)
        lib.trial_write(table, 0, ffi.new("struct trial_desc[]", [tuple(d) for d in descs]), len(descs))

    def add(self, parts: Sequence[tuple[Place, bool]]) -> int:
        """Write a chain of ``parts``, each a place and whether the device writes it; return its head."""
        if self.free + len(parts) > self.num:
            self.free = 0
        head = self.free
        last = len(parts) - 1
        self.write(
            head,
            [
                Desc(
                    place.iova, place.size, (WRITE if write else 0) | (NEXT if i < last else 0),
                    head + i + 1 if i < last else 0,
                )
                for i, (place, write) in enumerate(parts)
            ],
        )  # fmt: skip
        self.free += len(parts)
        return head

    def publish(self, *heads: int) -> None:
        """Put heads on the avail ring and move its index, without a notification."""
        lib.trial_publish(self.c, ffi.new("uint16_t[]", list(heads)), len(heads))

    def forget(self) -> None:
        """Put heads that do not exist where those were that the device has used: it must not look there again."""
        waiting = {i % self.num for i in range(self.taken, self.taken + (self.avail_index - self.taken & 0xFFFF))}
        for slot in set(range(self.num)) - waiting:
            self.ring.write(b"\xff\xff", self.avail - self.desc + 4 + 2 * slot)

    def set_avail(self, index: int) -> None:
        """Write the avail index alone."""
        lib.trial_set_avail(self.c, index & 0xFFFF)

    def set_flags(self, flags: int) -> None:
        """Write the avail ring's flags."""
        lib.trial_set_flags(self.c, flags)

    def set_used_event(self, index: int) -> None:
        """Write used_event (VIRTIO_F_EVENT_IDX)."""
        lib.trial_set_used_event(self.c, index & 0xFFFF)

    @property
    def avail_event(self) -> int:
        """What the device wrote to avail_event (VIRTIO_F_EVENT_IDX)."""
        return int(lib.trial_avail_event(self.c))

    @property
    def used_index(self) -> int:
        """The used index as it stands."""
        return int(lib.trial_used_index(self.c))

    @property
    def avail_index(self) -> int:
        """The avail index as the driver wrote it."""
        return int(self.c.avail)

    @property
    def taken(self) -> int:
        """The used index up to which elements were taken."""
        return int(self.c.used)

    def kick(self) -> None:
        """Notify the device."""
        lib.trial_kick(self.c)

    def collect(self, count: int, seconds: float) -> list[Used]:
        """Wait for ``count`` used elements and return those that came; Broken if the index makes no sense."""
        raw = ffi.new("struct trial_used[]", max(count, 1))
        got = lib.trial_collect(self.c, raw, count, time.monotonic_ns() + int(seconds * 1e9))
        if got < 0:
            raise Broken(
                f"queue {self.index}: used index {self.used_index}, though only {self.avail_index} heads "
                f"were made available and {self.taken} were taken"
            )
        return [Used(raw[i].id, raw[i].len) for i in range(got)]

    # -- eventfds ---------------------------------------------------------------------

    def called(self, seconds: float) -> bool:
        """Wait for the device's interrupt and clear it; False if none came."""
        poller = select.poll()
        poller.register(self.call_fd, select.POLLIN)
        if not poller.poll(seconds * 1000):
            return False
        os.eventfd_read(self.call_fd)
        return True

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick_fd, self.call_fd):
            os.close(fd)
