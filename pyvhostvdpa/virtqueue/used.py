# SPDX-License-Identifier: MIT
"""Shadowing a device that finds guest memory at IOVA = GPA: only what it writes has to pass through us.

Nothing is translated then, so the device fetches descriptors from the guest's
own table. What it writes into the buffers of a receive queue is known by the
used ring, so this one is separate, and with it the avail ring, which asks the
device for its notifications (``cdefs/used_relay.h`` says why the used ring
alone will not do). Of a queue that a device only reads from, it writes nothing
but the used ring: that needs no relay at all, and is in the position of
passthrough: the device has to use it in order, which is looked at when it is
stopped, and the guest's used ring is marked dirty then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .._cdefs import ffi, lib
from ..base.errors import MissingFeature
from ..memory.guest import GuestMemory, Translation
from .layout import GuestQueue, indices, map_queue, ring_layout
from .serving import RingServer, ServerThreads, Serving, ServingOptions
from .shadow import ShadowThreads, ShadowVirtqueue

__all__ = ["PassedThrough", "UsedRelay", "used_ring"]


class UsedRelay(ShadowVirtqueue):
    """One queue of which the device has the guest's descriptors, our avail ring and our used ring.

    Its indices are the guest's on both sides: the device continues at the
    guest's used index. There can be no translation.
    """

    def __init__(
        self,
        queue: GuestQueue,
        memory: GuestMemory,
        area: int,
        features: int = 0,
        translation: Translation | None = None,
    ) -> None:
        if translation is not None:
            raise MissingFeature("only the used ring can be relayed where guest memory is at IOVA = GPA")
        super().__init__(queue, memory, area, features)

    def _reserve(self, num: int) -> None:
        self._kept = (ffi.new("uint64_t[]", num),)
        [self.c.given_at] = self._kept
        self.c.device.desc = self.c.guest.desc

    def take_up(self) -> None:
        """Begin anew at the guest's used index, with all that is available there in our avail ring already.

        A device that sends from the guest's own ring may do so as soon as it runs, and what it receives then has to
        have a buffer.
        """
        super().take_up()
        lib.svq_forward(self.c)

    @property
    def base(self) -> int:
        """From where the device starts: the guest's used index."""
        return int(self.c.used_idx)

    def addresses(self, driver: int, device: int) -> tuple[int, int, int]:
        """Where the device finds the guest's descriptors, our avail and our used ring."""
        return self.queue.desc, driver + self.layout.avail_offset, device


class PassedThrough:
    """One queue of which the device has the guest's own ring and eventfds, beside others that are relayed."""

    def __init__(self, queue: GuestQueue, memory: GuestMemory, area: int, features: int = 0) -> None:
        self.queue, self.area, self._memory = queue, area, memory
        self.layout = ring_layout(queue.num, features)
        # it has to be guest memory
        indices(queue, memory)

    through, broken = True, ""

    @property
    def kick(self) -> int:
        """The guest's own."""
        return self.queue.kick

    @property
    def call(self) -> int:
        """The guest's own."""
        return self.queue.call

    @property
    def base(self) -> int:
        """From where the device starts: the guest's used index."""
        return indices(self.queue, self._memory)[1]

    def addresses(self, driver: int, device: int) -> tuple[int, int, int]:
        """Where the device finds the guest's ring, wherever our areas are."""
        return self.queue.desc, self.queue.avail, self.queue.used

    @property
    def in_flight(self) -> list[int]:
        """The guest's heads that are available and not used, oldest first, of a device that keeps order."""
        ring = ffi.new("struct vring *")
        map_queue(ring, self.queue, self._memory)
        heads = ffi.new("uint16_t[]", self.queue.num)
        count: int = lib.vring_open_heads(ring, heads)
        return list(heads[0 : max(count, 0)])

    def take_up(self) -> None:
        """Nothing is kept of the ring."""

    def reaches(self, gpa: int, size: int) -> bool:
        """As in passthrough, only the device knows which buffers it has."""
        return False

    def memory_changed(self) -> None:
        """Nothing is kept of the memory."""

    def notify_by(self, queue: GuestQueue) -> None:
        """Know that the device was given the eventfds of ``queue``, the same ring."""
        self.queue = queue

    def drain(self) -> None:
        """Mark as dirty what a stopped device has written: the used ring."""
        lib.memory_mark(self._memory.c_map, *self.queue.parts[2])

    def republish(self) -> int:
        """Return the used index: a device that keeps order leaves the avail ring as the next one needs it."""
        return self.base

    def statistics(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def close(self) -> None:
        """The eventfds are the guest's."""


class UsedThreads(ShadowThreads):
    """Relays for those queues of a device that are relayed."""

    def __init__(
        self, queues: Sequence[RingServer], options: ServingOptions, config_call: int = -1, together: int = 1
    ) -> None:
        relayed = [queue for queue in queues if not queue.through]
        super().__init__(relayed, options, config_call, together if len(relayed) == len(queues) else 1)


def used_ring(relays: Callable[[int], bool], name: str) -> Serving:
    """Return the way ``name`` to serve the queues of which ``relays`` is true, by index; others are passed through."""

    def queue(
        guest: GuestQueue, memory: GuestMemory, area: int, features: int, translation: Translation | None
    ) -> RingServer:
        if relays(guest.index):
            return UsedRelay(guest, memory, area, features, translation)
        return PassedThrough(guest, memory, area, features)

    def threads(
        queues: Sequence[RingServer], options: ServingOptions, config_call: int, together: int
    ) -> ServerThreads:
        return UsedThreads(queues, options, config_call, together)

    return Serving(queue, threads, relays, in_place=True, name=name)
