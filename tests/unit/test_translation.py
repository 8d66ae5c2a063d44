"""Guest memory that the device has at other addresses than the guest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ring_model import BASE, Model, Segment

from pyvhostvdpa.memory.guest import PAGE_SIZE

Make = Callable[..., Model]
MOVED = 0x5000_0000
DATA = BASE + 64 * PAGE_SIZE
REGION = 1 << 20


def test_the_device_gets_its_own_addresses_and_the_guest_its_own_heads(model: Make) -> None:
    m = model(moved=MOVED)
    m.describe(3, [Segment(DATA, 100), Segment(DATA + PAGE_SIZE, 200, writable=True)])
    m.publish(3)
    m.forward()
    [(head, segments)] = m.fetch()
    assert segments == [Segment(DATA + MOVED, 100), Segment(DATA + PAGE_SIZE + MOVED, 200, True)]
    m.complete(head, 50)
    m.give_back()
    assert m.used() == [(3, 50)]


def test_a_buffer_across_two_regions_is_cut_where_the_device_has_them_separately(model: Make) -> None:
    m = model(regions=2, moved=MOVED)
    end = BASE + REGION
    m.describe(0, [Segment(end - 10, 30)])
    m.publish(0)
    m.forward()
    [(_, segments)] = m.fetch()
    assert segments == [Segment(end - 10 + MOVED, 10), Segment(end + MOVED, 20)]


def test_device_writes_are_dirty_at_the_guests_address(model: Make) -> None:
    m = model(moved=MOVED)
    m.memory.start_dirty_log()  # again, with the translation already in use
    m.describe(0, [Segment(DATA, 10, writable=True)])
    m.publish(0)
    m.forward()
    [(head, _)] = m.fetch()
    m.complete(head, 10)
    m.give_back()
    assert DATA in m.memory.dirty_pages()
    assert not [page for page in m.memory.dirty_pages() if page >= BASE + MOVED]


def test_a_translation_names_every_region(model: Make) -> None:
    m = model(regions=2)
    with pytest.raises(ValueError, match="1 addresses for 2 regions"):
        m.memory.translate([MOVED])
