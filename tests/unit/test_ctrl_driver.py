"""The control queue's rings: commands as they are given to a device, and its answers as they are taken."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from ring_model import INDIRECT, NEXT, WRITE, Model

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.net import control_queue
from pyvhostvdpa.virtqueue.layout import map_queue

DATA = (1 << 30) + 0x40000
Make = Callable[..., Model]


class Driven:
    """A control queue that is driven, in memory of its own, and the device that answers it."""

    def __init__(self, m: Model, features: int = 0, tables: int = 0) -> None:
        self.ring = m.ring
        self.num = m.num
        self.c = ffi.new("struct ctrl_driver *", {"features": features, "kick": m.queue.kick, "call": m.queue.call})
        map_queue(self.c.ring, m.queue, m.memory)
        self.kick = m.queue.kick
        if tables:
            self.c.tables_gpa = tables
            self.c.tables = ffi.cast("struct vring_desc *", m.memory.hva(tables, 32 * m.num))
        lib.ctrl_driver_start(self.c)

    def add(self, at: int = 0x1000, size: int = 10, ack: int = 0x2000) -> int:
        return int(lib.ctrl_driver_add(self.c, at, size, ack))

    def answer(self, count: int = 1) -> None:
        self.ring.used.idx = (self.ring.used.idx + count) & 0xFFFF

    def wait(self, milliseconds: float = 0) -> int:
        return int(lib.ctrl_driver_wait(self.c, time.monotonic_ns() + int(milliseconds * 1e6)))

    def kicks(self) -> int:
        try:
            return os.eventfd_read(self.kick)
        except BlockingIOError:
            return 0


def test_a_driven_queue_begins_with_empty_rings(model: Make) -> None:
    m = model(start_idx=9)
    m.ring.desc[3].addr = m.ring.avail.flags = m.ring.used.flags = 1
    m.ring.used.ring[7].id = m.ring.avail.ring[8] = 5
    d = Driven(m)
    assert (m.ring.avail.idx, m.ring.used.idx, m.ring.avail.flags, m.ring.used.flags) == (0, 0, 0, 0)
    assert (m.ring.desc[3].addr, m.ring.used.ring[7].id, m.ring.avail.ring[8]) == (0, 0, 0)
    assert (d.c.avail_idx, d.c.used_idx, d.c.open) == (0, 0, 0)


@pytest.mark.parametrize("tables", [0, DATA])
def test_commands_fill_the_ring_and_no_more(model: Make, tables: int) -> None:
    d = Driven(model(num=8), tables=tables)
    assert [d.add() for _ in range(6)] == [0, 1, 2, 3, -1, -1]
    assert d.c.open == 4
    lib.ctrl_driver_kick(d.c)
    d.answer(3)
    assert d.wait() == 1
    assert [d.add() for _ in range(4)] == [0, 1, 2, -1]
    assert list(d.ring.avail.ring[0:8]) == [0, 2, 4, 6, 0, 2, 4, 0]


def test_a_command_is_a_readable_and_a_writable_descriptor(model: Make) -> None:
    d = Driven(model(num=8))
    d.add()
    d.add(0x3000, 33, 0x4000)
    entries = [(e.addr, e.len, e.flags, e.next) for e in d.ring.desc[2:4]]
    assert entries == [(0x3000, 33, NEXT, 3), (0x4000, 1, WRITE, 0)]


def test_with_tables_a_command_is_one_descriptor_and_a_table(model: Make) -> None:
    m = model(num=8)
    d = Driven(m, tables=DATA)
    d.add()
    d.add(0x3000, 33, 0x4000)
    slot = d.ring.desc[2]
    assert (slot.addr, slot.len, slot.flags) == (DATA + 32, 32, INDIRECT)
    entries = [(e.addr, e.len, e.flags, e.next) for e in d.c.tables[2:4]]
    assert entries == [(0x3000, 33, NEXT, 1), (0x4000, 1, WRITE, 0)]


def test_a_device_is_kicked_as_it_wants_to_be(model: Make) -> None:
    m = model(num=8)
    d = Driven(m)
    assert m.ring.avail.idx == 0
    d.add()
    lib.ctrl_driver_kick(d.c)
    assert (m.ring.avail.idx, d.kicks()) == (1, 1)
    m.ring.used.flags = lib.VRING_USED_F_NO_NOTIFY
    d.add()
    lib.ctrl_driver_kick(d.c)
    assert (m.ring.avail.idx, d.kicks()) == (2, 0)


def test_a_device_is_kicked_at_the_index_that_it_asked_for(model: Make) -> None:
    m = model(num=8)
    d = Driven(m, lib.SVQ_F_EVENT_IDX)
    event = ffi.cast("uint16_t *", ffi.addressof(m.ring.used.ring, m.num))
    event[0] = 1
    for kicks in (0, 1, 0):
        d.add()
        lib.ctrl_driver_kick(d.c)
        assert d.kicks() == kicks
    event[0] = 65535
    for _ in range(1):
        d.answer(3)
        assert d.wait() == 0
    d.add()
    lib.ctrl_driver_kick(d.c)
    assert d.kicks() == 0


def test_waiting_ends_with_the_answers_the_deadline_or_an_impossible_index(model: Make) -> None:
    m = model(num=8)
    d = Driven(m)
    assert d.wait(10_000) == 0
    for _ in range(3):
        d.add()
    lib.ctrl_driver_kick(d.c)
    before = time.monotonic()
    assert d.wait(30) == 3
    assert 0.03 <= time.monotonic() - before < 5
    d.answer(2)
    assert d.wait() == 1
    d.answer(2)
    assert d.wait() == -1


def test_waiting_is_ended_by_the_device_s_call(model: Make) -> None:
    m = model(num=8)
    d = Driven(m)
    d.add()
    lib.ctrl_driver_kick(d.c)

    def device() -> None:
        time.sleep(0.05)
        os.eventfd_write(m.queue.call, 1)
        time.sleep(0.05)
        d.answer()
        os.eventfd_write(m.queue.call, 1)

    thread = threading.Thread(target=device)
    thread.start()
    before = time.monotonic()
    assert d.wait(20_000) == 0
    assert time.monotonic() - before < 5
    thread.join()


def test_waiting_asks_for_a_notification_behind_what_was_answered(model: Make) -> None:
    m = model(num=8)
    d = Driven(m, lib.SVQ_F_EVENT_IDX)
    for _ in range(3):
        d.add()
    lib.ctrl_driver_kick(d.c)
    d.answer(2)
    assert d.wait() == 1
    assert m.ring.avail.ring[m.num] == 2


def test_waiting_on_a_closed_eventfd_is_reported(model: Make) -> None:
    d = Driven(model(num=8))
    d.c.call = 1 << 20
    d.add()
    assert d.wait(10_000) == -2


def test_waiting_for_nothing_asks_for_nothing(model: Make) -> None:
    m = model(num=8)
    d = Driven(m, lib.SVQ_F_EVENT_IDX)
    m.ring.avail.ring[m.num] = 77
    assert d.wait(10_000) == 0
    assert m.ring.avail.ring[m.num] == 77


def test_waiting_without_event_idx_leaves_the_event_alone(model: Make) -> None:
    m = model(num=8)
    d = Driven(m)
    d.add()
    m.ring.avail.ring[m.num] = 77
    assert d.wait() == 1
    assert m.ring.avail.ring[m.num] == 77


COMES = 0x0100
"""An index whose upper byte, written over its lower one, is the next index."""


def test_an_answer_that_comes_while_a_notification_is_asked_for_is_seen(model: Make) -> None:
    m = model(num=8)
    d = Driven(m)
    d.c.features = lib.SVQ_F_EVENT_IDX
    used = m.ring.used
    used.idx = d.c.used_idx = COMES
    d.c.open = 1
    event = int(ffi.cast("uintptr_t", used)) + 1
    d.c.ring.avail = ffi.cast("struct vring_avail *", event - 4 - 2 * 8)
    assert d.wait(0) == 0


@pytest.mark.parametrize(("old", "new"), [("GuestControl", "NetGuestControl"), ("ControlArea", "NetControlArea")])
def test_classes_by_their_name_of_an_earlier_release_work_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        found = getattr(control_queue, old)
    assert found is getattr(control_queue, new)
