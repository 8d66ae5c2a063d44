"""The scripted driver (cdefs/trial.c), against a device that is a few lines of Python."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from pyvhostvdpa.probe.check.bench import Arena
from pyvhostvdpa.probe.check.queue import INDIRECT, NEXT, WRITE, Desc, Queue, Used
from pyvhostvdpa.probe.check.rule import Broken, CannotTell
from pyvhostvdpa.probe.check.work import pattern
from pyvhostvdpa.virtqueue.layout import SplitLayout

IOVA = 1 << 30
NUM = 8


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(IOVA, 1 << 20)
    yield made
    made.memory.close()


@pytest.fixture
def queue(arena: Arena) -> Iterator[Queue]:
    made = Queue(0, NUM, arena.allocate(SplitLayout(NUM).size))
    yield made
    made.close()


class Device:
    """Reads and writes the ring's bytes as a device does."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.at = {name: getattr(queue, name) - queue.ring.iova for name in ("desc", "avail", "used")}

    def read(self, part: str, offset: int, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.queue.ring.read(struct.calcsize(form), self.at[part] + offset))

    def write(self, offset: int, form: str, *values: int) -> None:
        self.queue.ring.write(struct.pack(form, *values), self.at["used"] + offset)

    def desc(self, index: int) -> Desc:
        return Desc(*self.read("desc", 16 * index, "<QIHH"))

    @property
    def avail(self) -> int:
        return self.read("avail", 2, "<H")[0]

    def head(self, position: int) -> int:
        return self.read("avail", 4 + 2 * (position % NUM), "<H")[0]

    def use(self, position: int, head: int, length: int) -> None:
        self.write(4 + 8 * (position % NUM), "<II", head, length)
        self.write(2, "<H", (position + 1) & 0xFFFF)


def test_a_chain_is_written_as_the_specification_has_it(arena: Arena, queue: Queue) -> None:
    a, b = arena.allocate(100), arena.allocate(200)
    head = queue.add([(a, False), (b, True)])
    queue.publish(head)
    device = Device(queue)
    assert device.avail == 1
    assert device.head(0) == head
    assert device.desc(head) == Desc(a.iova, 100, NEXT, head + 1)
    assert device.desc(head + 1) == Desc(b.iova, 200, WRITE, 0)


def test_indirect_table_lies_outside_the_ring(arena: Arena, queue: Queue) -> None:
    place = arena.allocate(64)
    queue.table(place, [Desc(1, 2, NEXT, 1), Desc(3, 4)])
    queue.write(0, [Desc(place.iova, 32, INDIRECT)])
    assert struct.unpack("<QIHHQIHH", place.read(32)) == (1, 2, NEXT, 1, 3, 4, 0, 0)
    assert Device(queue).desc(0) == Desc(place.iova, 32, INDIRECT, 0)


@pytest.mark.parametrize("base", [0, 65533])
def test_used_elements_are_taken_in_order_and_around_the_end(queue: Queue, base: int) -> None:
    queue.begin(base)
    device = Device(queue)
    for i in range(10):
        queue.publish(i % NUM)
        device.use(base + i, i % NUM, 10 + i)
        assert queue.collect(1, 1.0) == [Used(i % NUM, 10 + i)]
    assert queue.avail_index == queue.taken == queue.used_index == (base + 10) & 0xFFFF


def test_used_index_that_moved_too_far_is_refused(queue: Queue) -> None:
    queue.publish(0)
    Device(queue).write(2, "<H", 2)
    with pytest.raises(Broken, match="used index 2, though only 1"):
        queue.collect(1, 1.0)


def test_take_waits_no_longer_than_asked(queue: Queue) -> None:
    queue.publish(0, 1)
    Device(queue).use(0, 0, 5)
    begin = time.monotonic()
    assert queue.collect(2, 0.1) == [Used(0, 5)]
    assert 0.1 <= time.monotonic() - begin < 2


def test_take_returns_an_element_that_comes_late(queue: Queue) -> None:
    queue.publish(3)
    later = threading.Timer(0.05, Device(queue).use, (0, 3, 7))
    later.start()
    assert queue.collect(1, 5.0) == [Used(3, 7)]
    later.join()


def test_kick_and_call_are_eventfds(queue: Queue) -> None:
    queue.kick()
    queue.kick()
    assert os.eventfd_read(queue.kick_fd) == 2
    assert not queue.called(0.01)
    os.eventfd_write(queue.call_fd, 1)
    assert queue.called(1.0)
    assert not queue.called(0)


def test_flags_and_event_indices_are_where_they_belong(queue: Queue) -> None:
    device = Device(queue)
    queue.set_flags(1)
    queue.set_used_event(0x1234)
    queue.set_avail(77)
    assert device.read("avail", 0, "<HH") == (1, 77)
    assert device.read("avail", 4 + 2 * NUM, "<H") == (0x1234,)
    device.write(4 + 8 * NUM, "<H", 0x4321)
    assert queue.avail_event == 0x4321


def test_places_do_not_overlap_and_end_with_the_memory(arena: Arena) -> None:
    first, second = arena.allocate(5000), arena.allocate(10)
    assert second.offset >= first.offset + first.size
    assert first.iova == IOVA + first.offset
    first.write(b"abc", 4)
    assert first.read(3, 4) == b"abc"
    assert first.part(4, 3).read() == b"abc"
    with pytest.raises(CannotTell, match="needs more than"):
        arena.allocate(2 << 20)


def test_patterns_differ_and_can_be_made_again() -> None:
    assert pattern(100, 1) == pattern(100, 1)
    assert pattern(100, 1) != pattern(100, 2)
    assert len(pattern(13, 0)) == 13
