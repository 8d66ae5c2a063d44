# SPDX-License-Identifier: MIT
"""What a front-end has said of each ring, kept until the device can be started with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..virtqueue.layout import GuestQueue
from .memory import FrontEndMemory
from .messages import MessageRefused, VringAddress
from .piped import PipedCalls, streams


def ring_parts(num: int) -> tuple[int, int, int]:
    """Return the bytes of descriptor table, avail ring and used ring of a split ring (virtio 1.3, 2.7)."""
    return 16 * num, 6 + 2 * num, 6 + 8 * num


@dataclass
class Ring:
    """One ring. Descriptors are owned, -1 for none."""

    index: int
    num: int = 0
    base: int | None = None
    address: VringAddress | None = None
    kick: int = -1
    call: int = -1
    error: int = -1
    piped: PipedCalls | None = None
    """What passes calls on if the front-end takes them from a pipe or a socket; ``call`` is made here then."""
    enabled: bool = False
    kicked: bool = False
    """Whether SET_VRING_KICK came since the ring was stopped: that is what starts a ring."""
    retired: dict[str, int] = field(default_factory=dict)
    """Eventfds that the device may still have, by what they are for: those it was started with."""

    @property
    def ready(self) -> bool:
        """Whether the ring could be started."""
        return self.kicked and self.num > 0 and self.address is not None

    def replace(self, name: str, fd: int) -> None:
        """Take another eventfd over; the one that the device may have is kept until :meth:`discard`.

        One descriptor of each kind at most: a front-end may replace them as often as it likes.
        """
        old: int = getattr(self, name)
        setattr(self, name, fd)
        if old < 0:
            return
        if name == "error" or name in self.retired:
            # the device was never given it
            os.close(old)
        else:
            self.retired[name] = old

    def replace_call(self, fd: int) -> None:
        """Take over what the front-end is called by: an eventfd, a pipe, a socket, or -1 for nothing."""
        piped = PipedCalls(fd) if fd >= 0 and streams(fd) else None
        self._end_piped()
        self.piped = piped
        self.replace("call", fd if piped is None else piped.eventfd())

    def _end_piped(self) -> None:
        piped, self.piped = self.piped, None
        if piped is not None:
            piped.close()

    def discard(self) -> None:
        """Close the eventfds that were replaced: the device has others now, or was reset."""
        retired, self.retired = self.retired, {}
        for fd in retired.values():
            os.close(fd)

    def stop(self) -> None:
        """The ring was stopped by GET_VRING_BASE; another kick starts it."""
        self.kicked = False

    def close(self) -> None:
        """Close every eventfd."""
        self._end_piped()
        for name in ("kick", "call", "error"):
            self.replace(name, -1)
        self.discard()

    def locate(self, address: VringAddress, memory: FrontEndMemory, guest: bool) -> tuple[int, int, int]:
        """Return the GPAs of descriptor table, avail and used ring; :class:`MessageRefused` if they do not do."""
        what = f"ring {self.index}"
        if address.desc % 16 or address.avail % 2 or address.used % 4:
            raise MessageRefused(f"{what}: its parts are not aligned (virtio 1.3, 2.7)")
        sizes = ring_parts(self.num or 1)
        parts = (address.desc, address.avail, address.used)
        try:
            found = [memory.locate(at, size, guest) for at, size in zip(parts, sizes, strict=True)]
        except MessageRefused as e:
            raise MessageRefused(f"{what}: {e}") from None
        ranges = sorted(zip(found, sizes, strict=True))
        if any(at + size > following for (at, size), (following, _) in pairwise(ranges)):
            raise MessageRefused(f"{what}: its parts overlap")
        return found[0], found[1], found[2]


def queues_of(rings: Sequence[Ring], memory: FrontEndMemory, guest: bool) -> list[GuestQueue]:
    """Return the queues of the rings that are ready, checked in full against the memory as it is now.

    :class:`MessageRefused` if they are not whole pairs from ring 0 on.
    """
    ready = [ring for ring in rings if ring.ready]
    if [ring.index for ring in ready] != list(range(len(ready))) or len(ready) % 2 or not ready:
        raise MessageRefused(f"the rings {[ring.index for ring in ready]} are set up, which are not whole queue pairs")
    queues = []
    for ring in ready:
        assert ring.address is not None
        desc, avail, used = ring.locate(ring.address, memory, guest)
        queues.append(GuestQueue(ring.index, ring.num, desc, avail, used, ring.kick, ring.call))
    return queues


def enabled_pairs(rings: Sequence[Ring]) -> int:
    """Return how many queue pairs from the first on have both rings enabled."""
    count = 0
    for rx, tx in zip(rings[::2], rings[1::2], strict=False):
        if not (rx.enabled and tx.enabled):
            break
        count += 1
    return count
