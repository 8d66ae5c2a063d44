"""Guest memory and addresses."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import DeviceClosed, MapRejected, MissingFeature
from pyvhostvdpa.memory import hugepages, mapped
from pyvhostvdpa.memory.guest import HUGE_PAGE, PAGE_SIZE, FileRegion, Gpa, GuestMemory
from pyvhostvdpa.memory.iova import IovaAllocator
from pyvhostvdpa.memory.mapped import FileMemory, SharedMemory
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


def test_huge_page_setting_decides_whether_advice_gets_them(tmp_path: Path) -> None:
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    for text, wanted, gets in (("always [advise] never", "advise", True), ("always madvise [never]", "never", False)):
        (folder / "shmem_enabled").write_text(text + "\n")
        chosen = hugepages.choice("shmem_enabled", tmp_path)
        assert chosen == wanted
        assert hugepages.advisable(chosen) is gets
    assert hugepages.choice("enabled", tmp_path) is None
    assert not hugepages.advisable(None)


def test_pool_of_huge_pages_reports_its_free_pages(tmp_path: Path) -> None:
    assert hugepages.free(HUGE_PAGE, tmp_path) == 0
    pool = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pool.mkdir(parents=True)
    (pool / "free_hugepages").write_text("7\n")
    assert hugepages.pool(HUGE_PAGE, tmp_path) == str(pool)
    assert hugepages.free(HUGE_PAGE, tmp_path) == 7


def test_memory_beyond_that_of_the_machine_is_refused_before_it_is_touched() -> None:
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
def test_iova_allocator_ranges_do_not_overlap(taken: list[tuple[int, int]], sizes: list[int]) -> None:
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
            monkeypatch.setattr(mapped, "_ENTRIES", pages)
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


BAD_LAYOUTS: dict[str, tuple[list[tuple[int, int]], str]] = {
    "no regions": ([], "no regions"),
    "a region of nothing": ([(0x10000, 0)], "cannot be guest memory"),
    "a negative size": ([(0x10000, -4096)], "-4096 bytes at 0x10000 cannot be guest memory"),
    "a negative address": ([(-4096, 4096)], "cannot be guest memory"),
    "an end behind 64 bits": ([((1 << 64) - 4096, 4096)], "cannot be guest memory"),
    "regions that overlap once they are whole pages": ([(0x10000, 0x800), (0x10800, 0x1000)], "overlap"),
    "the same in the other order": ([(0x10800, 0x1000), (0x10000, 0x800)], "overlap"),
    "two at the same place": ([(0x10000, 0x1000), (0x10000, 0x1000)], "overlap"),
    "a start within a page": ([(0x10800, 0x1000)], "does not start on a page"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_a_layout_that_cannot_be_guest_memory_is_refused(case: str) -> None:
    layout, why = BAD_LAYOUTS[case]
    with pytest.raises(ValueError, match=why):
        GuestMemory([(Gpa(gpa), size) for gpa, size in layout])
    with pytest.raises(ValueError, match=why):
        GuestMemory.from_files([FileRegion(gpa, -(-size // PAGE_SIZE) * PAGE_SIZE, -1) for gpa, size in layout])


def test_a_refused_size_is_named_as_it_was_given() -> None:
    with pytest.raises(ValueError, match=r"^-1 bytes at 0x0 cannot"):
        GuestMemory([(Gpa(0), -1)])


def test_guest_memory_without_regions_has_no_addresses_for_the_c_loops() -> None:
    nothing = ffi.new("struct memory_map *", {"count": 0, "regions": ffi.NULL})
    assert lib.memory_hva(nothing, 0, 1) == ffi.NULL
    assert lib.memory_part(nothing, 0, ffi.new("uint64_t *", 1)) == ffi.NULL
    assert lib.memory_read(nothing, 0, ffi.new("char[]", 1), 1) == -1
    lib.memory_mark(nothing, 0, 1)


PC = [(0, 640 << 10), (1 << 20, 3 << 20), (4 << 30, 1 << 20)]
"""From GPA 0 on, with the holes of a PC."""


def test_memory_from_gpa_0_with_holes_is_found_by_address() -> None:
    with GuestMemory([(Gpa(gpa), size) for gpa, size in PC]) as memory:
        assert [(region.gpa, region.size) for region in memory.regions] == PC
        assert memory.hva(0) == memory.regions[0].memory.hva
        assert memory.hva(4 << 30) == memory.regions[2].memory.hva
        for hole in (640 << 10, (1 << 20) - 1, 4 << 20, (4 << 30) - 1, (4 << 30) + (1 << 20)):
            with pytest.raises(ValueError, match="is not guest memory"):
                memory.hva(hole)
        with pytest.raises(ValueError, match="is not guest memory"):
            memory.hva((640 << 10) - 1, 2)


def test_marks_go_into_every_region_that_they_touch_and_into_no_hole() -> None:
    with GuestMemory([(Gpa(0), 640 << 10), (Gpa(640 << 10), 8192), (Gpa(1 << 20), 4096)]) as memory:
        memory.start_dirty_log()
        lib.memory_mark(memory.c_map, (640 << 10) - 1, 4098)
        lib.memory_mark(memory.c_map, 0, 1)
        lib.memory_mark(memory.c_map, (640 << 10) + 8191, 1 << 30)
        lib.memory_mark(memory.c_map, 1 << 20, 0)
        lib.memory_mark(memory.c_map, (1 << 20) - 1, 1)
        assert memory.dirty_pages() == [0, 0x9F000, 0xA0000, 0xA1000]
        lib.memory_mark(memory.c_map, 1 << 20, 4096)
        assert memory.dirty_pages()[-1] == 1 << 20
        memory.stop_dirty_log()
        lib.memory_mark(memory.c_map, 0x1000, 1)
        assert 0x1000 not in memory.dirty_pages()


# -- memory of another process -----------------------------------------------------

_OWNER = """
import os, sys
fd = int(sys.argv[1])
sys.stdin.readline()
os.pwrite(fd, b"from the owner", 0x5000)
print("written", flush=True)
sys.stdin.readline()
print(os.pread(fd, 14, 0x5000).decode(), flush=True)
"""


def test_memory_of_another_process_is_the_same_memory() -> None:
    fd = os.memfd_create("vm")
    os.ftruncate(fd, 8 << 20)
    command = [sys.executable, "-c", _OWNER, str(fd)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, pass_fds=[fd]) as owner:
        assert owner.stdin
        assert owner.stdout
        # two regions of one file, as a PC has them below and above its hole
        with GuestMemory.from_files(
            [FileRegion(1 << 20, 2 << 20, fd, 1 << 20), FileRegion(0, 640 << 10, fd)]
        ) as memory:
            kept = os.dup(fd)
            os.close(fd)
            assert [(region.gpa, region.size) for region in memory.regions] == [(0, 640 << 10), (1 << 20, 2 << 20)]
            owner.stdin.write("\n")
            owner.stdin.flush()
            assert owner.stdout.readline() == "written\n"
            seen = ffi.buffer(ffi.cast("char *", memory.hva(0x5000)), 14)
            assert bytes(seen) == b"from the owner"
            memory.regions[0].memory.buffer[0x5000:0x500E] = b"from the guest"
            memory.regions[1].memory.buffer[:5] = b"above"
            owner.stdin.write("\n")
            owner.stdin.flush()
            assert owner.stdout.readline() == "from the guest\n"
            assert os.pread(kept, 5, 1 << 20) == b"above"
    os.close(kept)


def test_a_file_that_cannot_be_guest_memory_is_refused(tmp_path: Path) -> None:
    fd = os.memfd_create("vm", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    try:
        with pytest.raises(MissingFeature, match="has 0x100000 bytes; guest memory would reach to 0x101000"):
            FileMemory(fd, 0x1000, 1 << 20)
        for offset, size in ((0, 0), (0, 100), (100, 4096), (-4096, 4096)):
            with pytest.raises(ValueError, match="are not whole pages"):
                FileMemory(fd, offset, size)
        with FileMemory(fd, 0, 4096) as memory:
            assert not memory.sealed
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with FileMemory(fd, 0, 4096) as memory:
            assert memory.sealed
    finally:
        os.close(fd)
    with open("/proc/self/exe", "rb") as file, pytest.raises(MissingFeature, match="cannot be guest memory"):
        FileMemory(file.fileno(), 0, 4096)
    with pytest.raises(MissingFeature, match="cannot be guest memory: Bad file descriptor"):
        FileMemory(-1, 0, 4096)


def test_closing_memory_of_another_process_leaves_its_file_alone() -> None:
    fd = os.memfd_create("vm")
    try:
        os.ftruncate(fd, 1 << 20)
        memory = FileMemory(fd, 0x3000, 0x2000)
        memory.buffer[:4] = b"kept"
        memory.close()
        memory.close()
        with pytest.raises(DeviceClosed):
            _ = memory.hva
        assert os.pread(fd, 4, 0x3000) == b"kept"
        assert os.fstat(fd).st_size == 1 << 20
    finally:
        os.close(fd)


@pytest.mark.parametrize("populate", [True, False])
def test_pages_of_a_shared_file_are_allocated_as_asked_for(populate: bool) -> None:
    fd = os.memfd_create("vm")
    try:
        os.ftruncate(fd, 4 << 20)
        pieces = [FileRegion(0, 640 << 10, fd), FileRegion(1 << 20, 1 << 20, fd, 1 << 20)]
        with GuestMemory.from_files(pieces, populate):
            allocated = os.fstat(fd).st_blocks * 512
            assert allocated >= (640 << 10) + (1 << 20) if populate else allocated == 0
    finally:
        os.close(fd)


def test_memlock_limit_raised_for_one_device_is_enough_for_others_prepared_at_the_same_time() -> None:
    """Each asks before the other has pinned anything: a limit of what one alone needs would fail the second map."""
    code = (
        "import resource as r; from pyvhostvdpa.memory.pinned import allow_pinning\n"
        "r.setrlimit(r.RLIMIT_MEMLOCK, (1 << 16, 1 << 22))\n"
        "assert 'raised from 64 KiB' in allow_pinning(1 << 20)\n"
        "assert r.getrlimit(r.RLIMIT_MEMLOCK) == (1 << 22, 1 << 22)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
