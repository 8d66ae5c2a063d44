"""Looks at written pages that take no longer for more memory: page tables that are moved aside."""

from __future__ import annotations

import os
import random
import resource
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.guest.protocol import Guest
from pyvhostvdpa.memory import aside, hugepages
from pyvhostvdpa.memory.guest import PAGE_SIZE, FileRegion, Gpa, GuestMemory
from pyvhostvdpa.migration.common import hash_bytes
from pyvhostvdpa.migration.dirty import DirtyTracker, Interface, PageSet, probe_interface
from pyvhostvdpa.migration.pages import PageSender
from pyvhostvdpa.migration.precopy import Rounds
from pyvhostvdpa.migration.stream import Channel

LOW, HIGH = Gpa(0), Gpa(1 << 32)
PAGES = 1024
SIZE = PAGES * PAGE_SIZE


class Library:
    """The C library, of which subclasses change a function."""

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


@pytest.fixture(autouse=True)
def small_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "_MIN", 1)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    if probe_interface() is not Interface.PAGEMAP_SCAN:
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    with GuestMemory([(LOW, SIZE), (HIGH, SIZE)]) as memory:
        yield memory


def write(memory: GuestMemory, pages: set[int]) -> None:
    for page in pages:
        number, offset = divmod(page * PAGE_SIZE, SIZE)
        memory.regions[number].memory.buffer[offset + 7] = page % 251 + 1


def gpas(pages: set[int]) -> set[int]:
    return {(LOW, HIGH)[page // PAGES] + page % PAGES * PAGE_SIZE for page in pages}


def test_what_was_written_before_and_after_the_tables_are_moved_is_reported_once(memory: GuestMemory) -> None:
    chance = random.Random(14)
    with DirtyTracker(memory) as tracker:
        tracker.collect()
        write(memory, {3, PAGES + 5})
        pages = PageSet(memory)
        assert tracker.look_at_used(pages) is not None
        assert set(pages) == gpas({3, PAGES + 5})
        assert tracker.collect().count == 0
        for _ in range(30):
            written = {chance.randrange(2 * PAGES) for _ in range(chance.choice([0, 1, 5, 300]))}
            write(memory, written)
            assert set(tracker.collect()) == gpas(written)


def test_a_page_that_is_only_read_is_reported_once_and_read_through_the_moved_tables_never(memory: GuestMemory) -> None:
    write(memory, {1, 2})
    with DirtyTracker(memory) as tracker:
        tracker.collect()
        through = tracker.look_at_used(PageSet(memory))
        assert through.regions[0].hva[2 * PAGE_SIZE + 7] == 3
        assert tracker.collect().count == 0
        assert memory.regions[0].memory.buffer[PAGE_SIZE + 7] == 2
        assert set(tracker.collect()) == gpas({1})
        assert memory.regions[0].memory.buffer[PAGE_SIZE + 7] == 2
        assert tracker.collect().count == 0


def test_nothing_is_lost_while_other_threads_write(memory: GuestMemory) -> None:
    """Each thread counts in pages of its own; what was copied of reported pages is what memory holds in the end."""
    buffer = memory.regions[0].memory.buffer
    ends = threading.Event()

    def count(first: int) -> None:
        chance = random.Random(first)
        while not ends.is_set():
            at = (first + 4 * chance.randrange(PAGES // 4)) * PAGE_SIZE
            buffer[at] = (buffer[at] + 1) % 256

    with DirtyTracker(memory) as tracker:
        writers = [threading.Thread(target=count, args=(first,)) for first in range(4)]
        for writer in writers:
            writer.start()
        copy = bytearray(SIZE)

        def take(pages: PageSet) -> None:
            for gpa in pages:
                if gpa < HIGH:
                    copy[gpa : gpa + PAGE_SIZE] = buffer[gpa : gpa + PAGE_SIZE]

        take(PageSet.all(memory))
        for _ in range(20):
            take(tracker.collect())
        pages = tracker.collect()
        tracker.look_at_used(pages)
        take(pages)
        for _ in range(20):
            take(tracker.collect())
        ends.set()
        for writer in writers:
            writer.join()
        take(tracker.collect())
        assert copy == buffer


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("guest-ram")


def test_the_addresses_are_given_back_and_memory_stays(memory: GuestMemory) -> None:
    mapped = mappings()
    with DirtyTracker(memory) as tracker:
        write(memory, {9})
        tracker.look_at_used(PageSet(memory))
        assert mappings() == mapped + 2
    assert mappings() == mapped
    assert memory.regions[0].memory.buffer[9 * PAGE_SIZE + 7] == 10
    with DirtyTracker(memory) as again:
        assert again.collect().count == 0
        write(memory, {9, PAGES})
        assert set(again.collect()) == gpas({9, PAGES})


def locked() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck")]
    return int(line.split()[1]) << 10


def test_what_is_used_is_locked_so_that_no_written_page_leaves_by_swapping(memory: GuestMemory) -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 4 * SIZE and os.geteuid():
        pytest.skip("this user may not lock so much memory")
    before = locked()
    with DirtyTracker(memory) as tracker:
        tracker.look_at_used(PageSet(memory))
        assert locked() == before + 2 * SIZE
    assert locked() == before


class Refusing(Library):
    """Some regions may not be locked: where nothing is yet, or once their page tables are moved."""

    def __init__(self, before: set[int], after: set[int]) -> None:
        self.before, self.after, self.reserved, self.moved = before, after, 0, 0

    def lock_used(self, start: object, size: int) -> int:
        self.reserved += 1
        return 12 if self.reserved - 1 in self.before else 0

    def aside_move(self, uffd: int, start: object, size: int, at: object, unlocked: Any) -> object:
        error = lib.aside_move(uffd, start, size, at, unlocked)
        if self.moved in self.after:
            lib.unlock_used(start, size)
            unlocked[0] = 12
        self.moved += 1
        return error


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("refused", [{0}, {1}, {0, 1}])
def test_memory_that_may_be_swapped_and_cannot_be_locked_is_looked_at_as_before(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, swap: bool, refused: set[int]
) -> None:
    monkeypatch.setattr(aside, "lib", Refusing(refused, refused))
    monkeypatch.setattr(aside, "_swap_is_used", lambda: swap)
    with DirtyTracker(memory) as tracker:
        pages = PageSet(memory)
        write(memory, {3, PAGES + 3})
        assert (tracker.look_at_used(pages) is None) == swap
        pages.update(tracker.collect())
        assert set(pages) == gpas({3, PAGES + 3})


def test_a_lock_that_fails_once_tables_are_moved_ends_the_tracking_where_there_is_swap(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "lib", Refusing(set(), {1}))
    monkeypatch.setattr(aside, "_swap_is_used", lambda: True)
    with DirtyTracker(memory) as tracker, pytest.raises(MissingFeature, match="cannot lock guest memory"):
        tracker.look_at_used(PageSet(memory))
    assert locked() == 0


def test_a_kernel_that_moves_only_some_tables_has_the_others_looked_at_as_before(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnlyOne(Library):
        moves = 0

        def aside_move(self, *args: object) -> object:
            self.moves += 1
            return lib.aside_move(*args) if self.moves == 1 else 22

        def unmap_memory(self, at: object, size: int) -> int:
            given_back.append(at)
            return int(lib.unmap_memory(at, size))

    given_back: list[object] = []
    monkeypatch.setattr(aside, "lib", OnlyOne())
    with DirtyTracker(memory) as tracker:
        tracker.collect()
        pages = PageSet(memory)
        write(memory, {3, PAGES + 3})
        through = tracker.look_at_used(pages)
        assert [through.regions[n].hva == memory.c_map.regions[n].hva for n in range(2)] == [False, True]
        pages.update(tracker.collect())
        assert set(pages) == gpas({3, PAGES + 3})
        write(memory, {4, PAGES + 4})
        assert set(tracker.collect()) == gpas({4, PAGES + 4})
    assert given_back == [through.regions[0].hva], "the kernel may have unmapped the others, and given them away"


def test_private_memory_keeps_its_page_tables_since_they_hold_its_pages() -> None:
    with GuestMemory([(LOW, SIZE)], private=True) as private, DirtyTracker(private) as tracker:
        write(private, {3})
        assert tracker.look_at_used(PageSet(private)) is None
        assert private.regions[0].memory.buffer[3 * PAGE_SIZE + 7] == 4


def test_memory_of_another_process_keeps_its_page_tables() -> None:
    fd = os.memfd_create("others")
    os.ftruncate(fd, SIZE)
    with GuestMemory.from_files([FileRegion(0, SIZE, fd)]) as memory, DirtyTracker(memory) as tracker:
        assert tracker.look_at_used(PageSet(memory)) is None
    os.close(fd)


def test_small_memory_and_what_may_become_huge_is_looked_at_as_before(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DirtyTracker(memory) as tracker:
        monkeypatch.setattr(hugepages, "in_files", lambda: True)
        assert tracker.look_at_used(PageSet(memory)) is None
        monkeypatch.setattr(hugepages, "in_files", lambda: False)
        monkeypatch.setattr(memory.regions[1].memory, "base_pages", False)
        assert tracker.look_at_used(PageSet(memory)) is None
        monkeypatch.setattr(memory.regions[1].memory, "base_pages", True)
        monkeypatch.setattr(aside, "_is_locked", lambda: True)
        assert tracker.look_at_used(PageSet(memory)) is None
        monkeypatch.setattr(aside, "_is_locked", lambda: False)
        monkeypatch.setattr(aside, "_MIN", 2 * SIZE + 1)
        assert tracker.look_at_used(PageSet(memory)) is None
        monkeypatch.setattr(aside, "_MIN", 2 * SIZE)
        assert tracker.look_at_used(PageSet(memory)) is not None
        assert tracker.look_at_used(PageSet(memory)) is None


def test_soft_dirty_bits_have_no_such_way(memory: GuestMemory) -> None:
    tracker = DirtyTracker(memory, Interface.SOFT_DIRTY)
    assert tracker.look_at_used(PageSet(memory)) is None


@pytest.mark.parametrize("offset", [0, 1, 511])
def test_the_address_aside_is_as_far_into_a_gib_as_the_memory_is(offset: int) -> None:
    start = ffi.cast("uint8_t *", (5 << 30) + (offset << 21))
    address = lib.aside_reserve(start, SIZE)
    assert int(ffi.cast("uintptr_t", address)) % (1 << 30) == offset << 21
    assert lib.unmap_memory(address, SIZE) == 0


class Measured:
    """A sender, and how fast it is."""

    bandwidth, measured = 1e6, True

    def __init__(self, sender: PageSender) -> None:
        self._sender = sender

    def __getattr__(self, name: str) -> object:
        return getattr(self._sender, name)


class Paused:
    """As much of a guest as the rounds use."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory


@pytest.mark.parametrize("idle", [True, False])
def test_the_paused_guest_s_pages_are_looked_for_among_those_used_since_the_last_short_round(
    memory: GuestMemory, idle: bool
) -> None:
    near, far = socket.socketpair()
    drain = threading.Thread(target=lambda: [None for _ in iter(partial(far.recv, 1 << 20), b"")])
    drain.start()
    with Channel(near) as channel:
        rounds = Rounds(cast(Guest, Paused(memory)), channel, None, lambda: None, lambda text: None)
        progress = iter(() if idle else ({1, PAGES + 1}, {2}, {5}))
        collect = rounds._collect
        rounds._collect = lambda: (write(memory, next(progress, set())), collect())[1]  # type: ignore[method-assign]
        rounds.until_few_are_left(60.0)
        through = rounds.c_map
        assert through is not memory.c_map
        assert rounds._sender._c.memory == through
        write(memory, {9, PAGES + 9})
        rounds.collect_written_by_cpu()
        expected = gpas({9, PAGES + 9} if idle else {5, 9, PAGES + 9})
        assert set(rounds.left) == expected
        lib.memory_mark(memory.c_map, HIGH + 7 * PAGE_SIZE, 1)
        rounds.collect_written_by_devices()
        assert set(rounds.left) == expected | {HIGH + 7 * PAGE_SIZE}
        assert set(rounds.left_by_devices) == {HIGH + 7 * PAGE_SIZE}
        rounds.last()
        assert hash_bytes(memory, through) == hash_bytes(memory)
        rounds.stop()
        assert rounds.c_map is memory.c_map
        assert rounds._sender._c.memory == memory.c_map
    drain.join()
    far.close()


def test_a_guest_that_reads_more_than_the_stream_moves_converges(memory: GuestMemory) -> None:
    """What it only reads counts as written once after page tables were moved; that must not look like no progress."""
    near, far = socket.socketpair()
    drain = threading.Thread(target=lambda: [None for _ in iter(partial(far.recv, 1 << 20), b"")])
    drain.start()
    write(memory, set(range(2 * PAGES)))
    with Channel(near) as channel:
        rounds = Rounds(cast(Guest, Paused(memory)), channel, None, lambda: None, lambda text: None)
        collect, looks = rounds._collect, iter(range(1, 100))

        def read_more() -> PageSet:
            upto = min(next(looks) * 100, 2 * PAGES)
            for page in range(upto):
                number, offset = divmod(page * PAGE_SIZE, SIZE)
                assert memory.regions[number].memory.buffer[offset + 7] != 0
            write(memory, {1})
            return collect()

        rounds._collect = read_more  # type: ignore[method-assign]
        rounds._sender = cast(PageSender, Measured(rounds._sender))
        rounds.until_few_are_left(3 * PAGE_SIZE / Measured.bandwidth)
        assert 1 <= rounds.left.count <= 3
        assert len(rounds.statistics) > 10
        rounds.stop()
    drain.join()
    far.close()
