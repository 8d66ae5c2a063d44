"""The control queue's rings: a guest's commands as they are taken, answered and broken."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from ring_model import INDIRECT, NEXT, WRITE, Model, Segment

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.virtqueue.layout import GuestQueue, map_queue, ring_layout

BASE = 1 << 30
DATA = BASE + 0x40000
COMMAND = bytes(range(1, 11))
SIZE = 64

Make = Callable[..., Model]


class Served:
    """A model guest's queue, served as a control queue."""

    def __init__(self, m: Model, features: int = 0) -> None:
        self.m = m
        self.buffer = ffi.new("uint8_t[]", SIZE)
        self.c = ffi.new("struct ctrl_guest *")
        map_queue(self.c.ring, m.queue, m.memory)
        self.c.memory, self.c.used_gpa, self.c.call = m.memory.c_map, m.queue.used, m.queue.call
        self.c.features = features
        lib.ctrl_guest_start(self.c)

    def take(self) -> bytes:
        length: int = lib.ctrl_guest_take(self.c, self.buffer, SIZE)
        return bytes(ffi.buffer(self.buffer, min(length, SIZE)))

    def calls(self) -> int:
        try:
            return os.eventfd_read(self.m.queue.call)
        except BlockingIOError:
            return 0


def put(m: Model, gpa: int, data: bytes) -> None:
    for k, byte in enumerate(data):
        ffi.cast("uint8_t *", m.memory.hva(gpa + k))[0] = byte


def answer_at(m: Model, gpa: int) -> int:
    return int(ffi.cast("uint8_t *", m.memory.hva(gpa))[0])


def test_a_command_in_several_buffers_is_copied_and_answered(model: Make) -> None:
    m = model()
    served = Served(m)
    put(m, DATA, COMMAND)
    m.describe(2, [Segment(DATA, 2), Segment(DATA + 2, 8), Segment(DATA + 100, 1, True)])
    m.publish(2)
    assert served.take() == COMMAND
    lib.ctrl_guest_answer(served.c, 7)
    assert answer_at(m, DATA + 100) == 7
    assert m.used() == [(2, 1)]
    assert served.calls() == 1
    assert served.take() == b""


def test_a_command_its_table_and_its_answer_may_lie_across_regions(model: Make) -> None:
    m = model(regions=3)
    served = Served(m, lib.SVQ_F_INDIRECT)
    first, second = m.memory.regions[1].gpa, m.memory.regions[2].gpa
    put(m, first - 4, COMMAND)
    m.describe_indirect(0, BASE + 0x80000, [Segment(first - 4, 10), Segment(second - 1, 2, True)])
    table = bytes(ffi.buffer(ffi.cast("char *", m.memory.hva(BASE + 0x80000)), 32))
    put(m, second - 24, table)
    m.ring.desc[0].addr = second - 24
    m.publish(0)
    assert served.take() == COMMAND
    lib.ctrl_guest_answer(served.c, 9)
    assert answer_at(m, second - 1) == 9


def test_a_table_is_taken_only_if_negotiated(model: Make) -> None:
    for features, broken in ((0, lib.SVQ_BAD_INDIRECT), (lib.SVQ_F_INDIRECT, lib.SVQ_OK)):
        m = model()
        served = Served(m, features)
        put(m, DATA, COMMAND)
        m.describe_indirect(0, BASE + 0x80000, [Segment(DATA, 10), Segment(DATA + 100, 1, True)])
        m.publish(0)
        assert served.take() == (b"" if broken else COMMAND)
        assert served.c.broken == broken


def test_with_event_idx_the_guest_is_asked_for_the_next_notification_only(model: Make) -> None:
    m = model(start_idx=65535)
    served = Served(m, lib.SVQ_F_EVENT_IDX)
    event = ffi.cast("uint16_t *", ffi.addressof(m.ring.used.ring, m.num))
    for done in range(1, 4):
        assert served.take() == b""
        assert event[0] == (65534 + done) & 0xFFFF
        put(m, DATA, COMMAND)
        m.describe(0, [Segment(DATA, 10), Segment(DATA + 100, 1, True)])
        m.publish(0)
        assert served.take() == COMMAND
        m.ring.avail.ring[m.num] = (65534 + done) & 0xFFFF if done < 3 else 0
        lib.ctrl_guest_answer(served.c, 0)
        assert served.calls() == (1 if done < 3 else 0)


def test_a_command_longer_than_the_buffer_is_told_and_does_no_harm(model: Make) -> None:
    m = model()
    served = Served(m)
    m.describe(0, [Segment(DATA, SIZE), Segment(DATA, 4096), Segment(DATA + 5000, 1, True)])
    m.publish(0)
    assert lib.ctrl_guest_take(served.c, served.buffer, SIZE) == SIZE + 4096
    assert served.c.broken == lib.SVQ_OK


HOSTILE: dict[str, tuple[str, list[tuple[int, int, int, int]]]] = {
    "no room for the answer": ("SVQ_BAD_CHAIN", [(DATA, 8, 0, 0)]),
    "nothing but room for the answer": ("SVQ_BAD_CHAIN", [(DATA, 1, WRITE, 0)]),
    "readable after writable": ("SVQ_BAD_ORDER", [(DATA, 1, WRITE | NEXT, 1), (DATA, 8, 0, 0)]),
    "loop": ("SVQ_BAD_CHAIN", [(DATA, 8, NEXT, 0)]),
    "next beyond the table": ("SVQ_BAD_CHAIN", [(DATA, 8, NEXT, 99)]),
    "zero length": ("SVQ_ZERO_LENGTH", [(DATA, 0, NEXT, 1), (DATA, 1, WRITE, 0)]),
    "outside memory": ("SVQ_BAD_ADDRESS", [(0x1000, 8, NEXT, 1), (DATA, 1, WRITE, 0)]),
    "4 GiB": ("SVQ_BAD_ADDRESS", [(DATA, 0xFFFFFFFF, NEXT, 1), (DATA, 1, WRITE, 0)]),
    "the answer outside memory": ("SVQ_BAD_ADDRESS", [(DATA, 8, NEXT, 1), (0x1000, 1, WRITE, 0)]),
    "empty table": ("SVQ_BAD_INDIRECT", [(DATA, 0, INDIRECT, 0)]),
    "half a table": ("SVQ_BAD_INDIRECT", [(DATA, 24, INDIRECT, 0)]),
    "table with a next": ("SVQ_BAD_INDIRECT", [(DATA, 32, INDIRECT | NEXT, 1)]),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_guest_breaks_its_control_queue_alone(model: Make, attack: str) -> None:
    code, chain = HOSTILE[attack]
    m = model()
    served = Served(m, lib.SVQ_F_INDIRECT)
    for slot, (addr, size, flags, following) in enumerate(chain):
        d = m.ring.desc[slot]
        d.addr, d.len, d.flags, d.next = addr, size, flags, following
    m.publish(0)
    assert served.take() == b""
    assert served.c.broken == getattr(lib, code)
    m.publish(0)
    assert served.take() == b""


def test_a_table_of_tables_breaks_the_queue(model: Make) -> None:
    m = model()
    served = Served(m, lib.SVQ_F_INDIRECT)
    m.describe_indirect(0, DATA, [Segment(DATA, 16)])
    ffi.cast("struct vring_desc *", m.memory.hva(DATA, 16)).flags = INDIRECT
    m.publish(0)
    assert served.take() == b""
    assert served.c.broken == lib.SVQ_BAD_INDIRECT


def test_a_ring_that_is_not_aligned_is_refused(model: Make) -> None:
    m = model()
    q = m.queue
    for desc, avail, used in ((8, 0, 0), (0, 1, 0), (0, 0, 2)):
        with pytest.raises(ValueError, match="not aligned"):
            map_queue(
                ffi.new("struct vring *"),
                GuestQueue(0, q.num, q.desc + desc, q.avail + avail, q.used + used, -1, -1),
                m.memory,
            )


def test_a_packed_ring_is_refused() -> None:
    with pytest.raises(MissingFeature, match="RING_PACKED"):
        ring_layout(256, lib.SVQ_F_PACKED)
    assert ring_layout(256, 0).size == 0x2000 + 0x1000
