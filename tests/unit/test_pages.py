"""Guest pages on a stream: two guests' memory in this process, a socket between them."""

from __future__ import annotations

import struct
import threading
import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_pair import HIGH, LOW, OTHER, SIZE, Pair, fill, pair, raw, receiving

from pyvhostvdpa.memory.guest import GUEST_PAGE, Gpa, GuestMemory
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import (
    PageReceiver,
    PageSender,
    RoundStatistics,
    memory_hash,
)

__all__ = ["pair", "raw"]
"""Fixtures of tests with two guests."""


def test_all_pages_arrive_as_they_are(pair: Pair) -> None:
    fill(pair.source)
    pair.source.regions[1].memory.buffer[: 7 * GUEST_PAGE] = bytes(7 * GUEST_PAGE)
    pages = PageSet.all(pair.source)
    assert pages.bytes == pair.source.size
    statistics = pair.send(pages)
    assert memory_hash(pair.destination) == memory_hash(pair.source)
    assert statistics.zero_pages == pair.receiver.zero_pages == 7
    assert statistics.pages == pair.receiver.pages == pages.count - 7
    assert statistics.bytes == pair.receiver.bytes
    assert statistics.memory == pair.source.size


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(
    chosen=st.lists(st.tuples(st.integers(0, 511), st.integers(1, 90), st.booleans()), max_size=12),
    seed=st.integers(0, 1 << 30),
)
def test_exactly_the_pages_of_a_set_arrive(raw: Pair, chosen: list[tuple[int, int, bool]], seed: int) -> None:
    fill(raw.source, seed)
    fill(raw.destination, seed + 1)
    pages = PageSet(raw.source)
    expected = [bytearray(region.memory.buffer) for region in raw.destination.regions]
    for first, count, zero in chosen:
        for number in range(first, min(first + count, 512)):
            region, at = divmod(number * GUEST_PAGE, SIZE)
            if zero:
                raw.source.regions[region].memory.buffer[at : at + GUEST_PAGE] = bytes(GUEST_PAGE)
            pages.add(LOW + number * GUEST_PAGE)
    for gpa in pages:
        region, at = divmod(gpa - LOW, SIZE)
        expected[region][at : at + GUEST_PAGE] = raw.source.regions[region].memory.buffer[at : at + GUEST_PAGE]
    statistics = raw.send(pages)
    assert statistics.pages + statistics.zero_pages == pages.count
    assert [bytearray(region.memory.buffer) for region in raw.destination.regions] == expected


def test_a_page_that_became_zero_is_zero_at_the_other_side(pair: Pair) -> None:
    fill(pair.source)
    pair.send(PageSet.all(pair.source))
    pages = PageSet(pair.source)
    for gpa in (LOW, LOW + GUEST_PAGE, HIGH - GUEST_PAGE, HIGH):
        region, at = divmod(gpa - LOW, SIZE)
        pair.source.regions[region].memory.buffer[at : at + GUEST_PAGE] = bytes(GUEST_PAGE)
        pages.add(gpa)
    assert pair.send(pages).zero_pages == 4
    assert memory_hash(pair.destination) == memory_hash(pair.source)


def test_a_page_that_is_not_zero_only_at_its_end_is_sent(raw: Pair) -> None:
    raw.source.regions[0].memory.buffer[GUEST_PAGE - 1] = 1
    assert raw.send(PageSet.all(raw.source)).pages == 1
    assert memory_hash(raw.destination) == memory_hash(raw.source)


def test_zero_pages_cost_next_to_nothing_on_the_stream(raw: Pair) -> None:
    statistics = raw.send(PageSet.all(raw.source))
    assert statistics.zero_pages == raw.source.size // GUEST_PAGE
    assert statistics.bytes < 200


def test_an_empty_set_sends_nothing(pair: Pair) -> None:
    assert pair.send(PageSet(pair.source))[:3] == (0, 0, 0)


def test_single_pages_with_holes_between_them_fit_into_many_frames(pair: Pair) -> None:
    fill(pair.source)
    pages = PageSet(pair.source)
    for gpa in range(LOW, LOW + 2 * SIZE, 2 * GUEST_PAGE):
        pages.add(gpa)
        if gpa % (8 * GUEST_PAGE) == 0:
            pair.source.regions[(gpa - LOW) // SIZE].memory.buffer[(gpa - LOW) % SIZE :][:GUEST_PAGE] = bytes(
                GUEST_PAGE
            )
    statistics = pair.send(pages)
    assert statistics.pages == pair.receiver.pages == 192
    assert statistics.zero_pages == pair.receiver.zero_pages == 64
    for gpa in pages:
        region, at = divmod(gpa - LOW, SIZE)
        assert (
            pair.destination.regions[region].memory.buffer[at : at + GUEST_PAGE]
            == pair.source.regions[region].memory.buffer[at : at + GUEST_PAGE]
        )


def test_a_guest_that_writes_meanwhile_never_makes_a_checksum_wrong(raw: Pair) -> None:
    fill(raw.source)
    stop = threading.Event()

    def write() -> None:
        value = 0
        buffer = raw.source.regions[0].memory.buffer
        while not stop.is_set():
            value = (value + 1) % 256
            buffer[: 256 << 10] = bytes([value]) * (256 << 10)

    guest = threading.Thread(target=write)
    guest.start()
    try:
        for _ in range(50):
            raw.send(PageSet.all(raw.source))
    finally:
        stop.set()
        guest.join()
    raw.send(PageSet.all(raw.source))
    assert memory_hash(raw.destination) == memory_hash(raw.source)


def test_progress_is_reported_up_to_the_end(pair: Pair) -> None:
    fill(pair.source)
    told: list[tuple[int, int]] = []
    with receiving(pair):
        sender = PageSender(pair.source, pair.near, None, lambda done, total: told.append((done, total)))
        sender.send(PageSet.all(pair.source))
        pair.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))
    assert told[-1] == (pair.source.size, pair.source.size)
    assert sorted(told) == told


def test_a_limit_is_kept_within_a_tenth(pair: Pair) -> None:
    fill(pair.source)
    statistics = pair.send(PageSet.all(pair.source), limit=2e6)
    assert statistics.bytes / statistics.seconds <= 2e6 * 1.1
    assert memory_hash(pair.destination) == memory_hash(pair.source)


def measured(pair: Pair, *sets: PageSet) -> tuple[float | None, list[RoundStatistics]]:
    """The bandwidth after rounds of these sets, and what each took."""
    sender = PageSender(pair.source, pair.near)
    with receiving(pair):
        rounds = [sender.send(pages) for pages in sets]
        pair.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))
    return sender.bandwidth, rounds


def some(pair: Pair, gpa: int, pages: int) -> PageSet:
    chosen = PageSet(pair.source)
    chosen.add(gpa, pages * GUEST_PAGE)
    return chosen


def test_the_bandwidth_is_not_known_before_a_page_with_content_went(pair: Pair) -> None:
    assert measured(pair)[0] is None
    assert measured(pair, PageSet.all(pair.source), PageSet(pair.source))[0] is None


def test_the_bandwidth_is_that_of_pages_with_content(pair: Pair) -> None:
    fill(pair.source)
    bandwidth, [sent] = measured(pair, PageSet.all(pair.source))
    assert bandwidth == pytest.approx(pair.source.size / sent.seconds)


def test_pages_of_zeros_do_not_add_to_the_bandwidth(pair: Pair) -> None:
    pair.source.regions[0].memory.buffer[: 9 * GUEST_PAGE] = b"x" * 9 * GUEST_PAGE
    bandwidth, [sent] = measured(pair, PageSet.all(pair.source))
    assert (sent.pages, sent.zero_pages) == (9, pair.source.size // GUEST_PAGE - 9)
    assert bandwidth == pytest.approx(9 * GUEST_PAGE / sent.seconds)


def test_a_round_of_mostly_zeros_counts_until_another_tells_better(pair: Pair) -> None:
    fill(pair.source)
    pair.source.regions[1].memory.buffer[:] = bytes(SIZE)
    full, zeros = some(pair, LOW, 90), some(pair, HIGH - GUEST_PAGE, 1) | some(pair, HIGH, 90)
    bandwidth, rounds = measured(pair, zeros, full, zeros)
    assert [each.pages for each in rounds] == [1, 90, 1]
    assert bandwidth == pytest.approx(90 * GUEST_PAGE / rounds[1].seconds)


def test_the_bandwidth_is_that_of_the_last_three_rounds(pair: Pair) -> None:
    fill(pair.source)
    bandwidth, rounds = measured(pair, *(some(pair, LOW, pages) for pages in (200, 20, 30, 40)))
    assert bandwidth == pytest.approx(90 * GUEST_PAGE / sum(each.seconds for each in rounds[1:]))


def test_a_frame_of_something_else_stays_in_the_stream(raw: Pair) -> None:
    fill(raw.source)
    pages = PageSet(raw.source)
    pages.add(LOW, 100 * GUEST_PAGE)
    with receiving(raw):
        PageSender(raw.source, raw.near).send(pages)
        raw.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0) + b"what follows")
    assert raw.far.socket.recv(100) == b"what follows"


def test_when_pages_were_in_place_is_known_however_long_the_receiver_waits_for_more(pair: Pair) -> None:
    pages = PageSet(pair.source)
    pages.add(LOW)
    begin = time.monotonic_ns()
    with receiving(pair):
        PageSender(pair.source, pair.near).send(pages)
        while not (written := pair.receiver.written_at):
            time.sleep(0.001)
        before = time.monotonic_ns()
        pair.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))
    assert begin < written < before
    assert pair.receiver.written_at == written


def test_memory_hash_depends_on_content_and_place() -> None:
    layouts: list[list[tuple[Gpa, int]]] = [[(LOW, SIZE)], [(HIGH, SIZE)], [(LOW, SIZE), (HIGH, SIZE)]]
    hashes = set()
    for layout in layouts:
        with GuestMemory(layout) as memory:
            hashes.add(memory_hash(memory))
            memory.regions[0].memory.buffer[SIZE - 1] = 1
            hashes.add(memory_hash(memory))
    assert len(hashes) == 2 * len(layouts)


def test_hashing_tells_its_progress() -> None:
    told: list[tuple[int, int]] = []
    with GuestMemory([(LOW, 72 << 20)]) as memory:
        memory_hash(memory, lambda done, total: told.append((done, total)))
    assert told == [(64 << 20, 72 << 20), (72 << 20, 72 << 20)]


@pytest.mark.parametrize("raw", [True, False])
def test_memory_that_was_zeros_ends_up_as_the_source_s(raw: bool) -> None:
    """Pages come and go in the rounds: those that had content become zeros again, the others are not looked at."""
    chance, pair = Random(14), Pair(raw)
    pair.receiver = PageReceiver(pair.destination, pair.far, fresh=True)
    try:
        pair.send(PageSet.all(pair.source))
        for _ in range(25):
            pages = PageSet(pair.source)
            for _ in range(chance.choice([1, 10, 200])):
                region = chance.choice(pair.source.regions)
                first = chance.randrange(SIZE // GUEST_PAGE)
                count = min(chance.choice([1, 3, 70]), SIZE // GUEST_PAGE - first)
                content = chance.choice([bytes(1), b"\x55"]) * (count * GUEST_PAGE)
                region.memory.buffer[first * GUEST_PAGE : (first + count) * GUEST_PAGE] = content
                pages.add(region.gpa + first * GUEST_PAGE, count * GUEST_PAGE)
            pair.send(pages)
            assert memory_hash(pair.destination) == memory_hash(pair.source)
    finally:
        pair.close()


def test_pages_of_zeros_are_not_looked_at_in_memory_that_was_zeros() -> None:
    pair = Pair()
    pair.receiver = PageReceiver(pair.destination, pair.far, fresh=True)
    try:
        # which no other process may write, and this one does
        pair.destination.regions[0].memory.buffer[0] = 1
        pair.send(PageSet.all(pair.source))
        assert pair.destination.regions[0].memory.buffer[0] == 1
    finally:
        pair.close()
