"""A guest and a device that play with real rings in memory, step by step.

Stand-ins for the two ends of a shadow virtqueue: these tests are about the
queue in between. Single-threaded, so Python may touch the rings here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.guest.arena import GuestArena, place_queue
from pyvhostvdpa.memory.guest import Gpa, GuestMemory
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.virtqueue.layout import map_queue
from pyvhostvdpa.virtqueue.shadow import ShadowVirtqueue
from pyvhostvdpa.virtqueue.used import UsedRelay

NEXT, WRITE, INDIRECT = lib.VRING_DESC_F_NEXT, lib.VRING_DESC_F_WRITE, lib.VRING_DESC_F_INDIRECT
BASE = Gpa(1 << 30)


@dataclass
class Segment:
    gpa: int
    size: int
    writable: bool = False


class Model:
    """A guest's queue of ``num``, shadowed, with memory regions of 1 MiB, ``moved`` bytes away for the device.

    With ``used`` the device has the guest's descriptors, and only rings are relayed.
    """

    def __init__(
        self, num: int = 8, regions: int = 1, gap: int = 0, start_idx: int = 0, moved: int = 0, used: int = 0
    ) -> None:
        self.used_only = bool(used)
        size = 1 << 20
        self.memory = GuestMemory([(Gpa(BASE + i * (size + gap)), size) for i in range(regions)])
        self.memory.start_dirty_log()
        self.queue = place_queue(GuestArena(self.memory), 0, num)
        self.num = num
        self.ring = ffi.new("struct vring *")
        map_queue(self.ring, self.queue, self.memory)
        self.ring.avail.idx = self.ring.used.idx = start_idx
        self.avail_idx = self.last_used = start_idx
        self.shadow_memory = SharedMemory("shadow", 1 << 21)
        iovas = [region.gpa + moved for region in self.memory.regions]
        self.translation = self.memory.translate(iovas) if moved else None
        self.svq = self.shadow()

    def shadow(self, features: int = 0) -> ShadowVirtqueue:
        """Begin to shadow the queue, for a device that was reset."""
        kind = UsedRelay if self.used_only else ShadowVirtqueue
        made = kind(self.queue, self.memory, self.shadow_memory.hva, features, self.translation)
        self.device_avail = made.base
        return made

    def close(self) -> None:
        self.svq.close()
        os.close(self.queue.kick)
        os.close(self.queue.call)
        self.memory.close()
        self.shadow_memory.close()

    # -- guest -----------------------------------------------------------------

    def describe(self, first: int, segments: list[Segment]) -> None:
        """Write a chain into descriptors first, first + 1, …"""
        for k, segment in enumerate(segments):
            last = k + 1 == len(segments)
            d = self.ring.desc[first + k]
            d.addr, d.len = segment.gpa, segment.size
            d.flags = (WRITE if segment.writable else 0) | (0 if last else NEXT)
            d.next = 0 if last else first + k + 1

    def describe_indirect(self, head: int, table: int, segments: list[Segment]) -> None:
        """Write a chain into an indirect table, and where that is into a descriptor."""
        entries = ffi.cast("struct vring_desc *", self.memory.hva(table, 16 * len(segments)))
        for k, segment in enumerate(segments):
            last = k + 1 == len(segments)
            entries[k].addr, entries[k].len = segment.gpa, segment.size
            entries[k].flags = (WRITE if segment.writable else 0) | (0 if last else NEXT)
            entries[k].next = 0 if last else k + 1
        d = self.ring.desc[head]
        d.addr, d.len, d.flags, d.next = table, 16 * len(segments), INDIRECT, 0

    def publish(self, head: int) -> None:
        self.ring.avail.ring[self.avail_idx % self.num] = head
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.ring.avail.idx = self.avail_idx

    def used(self) -> list[tuple[int, int]]:
        """What the guest got back since it last looked, as (head, length)."""
        entries = []
        while self.last_used != self.ring.used.idx:
            e = self.ring.used.ring[self.last_used % self.num]
            entries.append((e.id, e.len))
            self.last_used = (self.last_used + 1) & 0xFFFF
        return entries

    # -- device ------------------------------------------------------------------

    def fetch(self) -> list[tuple[int, list[Segment]]]:
        """What the device finds new in the shadow ring: (head, its buffers)."""
        ring = self.svq.c.device
        found = []
        while self.device_avail != ring.avail.idx:
            head = ring.avail.ring[self.device_avail % self.num]
            segments, i = [], head
            while True:
                d = ring.desc[i]
                if d.flags & INDIRECT:
                    segments += self._table(d.addr, d.len // 16)
                    break
                segments.append(Segment(d.addr, d.len, bool(d.flags & WRITE)))
                if not d.flags & NEXT:
                    break
                i = d.next
            found.append((head, segments))
            self.device_avail = (self.device_avail + 1) & 0xFFFF
        return found

    def _table(self, at: int, count: int) -> list[Segment]:
        """Return the buffers of an indirect table, which may lie across regions; its entries are in order."""
        table = ffi.new("struct vring_desc[]", count)
        assert lib.memory_read(self.memory.c_map, at, table, 16 * count) == 0
        return [Segment(d.addr, d.len, bool(d.flags & WRITE)) for d in table]

    def complete(self, head: int, length: int = 0) -> None:
        ring = self.svq.c.device
        e = ring.used.ring[ring.used.idx % self.num]
        e.id, e.len = head, length
        ring.used.idx = (ring.used.idx + 1) & 0xFFFF

    # -- relay -------------------------------------------------------------------

    def forward(self) -> int:
        return int(lib.svq_forward(self.svq.c))

    def give_back(self) -> int:
        return int(lib.svq_return(self.svq.c))


def publish_indirect(m: Model, head: int, table: int, segments: list[Segment]) -> None:
    m.describe_indirect(head, table, segments)
    m.publish(head)
