"""Every IOTLB message, in both formats, with every permission, on the kernel's own tree."""

from __future__ import annotations

import errno

import pytest

from pyvhostvdpa import Access, KernelError, VdpaNetDevice, VhostVdpa
from pyvhostvdpa.base.uapi import IotlbType, MessageFormat
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.memory.guest import PAGE_SIZE
from pyvhostvdpa.memory.mapped import SharedMemory

IOVA = 1 << 30


def message(kind: IotlbType, uaddr: int = 0, asid: int = 0, perm: int = 3, size: int = PAGE_SIZE) -> IotlbMessage:
    return IotlbMessage(kind, asid, IOVA, size, uaddr, perm)


def is_mapped(dev: VhostVdpa, memory: SharedMemory, asid: int = 0) -> bool:
    """Whether the kernel has something there: it refuses to map it a second time."""
    try:
        dev.write_iotlb([message(IotlbType.UPDATE, memory.hva, asid)])
    except KernelError as e:
        return e.errno == errno.EFAULT
    dev.write_iotlb([message(IotlbType.INVALIDATE, asid=asid)])
    return False


@pytest.fixture
def owned(devices: tuple[str, str]):  # type: ignore[no-untyped-def]
    with VhostVdpa(devices[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        dev.set_backend_features(dev.get_backend_features())
        dev.set_owner()
        yield dev, memory


@pytest.mark.parametrize("perm", [0, Access.RO, Access.WO, Access.RW])
@pytest.mark.parametrize("form", MessageFormat)
def test_memory_is_mapped_with_every_permission_in_both_formats(
    owned: tuple[VhostVdpa, SharedMemory], form: MessageFormat, perm: int
) -> None:
    dev, memory = owned
    dev.write_iotlb([message(IotlbType.UPDATE, memory.hva, perm=perm)], form)
    assert is_mapped(dev, memory)
    dev.write_iotlb([message(IotlbType.INVALIDATE)], form)
    assert not is_mapped(dev, memory)


def test_the_first_format_knows_address_space_0_only(owned: tuple[VhostVdpa, SharedMemory]) -> None:
    dev, memory = owned
    dev.write_iotlb([message(IotlbType.UPDATE, memory.hva, asid=1)], MessageFormat.V1)
    assert is_mapped(dev, memory, asid=0)
    assert not is_mapped(dev, memory, asid=1)


def test_the_address_space_is_ignored_until_it_is_acknowledged(devices: tuple[str, str]) -> None:
    with VhostVdpa(devices[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        dev.set_owner()
        dev.write_iotlb([message(IotlbType.UPDATE, memory.hva, asid=1)])
        assert is_mapped(dev, memory, asid=0)


REFUSED = {
    "a miss": (message(IotlbType.MISS), errno.EFAULT),
    "an access failure": (message(IotlbType.ACCESS_FAIL), errno.EFAULT),
    "no size": (message(IotlbType.UPDATE, size=0), errno.EINVAL),
    "the end of a batch of an address space never used": (message(IotlbType.BATCH_END, asid=1), errno.EFAULT),
    "an address space it has not": (message(IotlbType.BATCH_BEGIN, asid=9), errno.EFAULT),
}


@pytest.mark.parametrize("case", REFUSED)
def test_iotlb_message_that_is_not_a_map_is_refused(owned: tuple[VhostVdpa, SharedMemory], case: str) -> None:
    dev, _ = owned
    refused, number = REFUSED[case]
    with pytest.raises(KernelError) as error:
        dev.write_iotlb([refused])
    assert error.value.errno == number


def test_map_without_being_the_owner_is_explained(devices: tuple[str, str]) -> None:
    with VdpaNetDevice(devices[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        dev.iotlb.chardev, taken = _unowned(devices[1]), dev.iotlb.chardev
        with pytest.raises(KernelError, match="not the device's owner") as refused:
            dev.iotlb.space(0).map(IOVA, memory.hva, PAGE_SIZE)
        dev.iotlb.chardev.close()
        dev.iotlb.chardev = taken
    assert "set_owner" in refused.value.hint


def _unowned(path: str) -> VhostVdpa:
    return VhostVdpa(path)


def test_a_map_over_one_that_was_written_past_the_mirror_is_explained(devices: tuple[str, str]) -> None:
    with VdpaNetDevice(devices[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        dev.chardev.write_iotlb([message(IotlbType.UPDATE, memory.hva)])
        with pytest.raises(KernelError, match="by a message written past it") as refused:
            dev.iotlb.space(0).map(IOVA, memory.hva, PAGE_SIZE)
        assert refused.value.errno == errno.EFAULT
        assert refused.value.hint


def test_address_outside_memory_is_explained(pinned: tuple[str, str]) -> None:
    with VdpaNetDevice(pinned[0]) as dev, pytest.raises(KernelError, match="no memory of this process at 0x1000"):
        dev.iotlb.space(0).map(IOVA, 0x1000, PAGE_SIZE)


def test_open_batch_of_another_address_space_is_reported_before_the_message(devices: tuple[str, str]) -> None:
    with VdpaNetDevice(devices[0]) as dev, SharedMemory("test", 1 << 20) as memory:
        dev.chardev.write_iotlb([IotlbMessage(IotlbType.BATCH_BEGIN, 1)])
        dev.reset()
        with pytest.raises(ValueError, match="a batch of ASID 1 is still open"):
            dev.iotlb.space(0).map(IOVA, memory.hva, PAGE_SIZE)
        dev.chardev.write_iotlb([IotlbMessage(IotlbType.BATCH_END, 1)])
        dev.iotlb.space(0).map(IOVA, memory.hva, PAGE_SIZE)
