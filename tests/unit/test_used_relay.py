"""A queue whose descriptors are the guest's own, between a model guest and a model device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_model import BASE, INDIRECT, NEXT, WRITE, Model, Segment

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import MissingFeature, QueueBroken
from pyvhostvdpa.memory.guest import PAGE_SIZE
from pyvhostvdpa.virtqueue.serving import RingServer, ServingOptions
from pyvhostvdpa.virtqueue.used import PassedThrough, UsedRelay, UsedThreads, used_ring

EXAMPLES = int(os.environ.get("PYVHOSTVDPA_USED_RELAY_EXAMPLES", "500"))
DATA = BASE + 0x40000
TABLE = BASE + 0x30008
Make = Callable[..., Model]


def make(model: Make, **options: int) -> Model:
    return model(used=1, **options)


def give(m: Model, *heads: int) -> None:
    for head in heads:
        m.describe(head, [Segment(m.memory.regions[-1].end - (head % 64 + 1) * 64, 64, True)])
        m.publish(head)


def test_the_device_finds_the_guest_s_heads_and_descriptors_at_the_guest_s_indices(model: Make) -> None:
    m = make(model, start_idx=65534)
    give(m, 5, 3, 0)
    assert m.svq.base == 65534
    assert m.forward() == 3
    assert m.svq.c.device.avail.idx == m.ring.avail.idx == 1
    assert m.fetch() == [(head, [Segment(m.memory.regions[0].end - (head + 1) * 64, 64, True)]) for head in (5, 3, 0)]
    m.complete(3, 10)
    assert m.give_back() == 1
    assert m.used() == [(3, 10)]
    assert m.svq.c.device.used.idx == m.ring.used.idx == 65535


def test_addresses_are_the_guest_s_descriptors_and_our_two_rings(model: Make) -> None:
    m = make(model)
    layout = m.svq.layout
    assert m.svq.addresses(0x1000, 0x5000) == (m.queue.desc, 0x1000 + layout.avail_offset, 0x5000)
    assert not m.svq.through


def test_a_translation_is_refused(model: Make) -> None:
    with pytest.raises(MissingFeature, match="IOVA = GPA"):
        make(model, moved=1 << 40)


@pytest.mark.parametrize("num", [1, 2, 4, 1024, 32768])
def test_rings_of_any_size_go_round(model: Make, num: int) -> None:
    m = make(model, num=num, start_idx=65536 - 2 * num & 0xFFFF)
    rounds = 4
    for _ in range(rounds):
        give(m, *range(num))
        assert m.forward() == num
        for head, _segments in m.fetch():
            m.complete(head, 1)
        assert m.give_back() == num
        assert m.used() == [(head, 1) for head in range(num)]
    assert m.svq.in_flight == []


# -- what is in flight -----------------------------------------------------------------


def test_heads_in_flight_are_those_given_less_those_used_oldest_first(model: Make) -> None:
    m = make(model, num=8, start_idx=100)
    give(m, 6, 5, 4, 3, 2, 1)
    m.forward()
    for head in (4, 6, 2):
        m.complete(head)
    m.give_back()
    assert m.svq.in_flight == [5, 3, 1]
    assert m.svq.republish() == 103 == m.ring.used.idx
    assert [m.ring.avail.ring[i % 8] for i in range(103, 106)] == [5, 3, 1]


def test_an_element_that_is_held_while_the_ring_goes_round_stays_the_oldest(model: Make) -> None:
    m = make(model, num=4)
    give(m, 0)
    for _ in range(10):
        give(m, 1, 2)
        m.forward()
        for head in (2, 1):
            m.complete(head)
        m.give_back()
    give(m, 3)
    m.forward()
    assert m.svq.in_flight == [0, 3]


def test_heads_that_were_returned_are_taken_again(model: Make) -> None:
    m = make(model)
    give(m, 7, 6, 5)
    m.forward()
    m.complete(6, 64)
    m.svq.drain()
    base = m.svq.republish()
    m.svq.take_up()
    m.device_avail = m.svq.base
    assert m.svq.base == base == 1
    assert m.forward() == 0, "the device must have them before it runs"
    assert [head for head, _ in m.fetch()] == [7, 5]


def test_buffers_in_flight_are_known_in_chains_and_tables(model: Make) -> None:
    m = make(model)
    m.svq.c.features = lib.SVQ_F_INDIRECT
    m.describe(0, [Segment(DATA, 8), Segment(DATA + 0x2000, 0x1000, True)])
    m.publish(0)
    m.describe_indirect(4, TABLE, [Segment(DATA + 0x8000, 16, True), Segment(DATA + 0xA000, 16, True)])
    m.publish(4)
    m.forward()
    for gpa, size, reached in (
        *((DATA, 8, True), (DATA + 8, 8, False), (DATA + 0x2FFF, 1, True), (DATA + 0x3000, 1, False)),
        *((DATA + 0xA00F, 0x100, True), (DATA + 0xA010, 0x100, False), (TABLE + 17, 1, True), (TABLE + 32, 8, False)),
    ):
        assert m.svq.reaches(gpa, size) == reached, hex(gpa)
    for head in (0, 4):
        m.complete(head)
    m.give_back()
    assert not m.svq.reaches(DATA, 0x10000)


# -- what is written ----------------------------------------------------------------------


def pages(gpa: int, size: int) -> set[int]:
    return set(range(gpa // PAGE_SIZE * PAGE_SIZE, gpa + size, PAGE_SIZE)) if size else set()


buffers = st.lists(st.tuples(st.integers(0, 0x5000), st.integers(1, 0x3000)), min_size=1, max_size=5)


@settings(max_examples=EXAMPLES, deadline=None)
@given(buffers, st.integers(0, 5), st.integers(0, 0x8000), st.booleans(), st.integers(0, 2), st.integers(0, 65535))
def test_exactly_the_written_pages_are_marked(
    parts: list[tuple[int, int]], readable: int, written: int, indirect: bool, regions: int, start: int
) -> None:
    """Of chains and tables anywhere, also across regions, twice over so that what is known of a page is used too."""
    with closing(Model(used=1, regions=1 + regions, start_idx=start)) as m:
        m.svq.c.features = lib.SVQ_F_INDIRECT
        ends = [region.end for region in m.memory.regions]
        segments, at = [], ends[0] - 0x10000 - sum(gap + size for gap, size in parts) // 2 * bool(regions)
        for number, (gap, size) in enumerate(parts):
            segments.append(Segment(at + gap, size, number >= readable))
            at += gap + size
        if at > ends[-1]:
            return
        for _ in range(2):
            if indirect:
                m.describe_indirect(2, TABLE, segments)
            else:
                m.describe(2, segments)
            m.publish(2)
            m.forward()
            m.memory.start_dirty_log()
            [(head, seen)] = m.fetch()
            assert (head, seen) == (2, segments)
            m.complete(2, written)
            assert m.give_back() == 1
            left = min(written, sum(s.size for s in segments if s.writable))
            assert m.used() == [(2, left)]
            expected = pages(m.queue.used, 4) | pages(m.queue.used + 4 + (m.last_used - 1 & 0xFFFF) % 8 * 8, 8)
            for segment in segments:
                if segment.writable:
                    expected |= pages(segment.gpa, min(left, segment.size))
                    left -= min(left, segment.size)
            assert set(m.memory.dirty_pages()) == expected


@pytest.mark.parametrize("claimed", [65, 1 << 31])
def test_a_device_that_claims_more_than_it_was_lent_is_cut_and_counted(model: Make, claimed: int) -> None:
    m = make(model)
    # one as it should be, so that the region of the next is known
    for written in (64, claimed):
        give(m, 1)
        m.forward()
        m.complete(1, written)
        assert m.svq.c.clamped == 0
        if written == 64:
            m.give_back()
    m.give_back()
    assert (m.used()[-1], m.svq.c.clamped) == ((1, 64), 1)


def test_a_region_that_comes_is_found(model: Make) -> None:
    """Where a region was found last is forgotten with the regions."""
    m = make(model, regions=2)
    give(m, 0)
    m.forward()
    m.complete(0, 1)
    m.give_back()
    c_map = m.memory.c_map
    hidden = c_map.regions
    c_map.count = 1
    m.svq.memory_changed()
    m.describe(1, [Segment(m.memory.regions[1].gpa + 8, 64, True)])
    m.publish(1)
    m.forward()
    m.complete(1, 1)
    assert m.give_back() == 0
    assert m.svq.c.broken == lib.SVQ_BAD_ADDRESS
    c_map.count, c_map.regions = 2, hidden


# -- notifications ---------------------------------------------------------------------------


def raised(fd: int) -> bool:
    try:
        return bool(os.eventfd_read(fd))
    except BlockingIOError:
        return False


@pytest.mark.parametrize("features", [0, lib.SVQ_F_EVENT_IDX])
@pytest.mark.parametrize("start", [0, 1, 5, 65535])
def test_the_first_buffers_are_kicked_for_wherever_the_ring_stands(model: Make, features: int, start: int) -> None:
    m = make(model, start_idx=start)
    m.svq.close()
    m.svq = m.shadow(features)
    give(m, 0, 1)
    m.forward()
    assert raised(m.svq.kick)


def test_the_device_obeys_our_flags_and_not_the_guest_s(model: Make) -> None:
    """A guest that polls must not keep the device from telling us."""
    m = make(model)
    m.ring.avail.flags = lib.VRING_AVAIL_F_NO_INTERRUPT
    lib.svq_want_notifications(m.svq.c, 1)
    assert m.svq.c.device.avail.flags == 0
    give(m, 0)
    m.forward()
    m.complete(0)
    m.give_back()
    assert not raised(m.queue.call)
    m.ring.avail.flags = 0
    give(m, 1)
    m.forward()
    m.complete(1)
    m.give_back()
    assert raised(m.queue.call)


# -- hostile guests and devices ----------------------------------------------------------------


def _desc(m: Model, i: int, gpa: int, size: int, flags: int, following: int = 0) -> None:
    d = m.ring.desc[i]
    d.addr, d.len, d.flags, d.next = gpa, size, flags, following


def _table(m: Model, size: int, *entries: tuple[int, int, int, int]) -> None:
    m.svq.c.features = lib.SVQ_F_INDIRECT
    table = ffi.cast("struct vring_desc *", m.memory.hva(TABLE, 16 * len(entries)))
    for k, (gpa, length, flags, following) in enumerate(entries):
        table[k].addr, table[k].len, table[k].flags, table[k].next = gpa, length, flags, following
    _desc(m, 0, TABLE, size, INDIRECT)


def _outside(m: Model) -> None:
    _table(m, 16)
    _desc(m, 0, 64, 16, INDIRECT)


def _twice(m: Model) -> None:
    m.publish(2)
    m.publish(2)


Attacks = dict[str, tuple[str, Callable[[Model], None]]]
FORWARD: Attacks = {
    "avail index jumps": ("SVQ_BAD_AVAIL_IDX", lambda m: setattr(m.ring.avail, "idx", m.num + 1)),
    "head beyond the table": ("SVQ_BAD_HEAD", lambda m: m.publish(m.num)),
    "head twice": ("SVQ_HEAD_TWICE", _twice),
}


@pytest.mark.parametrize("attack", FORWARD)
def test_a_hostile_avail_ring_breaks_its_queue(model: Make, attack: str) -> None:
    code, act = FORWARD[attack]
    m = make(model)
    act(m)
    m.forward()
    assert m.svq.c.broken == getattr(lib, code)
    assert m.svq.broken.startswith("guest: ")
    assert m.forward() == m.give_back() == 0


RETURN: Attacks = {
    "buffer outside memory": ("SVQ_BAD_ADDRESS", lambda m: _desc(m, 0, 0x1000, 8, WRITE)),
    "buffer that leaves memory": ("SVQ_BAD_ADDRESS", lambda m: _desc(m, 0, m.memory.regions[-1].end - 4, 8, WRITE)),
    "address that wraps": ("SVQ_BAD_ADDRESS", lambda m: _desc(m, 0, (1 << 64) - 4, 8, WRITE)),
    "chain that loops": ("SVQ_BAD_CHAIN", lambda m: _desc(m, 0, DATA, 8, NEXT, 0)),
    "chain of nothing that loops": ("SVQ_BAD_CHAIN", lambda m: _desc(m, 0, DATA, 0, WRITE | NEXT, 0)),
    "next beyond the table": ("SVQ_BAD_CHAIN", lambda m: _desc(m, 0, DATA, 8, NEXT, 999)),
    "indirect, not negotiated": ("SVQ_BAD_INDIRECT", lambda m: _desc(m, 0, TABLE, 16, INDIRECT)),
    "table with a rest": ("SVQ_BAD_INDIRECT", lambda m: _table(m, 17, (DATA, 8, WRITE, 0))),
    "empty table": ("SVQ_BAD_INDIRECT", lambda m: _table(m, 0)),
    "table in a table": ("SVQ_BAD_INDIRECT", lambda m: _table(m, 16, (TABLE, 16, INDIRECT, 0))),
    "table that loops": ("SVQ_BAD_CHAIN", lambda m: _table(m, 16, (DATA, 0, WRITE | NEXT, 0))),
    "next beyond a table": ("SVQ_BAD_CHAIN", lambda m: _table(m, 16, (DATA, 1, NEXT, 1))),
    "table outside memory": ("SVQ_BAD_ADDRESS", _outside),
}


@pytest.mark.parametrize("attack", RETURN)
def test_hostile_descriptors_break_their_queue_when_they_are_used(model: Make, attack: str) -> None:
    code, act = RETURN[attack]
    m = make(model)
    act(m)
    m.publish(0)
    assert m.forward() == 1
    m.complete(0, 8)
    with pytest.raises(QueueBroken):
        m.svq.drain()
    assert m.svq.c.broken == getattr(lib, code)
    assert m.used() == []


def _one_chain_under_all_heads(m: Model, size: int) -> None:
    """Chain every descriptor to the next, and make every head available: no chain has the same length."""
    for i in range(m.num):
        _desc(m, i, DATA, size, WRITE | (NEXT if i + 1 < m.num else 0), i + 1)
    for head in range(m.num):
        m.publish(head)


@pytest.mark.parametrize("size", [0, 8])
def test_chains_that_share_descriptors_break_their_queue_before_all_are_walked(model: Make, size: int) -> None:
    """Walked to their ends they would be half a billion descriptors in one call."""
    m = make(model, num=32768)
    _one_chain_under_all_heads(m, size)
    assert m.forward() == m.num
    written = 8 * m.num
    for head in range(m.num):
        m.complete(head, written)
    assert m.give_back() <= 1
    assert m.svq.c.broken == lib.SVQ_SHARED_DESC
    assert m.svq.broken == "guest: descriptor in several chains at the same time"


def test_chains_that_have_all_descriptors_between_them_are_returned_in_one_call(model: Make) -> None:
    m = make(model, num=1024)
    half = m.num // 2
    for i in range(m.num):
        _desc(m, i, DATA, 8, WRITE | (0 if i in (half - 1, m.num - 1) else NEXT), i + 1)
    for head in (half, 0):
        m.publish(head)
    m.forward()
    for head in (0, half):
        m.complete(head, 8 * half)
    assert m.give_back() == 2
    assert m.used() == [(0, 8 * half), (half, 8 * half)]
    assert not m.svq.broken


def _one_table_under_all_heads(m: Model, entries: int, last: int) -> None:
    """Point every head to the same table, of which only the last entry has any bytes."""
    m.svq.c.features = lib.SVQ_F_INDIRECT
    table = ffi.cast("struct vring_desc *", m.memory.hva(TABLE, 16 * entries))
    for k in range(entries):
        end = k + 1 == entries
        table[k].addr, table[k].len, table[k].flags = DATA, last if end else 0, WRITE | (0 if end else NEXT)
        table[k].next = 0 if end else k + 1
    for head in range(m.num):
        _desc(m, head, TABLE, 16 * entries, INDIRECT)
        m.publish(head)


@pytest.mark.parametrize("start", [0, 65535])
def test_long_tables_are_returned_over_several_calls(model: Make, start: int) -> None:
    """A driver may have a table as long as the ring behind each head: a call ends, and the next one continues."""
    m = make(model, num=1024, start_idx=start)
    _one_table_under_all_heads(m, m.num, 64)
    assert m.forward() == m.num
    for head in range(m.num):
        m.complete(head, 64)
    calls = []
    while m.ring.used.idx != m.ring.avail.idx:
        calls.append(m.give_back())
        assert 0 < calls[-1] <= 2 * 32768 // m.num, calls
    assert m.used() == [(head, 64) for head in range(m.num)]
    assert not m.svq.broken
    assert m.svq.in_flight == []


def test_a_stop_returns_all_of_what_takes_several_calls(model: Make) -> None:
    m = make(model, num=1024)
    _one_table_under_all_heads(m, m.num, 64)
    m.forward()
    for head in range(m.num):
        m.complete(head, 64)
    queues, bases = ffi.new("struct svq *[]", [m.svq.c]), ffi.new("uint16_t[]", 1)
    lib.svqs_take_over(queues, 1, bases)
    assert bases[0] == m.num
    assert len(m.used()) == m.num


def test_large_buffers_are_marked_over_several_calls(model: Make) -> None:
    m = make(model, num=1024)
    region = m.memory.regions[0]
    for head in range(m.num):
        _desc(m, head, region.gpa, region.size, WRITE)
        m.publish(head)
    m.forward()
    for head in range(m.num):
        m.complete(head, region.size)
    # one more descriptor than pages
    each = 1 + region.size // PAGE_SIZE
    assert m.give_back() == -(-2 * 32768 // each)


def test_chains_that_share_descriptors_may_reach_anything(model: Make) -> None:
    m = make(model, num=32768)
    _one_chain_under_all_heads(m, 8)
    m.forward()
    assert m.svq.reaches(DATA + 0x2000, 8)


def test_tables_that_are_too_many_to_look_at_may_reach_anything(model: Make) -> None:
    m = make(model, num=4096)
    _one_table_under_all_heads(m, m.num, 8)
    m.forward()
    assert m.svq.reaches(m.memory.regions[0].end - 8, 8)


@pytest.mark.parametrize("head", [1, 8, 0xFFFFFFFF])
def test_a_used_id_that_was_never_given_breaks_the_queue(model: Make, head: int) -> None:
    m = make(model)
    give(m, 0)
    m.forward()
    m.complete(head)
    assert m.give_back() == 0
    assert m.svq.c.broken == lib.SVQ_BAD_USED_ID


def test_elements_before_a_bad_one_are_kept(model: Make) -> None:
    m = make(model)
    give(m, 0, 1)
    m.publish(8)
    assert m.forward() == 2
    assert m.svq.c.broken == lib.SVQ_BAD_HEAD
    m = make(model)
    give(m, 0, 1)
    m.forward()
    m.complete(0, 7)
    m.complete(0, 7)
    assert m.give_back() == 1
    assert m.used() == [(0, 7)]
    assert m.svq.c.broken == lib.SVQ_BAD_USED_ID


def test_a_used_index_that_jumps_breaks_the_queue(model: Make) -> None:
    m = make(model)
    m.svq.c.device.used.idx = 9
    assert m.give_back() == 0
    assert m.svq.c.broken == lib.SVQ_BAD_USED_IDX


# -- queues that pass ---------------------------------------------------------------------------


def test_a_queue_that_passes_is_the_guest_s_own(model: Make) -> None:
    m = model(start_idx=9)
    server: RingServer = PassedThrough(m.queue, m.memory, 0)
    give(m, 4, 2)
    assert (server.through, server.broken, server.base, list(server.in_flight)) == (True, "", 9, [4, 2])
    assert server.addresses(1, 2) == (m.queue.desc, m.queue.avail, m.queue.used)
    assert (server.kick, server.call) == (m.queue.kick, m.queue.call)
    assert server.republish() == 9
    assert m.memory.dirty_pages() == []
    server.drain()
    assert set(m.memory.dirty_pages()) == pages(m.queue.used, 6 + 8 * m.num)
    server.close()
    os.eventfd_write(m.queue.kick, 1)


def test_queues_are_relayed_or_passed_by_their_index(model: Make) -> None:
    m = model()
    serving = used_ring(lambda index: index % 2 == 0, "used")
    assert (serving.in_place, serving.relays(0), serving.relays(1)) == (True, True, False)
    other = ffi.new("char[]", 1 << 16)
    assert isinstance(serving.queue(m.queue, m.memory, int(ffi.cast("uintptr_t", other)), 0, None), UsedRelay)
    assert isinstance(serving.queue(replace(m.queue, index=1), m.memory, 0, 0, None), PassedThrough)


def test_threads_serve_what_is_relayed_and_leave_the_rest(model: Make) -> None:
    relayed, passing = make(model), model()
    servers: Sequence[RingServer] = [relayed.svq, PassedThrough(passing.queue, passing.memory, 0)]
    threads = UsedThreads(servers, ServingOptions())
    assert [thread.c.count for thread in threads._threads] == [1]
    take_over = threads.prepare_take_over()
    assert take_over is not None
    assert len(take_over.bases()) == 1
    threads.stop()
    threads = UsedThreads(servers[:1], ServingOptions())
    assert threads.prepare_take_over() is not None
    threads.stop()
