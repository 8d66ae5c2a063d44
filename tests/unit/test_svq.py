"""The shadow virtqueue between a model guest and a model device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ring_model import BASE, INDIRECT, NEXT, WRITE, Model, Segment, publish_indirect

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import QueueBroken

DATA = BASE + 0x40000

Make = Callable[..., Model]


def test_a_chain_reaches_the_device_as_the_guest_wrote_it(model: Make) -> None:
    m = model()
    m.describe(3, [Segment(DATA, 12), Segment(DATA + 4096, 100), Segment(DATA + 8192, 50, True)])
    m.publish(3)
    assert m.forward() == 1
    [(_, segments)] = m.fetch()
    assert segments == [Segment(DATA, 12), Segment(DATA + 4096, 100), Segment(DATA + 8192, 50, True)]


def test_a_used_element_returns_under_the_guests_head_and_length(model: Make) -> None:
    m = model()
    m.describe(5, [Segment(DATA, 64, True)])
    m.publish(5)
    m.forward()
    [(head, _)] = m.fetch()
    m.complete(head, 42)
    assert m.give_back() == 1
    assert m.used() == [(5, 42)]


def test_svq_starts_at_the_used_index_of_the_guests_ring(model: Make) -> None:
    m = model(start_idx=65533)
    for slot in range(6):
        m.describe(slot, [Segment(DATA + slot * 64, 64)])
        m.publish(slot)
    assert m.forward() == 6
    for head, _ in m.fetch():
        m.complete(head)
    m.give_back()
    assert [head for head, _ in m.used()] == [0, 1, 2, 3, 4, 5]
    assert m.ring.used.idx == (65533 + 6) & 0xFFFF


def test_a_full_shadow_ring_makes_the_guest_wait_and_loses_nothing(model: Make) -> None:
    m = model(num=4, regions=2)
    end = m.memory.regions[0].end
    # a buffer across two regions takes two shadow descriptors
    for slot in range(4):
        m.describe(slot, [Segment(end - 32, 64)])
        m.publish(slot)
    assert m.forward() == 2
    assert m.svq.statistics()["stalls"] == 1
    for head, segments in m.fetch():
        assert [s.size for s in segments] == [32, 32]
        m.complete(head)
    m.give_back()
    assert m.forward() == 2
    for head, _ in m.fetch():
        m.complete(head)
    m.give_back()
    assert [head for head, _ in m.used()] == [0, 1, 2, 3]


def test_translation_gives_the_device_its_own_address(model: Make) -> None:
    m = model()
    m.memory.c_map.regions[0].iova = 0x7000_0000_0000
    m.describe(0, [Segment(DATA, 64)])
    m.publish(0)
    m.forward()
    assert m.fetch()[0][1] == [Segment(0x7000_0000_0000 + DATA - BASE, 64)]


def test_heads_in_flight_are_listed_oldest_first_and_republished_exactly(model: Make) -> None:
    m = model(num=8, start_idx=100)
    for slot in range(6):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
    m.forward()
    by_slot = dict(zip(range(6), (head for head, _ in m.fetch()), strict=True))
    for slot in (4, 0, 2):  # the device finishes out of order
        m.complete(by_slot[slot])
    m.give_back()
    assert m.svq.in_flight == [1, 3, 5]
    base = m.svq.republish()
    assert base == 103 == m.ring.used.idx
    assert [m.ring.avail.ring[i % 8] for i in range(103, 106)] == [1, 3, 5]


def test_device_that_claims_more_than_its_writable_buffers_is_refused(model: Make) -> None:
    m = model()
    m.describe(0, [Segment(DATA, 64, True)])
    m.publish(0)
    m.forward()
    m.complete(m.fetch()[0][0], 1 << 20)
    m.give_back()
    assert m.used() == [(0, 64)]
    assert m.svq.statistics()["clamped"] == 1


HOSTILE_GUEST = {
    "avail index jumps": ("SVQ_BAD_AVAIL_IDX", lambda m: setattr(m.ring.avail, "idx", m.num + 1)),
    "head beyond the table": ("SVQ_BAD_HEAD", lambda m: m.publish(m.num)),
    "next beyond the table": ("SVQ_BAD_CHAIN", lambda m: _one(m, DATA, 8, NEXT, 999)),
    "chain that loops": ("SVQ_BAD_CHAIN", lambda m: _one(m, DATA, 8, NEXT, 0)),
    "address outside memory": ("SVQ_BAD_ADDRESS", lambda m: _one(m, 0x1000, 8, 0, 0)),
    "buffer that leaves memory": ("SVQ_BAD_ADDRESS", lambda m: _one(m, m.memory.regions[-1].end - 4, 8, 0, 0)),
    "address that wraps": ("SVQ_BAD_ADDRESS", lambda m: _one(m, (1 << 64) - 4, 8, 0, 0)),
    "length of 4 GiB": ("SVQ_BAD_ADDRESS", lambda m: _one(m, DATA, 0xFFFFFFFF, WRITE, 0)),
    "zero length": ("SVQ_ZERO_LENGTH", lambda m: _one(m, DATA, 0, 0, 0)),
    "indirect, not negotiated": ("SVQ_BAD_INDIRECT", lambda m: _one(m, DATA, 64, INDIRECT, 0)),
    "readable after writable": ("SVQ_BAD_ORDER", lambda m: _two(m, Segment(DATA, 8, True), Segment(DATA, 8))),
}


def _one(m: Model, gpa: int, size: int, flags: int, following: int) -> None:
    d = m.ring.desc[0]
    d.addr, d.len, d.flags, d.next = gpa, size, flags, following
    m.publish(0)


def _two(m: Model, first: Segment, second: Segment) -> None:
    m.describe(0, [first, second])
    m.publish(0)


@pytest.mark.parametrize("attack", HOSTILE_GUEST)
def test_a_hostile_guest_breaks_its_queue_and_nothing_else(model: Make, attack: str) -> None:
    code, act = HOSTILE_GUEST[attack]
    m = model(num=8)
    act(m)
    assert m.forward() == 0
    assert m.svq.c.broken == getattr(lib, code)
    assert m.svq.broken.startswith("guest: ")
    assert m.fetch() == []
    assert m.forward() == 0


def test_a_good_chain_before_a_bad_one_still_goes_out(model: Make) -> None:
    m = model()
    m.describe(0, [Segment(DATA, 8)])
    m.publish(0)
    m.publish(7)
    assert m.forward() == 1
    assert len(m.fetch()) == 1
    assert m.svq.c.broken == lib.SVQ_ZERO_LENGTH


@pytest.mark.parametrize("head", [7, 8, 0xFFFFFFFF])
def test_a_used_id_that_was_never_given_breaks_the_queue(model: Make, head: int) -> None:
    m = model(num=8)
    m.describe(0, [Segment(DATA, 8)])
    m.publish(0)
    m.forward()
    m.complete(head)
    with pytest.raises(QueueBroken, match="used id that it was not given"):
        m.svq.drain()
    assert m.used() == []


def test_the_same_id_used_twice_breaks_the_queue(model: Make) -> None:
    m = model()
    m.describe(0, [Segment(DATA, 8)])
    m.publish(0)
    m.forward()
    [(head, _)] = m.fetch()
    m.complete(head)
    m.complete(head)
    assert m.give_back() == 1
    assert m.svq.c.broken == lib.SVQ_BAD_USED_ID


def test_a_used_index_that_jumps_breaks_the_queue(model: Make) -> None:
    m = model(num=8)
    m.svq.c.device.used.idx = 9
    assert m.give_back() == 0
    assert m.svq.c.broken == lib.SVQ_BAD_USED_IDX


def test_an_indirect_table_is_flattened(model: Make) -> None:
    m = model()
    m.svq.c.features = lib.SVQ_F_INDIRECT
    chain = [Segment(DATA, 12), Segment(DATA + 4096, 100), Segment(DATA + 8192, 50, True)]
    publish_indirect(m, 4, BASE + 0x80000, chain)
    assert m.forward() == 1
    [(head, segments)] = m.fetch()
    assert segments == chain
    m.complete(head, 50)
    m.give_back()
    assert m.used() == [(4, 50)]


HOSTILE_TABLES = {
    "no entries": (0, 0, "SVQ_BAD_INDIRECT"),
    "half an entry": (8, 0, "SVQ_BAD_INDIRECT"),
    "one and a half": (24, 0, "SVQ_BAD_INDIRECT"),
    "table with a next": (16, NEXT, "SVQ_BAD_INDIRECT"),
    "longer than the ring": (16 * 9, 0, "SVQ_BAD_CHAIN"),
}


@pytest.mark.parametrize("attack", HOSTILE_TABLES)
def test_a_misshapen_indirect_table_breaks_the_queue(model: Make, attack: str) -> None:
    size, flags, code = HOSTILE_TABLES[attack]
    m = model(num=8)
    m.svq.c.features = lib.SVQ_F_INDIRECT
    publish_indirect(m, 0, BASE + 0x80000, [Segment(DATA, 8)] * 9)
    m.ring.desc[0].len, m.ring.desc[0].flags = size, INDIRECT | flags
    assert m.forward() == 0
    assert m.svq.c.broken == getattr(lib, code)


def test_an_indirect_table_within_one_breaks_the_queue(model: Make) -> None:
    m = model()
    m.svq.c.features = lib.SVQ_F_INDIRECT
    publish_indirect(m, 0, BASE + 0x80000, [Segment(BASE + 0x80000, 16)])
    ffi.cast("struct vring_desc *", m.memory.hva(BASE + 0x80000, 16)).flags = INDIRECT
    assert m.forward() == 0
    assert m.svq.c.broken == lib.SVQ_BAD_INDIRECT


def test_event_idx_spares_the_guest_interrupts_it_did_not_ask_for(model: Make) -> None:
    m = model()
    m.svq.c.features = lib.SVQ_F_EVENT_IDX
    for slot in range(3):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
    m.ring.avail.ring[m.num] = 1  # used_event: notify when the second is done
    m.forward()
    heads = [head for head, _ in m.fetch()]
    for head, calls in zip(heads, (0, 1, 1), strict=True):
        m.complete(head)
        m.give_back()
        assert m.svq.statistics()["calls"] == calls


def test_event_idx_spares_the_device_kicks_it_did_not_ask_for(model: Make) -> None:
    m = model()
    m.svq.c.features = lib.SVQ_F_EVENT_IDX
    avail_event = ffi.cast("uint16_t *", ffi.addressof(m.svq.c.device.used.ring, m.num))
    avail_event[0] = 1
    for slot, kicks in zip(range(3), (0, 1, 1), strict=True):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
        m.forward()
        assert m.svq.statistics()["kicks"] == kicks


def test_asking_for_notifications_moves_both_events(model: Make) -> None:
    m = model(start_idx=40)
    m.svq.c.features = lib.SVQ_F_EVENT_IDX
    for slot in range(2):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
    m.forward()
    m.complete(m.fetch()[0][0])
    m.give_back()
    lib.svq_want_notifications(m.svq.c, 1)
    guest_avail_event = ffi.cast("uint16_t *", ffi.addressof(m.ring.used.ring, m.num))[0]
    assert guest_avail_event == 42
    assert m.svq.c.device.avail.ring[m.num] == 1


def test_without_event_idx_flags_spare_both_sides_while_the_ring_is_polled(model: Make) -> None:
    m = model()
    for on in (0, 1):
        lib.svq_want_notifications(m.svq.c, on)
        assert m.ring.used.flags == (0 if on else lib.VRING_USED_F_NO_NOTIFY)
        assert m.svq.c.device.avail.flags == (0 if on else lib.VRING_AVAIL_F_NO_INTERRUPT)


def test_neither_side_is_notified_that_does_not_want_it(model: Make) -> None:
    m = model()
    m.svq.c.device.used.flags = lib.VRING_USED_F_NO_NOTIFY
    m.ring.avail.flags = lib.VRING_AVAIL_F_NO_INTERRUPT
    m.describe(0, [Segment(DATA, 8)])
    m.publish(0)
    m.forward()
    m.complete(m.fetch()[0][0])
    m.give_back()
    assert (m.svq.statistics()["kicks"], m.svq.statistics()["calls"]) == (0, 0)


def test_svq_ignores_guest_writes_to_descriptors_in_flight(model: Make) -> None:
    m = model()
    m.describe(0, [Segment(DATA, 8, True)])
    m.publish(0)
    m.forward()
    m.ring.desc[0].addr, m.ring.desc[0].len = 0x1000, 1 << 20
    [(head, segments)] = m.fetch()
    assert segments == [Segment(DATA, 8, True)]
    m.complete(head, 1 << 20)
    m.give_back()
    assert m.used() == [(0, 8)]


@pytest.mark.parametrize("num", [2, 32768])
def test_the_smallest_and_the_largest_ring_go_round(model: Make, num: int) -> None:
    m = model(num=num, start_idx=65530)
    for slot in range(num):
        m.describe(slot, [Segment(DATA, 8)])
    for _ in range(2):
        for slot in range(num):
            m.publish(slot)
        assert m.forward() == num
        for head, _ in m.fetch():
            m.complete(head)
        assert m.give_back() == num
        assert [head for head, _ in m.used()] == list(range(num))


def test_an_element_held_for_2_31_others_is_still_the_oldest(model: Make) -> None:
    m = model()
    for slot in range(2):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
        m.forward()
        m.svq.c.given = (1 << 31) + 1
    assert m.svq.in_flight == [0, 1]


@pytest.mark.parametrize(("told", "kept", "clamped"), [(63, 63, 0), (64, 64, 0), (65, 64, 1)])
def test_only_a_length_beyond_the_buffers_is_clamped(model: Make, told: int, kept: int, clamped: int) -> None:
    m = model()
    m.describe(0, [Segment(DATA, 64, True)])
    m.publish(0)
    m.forward()
    m.complete(m.fetch()[0][0], told)
    m.give_back()
    assert m.used() == [(0, kept)]
    assert m.svq.statistics()["clamped"] == clamped


def test_an_id_just_beyond_the_table_is_refused_whatever_lies_there(model: Make) -> None:
    m = model(num=8)
    beyond = ffi.new("struct svq_element[]", 9)
    beyond[8].segments = 1
    m.svq.c.elements = beyond
    m.describe(0, [Segment(DATA, 8)])
    m.publish(0)
    m.forward()
    m.complete(8)
    assert m.give_back() == 0
    assert m.svq.c.broken == lib.SVQ_BAD_USED_ID


def test_heads_in_flight_are_listed_by_age_whatever_shadow_slots_they_have(model: Make) -> None:
    m = model(num=4)
    for slot in range(4):
        m.describe(slot, [Segment(DATA, 8)])
        m.publish(slot)
    m.forward()
    shadow = [head for head, _ in m.fetch()]
    for again in (2, 0):
        m.complete(shadow[again])
        m.give_back()
        m.publish(again)
        m.forward()
    assert m.svq.in_flight == [1, 3, 2, 0]


@pytest.mark.parametrize(("following", "broken"), [(7, lib.SVQ_OK), (8, lib.SVQ_BAD_CHAIN)])
def test_a_next_is_within_the_ring(model: Make, following: int, broken: int) -> None:
    """Whatever lies behind the table, and be it a good descriptor."""
    m = model(num=8)
    table = ffi.new("struct vring_desc[]", 9)
    m.svq.c.guest.desc = table
    for d in table:
        d.addr, d.len, d.flags, d.next = DATA, 10, 0, 0
    table[0].flags, table[0].next = NEXT, following
    m.publish(0)
    assert m.forward() == (0 if broken else 1)
    assert m.svq.c.broken == broken


@pytest.mark.parametrize(("following", "broken"), [(2, lib.SVQ_OK), (3, lib.SVQ_BAD_CHAIN)])
def test_a_next_is_within_its_indirect_table(model: Make, following: int, broken: int) -> None:
    m = model(num=8)
    m.svq = m.shadow(lib.SVQ_F_INDIRECT)
    m.describe_indirect(0, DATA + 0x1000, [Segment(DATA, 10)] * 4)
    entries = ffi.cast("struct vring_desc *", m.memory.hva(DATA + 0x1000, 64))
    entries[0].next, entries[2].flags = following, 0
    m.ring.desc[0].len = 48
    m.publish(0)
    assert m.forward() == (0 if broken else 1)
    assert m.svq.c.broken == broken


def test_a_chain_that_needs_one_descriptor_more_than_there_are_waits(model: Make) -> None:
    m = model(num=4, regions=2)
    end = m.memory.regions[0].end
    m.describe(0, [Segment(DATA, 64)])
    for slot in (1, 2):
        m.describe(slot, [Segment(end - 32, 64)])
    for slot in range(3):
        m.publish(slot)
    assert m.forward() == 2
    assert m.svq.statistics()["stalls"] == 1
    m.complete(m.fetch()[0][0])
    m.give_back()
    assert m.forward() == 1


def test_a_shadow_begins_with_what_waits_in_the_guest_s_ring(model: Make) -> None:
    m = model(start_idx=65534)
    for slot in range(3):
        m.describe(slot, [Segment(DATA + slot, 1)])
        m.publish(slot)
    m.svq = m.shadow()
    assert m.forward() == 3
    assert [segments for _, segments in m.fetch()] == [[Segment(DATA + slot, 1)] for slot in range(3)]
