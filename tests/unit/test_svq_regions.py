"""Chains of a shadow virtqueue that lie in several regions of guest memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ring_model import BASE, Model, Segment, publish_indirect

from pyvhostvdpa._cdefs import lib
from pyvhostvdpa.memory.guest import PAGE_SIZE

DATA = BASE + 0x40000
Make = Callable[..., Model]


def test_an_indirect_table_need_not_be_aligned_nor_in_one_region(model: Make) -> None:
    m = model(regions=2)
    m.svq.c.features = lib.SVQ_F_INDIRECT
    chain = [Segment(DATA, 12), Segment(DATA + 4096, 100, True)]
    publish_indirect(m, 0, BASE + 0x80003, chain)
    assert m.forward() == 1
    assert m.fetch()[0][1] == chain


def test_regions_that_only_the_guest_sees_side_by_side_are_separate_for_the_device(model: Make) -> None:
    m = model(regions=2)
    first, second = m.memory.regions
    m.memory.c_map.regions[0].iova, m.memory.c_map.regions[1].iova = 0x20_0000_0000, 0x10_0000_0000
    m.describe(0, [Segment(second.gpa - 100, 300, True)])
    m.publish(0)
    m.forward()
    [(head, segments)] = m.fetch()
    assert segments == [Segment(0x20_0000_0000 + first.size - 100, 100, True), Segment(0x10_0000_0000, 200, True)]
    m.complete(head, 300)
    m.give_back()
    assert m.used() == [(0, 300)]
    assert {second.gpa - PAGE_SIZE, second.gpa} <= set(m.memory.dirty_pages())


BORDER_CHAINS = {"one buffer": 1, "the last of two": 2, "the last of as many as the ring has": 8}


@pytest.mark.parametrize("moved", [0, 0x7000_0000_0000])
@pytest.mark.parametrize("chain", BORDER_CHAINS)
def test_a_chain_as_long_as_the_ring_may_cross_a_border(model: Make, chain: str, moved: int) -> None:
    num = BORDER_CHAINS[chain]
    m = model(num=num, regions=3, moved=moved)
    second = m.memory.regions[1].gpa
    before = [Segment(DATA + k * 64, 16, k >= num // 2) for k in range(num - 1)]
    # from the first region through all of the second into the third
    across = Segment(second - 5000, 5000 + (1 << 20) + 10, True)
    m.describe(0, [*before, across])
    m.publish(0)
    assert m.forward() == 1
    [(head, segments)] = m.fetch()
    assert segments == [Segment(s.gpa + moved, s.size, s.writable) for s in [*before, across]]
    written = sum(s.size for s in [*before, across] if s.writable)
    m.complete(head, written)
    m.give_back()
    assert m.used() == [(0, written)]
    touched = set(range(second - 2 * PAGE_SIZE, second + (1 << 20) + 1, PAGE_SIZE))
    assert touched <= set(m.memory.dirty_pages())
    assert second - 3 * PAGE_SIZE not in m.memory.dirty_pages()
    assert m.svq.c.free_count == num


AT_THE_BORDER: dict[str, Callable[[int], list[Segment]]] = {
    "two buffers side by side": lambda border: [
        Segment(border - 64, 64),
        Segment(border, 32),
        Segment(border + 32, 8),
        Segment(border - 8, 16),
    ],
    "every buffer of a full ring across": lambda border: [Segment(border - 16 - k, 32, k > 3) for k in range(8)],
}


@pytest.mark.parametrize("which", AT_THE_BORDER)
def test_buffers_at_the_border_of_two_regions_arrive_as_they_are(model: Make, which: str) -> None:
    m = model(num=8 if "full" in which else 4, regions=2)
    chain = AT_THE_BORDER[which](m.memory.regions[1].gpa)
    m.describe(0, chain)
    m.publish(0)
    assert m.forward() == 1
    assert m.fetch()[0][1] == chain


def test_a_full_chain_across_regions_that_are_separate_for_the_device_is_not_the_guests_fault(model: Make) -> None:
    m = model(num=2, regions=2)
    m.memory.c_map.regions[1].iova = 0x7000_0000_0000
    m.describe(0, [Segment(DATA, 8), Segment(m.memory.regions[1].gpa - 8, 16)])
    m.publish(0)
    assert m.forward() == 0
    assert m.svq.c.broken == lib.SVQ_NO_ROOM
    assert "guest:" not in m.svq.broken
    assert "not adjacent for the device" in m.svq.broken


def test_a_table_longer_than_the_ring_is_refused_wherever_its_buffers_lie(model: Make) -> None:
    m = model(num=8, regions=2)
    m.svq.c.features = lib.SVQ_F_INDIRECT
    border = m.memory.regions[1].gpa
    publish_indirect(m, 0, BASE + 0x80000, [Segment(border - 4, 8)] * 9)
    assert m.forward() == 0
    assert m.svq.c.broken == lib.SVQ_BAD_CHAIN
