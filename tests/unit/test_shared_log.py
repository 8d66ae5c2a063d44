"""Dirty pages in a bitmap that another process reads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_dirty import draining

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.memory.guest import GUEST_PAGE, Gpa, GuestMemory
from pyvhostvdpa.memory.log import SharedLog, log_size

LAYOUT = [(Gpa(0), 640 << 10), (Gpa(1 << 20), 1 << 20), (Gpa((1 << 28) + 5 * GUEST_PAGE), 3 * GUEST_PAGE)]
SIZE = ((1 << 28) // GUEST_PAGE + 7) // 8 + 1


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(LAYOUT) as memory:
        memory.start_dirty_log()
        yield memory


@pytest.fixture
def bitmap() -> Iterator[int]:
    fd = os.memfd_create("vhost-log")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def pages_in(bitmap: int, offset: int = 0) -> list[int]:
    """The addresses that a front-end reads from the bitmap."""
    content = os.pread(bitmap, 1 << 20, offset)
    return [
        (8 * at + bit) * GUEST_PAGE for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1
    ]


def test_a_bitmap_is_as_long_as_the_highest_page_needs(memory: GuestMemory) -> None:
    assert log_size(memory) == SIZE
    with GuestMemory([(Gpa(0), 8 * GUEST_PAGE)]) as small:
        assert log_size(small) == 1
    with GuestMemory([(Gpa(0), 9 * GUEST_PAGE)]) as small:
        assert log_size(small) == 2


@pytest.mark.parametrize("offset", [0, 4096, 24])
def test_marks_arrive_at_their_guest_addresses(memory: GuestMemory, bitmap: int, offset: int) -> None:
    last = (1 << 28) + 7 * GUEST_PAGE
    with SharedLog(memory, bitmap, SIZE, offset) as log:
        for gpa in (0, 3 * GUEST_PAGE + 9, (640 << 10) - 1, 1 << 20, last):
            lib.memory_mark(memory.c_map, gpa, 1)
        assert log.publish() == 5
        assert pages_in(bitmap, offset) == [0, 3 * GUEST_PAGE, 159 * GUEST_PAGE, 1 << 20, last]
        assert memory.dirty_pages() == []
        assert log.publish() == 0


def test_bits_of_others_stay_and_cleared_ones_stay_cleared(memory: GuestMemory, bitmap: int) -> None:
    with SharedLog(memory, bitmap, SIZE) as log:
        os.pwrite(bitmap, b"\x82", 0)
        lib.memory_mark(memory.c_map, 2 * GUEST_PAGE, 1)
        log.publish()
        assert os.pread(bitmap, 1, 0) == b"\x86"
        os.pwrite(bitmap, b"\0", 0)
        log.publish()
        assert os.pread(bitmap, 1, 0) == b"\0"


def test_a_closed_log_is_not_written(memory: GuestMemory, bitmap: int) -> None:
    log = SharedLog(memory, bitmap, SIZE)
    log.close()
    log.close()
    lib.memory_mark(memory.c_map, 0, 1)
    assert pages_in(bitmap) == []


def test_shared_log_that_is_not_started_publishes_nothing(bitmap: int) -> None:
    with GuestMemory(LAYOUT) as memory, SharedLog(memory, bitmap, SIZE) as log:
        assert log.publish() == 0


@pytest.mark.parametrize(("size", "offset"), [(SIZE - 1, 0), (SIZE, (1 << 20) - SIZE + 1), (SIZE, -1), (1 << 21, 0)])
def test_a_bitmap_that_is_too_small_is_refused(memory: GuestMemory, bitmap: int, size: int, offset: int) -> None:
    with pytest.raises(MissingFeature, match="this guest memory needs"):
        SharedLog(memory, bitmap, size, offset)


def test_a_file_that_is_not_memory_is_refused(memory: GuestMemory) -> None:
    with open("/proc/self/exe", "rb") as file, pytest.raises(MissingFeature, match="cannot be a dirty bitmap"):
        SharedLog(memory, file.fileno(), SIZE)


@given(
    pages=st.sets(st.integers(0, 191)), first=st.integers(0, 70), size=st.integers(0, 40), before=st.binary(max_size=40)
)
def test_any_set_of_pages_is_published_exactly(pages: set[int], first: int, size: int, before: bytes) -> None:
    words = [sum(1 << (page % 64) for page in pages if page // 64 == word) for word in range(3)]
    log = ffi.new("uint8_t[]", 64)
    ffi.memmove(log, before, len(before))
    beyond = lib.pages_publish(ffi.new("uint64_t[]", words), 3, first, log, size)
    expected = int.from_bytes(before, "little")
    for page in pages:
        if (first + page) // 8 < size:
            expected |= 1 << (first + page)
    assert int.from_bytes(ffi.buffer(log), "little") == expected
    assert beyond == sum((first + page) // 8 >= size for page in pages)


def test_no_bit_is_lost_while_another_process_takes_them() -> None:
    """Two threads: one sets bits of a byte, the other takes them all."""
    log, taken = ffi.new("uint64_t[]", 1), ffi.new("uint64_t[]", 1)
    seen = 0
    with draining(log, taken):
        for number in range(20_000):
            lib.pages_publish(ffi.new("uint64_t[]", [1]), 1, number % 64, ffi.cast("uint8_t *", log), 8)
            if number % 64 == 63:
                while log[0]:
                    pass
                seen += 1
    lib.pages_drain(taken, ffi.NULL, log, 1)
    assert seen
    assert taken[0] == (1 << 64) - 1
