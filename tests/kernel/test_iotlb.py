"""Maps on the kernel's own tree: the package refuses, before it asks, what the kernel would refuse."""

from __future__ import annotations

import errno
import subprocess

import lab
import pytest

from pyvhostvdpa import Access, KernelError, MapRejected, VdpaNetDevice, VhostVdpa
from pyvhostvdpa.base.uapi import BackendFeature, IotlbType
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.memory.guest import DEFAULT_GPA, PAGE_SIZE, Gpa, GuestMemory
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.memory.pinned import pinned_bytes

IOVA = 1 << 30


def update(iova: int, size: int, uaddr: int, asid: int = 0) -> IotlbMessage:
    return IotlbMessage(IotlbType.UPDATE, asid, iova, size, uaddr, int(Access.RW))


@pytest.mark.parametrize(
    ("messages", "applied"),
    [
        ("overlap", 1),
        ("ASID out of range", 0),
        ("other ASID within a batch", 1),
        ("ASID never used", 0),
    ],
)
def test_write_iotlb_reports_efault_and_how_many_messages_were_applied(
    devices: tuple[str, str], messages: str, applied: int
) -> None:
    with VhostVdpa(devices[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        dev.set_backend_features(BackendFeature.IOTLB_MSG_V2 | BackendFeature.IOTLB_ASID | BackendFeature.IOTLB_BATCH)
        dev.set_owner()
        a = memory.hva
        bursts = {
            "overlap": [update(IOVA, 0x2000, a), update(IOVA + 0x1000, 0x1000, a)],
            "ASID out of range": [update(IOVA, 0x1000, a, asid=7)],
            "other ASID within a batch": [IotlbMessage(IotlbType.BATCH_BEGIN, 0), update(IOVA, 0x1000, a, asid=1)],
            "ASID never used": [IotlbMessage(IotlbType.INVALIDATE, 1, IOVA, 0x1000)],
        }
        with pytest.raises(KernelError) as refused:
            dev.write_iotlb(bursts[messages])
        assert refused.value.errno == errno.EFAULT
        assert refused.value.applied == applied  # type: ignore[attr-defined]


def test_a_batch_maps_and_unmaps_in_its_address_space(devices: tuple[str, str]) -> None:
    with VdpaNetDevice(devices[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        for asid in (0, 1):
            space = dev.iotlb.space(asid)
            with space.batch() as batch:
                for i in range(16):
                    batch.map(IOVA + i * 2 * PAGE_SIZE, memory.hva + i * PAGE_SIZE, PAGE_SIZE)
            # the kernel agrees that each of them is there
            with pytest.raises(KernelError):
                dev.chardev.write_iotlb([update(IOVA, PAGE_SIZE, memory.hva, asid)])
            with space.batch() as batch:
                for m in space.mappings:
                    batch.unmap(m.iova, m.size)
            dev.chardev.write_iotlb([update(IOVA, PAGE_SIZE, memory.hva, asid)])


def test_pinned_memory_is_counted_once_per_address_space(pinned: tuple[str, str]) -> None:
    size = 4 << 20
    before = pinned_bytes()
    with VdpaNetDevice(pinned[0]) as dev, SharedMemory("test", size) as memory:
        assert dev.iotlb.limits.pinned
        dev.iotlb.space(0).map(IOVA, memory.hva, size)
        dev.iotlb.space(1).map(IOVA, memory.hva, size)
        assert pinned_bytes() - before == 2 * size
    assert pinned_bytes() == before


def test_guest_memory_is_contiguous_enough_for_the_entry_limit(pinned: tuple[str, str]) -> None:
    """256 MiB of scattered 4 KiB pages would take 65,536 entries; kernels with a limit allow 2,048."""
    with VdpaNetDevice(pinned[0]) as dev, GuestMemory([(DEFAULT_GPA, 256 << 20)]) as memory:
        dev.attach(memory)
        [mapping] = [m for m in dev.iotlb.space(0).mappings if m.iova == DEFAULT_GPA]
        assert 1 <= mapping.entries <= 128


def test_map_over_the_entry_limit_is_refused_as_the_kernel_would(pinned: tuple[str, str]) -> None:
    with VdpaNetDevice(pinned[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        limit = dev.iotlb.limits.entries
        assert limit, "this kernel has no max_iotlb_entries"
        space = dev.iotlb.space(0)
        with space.batch() as batch:
            for i in range(limit):
                batch.map(IOVA + i * 2 * PAGE_SIZE, memory.hva, PAGE_SIZE)
        beyond = IOVA + limit * 2 * PAGE_SIZE
        with pytest.raises(MapRejected, match=f"the kernel allows {limit}"):
            space.map(beyond, memory.hva, PAGE_SIZE)
        with pytest.raises(KernelError):
            dev.chardev.write_iotlb([update(beyond, PAGE_SIZE, memory.hva)])


def test_several_regions_make_one_guest(devices: tuple[str, str]) -> None:
    layout = [(Gpa(1 << 30), 4 << 20), (Gpa(4 << 30), 4 << 20), (Gpa(1 << 40), 4 << 20)]
    with VdpaNetDevice(devices[0]) as dev, GuestMemory(layout) as memory:
        dev.attach(memory)
        assert [m.iova for m in dev.iotlb.space(0).mappings] == [gpa for gpa, _ in layout]


def migrate_with_little_memlock(devices: tuple[str, str], *privileges: str) -> subprocess.CompletedProcess[str]:
    inner = ["vhost-vdpa", "migrate", *devices, "--memory", "32M", "--seconds", "1"]
    return subprocess.run(
        ["sh", "-c", 'ulimit -l 64; exec "$@"', "sh", *privileges, *inner], capture_output=True, text=True, check=False
    )


def test_root_raises_its_own_memlock_limit_and_reports_it(pinned: tuple[str, str]) -> None:
    done = migrate_with_little_memlock(pinned)
    assert done.returncode == 0, done.stderr
    assert "RLIMIT_MEMLOCK raised from 64 KiB" in done.stderr


def test_a_memlock_limit_that_cannot_be_raised_is_explained(pinned: tuple[str, str]) -> None:
    done = migrate_with_little_memlock(pinned, "setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource")
    assert done.returncode == 1
    assert "RLIMIT_MEMLOCK is 64 KiB" in done.stderr
    assert "next: ulimit -l unlimited" in done.stderr


def test_limits_of_a_simulator_report_no_pinning(devices: tuple[str, str]) -> None:
    assert devices == lab.DEVICES
    with VdpaNetDevice(devices[0]) as dev:
        assert not dev.iotlb.limits.pinned
