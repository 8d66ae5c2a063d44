"""Guest memory and addresses."""

from __future__ import annotations

import mmap
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhostvdpa.base.errors import DeviceClosed, MapRejected, MissingFeature
from pyvhostvdpa.memory import guest, hugepages
from pyvhostvdpa.memory.guest import HUGE_PAGE, PAGE_SIZE, Gpa, GuestMemory, IovaAllocator, SharedMemory
from pyvhostvdpa.virtqueue.layout import SplitLayout


def test_memory_is_shared_aligned_and_gone_after_close() -> None:
    memory = SharedMemory("test", 5000)
    assert memory.size == 2 * PAGE_SIZE
    assert memory.hva % HUGE_PAGE == 0
    memory.buffer[:5] = b"hello"
    assert bytes(memory.buffer[:5]) == b"hello"
    memory.close()
    memory.close()
    with pytest.raises(DeviceClosed):
        _ = memory.hva


def test_what_is_chosen_of_huge_pages_tells_whether_advice_gets_them(tmp_path: Path) -> None:
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    for text, wanted, gets in (("always [advise] never", "advise", True), ("always madvise [never]", "never", False)):
        (folder / "shmem_enabled").write_text(text + "\n")
        chosen = hugepages.choice("shmem_enabled", tmp_path)
        assert chosen == wanted
        assert hugepages.advisable(chosen) is gets
    assert hugepages.choice("enabled", tmp_path) is None
    assert not hugepages.advisable(None)


def test_the_pool_of_huge_pages_tells_what_is_free_in_it(tmp_path: Path) -> None:
    assert hugepages.free(HUGE_PAGE, tmp_path) == 0
    pool = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pool.mkdir(parents=True)
    (pool / "free_hugepages").write_text("7\n")
    assert hugepages.pool(HUGE_PAGE, tmp_path) == pool
    assert hugepages.free(HUGE_PAGE, tmp_path) == 7


def test_memory_that_the_machine_has_not_is_refused_before_it_is_touched() -> None:
    with pytest.raises(MissingFeature, match="available"):
        GuestMemory([(Gpa(1 << 30), 1 << 60)])


def test_regions_are_found_by_guest_address() -> None:
    with GuestMemory([(Gpa(0x8000_0000), 1 << 20), (Gpa(0x4000_0000), 1 << 20)]) as memory:
        low, high = memory.regions
        assert (low.gpa, high.gpa) == (0x4000_0000, 0x8000_0000)
        assert memory.hva(0x4000_1000) == low.memory.hva + 0x1000
        assert memory.hva(0x800F_FFFF) == high.memory.hva + 0xFFFFF
        for outside in (0x3FFF_FFFF, 0x4010_0000, 0x8010_0000, 0):
            with pytest.raises(ValueError, match="is not guest memory"):
                memory.hva(outside)
        with pytest.raises(ValueError, match="is not guest memory"):
            memory.hva(0x400F_FFFF, 2)


def test_overlapping_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory([(Gpa(0x4000_0000), 2 << 20), (Gpa(0x4010_0000), 1 << 20)])


@given(
    taken=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), max_size=6),
    sizes=st.lists(st.integers(1, 5 * PAGE_SIZE), min_size=1, max_size=12),
)
def test_what_the_allocator_gives_out_overlaps_nothing(taken: list[tuple[int, int]], sizes: list[int]) -> None:
    ranges = [(start * PAGE_SIZE, pages * PAGE_SIZE) for start, pages in taken]
    allocator = IovaAllocator(0, 80 * PAGE_SIZE - 1, ranges)
    for size in sizes:
        try:
            iova = allocator.allocate(size)
        except MapRejected:
            continue
        whole = -(-size // PAGE_SIZE) * PAGE_SIZE
        assert iova >= PAGE_SIZE
        assert iova % PAGE_SIZE == 0
        assert iova + whole <= 80 * PAGE_SIZE
        assert all(iova + whole <= start or start + length <= iova for start, length in ranges)
        ranges.append((iova, whole))


def test_a_freed_range_is_given_out_again() -> None:
    allocator = IovaAllocator(0, 4 * PAGE_SIZE - 1)
    first = allocator.allocate(3 * PAGE_SIZE)
    with pytest.raises(MapRejected, match="no hole"):
        allocator.allocate(PAGE_SIZE)
    allocator.free(first)
    assert allocator.allocate(PAGE_SIZE) == first == PAGE_SIZE


@pytest.mark.parametrize(
    ("num", "driver", "device"), [(256, 0x2000, 0x1000), (64, 0x1000, 0x1000), (1, 0x1000, 0x1000)]
)
def test_ring_areas_have_the_sizes_of_the_specification(num: int, driver: int, device: int) -> None:
    layout = SplitLayout(num)
    assert (layout.driver_area, layout.device_area) == (driver, device)


@pytest.mark.parametrize("num", [0, 3, 65536, -1])
def test_ring_sizes_are_powers_of_two(num: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        SplitLayout(num)


def test_page_size_is_the_systems() -> None:
    assert PAGE_SIZE == mmap.PAGESIZE


def test_physical_runs_are_counted_in_parts_as_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedMemory("test", 64 * PAGE_SIZE) as memory:
        whole = memory.runs()
        for pages in (1, 2, 3, 64, 100):
            monkeypatch.setattr(guest, "_ENTRIES", pages)
            assert memory.runs() == whole
            assert memory.runs(PAGE_SIZE, 5 * PAGE_SIZE) <= 5


def test_counting_physical_runs_takes_no_memory_by_size() -> None:
    with SharedMemory("test", 512 << 20) as memory:
        tracemalloc.start()
        try:
            memory.runs()
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 768 << 10
