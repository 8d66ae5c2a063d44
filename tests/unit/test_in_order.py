"""What the rings of a passthrough device show of the order in which it finished."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ring_model import Model

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.virtqueue.layout import RingStart

NUM = 8

Make = Callable[..., Model]


class Passthrough:
    """A device on the guest's own ring, and a driver that gives each head again when it was used."""

    def __init__(self, m: Model) -> None:
        self.m, self.start = m, RingStart(m.queue, m.memory)
        self.open = list(range(m.num))
        for head in self.open:
            m.publish(head)

    def finish(self, position: int) -> int:
        """Use the open descriptor at this position; 0 is the oldest."""
        head = self.open.pop(position)
        used = self.m.ring.used
        used.ring[used.idx % self.m.num].id = head
        used.idx = (used.idx + 1) & 0xFFFF
        return head

    def refill(self, head: int) -> None:
        self.open.append(head)
        self.m.publish(head)

    @property
    def looks_in_order(self) -> bool:
        return bool(lib.vring_in_order(self.m.ring, self.start.c, 0))

    @property
    def is_in_order(self) -> bool:
        """Whether what is open is what was given last."""
        ring, used = self.m.ring, self.m.ring.used.idx
        return self.open == [ring.avail.ring[(used + k) % self.m.num] for k in range(len(self.open))]


@pytest.mark.parametrize("start_idx", [0, 65530])
@given(finished=st.lists(st.tuples(st.integers(0, NUM - 1), st.booleans()), max_size=40))
def test_full_ring_shows_exactly_whether_open_descriptors_are_the_newest(
    start_idx: int, finished: list[tuple[int, bool]]
) -> None:
    with closing(Model(NUM, start_idx=start_idx)) as m:
        device = Passthrough(m)
        for position, in_turn in finished:
            device.refill(device.finish(0 if in_turn else position))
            assert device.looks_in_order == device.is_in_order


@given(steps=st.lists(st.integers(0, NUM), max_size=40))
def test_a_device_that_keeps_order_is_never_taken_for_one_that_does_not(steps: list[int]) -> None:
    with closing(Model(NUM)) as m:
        device, back = Passthrough(m), list[int]()
        for step in steps:
            if step < len(device.open):
                back.append(device.finish(0))
            elif back:
                device.refill(back.pop(step % len(back)))
            assert device.looks_in_order


def test_the_driver_need_not_have_given_anything_again(model: Make) -> None:
    device = Passthrough(model(num=NUM))
    device.finish(3)
    assert not device.looks_in_order
    for _ in range(3):
        device.finish(0)
    # nothing that is open is out of order any more, but this device has proved to be unreliable
    assert device.is_in_order
    assert not device.looks_in_order


def test_heads_beyond_the_table_and_a_wild_index_are_looked_at_without_harm(model: Make) -> None:
    m = model(num=NUM)
    device = Passthrough(m)
    for slot in range(NUM):
        m.ring.avail.ring[slot] = 0xFFFF
    assert device.looks_in_order
    m.ring.avail.idx += 12345
    assert device.looks_in_order


def swapped_pairs(m: Model, start: int, count: int) -> None:
    """Let a device use ``count`` elements from index ``start`` on, the second of each pair first; nothing is open."""
    for k in range(count):
        slot = (start + k) % m.num
        m.ring.avail.ring[slot] = slot
        m.ring.used.ring[slot].id = slot ^ 1
    m.ring.avail.idx = m.ring.used.idx = (start + count) & 0xFFFF


@pytest.mark.parametrize("count", [NUM, 1000, 65536, 65536 + 2, 2 * 65536 + NUM - 2])
@pytest.mark.parametrize("start_idx", [0, 65530])
def test_disorder_is_seen_after_any_number_of_elements(model: Make, start_idx: int, count: int) -> None:
    m = model(num=NUM, start_idx=start_idx)
    start = RingStart(m.queue, m.memory)
    swapped_pairs(m, start_idx, count)
    assert not lib.vring_in_order(m.ring, start.c, 0)


@pytest.mark.parametrize("since", [0, 1, NUM - 2])
@pytest.mark.parametrize("start_idx", [0, 65530])
def test_disorder_from_before_the_start_is_left_out(model: Make, start_idx: int, since: int) -> None:
    m = model(num=NUM, start_idx=start_idx)
    swapped_pairs(m, start_idx, NUM)
    start = RingStart(m.queue, m.memory)
    for k in range(since):
        slot = (start_idx + NUM + k) % NUM
        m.ring.avail.ring[slot] = m.ring.used.ring[slot].id = slot
    m.ring.avail.idx = m.ring.used.idx = (start_idx + NUM + since) & 0xFFFF
    assert lib.vring_in_order(m.ring, start.c, 0)
    assert not lib.vring_in_order(m.ring, ffi.NULL, 0), "without a start every slot counts"


def test_an_avail_slot_written_after_the_start_counts(model: Make) -> None:
    m = model(num=NUM)
    swapped_pairs(m, 0, NUM)
    start = RingStart(m.queue, m.memory)
    # a whole round of the index later: the device used what it did before, the driver gave other heads
    for slot in range(2, NUM):
        m.ring.avail.ring[slot] = slot ^ 2
    assert not lib.vring_in_order(m.ring, start.c, 0)


def test_a_ring_start_has_the_used_index(model: Make) -> None:
    m = model(num=NUM, start_idx=65530)
    assert RingStart(m.queue, m.memory).used_index == 65530


def test_a_head_beyond_the_table_does_not_hide_one_that_is_open_twice(model: Make) -> None:
    m = model(num=NUM)
    start = RingStart(m.queue, m.memory)
    for head in (0xFFFF, 1, 1):
        m.publish(head)
    assert not lib.vring_in_order(m.ring, start.c, 0)


@pytest.mark.parametrize("since", [2, NUM])
def test_disorder_like_that_from_before_the_start_counts_once_it_is_repeated(model: Make, since: int) -> None:
    m = model(num=NUM)
    swapped_pairs(m, 0, NUM)
    start = RingStart(m.queue, m.memory)
    swapped_pairs(m, NUM, since)
    assert not lib.vring_in_order(m.ring, start.c, 0)


def test_every_slot_is_looked_at(model: Make) -> None:
    m = model(num=NUM)
    start = RingStart(m.queue, m.memory)
    for slot in range(NUM):
        m.ring.avail.ring[slot] = m.ring.used.ring[slot].id = slot
    m.ring.avail.idx = m.ring.used.idx = NUM
    assert lib.vring_in_order(m.ring, start.c, 0)
    for slot in range(NUM):
        m.ring.used.ring[slot].id = (slot + 1) % NUM
        assert not lib.vring_in_order(m.ring, start.c, 0)
        m.ring.used.ring[slot].id = slot


def test_open_heads_are_those_between_used_and_avail(model: Callable[..., Model]) -> None:
    m = model(start_idx=65534)
    for head in (5, 2, 7):
        m.publish(head)
    heads = ffi.new("uint16_t[]", 8)
    assert lib.vring_open_heads(m.ring, heads) == 3
    assert list(heads)[:3] == [5, 2, 7]


@pytest.mark.parametrize("start_idx", [0, 65534])
def test_a_base_lies_between_used_and_avail_index_of_its_ring(model: Callable[..., Model], start_idx: int) -> None:
    first, second = model(num=NUM, start_idx=start_idx), model(num=NUM, start_idx=start_idx)
    for head in (5, 2, 7):
        second.publish(head)
    rings = ffi.new("struct vring[]", [first.ring[0], second.ring[0]])

    def wrong(base: int) -> int:
        bases = ffi.new("uint16_t[]", [start_idx, (start_idx + base) & 0xFFFF])
        return int(lib.rings_hold_bases(rings, 2, bases))

    assert [wrong(base) for base in (-1, 0, 3, 4)] == [1, 2, 2, 1]
    # an avail index that is further than the ring is long makes no base right that is
    second.ring.avail.idx = (start_idx + 4 * NUM) & 0xFFFF
    assert [wrong(base) for base in (0, NUM, NUM + 1, 2 * NUM)] == [2, 2, 1, 1]
