"""What the kernel reports about written pages, on memory of each kind, and pre-copy that relies on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import lab
import pytest
from conftest import RunningGuest
from movers import GuestCpu, copying

from pyvhostvdpa import VdpaNetDevice
from pyvhostvdpa.memory import aside
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GUEST_PAGE, HUGE_PAGE, Gpa, GuestMemory
from pyvhostvdpa.migration.dirty import DirtyTracker, Interface, PageSet, probe_interface
from pyvhostvdpa.migration.pages import memory_hash

SIZE = 16 << 20
SECOND = Gpa(1 << 32)
SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
HUGETLB = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
INTERFACES = list(Interface)


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    before = path.read_text().strip()
    before = before.partition("[")[2].partition("]")[0] or before
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Two regions of small pages."""
    with setting(SHMEM_HUGE, "never"), GuestMemory([(DEFAULT_GPA, SIZE), (SECOND, SIZE)]) as memory:
        yield memory


def write(memory: GuestMemory, gpa: int, value: int = 1) -> None:
    for region in memory.regions:
        if region.gpa <= gpa < region.end:
            region.memory.buffer[gpa - region.gpa] = value


def mapped_huge(memory: GuestMemory) -> int:
    """KiB of the first region that huge page table entries map."""
    start = f"{memory.regions[0].memory.hva:x}-"
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.startswith(start)
        elif inside and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1])
    raise AssertionError("the region is not mapped")


def test_these_kernels_have_the_better_interface() -> None:
    assert probe_interface() is Interface.PAGEMAP_SCAN


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_written_page_is_reported_once_and_no_other(memory: GuestMemory, interface: Interface) -> None:
    random = Random(7)
    with DirtyTracker(memory, interface) as tracker:
        assert tracker.collect().count == 0
        for number in (1, 3, 50, 700):
            written = set()
            for _ in range(number):
                region = random.choice(memory.regions)
                gpa = region.gpa + random.randrange(region.size)
                write(memory, gpa, random.randrange(256))
                written.add(gpa - gpa % GUEST_PAGE)
            assert set(tracker.collect()) == written
        assert tracker.collect().count == 0


@pytest.mark.parametrize("interface", INTERFACES)
def test_read_page_is_not_dirty(memory: GuestMemory, interface: Interface) -> None:
    with DirtyTracker(memory, interface) as tracker:
        before = memory_hash(memory)
        assert tracker.collect().count == 0
        assert memory_hash(memory) == before


@pytest.mark.parametrize("interface", INTERFACES)
def test_dirty_tracker_ignores_writes_before_its_start(memory: GuestMemory, interface: Interface) -> None:
    write(memory, SECOND)
    tracker = DirtyTracker(memory, interface)
    for _ in range(3):
        tracker.start()
        write(memory, DEFAULT_GPA + 5 * GUEST_PAGE)
        assert list(tracker.collect()) == [DEFAULT_GPA + 5 * GUEST_PAGE]
        tracker.stop()
        tracker.stop()
        write(memory, SECOND)


def test_dirty_tracker_misses_no_page_while_threads_write(memory: GuestMemory) -> None:
    cpus = [GuestCpu(memory, part * (SIZE // 4), SIZE // 4 // GUEST_PAGE, 20_000) for part in range(3)]
    with copying(memory) as copy, DirtyTracker(memory) as tracker:
        assert tracker.atomic
        for cpu in cpus:
            cpu.run()
        copy.move(PageSet.all(memory))
        rounds = []
        for _ in range(15):
            rounds.append(tracker.collect())
            copy.move(rounds[-1])
        for cpu in cpus:
            cpu.pause()
        copy.move(tracker.collect())
        copy.finish()
        assert sum(pages.count for pages in rounds) > 1000
        assert memory_hash(copy.memory) == memory_hash(memory)
    for cpu in cpus:
        cpu.close()


def test_soft_dirty_misses_no_page_if_the_guest_is_paused_at_each_collect(memory: GuestMemory) -> None:
    cpu = GuestCpu(memory, 0, SIZE // GUEST_PAGE, 20_000)
    with copying(memory) as copy, DirtyTracker(memory, Interface.SOFT_DIRTY) as tracker:
        assert not tracker.atomic
        copy.move(PageSet.all(memory))
        for _ in range(10):
            with cpu.running():
                time.sleep(0.05)
            pages = tracker.collect()
            with cpu.running():
                copy.move(pages)
        copy.move(tracker.collect())
        copy.finish()
        assert memory_hash(copy.memory) == memory_hash(memory)
    cpu.close()


def precopy_with_traffic(guest: RunningGuest) -> None:
    guest.device.start_shadow(guest.nic.queues)
    with copying(guest.memory) as copy, DirtyTracker(guest.memory) as tracker:
        guest.traffic.run()
        copy.move(PageSet.all(guest.memory))
        for _ in range(8):
            guest.receives(200)
            copy.move(tracker.collect())
        guest.traffic.pause()
        guest.device.stop()
        copy.move(tracker.collect())
        copy.finish()
        assert memory_hash(copy.memory) == memory_hash(guest.memory)


def test_dirty_tracker_reports_device_writes(guest: RunningGuest) -> None:
    precopy_with_traffic(guest)


def test_dirty_tracker_reports_device_writes_past_the_page_tables(pinned_guest: RunningGuest) -> None:
    precopy_with_traffic(pinned_guest)


@pytest.fixture
def small_pages(devices: tuple[str, str]) -> Iterator[RunningGuest]:
    """A guest with no other pages, as where nobody has asked for them."""
    with (
        setting(SHMEM_HUGE, "never"),
        GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory,
        VdpaNetDevice(devices[0]) as device,
    ):
        device.attach(memory)
        guest = RunningGuest(device, memory)
        try:
            yield guest
        finally:
            guest.close()


def test_no_write_of_cpu_or_device_is_missed_while_page_tables_are_moved_aside(
    small_pages: RunningGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "_MIN", 1)
    guest = small_pages
    guest.device.start_shadow(guest.nic.queues)
    size = guest.memory.regions[0].size // 4
    cpu = GuestCpu(guest.memory, guest.memory.regions[0].size - size, size // GUEST_PAGE, 2000)
    with copying(guest.memory) as copy, DirtyTracker(guest.memory) as tracker:
        guest.traffic.run()
        with cpu.running():
            copy.move(PageSet.all(guest.memory))
            guest.receives(500)
            pages = tracker.collect()
            through = tracker.look_at_used(pages)
            assert through is not None
            copy.read_through(through)
            copy.move(pages)
            for _ in range(8):
                guest.receives(200)
                copy.move(tracker.collect())
        guest.traffic.pause()
        guest.device.stop()
        last = tracker.collect()
        assert last.count < size // GUEST_PAGE
        copy.move(last)
        copy.finish()
        ours = memory_hash(guest.memory, c_map=through)
        assert memory_hash(copy.memory) == ours == memory_hash(guest.memory)
    cpu.close()
    assert guest.memory.lost == 0


def test_only_shadow_virtqueues_know_what_a_pinning_device_writes(pinned_guest: RunningGuest) -> None:
    guest = pinned_guest
    guest.device.start_shadow(guest.nic.queues)
    with DirtyTracker(guest.memory) as tracker:
        guest.traffic.run()
        guest.receives(2000)
        guest.traffic.pause()
        guest.device.stop()
        pair = guest.nic.pairs[0].c
        buffers = set(range(pair.rx_gpa, pair.rx_gpa + pair.rx.num * pair.buffer_size, GUEST_PAGE))
        marked = set(guest.memory.dirty_pages())
        assert buffers <= marked
        for bits in guest.memory.dirty_log:
            for index in range(len(bits)):
                bits[index] = 0
        assert not buffers & set(tracker.collect())


def test_a_write_to_a_huge_page_of_shared_memory_is_reported_as_one_small_page() -> None:
    with setting(SHMEM_HUGE, "advise"), GuestMemory([(DEFAULT_GPA, SIZE)]) as memory:
        assert mapped_huge(memory) == SIZE >> 10
        with DirtyTracker(memory) as tracker:
            write(memory, DEFAULT_GPA + 3 * HUGE_PAGE + 9 * GUEST_PAGE)
            assert list(tracker.collect()) == [DEFAULT_GPA + 3 * HUGE_PAGE + 9 * GUEST_PAGE]


def test_soft_dirty_reports_huge_pages_of_shared_memory_as_a_whole() -> None:
    with (
        setting(SHMEM_HUGE, "advise"),
        GuestMemory([(DEFAULT_GPA, SIZE)]) as memory,
        DirtyTracker(memory, Interface.SOFT_DIRTY) as tracker,
    ):
        write(memory, DEFAULT_GPA + 3 * HUGE_PAGE + 9 * GUEST_PAGE)
        pages = list(tracker.collect())
        assert pages == list(range(DEFAULT_GPA + 3 * HUGE_PAGE, DEFAULT_GPA + 4 * HUGE_PAGE, GUEST_PAGE))


def test_pre_copy_converges_on_huge_pages_of_shared_memory() -> None:
    with setting(SHMEM_HUGE, "advise"), GuestMemory([(DEFAULT_GPA, SIZE)]) as memory:
        cpu = GuestCpu(memory, 0, SIZE // GUEST_PAGE, 2000)
        with copying(memory) as copy, DirtyTracker(memory) as tracker, cpu.running():
            copy.move(PageSet.all(memory))
            for _ in range(5):
                time.sleep(0.1)
                copy.move(tracker.collect())
            cpu.pause()
            copy.move(tracker.collect())
            copy.finish()
            assert memory_hash(copy.memory) == memory_hash(memory)
        cpu.close()


def test_hugetlb_pages_are_reported_as_a_whole() -> None:
    with (
        setting(SHMEM_HUGE, "never"),
        setting(HUGETLB, str(2 * SIZE // HUGE_PAGE)),
        GuestMemory([(DEFAULT_GPA, SIZE)]) as memory,
        DirtyTracker(memory) as tracker,
    ):
        assert memory.regions[0].memory.runs() <= SIZE // HUGE_PAGE
        assert tracker.collect().count == 0
        write(memory, DEFAULT_GPA + 3 * HUGE_PAGE + 9 * GUEST_PAGE)
        pages = list(tracker.collect())
        assert pages == list(range(DEFAULT_GPA + 3 * HUGE_PAGE, DEFAULT_GPA + 4 * HUGE_PAGE, GUEST_PAGE))
        assert tracker.collect().count == 0


def test_a_device_continues_while_pages_are_watched(guest: RunningGuest) -> None:
    guest.device.start_passthrough(guest.nic.queues)
    guest.traffic.run()
    with DirtyTracker(guest.memory) as tracker:
        for _ in range(5):
            guest.receives(200)
            tracker.collect()
    guest.receives(200)
    guest.settle()
