"""What the mirror of the kernel's tree refuses, and what it sends.

The chardev is a stand-in that records messages: these tests are about errors
found before the kernel is asked. tests/kernel asks it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from pyvhostvdpa.base.errors import MapRejected
from pyvhostvdpa.base.uapi import Access, IotlbType
from pyvhostvdpa.chardev.iotlb import Iotlb, Limits
from pyvhostvdpa.chardev.message import IotlbMessage, IotlbWriteError
from pyvhostvdpa.memory.mapped import SharedMemory

LIMITS = Limits(first=0, last=(1 << 48) - 1, as_num=2, pinned=False, entries=4)


class Recorder:
    def __init__(self, fail_at: int | None = None) -> None:
        self.sent: list[IotlbMessage] = []
        self.fail_at = fail_at
        self.batch_asid: int | None = None

    def get_vring_busyloop_timeout(self, index: int) -> int:
        return 0

    def write_iotlb(self, messages: Sequence[IotlbMessage]) -> None:
        for applied, message in enumerate(messages):
            if self.fail_at is not None and len(self.sent) == self.fail_at:
                self.fail_at = None
                raise IotlbWriteError(errno.EFAULT, message, applied)
            self.sent.append(message)

    @property
    def types(self) -> str:
        letters = {
            IotlbType.UPDATE: "U",
            IotlbType.INVALIDATE: "I",
            IotlbType.BATCH_BEGIN: "B",
            IotlbType.BATCH_END: "E",
        }
        return "".join(letters[m.type] for m in self.sent)


def make(fail_at: int | None = None, limits: Limits = LIMITS) -> tuple[Iotlb, Recorder]:
    recorder = Recorder(fail_at)
    return Iotlb(recorder, limits), recorder  # type: ignore[arg-type]


REFUSED = {
    "unaligned IOVA": ((0x1800, 0x1000, 0x1000), "multiples of 4096"),
    "unaligned size": ((0x1000, 0x1000, 0x800), "multiples of 4096"),
    "no size": ((0x1000, 0x1000, 0), "multiples of 4096"),
    "beyond the range": ((1 << 48, 0x1000, 0x1000), "outside the device's range"),
    "across the range's end": (((1 << 48) - 0x1000, 0x1000, 0x2000), "outside the device's range"),
    "overlap": ((0x11000, 0x1000, 0x1000), "overlaps what is mapped at 0x10000-0x12fff"),
    "overlap from below": ((0xF000, 0x1000, 0x2000), "overlaps"),
    "overlap around": ((0xF000, 0x1000, 0x8000), "overlaps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_map_is_refused_with_its_reason(case: str) -> None:
    (iova, uaddr, size), why = REFUSED[case]
    iotlb, recorder = make()
    space = iotlb.space(0)
    space.map(0x10000, 0x1000, 0x3000)
    with pytest.raises(MapRejected, match=why):
        space.map(iova, uaddr, size)
    assert recorder.types == "U"


def test_guest_memory_may_be_mapped_from_iova_0_on() -> None:
    iotlb, recorder = make()
    space = iotlb.space(0)
    space.map(0, 0x1000, 0xA0000)
    with pytest.raises(MapRejected, match="overlaps what is mapped at 0x0-0x9ffff"):
        space.map(0x1000, 0x1000, 0x1000)
    space.map(0x100000, 0x1000, 0x1000)
    assert [m.iova for m in space.mappings] == [0, 0x100000]
    space.unmap(0, 0xA0000)
    assert recorder.types == "UUI"


def test_iova_0_is_refused_where_the_device_does_not_have_it() -> None:
    iotlb, _ = make(limits=Limits(first=0x1000, last=(1 << 32) - 1, as_num=1, pinned=False, entries=None))
    with pytest.raises(MapRejected, match="outside the device's range 0x1000-"):
        iotlb.space(0).map(0, 0x1000, 0x1000)


def test_an_address_space_the_device_lacks_is_refused() -> None:
    iotlb, _ = make()
    with pytest.raises(MapRejected, match="ASID 2: the device has 2 address spaces"):
        iotlb.space(2)


def test_the_entry_limit_is_reported_with_its_remedy() -> None:
    iotlb, _ = make()
    space = iotlb.space(1)
    for i in range(1, 5):
        space.map(i << 20, 0x1000, 0x1000)
    with pytest.raises(MapRejected, match="the kernel allows 4") as error:
        space.map(5 << 20, 0x1000, 0x1000)
    assert "max_iotlb_entries" in error.value.hint
    iotlb.space(0).map(5 << 20, 0x1000, 0x1000)


def test_pinned_memory_costs_an_entry_per_contiguous_run() -> None:
    with SharedMemory("runs", 1 << 20) as memory:
        iotlb, _ = make(limits=Limits(0, (1 << 48) - 1, 1, pinned=True, entries=2048))
        iotlb.space(0).map(1 << 30, memory.hva, memory.size)
        [mapping] = iotlb.space(0).mappings
        assert mapping.entries == max(memory.runs(), 1)


def test_only_what_was_mapped_can_be_unmapped() -> None:
    iotlb, recorder = make()
    space = iotlb.space(0)
    space.map(0x10000, 0x1000, 0x2000)
    with pytest.raises(MapRejected, match="no mapping with exactly this range"):
        space.unmap(0x10000, 0x1000)
    space.unmap(0x10000, 0x2000)
    assert space.mappings == ()
    assert recorder.types == "UI"


def test_a_batch_is_one_burst_of_one_address_space() -> None:
    iotlb, recorder = make()
    space = iotlb.space(1)
    space.map(0x10000, 0x1000, 0x1000)
    with space.batch() as batch:
        batch.unmap(0x10000, 0x1000)
        batch.map(0x10000, 0x5000, 0x1000, Access.RO)
        batch.map(0x20000, 0x5000, 0x1000)
    assert recorder.types == "UBIUUE"
    assert {m.asid for m in recorder.sent} == {1}
    assert [m.iova for m in space.mappings] == [0x10000, 0x20000]


def test_a_batch_whose_block_raises_sends_nothing() -> None:
    iotlb, recorder = make()

    def change() -> None:
        with iotlb.space(0).batch() as batch:
            batch.map(0x10000, 0x1000, 0x1000)
            raise RuntimeError("changed my mind")

    with pytest.raises(RuntimeError, match="changed my mind"):
        change()
    assert recorder.sent == []


def test_an_empty_batch_sends_nothing() -> None:
    iotlb, recorder = make()
    with iotlb.space(0).batch():
        pass
    assert recorder.sent == []


@pytest.mark.parametrize(
    ("fail_at", "sent", "mapped"), [(0, "", []), (1, "BE", []), (2, "BUE", [0x10000]), (3, "BUUE", [0x10000, 0x20000])]
)
def test_a_batch_the_kernel_refuses_midway_is_closed_and_the_mirror_is_true(
    fail_at: int, sent: str, mapped: list[int]
) -> None:
    iotlb, recorder = make(fail_at)
    space = iotlb.space(0)

    def change() -> None:
        with space.batch() as batch:
            for iova in (0x10000, 0x20000, 0x30000):
                batch.map(iova, 0x1000, 0x1000)

    with pytest.raises(IotlbWriteError, match="IOTLB_"):
        change()
    assert recorder.types == sent
    assert [m.iova for m in space.mappings] == mapped


def test_open_batch_of_another_address_space_is_reported_before_a_request() -> None:
    iotlb, recorder = make()
    recorder.batch_asid = 1
    with pytest.raises(MapRejected, match="a batch of ASID 1 is still open"):
        iotlb.space(0).map(0x10000, 0x1000, 0x1000)
    iotlb.space(1).map(0x10000, 0x1000, 0x1000)
    assert [m.asid for m in recorder.sent] == [1]


def test_rejected_map_is_reported_with_its_likely_cause() -> None:
    iotlb, _ = make(fail_at=0)
    with pytest.raises(IotlbWriteError, match="there is no memory of this process at 0x1000") as refused:
        iotlb.space(0).map(0x10000, 0x1000, 0x1000)
    assert refused.value.errno == errno.EFAULT
    assert refused.value.hint


def test_maps_are_renewed_after_a_reset_that_forgot_them() -> None:
    iotlb, recorder = make()
    with iotlb.space(0).batch() as batch:
        batch.map(0x10000, 0x1000, 0x1000)
        batch.map(0x20000, 0x5000, 0x1000, Access.RO)
    before = iotlb.space(0).mappings
    recorder.sent.clear()
    iotlb.map_again()
    assert recorder.types == "BIIUUE"
    assert iotlb.space(0).mappings == before
