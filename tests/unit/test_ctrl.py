"""The control queue's rings: a guest's commands as they are taken, answered and broken."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from ring_model import INDIRECT, NEXT, WRITE, Model, Segment

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.memory.guest import PAGE_SIZE
from pyvhostvdpa.virtqueue.layout import GuestQueue, map_queue, ring_layout

BASE = 1 << 30
DATA = BASE + 0x40000
COMMAND = bytes(range(1, 11))
SIZE = 64
COMES = 0x0100
"""An index whose upper byte, written over its lower one, is the next index."""

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
        length: int = lib.ctrl_guest_pop(self.c, self.buffer, SIZE)
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


def test_a_command_longer_than_the_buffer_is_reported_and_does_no_harm(model: Make) -> None:
    m = model()
    served = Served(m)
    m.describe(0, [Segment(DATA, SIZE), Segment(DATA, 4096), Segment(DATA + 5000, 1, True)])
    m.publish(0)
    assert lib.ctrl_guest_pop(served.c, served.buffer, SIZE) == SIZE + 4096
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


# -- what the guest's side marks and notifies ----------------------------------------


def ask(m: Model, served: Served, head: int = 0) -> None:
    """Give a command in two buffers, and take it."""
    put(m, DATA, COMMAND)
    m.describe(head, [Segment(DATA, 10), Segment(DATA + 3 * PAGE_SIZE - 1, 4, True)])
    m.publish(head)
    assert served.take() == COMMAND


def used_pages(m: Model) -> set[int]:
    return set(range(m.queue.used & ~(PAGE_SIZE - 1), m.queue.used + 4 + 8 * m.num + 2, PAGE_SIZE))


@pytest.mark.parametrize("num", [8, 1024])
def test_an_answer_and_the_used_ring_are_marked_and_nothing_else(model: Make, num: int) -> None:
    m = model(num=num)
    served = Served(m)
    ask(m, served)
    m.memory.start_dirty_log()
    lib.ctrl_guest_answer(served.c, 0)
    assert set(m.memory.dirty_pages()) == used_pages(m) | {DATA + 2 * PAGE_SIZE}


def test_asking_for_a_notification_by_index_is_marked(model: Make) -> None:
    m = model()
    served = Served(m, lib.SVQ_F_EVENT_IDX)
    m.memory.start_dirty_log()
    assert served.take() == b""
    assert set(m.memory.dirty_pages()) == used_pages(m)


def test_a_command_is_answered_where_it_was_asked_once(model: Make) -> None:
    m = model()
    served = Served(m)
    for round_, head in enumerate((2, 4, 6), 1):
        ask(m, served, head)
        lib.ctrl_guest_answer(served.c, 40 + round_)
        assert answer_at(m, DATA + 3 * PAGE_SIZE - 1) == 40 + round_
        assert answer_at(m, DATA + 3 * PAGE_SIZE) == 0
        assert m.used() == [(head, 1)]
        assert m.ring.used.idx == round_
    assert served.calls() == 3


def test_a_guest_that_wants_no_interrupt_is_not_interrupted(model: Make) -> None:
    m = model()
    served = Served(m)
    m.ring.avail.flags = lib.VRING_AVAIL_F_NO_INTERRUPT
    ask(m, served)
    lib.ctrl_guest_answer(served.c, 0)
    assert served.calls() == 0
    assert served.c.broken == lib.SVQ_OK


def test_a_closed_call_breaks_the_control_queue(model: Make) -> None:
    m = model()
    served = Served(m)
    ask(m, served)
    served.c.call = 1 << 20
    lib.ctrl_guest_answer(served.c, 0)
    assert served.c.broken == lib.SVQ_BAD_EVENTFD
    assert m.used() == [(0, 1)]


def test_a_served_queue_continues_at_the_used_index(model: Make) -> None:
    m = model(start_idx=65535)
    m.describe(0, [Segment(DATA, 10), Segment(DATA + 100, 1, True)])
    m.publish(0)
    served = Served(m)
    served.c.broken = lib.SVQ_BAD_CHAIN
    lib.ctrl_guest_start(served.c)
    assert (served.c.broken, served.c.last_avail, served.c.used_idx) == (lib.SVQ_OK, 65535, 65535)
    assert len(served.take()) == 10
    assert served.c.last_avail == 0


@pytest.mark.parametrize(("ahead", "broken"), [(8, lib.SVQ_OK), (9, lib.SVQ_BAD_AVAIL_IDX)])
def test_as_many_commands_as_the_ring_has_may_wait_and_no_more(model: Make, ahead: int, broken: int) -> None:
    m = model(num=8)
    served = Served(m)
    m.describe(0, [Segment(DATA, 10), Segment(DATA + 100, 1, True)])
    m.ring.avail.idx = ahead
    assert len(served.take()) == (0 if broken else 10)
    assert served.c.broken == broken


@pytest.mark.parametrize(("head", "broken"), [(7, lib.SVQ_OK), (8, lib.SVQ_BAD_HEAD)])
def test_a_head_is_within_the_table(model: Make, head: int, broken: int) -> None:
    m = model(num=8)
    served = Served(m)
    d = m.ring.desc[7]
    d.addr, d.len, d.flags, d.next = DATA, 10, NEXT, 1
    m.describe(1, [Segment(DATA + 100, 1, True)])
    m.publish(head)
    assert len(served.take()) == (0 if broken else 10)
    assert served.c.broken == broken


@pytest.mark.parametrize(("following", "broken"), [(7, lib.SVQ_OK), (8, lib.SVQ_BAD_CHAIN)])
def test_a_next_is_within_the_table(model: Make, following: int, broken: int) -> None:
    m = model(num=8)
    served = Served(m)
    m.describe(7, [Segment(DATA + 100, 1, True)])
    d = m.ring.desc[0]
    d.addr, d.len, d.flags, d.next = DATA, 10, NEXT, following
    m.publish(0)
    assert len(served.take()) == (0 if broken else 10)
    assert served.c.broken == broken


def test_a_command_may_have_as_many_buffers_as_the_ring(model: Make) -> None:
    for indirect in (False, True):
        m = model(num=8)
        served = Served(m, lib.SVQ_F_INDIRECT)
        put(m, DATA, bytes(range(7)))
        chain = [*(Segment(DATA + k, 1) for k in range(7)), Segment(DATA + 100, 1, True)]
        if indirect:
            m.describe_indirect(3, DATA + 0x1000, chain)
        else:
            m.describe(0, chain)
        m.publish(3 if indirect else 0)
        assert served.take() == bytes(range(7))


def test_the_length_of_a_command_beyond_32_bits_does_not_come_round(model: Make) -> None:
    m = model(num=8192)
    served = Served(m)
    m.describe(0, [*([Segment(DATA, 0xB0000)] * 8191), Segment(DATA, 1, True)])
    m.publish(0)
    assert lib.ctrl_guest_pop(served.c, served.buffer, SIZE) == 0xFFFFFFFF


def test_a_command_is_cut_at_the_end_of_the_buffer(model: Make) -> None:
    m = model()
    served = Served(m)
    put(m, DATA, bytes(range(100)))
    room = ffi.new("uint8_t[]", 80)
    m.describe(0, [Segment(DATA, 30), Segment(DATA + 30, 40), Segment(DATA + 70, 1), Segment(DATA + 200, 1, True)])
    m.publish(0)
    assert lib.ctrl_guest_pop(served.c, room, 64) == 71
    assert bytes(room) == bytes(range(64)) + bytes(16)


def test_a_command_that_comes_while_a_notification_is_asked_for_is_taken(model: Make) -> None:
    """The driver does not notify of it. Here asking for the notification makes the command come."""
    m = model(num=8)
    served = Served(m, lib.SVQ_F_EVENT_IDX)
    put(m, DATA, COMMAND)
    m.describe(2, [Segment(DATA, 10), Segment(DATA + 100, 1, True)])
    avail = m.ring.avail
    avail.ring[COMES % 8] = 2
    avail.idx = served.c.used_idx = served.c.last_avail = COMES
    event = int(ffi.cast("uintptr_t", avail)) + 1
    served.c.ring.used = ffi.cast("struct vring_used *", event - 4 - 8 * 8)
    assert served.take() == COMMAND
