"""Which pages a shadow virtqueue marks as written: by the device, and by this side in the guest's rings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ring_model import BASE, Model, Segment

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.memory.guest import PAGE_SIZE

DATA = BASE + 0x40000
Make = Callable[..., Model]


def test_svq_marks_only_device_writable_pages_dirty(model: Make) -> None:
    m = model()
    m.describe(0, [Segment(DATA, 100), Segment(DATA + 3 * PAGE_SIZE - 8, 16, True)])
    m.publish(0)
    m.forward()
    assert m.memory.dirty_pages() == []
    m.complete(m.fetch()[0][0], 16)
    m.give_back()
    used_page = m.queue.used & ~(PAGE_SIZE - 1)
    assert m.memory.dirty_pages() == sorted([used_page, DATA + 2 * PAGE_SIZE, DATA + 3 * PAGE_SIZE])


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_chain_of_4_gib_or_more_is_marked_and_its_length_is_kept(model: Make, beyond: int) -> None:
    num, size = 8192, 1 << 19
    assert num * size == 1 << 32
    m = model(num=num)
    m.describe(0, [Segment(DATA, size + beyond, True)] * num)
    m.publish(0)
    assert m.forward() == 1
    m.complete(m.svq.c.device.avail.ring[0], size)
    m.give_back()
    assert m.used() == [(0, size)]
    assert m.svq.statistics()["clamped"] == 0
    assert set(range(DATA, DATA + size, PAGE_SIZE)) <= set(m.memory.dirty_pages())


def pages_of(gpa: int, size: int) -> set[int]:
    return set(range(gpa & ~(PAGE_SIZE - 1), gpa + size, PAGE_SIZE))


@pytest.mark.parametrize(("start", "count"), [(0, 16), (500, 16), (2040, 16), (2046, 1000), (1, 2047)])
def test_every_used_entry_written_is_marked_also_where_the_ring_wraps(model: Make, start: int, count: int) -> None:
    """A used ring of five pages; its first page is marked for the index in any case."""
    num = 2048
    m = model(num=num, start_idx=start)
    for slot in range(count):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
    m.forward()
    for head, _ in m.fetch():
        m.complete(head)
    m.memory.start_dirty_log()
    assert m.give_back() == count
    expected = pages_of(m.queue.used, 4)
    for k in range(count):
        expected |= pages_of(m.queue.used + 4 + 8 * ((start + k) % num), 8)
    assert set(m.memory.dirty_pages()) == expected


def test_a_republished_avail_ring_is_marked_and_an_unchanged_one_is_not(model: Make) -> None:
    num = 2048
    m = model(num=num, start_idx=2040)
    m.memory.start_dirty_log()
    assert m.svq.republish() == 2040
    assert m.memory.dirty_pages() == []
    for slot in range(16):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
    m.forward()
    m.memory.start_dirty_log()
    assert m.svq.republish() == 2040
    # the slots lie at both ends of a ring of two pages
    ends = pages_of(m.queue.avail + 4, 2) | pages_of(m.queue.avail + 4 + 2 * (num - 1), 2)
    assert len(ends) == 2
    assert ends <= set(m.memory.dirty_pages())


@pytest.mark.parametrize("on", [0, 1])
def test_asking_the_guest_for_notifications_is_marked(model: Make, on: int) -> None:
    m = model(num=1024)
    m.memory.start_dirty_log()
    lib.svq_want_notifications(m.svq.c, on)
    assert set(m.memory.dirty_pages()) == pages_of(m.queue.used, 2)
    m.svq.c.features = lib.SVQ_F_EVENT_IDX
    m.memory.start_dirty_log()
    lib.svq_want_notifications(m.svq.c, on)
    assert set(m.memory.dirty_pages()) == (pages_of(m.queue.used + 4 + 8 * 1024, 2) if on else set())


def test_a_region_without_a_log_is_not_marked_and_the_others_are(model: Make) -> None:
    m = model(regions=2)
    second = m.memory.regions[1].gpa
    m.memory.c_map.regions[0].dirty = ffi.NULL
    m.describe(0, [Segment(DATA, 8, True), Segment(second, 8, True)])
    m.publish(0)
    m.forward()
    m.complete(m.fetch()[0][0], 16)
    m.give_back()
    assert m.memory.dirty_pages() == [second]


@pytest.mark.parametrize(
    ("written", "marked"),
    [(0, []), (1, [0]), (100, [0]), (101, [0, 4]), (100 + PAGE_SIZE, [0, 4]), (101 + PAGE_SIZE, [0, 4, 5])],
)
def test_svq_marks_only_the_pages_that_the_device_reports_as_written(
    model: Make, written: int, marked: list[int]
) -> None:
    """Over the writable buffers in their order; what is behind, a driver must not rely on (virtio 1.3, 2.7.8.2)."""
    m = model()
    m.describe(
        0, [Segment(DATA + 8 * PAGE_SIZE, 64), Segment(DATA, 100, True), Segment(DATA + 4 * PAGE_SIZE, 1 << 14, True)]
    )
    m.publish(0)
    m.forward()
    m.memory.start_dirty_log()
    m.complete(m.fetch()[0][0], written)
    assert m.give_back() == 1
    assert [(page - DATA) // PAGE_SIZE for page in m.memory.dirty_pages() if page >= DATA] == marked


def test_a_returned_element_marks_its_slot_and_the_index(model: Make) -> None:
    """Which lie in different pages of a long ring."""
    m = model(num=1024, start_idx=600)
    m.describe(0, [Segment(DATA, 64)])
    m.publish(0)
    m.forward()
    m.complete(m.fetch()[0][0])
    m.memory.start_dirty_log()
    assert m.give_back() == 1
    slot = m.queue.used + 4 + 8 * 600
    pages = {at // PAGE_SIZE * PAGE_SIZE for at in (m.queue.used, slot)}
    assert len(pages) == 2
    assert set(m.memory.dirty_pages()) == pages
