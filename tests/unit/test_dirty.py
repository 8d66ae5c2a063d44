"""Sets of guest pages, what was written, and when to stop sending."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.memory.guest import GUEST_PAGE, PAGE_SIZE, Gpa, GuestMemory, bitmap_words
from pyvhostvdpa.migration import dirty
from pyvhostvdpa.migration.convergence import Convergence
from pyvhostvdpa.migration.dirty import DirtyTracker, Interface, PageSet, probe_interface

LOW, HIGH = Gpa(1 << 30), Gpa(1 << 32)
PAGES = 300
SIZE = PAGES * GUEST_PAGE

with_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(LOW, SIZE), (HIGH, SIZE)]) as memory:
        yield memory


ranges = st.lists(
    st.tuples(st.sampled_from([LOW, HIGH]), st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
        lambda each: (each[0] + each[1], min(each[2], SIZE - each[1]))
    ),
    max_size=6,
)


def touched(chosen: list[tuple[int, int]]) -> set[int]:
    return {page for gpa, size in chosen for page in range(gpa // GUEST_PAGE * GUEST_PAGE, gpa + size, GUEST_PAGE)}


def made(memory: GuestMemory, chosen: list[tuple[int, int]]) -> PageSet:
    pages = PageSet(memory)
    for gpa, size in chosen:
        pages.add(gpa, size)
    return pages


@with_fixtures
@given(chosen=ranges)
def test_a_set_holds_the_pages_that_its_ranges_touch(memory: GuestMemory, chosen: list[tuple[int, int]]) -> None:
    pages, expected = made(memory, chosen), touched(chosen)
    assert list(pages) == sorted(expected)
    assert pages.count == len(expected)
    assert pages.bytes == len(expected) * GUEST_PAGE
    assert all(gpa in pages for gpa in expected)
    assert HIGH + SIZE not in pages
    assert "x" not in pages


@with_fixtures
@given(one=ranges, other=ranges)
def test_a_union_holds_both_and_leaves_both_alone(
    memory: GuestMemory, one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    a, b = made(memory, one), made(memory, other)
    assert set(a | b) == touched(one) | touched(other)
    assert set(a) == touched(one)
    a.update(b)
    assert set(a) == touched(one) | touched(other)
    assert set(b) == touched(other)


def test_page_set_of_all_pages_has_the_size_of_the_memory(memory: GuestMemory) -> None:
    pages = PageSet.all(memory)
    assert pages.count == 2 * PAGES
    assert pages.bytes == memory.size
    assert HIGH + SIZE - 1 in pages


@pytest.mark.parametrize(("gpa", "size"), [(LOW - 1, 1), (LOW + SIZE, 1), (LOW, SIZE + 1), (LOW, 0), (HIGH, -1)])
def test_page_set_refuses_addresses_outside_guest_memory(memory: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(ValueError, match="is not guest memory"):
        PageSet(memory).add(gpa, size)


def test_sets_of_different_guests_do_not_mix(memory: GuestMemory) -> None:
    with GuestMemory([(LOW, SIZE)]) as other, pytest.raises(ValueError, match="different guest memory"):
        PageSet(memory).update(PageSet(other))


@with_fixtures
@given(entries=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=70), first=st.integers(0, 70))
def test_a_page_that_is_not_mapped_counts_as_written(entries: list[tuple[bool, bool]], first: int) -> None:
    words = [present << 63 | dirty << 55 for present, dirty in entries]
    bits = ffi.new("uint64_t[]", 8)
    lib.written_soft_dirty(ffi.new("uint64_t[]", words), len(words), 2, bits, first)
    expected = sum(3 << first + 2 * i for i, (present, dirty) in enumerate(entries) if dirty or not present)
    assert int.from_bytes(ffi.buffer(bits), "little") == expected


@contextmanager
def draining(log: Any, drained: Any) -> Iterator[threading.Thread]:
    """Move the bits of one word to another in a thread: cffi calls run without the GIL."""
    stop = threading.Event()

    def drain() -> None:
        while not stop.is_set():
            lib.pages_drain(drained, ffi.NULL, log, 1)

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def test_marks_are_taken_while_others_mark() -> None:
    log, taken = ffi.new("uint64_t[]", 1), ffi.new("uint64_t[]", 1)
    until = time.monotonic() + 20
    with draining(log, taken) as thread:
        for bit in range(64):
            log[0] = 1 << bit
            while log[0] and thread.is_alive() and time.monotonic() < until:
                pass
    # Not before: a mark leaves the log a moment before it is among those taken.
    assert (log[0], taken[0]) == (0, (1 << 64) - 1)


def test_no_mark_is_lost_while_another_thread_takes_them() -> None:
    words = 1 << 16
    every, log, taken = (ffi.new("uint64_t[]", words) for _ in range(3))
    lib.pages_mark(every, 0, 64 * words)
    stop, begun = threading.Event(), threading.Event()

    def take() -> None:
        while not stop.is_set():
            lib.pages_drain(taken, ffi.NULL, log, words)
            begun.set()

    for _ in range(50):
        ffi.memmove(taken, bytes(8 * words), 8 * words)
        stop.clear()
        begun.clear()
        thread = threading.Thread(target=take)
        thread.start()
        begun.wait()
        lib.pages_publish(every, words, 0, ffi.cast("uint8_t *", log), 8 * words)
        stop.set()
        thread.join()
        lib.pages_drain(taken, ffi.NULL, log, words)
        assert lib.pages_count(taken, words) == 64 * words


def test_log_of_a_stopped_tracker_is_not_written_any_more(memory: GuestMemory) -> None:
    memory.start_dirty_log()
    [log, _] = memory.dirty_log
    log[0] = 5
    assert memory.dirty_pages() == [LOW, LOW + 2 * GUEST_PAGE]
    memory.stop_dirty_log()
    assert memory.c_map.regions[0].dirty == ffi.NULL
    memory.start_dirty_log()
    assert memory.dirty_pages() == []
    assert memory.c_map.regions[0].dirty == log


def test_a_bitmap_has_a_bit_for_each_page() -> None:
    assert [bitmap_words(pages * GUEST_PAGE) for pages in (1, 63, 64, 65, 128)] == [1, 1, 1, 2, 2]


def test_collect_of_a_tracker_that_was_not_started_is_refused(memory: GuestMemory) -> None:
    tracker = DirtyTracker(memory, Interface.PAGEMAP_SCAN)
    assert not tracker.running
    tracker.stop()
    with pytest.raises(VhostVdpaError, match="not started"):
        tracker.collect()


def test_the_guest_is_stopped_when_the_rest_fits_into_the_downtime(memory: GuestMemory) -> None:
    rule = Convergence(downtime=0.5)
    left = made(memory, [(LOW, 100 * GUEST_PAGE)])
    enough = 100 * GUEST_PAGE / 0.5
    assert rule.estimate(left, enough) == pytest.approx(0.5)
    assert rule.done(left, enough * 1.001)
    assert not rule.done(left, enough * 0.99)


def test_without_a_measured_rate_only_nothing_left_is_done(memory: GuestMemory) -> None:
    rule = Convergence(downtime=10)
    assert rule.estimate(PageSet.all(memory), None) is None
    assert not rule.done(PageSet.all(memory), None)
    assert rule.done(PageSet(memory), None)


@with_fixtures
@given(left=st.lists(st.integers(0, PAGES), min_size=1, max_size=25), patience=st.integers(1, 4))
def test_convergence_diverges_when_rounds_leave_no_less_than_the_best(
    memory: GuestMemory, left: list[int], patience: int
) -> None:
    rule = Convergence(downtime=0, patience=patience)
    for index, count in enumerate(left):
        pages = PageSet(memory)
        if count:
            pages.add(LOW, count * GUEST_PAGE)
        recent = left[: index + 1][-patience:]
        before = left[: index + 1][:-patience]
        assert rule.diverges(pages) == (bool(before) and min(recent) >= min(before))


def test_a_system_page_is_whole_guest_pages() -> None:
    assert PAGE_SIZE % GUEST_PAGE == 0


@pytest.mark.parametrize("cpus", [1, 3])
def test_large_memory_is_scanned_in_parts_with_the_same_result(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    if probe_interface() is not Interface.PAGEMAP_SCAN:
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    monkeypatch.setattr(dirty, "_SCAN_MIN", 64 * GUEST_PAGE)
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    written = [0, 63, 64, 127, 128, 200, PAGES - 1]
    with DirtyTracker(memory, Interface.PAGEMAP_SCAN) as tracker:
        tracker.collect()
        for region in memory.regions:
            for page in written:
                region.memory.buffer[page * GUEST_PAGE] = 1
        found = tracker.collect()
        assert list(found) == [start + page * GUEST_PAGE for start in (LOW, HIGH) for page in written]
        assert not tracker.collect().count
        assert not tracker.written_by_devices.count


@pytest.mark.parametrize("private", [False, True])
def test_dirty_tracker_reports_a_written_page_once_even_in_huge_pages(private: bool) -> None:
    """Of private memory the kernel knows huge pages: the first write to one splits it, and loses none."""
    size, chance = 16 << 20, random.Random(14)
    with GuestMemory([(LOW, size)], private=private) as memory:
        [region] = memory.regions
        with DirtyTracker(memory) as tracker:
            if not tracker.atomic:
                pytest.skip("PAGEMAP_SCAN is not there")
            assert tracker.collect().count == 0
            for _ in range(30):
                pages = {chance.randrange(size // PAGE_SIZE) for _ in range(chance.choice([0, 1, 5, 300]))}
                for page in pages:
                    region.memory.buffer[page * PAGE_SIZE + chance.randrange(PAGE_SIZE)] = 1
                assert set(tracker.collect()) == {LOW + page * PAGE_SIZE for page in pages}
            left, by_devices = PageSet(memory), PageSet(memory)
            left.add(LOW)
            region.memory.buffer[5 * PAGE_SIZE] = 1
            lib.memory_mark(memory.c_map, LOW + 7 * GUEST_PAGE, 1)
            tracker.drain_into(left, by_devices)
            tracker.scan_into(left)
            assert set(left) == {LOW, LOW + 5 * PAGE_SIZE, LOW + 7 * GUEST_PAGE}
            assert set(by_devices) == {LOW + 7 * GUEST_PAGE}


@with_fixtures
@given(words=st.lists(st.sampled_from([0, 0, 0, 1, 1 << 63, (1 << 64) - 1]), max_size=40))
def test_pages_drain_finds_bits_in_eight_words_at_once(words: list[int]) -> None:
    log = ffi.new("uint64_t[]", words)
    bits, seen = ffi.new("uint64_t[]", len(words) + 1), ffi.new("uint64_t[]", len(words) + 1)
    assert lib.pages_count(log, len(words)) == sum(word.bit_count() for word in words)
    lib.pages_drain(bits, seen, log, len(words))
    assert list(bits[0 : len(words)]) == list(seen[0 : len(words)]) == words
    assert not any(log)
