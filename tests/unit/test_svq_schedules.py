"""A guest, the shadow queue and a device take turns in any order, and nothing is lost, doubled or mixed up."""

from __future__ import annotations

import os
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ring_model import BASE, Model, Segment

from pyvhostvdpa._cdefs import ffi, lib

PROGRAMS = int(os.environ.get("PYVHOSTVDPA_SVQ_PROGRAMS", "500"))
"""Of 400 to 700 steps each; many more for a long run."""
STEPS = (400, 700)
AREA, SLOT = BASE + 0x40000, 0x400
"""Where buffers are: SLOT bytes for each head."""
PIECE = 0x1234
"""Size of a region: no power of two, so that buffers and tables lie across anywhere."""
ELSEWHERE = 0x7000_0000_0000
TAG = struct.Struct("<Q")


class Schedule:
    """One step a byte. What the guest sends carries a number, and the device answers it in the same chain."""

    def __init__(self, m: Model, features: int, translated: bool) -> None:
        self.m, self.features = m, features
        if translated:
            self._cut_memory()
        m.svq.close()
        m.svq = m.shadow(features)
        self.free = list(range(0, m.num, 2))
        self.lent: dict[int, int] = {}
        self.at_device: list[tuple[int, list[Segment]]] = []
        self.number = self.returned = 0
        self.steps = (
            *(self.publish, self.forward, self.fetch, self.complete, self.give_back),
            *(self.publish, self.forward, self.fetch, self.complete, self.give_back),
            *(self.notify, self.switch),
        )

    def _cut_memory(self) -> None:
        c_map = self.m.memory.c_map
        whole = c_map.regions[0]
        self.pieces = ffi.new("struct memory_region[]", -(-whole.size // PIECE))
        for number, piece in enumerate(self.pieces):
            offset = number * PIECE
            piece.gpa, piece.hva = whole.gpa + offset, whole.hva + offset
            piece.size = min(PIECE, whole.size - offset)
            piece.iova = piece.gpa if self.m.used_only else ELSEWHERE - (number << 32)
        c_map.regions, c_map.count = self.pieces, len(self.pieces)

    def _gpa(self, iova: int) -> int:
        if iova < 1 << 40:
            return iova
        number = (ELSEWHERE - iova + (1 << 32) - 1) >> 32
        assert iova - int(self.pieces[number].iova) < PIECE
        return int(self.pieces[number].gpa) + iova - int(self.pieces[number].iova)

    def _bytes(self, segments: list[Segment], writable: bool) -> list[object]:
        """Each segment's memory, which may be anywhere but has to be the guest's."""
        found = []
        for segment in segments:
            if segment.writable == writable:
                found.append(ffi.buffer(ffi.cast("char *", self._hva(self._gpa(segment.gpa))), segment.size))
        return found

    # -- guest ---------------------------------------------------------------------

    def publish(self, choice: int) -> None:
        if not self.free:
            return
        head = self.free.pop(choice % len(self.free))
        at = AREA + head * SLOT + choice
        chain = [Segment(at, TAG.size), Segment(at + 0x100, TAG.size, True)]
        self._write(chain[0], TAG.pack(self.number))
        if self.features & lib.SVQ_F_INDIRECT and choice & 1:
            self._write_table(head, at + 0x200, chain)
        else:
            self.m.describe(head, chain)
        self.m.publish(head)
        self.lent[head] = self.number
        self.number += 1

    def _hva(self, gpa: int) -> int:
        return int(self.m.memory.regions[0].memory.hva) + gpa - BASE

    def _write(self, segment: Segment, data: bytes) -> None:
        ffi.memmove(ffi.cast("char *", self._hva(segment.gpa)), data, len(data))

    def _write_table(self, head: int, at: int, chain: list[Segment]) -> None:
        entry = struct.Struct("<QIHH")
        table = entry.pack(chain[0].gpa, chain[0].size, lib.VRING_DESC_F_NEXT, 1)
        table += entry.pack(chain[1].gpa, chain[1].size, lib.VRING_DESC_F_WRITE, 0)
        self._write(Segment(at, len(table)), table)
        d = self.m.ring.desc[head]
        d.addr, d.len, d.flags, d.next = at, len(table), lib.VRING_DESC_F_INDIRECT, 0

    def collect(self) -> None:
        for head, length in self.m.used():
            number = self.lent.pop(head)
            d = self.m.ring.desc[head]
            answer = int(d.addr) + (-0x100 if d.flags & lib.VRING_DESC_F_INDIRECT else 0x100)
            assert length == TAG.size
            assert TAG.unpack(ffi.buffer(ffi.cast("char *", self._hva(answer)), TAG.size))[0] == number * 3
            self.free.append(head)
            self.returned += 1

    # -- relay ---------------------------------------------------------------------

    def forward(self, _: int) -> None:
        self.m.forward()

    def give_back(self, _: int) -> None:
        self.m.give_back()
        self.collect()

    def notify(self, choice: int) -> None:
        lib.svq_want_notifications(self.m.svq.c, choice & 1)

    def switch(self, _: int) -> None:
        """The device is stopped, another one goes on where it was."""
        self.m.svq.drain()
        self.collect()
        assert self.m.svq.republish() == self.m.ring.used.idx
        self.m.svq.close()
        self.at_device.clear()
        self.m.svq = self.m.shadow(self.features)

    # -- device --------------------------------------------------------------------

    def fetch(self, _: int) -> None:
        self.at_device += self.m.fetch()

    def complete(self, choice: int) -> None:
        if not self.at_device:
            return
        head, segments = self.at_device.pop(choice % len(self.at_device))
        [number] = TAG.unpack(b"".join(bytes(part) for part in self._bytes(segments, False)))
        answer = TAG.pack(number * 3)
        for part in self._bytes(segments, True):
            part[:] = answer[: len(part)]
            answer = answer[len(part) :]
        self.m.complete(head, TAG.size)

    def check(self) -> None:
        q = self.m.svq.c
        assert q.broken == lib.SVQ_OK
        if self.m.used_only:
            in_flight = [order for order in q.given_at[0 : self.m.num] if order]
            assert q.used_idx == q.device_used
            assert q.last_avail == q.device_avail
        else:
            in_flight = [e.segments for e in q.elements[0 : self.m.num] if e.segments]
            assert q.free_count + sum(in_flight) == self.m.num
        assert q.forwarded - q.returned == (q.last_avail - q.used_idx) & 0xFFFF == len(in_flight)
        assert len(in_flight) <= len(self.lent)

    def finish(self) -> None:
        """Let everything come back."""
        while self.lent:
            for step in (self.forward, self.fetch, self.give_back):
                step(0)
            while self.at_device:
                self.complete(0)
        assert self.returned == self.number


def run(num: int, start: int, kind: int, program: bytes) -> None:
    m = Model(num=num, start_idx=start, used=kind & 8)
    try:
        schedule = Schedule(m, kind & 3, bool(kind & 4))
        for byte in program:
            schedule.steps[byte % 12](byte // 12)
            schedule.check()
        schedule.finish()
    finally:
        m.close()


def test_any_schedule_loses_nothing_and_keeps_the_free_slots_whole() -> None:
    """200,000 steps: chains, tables, event index, buffers across regions, switches; the guest's descriptors."""
    steps = 0

    @settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from([4, 8, 16, 64]),
        st.integers(0, 65535),
        st.integers(0, 15),
        st.binary(min_size=STEPS[0], max_size=STEPS[1]),
    )
    def some(num: int, start: int, kind: int, program: bytes) -> None:
        nonlocal steps
        run(num, start, kind, program)
        steps += len(program)

    some()
    print(f"{steps} steps")
    assert steps >= PROGRAMS * STEPS[0]
