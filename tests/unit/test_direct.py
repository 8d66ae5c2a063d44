"""The package's own procedure against a recorded door: what the device is given, and what is released.

The chardev is a stand-in that records calls and remembers status and bases.
tests/kernel asks real kernels; here each step can be looked at by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import pytest
from prepared_double import PreparedDouble
from ring_model import Model, Segment

from pyvhostvdpa.base.errors import OutOfOrder
from pyvhostvdpa.base.uapi import Access, BackendFeature, IotlbType, Status
from pyvhostvdpa.chardev.iotlb import Iotlb, Limits
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.device.groups import Groups
from pyvhostvdpa.device.procedure.base import GUEST_ASID, OWN_ASID, Procedure, State, Target
from pyvhostvdpa.device.procedure.direct import Direct
from pyvhostvdpa.device.procedure.in_place import InPlace
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.net.features import SUPPORTED
from pyvhostvdpa.trace.recorder import Trace

Make = Callable[..., Model]
ALL = BackendFeature.SUSPEND | BackendFeature.RESUME | BackendFeature.DESC_ASID | BackendFeature.IOTLB_PERSIST
LAST = (1 << 47) - 1


class Door:
    """Answers as an idle device does."""

    path = "/dev/recorded"
    batch_asid: int | None = None

    def __init__(self) -> None:
        self.trace = Trace().device(self.path)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.messages: list[IotlbMessage] = []
        self.status = Status(0)
        self.bases: dict[int, int] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> None:
            self.calls.append((name, (*arguments, *named.values())))

        return call

    def prepare(self) -> PreparedDouble:
        return PreparedDouble(self)

    def set_status(self, status: Status) -> None:
        self.calls.append(("set_status", (status,)))
        self.status = status

    def get_status(self) -> Status:
        return self.status

    def get_vqs_count(self) -> int:
        return 2

    def get_vring_num(self) -> int:
        return 256

    def get_vring_base(self, index: int) -> int:
        return self.bases[index]

    def get_vring_group(self, index: int) -> int:
        return 0

    def write_iotlb(self, messages: Sequence[IotlbMessage]) -> None:
        self.messages += messages

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Rig:
    """A model guest's queue on a device behind a recorded door."""

    def __init__(self, m: Model, kind: type[Procedure] = Direct, backend: BackendFeature = ALL) -> None:
        self.m, self.door = m, Door()
        limits = Limits(first=0, last=LAST, as_num=2, pinned=False, entries=None)
        self.iotlb = Iotlb(cast(Any, self.door), limits)
        groups = Groups(max_pairs=1, control_index=None, control=None, descriptors=1)
        self.procedure = kind(Target(cast(Any, self.door), self.iotlb, SUPPORTED, backend, groups))
        self.procedure.attach(m.memory)

    def start(self, mode: State) -> None:
        self.procedure.start(mode, [self.m.queue], None)

    def close(self) -> None:
        self.procedure.reset()
        self.procedure.release()

    @property
    def extra_maps(self) -> list[tuple[int, int]]:
        """(ASID, IOVA) of everything mapped beside guest memory."""
        return [(asid, m.iova) for asid in (GUEST_ASID, OWN_ASID) for m in self.iotlb.space(asid).mappings][1:]

    @property
    def taken(self) -> int:
        """IOVA ranges that the allocator counts as given out."""
        return len(self.procedure.memories.holes._given)


@pytest.fixture
def rig(model: Make) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(kind: type[Procedure] = Direct, backend: BackendFeature = ALL) -> Rig:
        made.append(Rig(model(), kind, backend))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("kind", [Direct, InPlace])
def test_a_device_may_write_the_used_ring_and_only_read_the_rest(
    rig: Callable[..., Rig], kind: type[Procedure]
) -> None:
    r = rig(kind)
    r.start(State.SHADOW)
    [shadow] = r.procedure.shadows
    rights = {m.uaddr: m.perm for m in r.door.messages if m.type is IotlbType.UPDATE}
    assert rights[shadow.area] == Access.RO
    assert rights[shadow.area + shadow.layout.driver_area] == Access.RW
    assert rights[r.m.memory.regions[0].memory.hva] == Access.RW


@pytest.mark.parametrize("kind", [Direct, InPlace])
def test_iova_ranges_are_released_at_every_reset(rig: Callable[..., Rig], kind: type[Procedure]) -> None:
    r = rig(kind)
    seen = set()
    for mode in [State.SHADOW, State.PASSTHROUGH] * 5:
        r.start(mode)
        seen.update(r.extra_maps)
        r.procedure.reset()
        assert (r.extra_maps, r.taken) == ([], 0)
    # the same ranges each time: none was lost on the way
    assert len(seen) <= 4


def test_shadow_rings_lie_in_no_guest_memory_and_not_at_0(rig: Callable[..., Rig]) -> None:
    r = rig(backend=ALL & ~BackendFeature.DESC_ASID)
    r.start(State.SHADOW)
    mapped = r.iotlb.space(GUEST_ASID).mappings
    assert len(mapped) == 3
    assert all(one.last < other.iova for one, other in pairwise(mapped))
    assert mapped[0].iova > 0


def disorder(m: Model) -> None:
    """Let a device in passthrough use the second of four descriptors first."""
    for slot in range(4):
        m.describe(slot, [Segment(m.memory.regions[0].gpa + 0x40000, 8)])
        m.publish(slot)
    m.ring.used.ring[0].id = 1
    m.ring.used.idx = 1


def test_a_device_out_of_order_continues_and_the_stop_is_refused(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.start(State.PASSTHROUGH)
    disorder(r.m)
    r.door.calls.clear()
    with pytest.raises(OutOfOrder, match="virtqueue 0"):
        r.procedure.stop()
    assert r.door.names() == ["suspend", "resume"]
    assert r.procedure.state is State.PASSTHROUGH


def test_a_device_out_of_order_that_cannot_continue_is_reset(rig: Callable[..., Rig]) -> None:
    r = rig(backend=ALL & ~BackendFeature.RESUME)
    r.start(State.PASSTHROUGH)
    disorder(r.m)
    with pytest.raises(OutOfOrder, match="cannot be resumed and was reset"):
        r.procedure.stop()
    assert r.door.status == Status(0)
    assert r.procedure.state is State.RESET


def test_disorder_from_before_a_start_does_not_refuse_the_stop(rig: Callable[..., Rig]) -> None:
    r = rig()
    for slot in range(8):
        r.m.ring.avail.ring[slot] = slot
        r.m.ring.used.ring[slot].id = slot ^ 1
    r.m.ring.avail.idx = r.m.ring.used.idx = 8
    r.start(State.PASSTHROUGH)
    r.door.bases[0] = 8
    r.procedure.stop()
    assert r.procedure.state is State.RESET


def test_disorder_65536_elements_after_a_start_refuses_the_stop(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.start(State.PASSTHROUGH)
    for slot in range(8):
        r.m.ring.avail.ring[slot] = slot
        r.m.ring.used.ring[slot].id = slot ^ 1
    # both indices have come round to where they were
    with pytest.raises(OutOfOrder):
        r.procedure.stop()


def test_a_stop_in_shadow_mode_needs_no_order(rig: Callable[..., Rig]) -> None:
    r = rig()
    disorder(r.m)
    r.start(State.SHADOW)
    r.procedure.stop()
    assert r.procedure.state is State.RESET


def test_a_shadow_start_gives_the_device_the_shadow_s_ring_and_eventfds(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.start(State.SHADOW)
    [shadow] = r.procedure.shadows
    told = dict(r.door.calls)
    at = {m.uaddr: m.iova for m in r.door.messages if m.type is IotlbType.UPDATE and m.asid == OWN_ASID}
    desc, used = at[shadow.area], at[shadow.area + shadow.layout.driver_area]
    assert told["set_vring_addr"] == (0, desc, desc + shadow.layout.avail_offset, used)
    assert told["set_vring_kick"] == (0, shadow.kick)
    assert told["set_vring_call"] == (0, shadow.call)
    assert told["set_group_asid"] == (1, OWN_ASID)


def test_guest_memory_from_gpa_0_is_mapped_where_the_guest_has_it() -> None:
    with GuestMemory([(0, 640 << 10), (1 << 20, 1 << 20), (4 << 30, 1 << 20)]) as memory:  # type: ignore[list-item]
        for kind in (Direct, InPlace):
            door = Door()
            iotlb = Iotlb(cast(Any, door), Limits(first=0, last=LAST, as_num=2, pinned=False, entries=None))
            groups = Groups(max_pairs=1, control_index=None, control=None, descriptors=1)
            procedure = kind(Target(cast(Any, door), iotlb, SUPPORTED, ALL, groups))
            procedure.attach(memory)
            assert [(each.iova, each.size) for each in iotlb.space(GUEST_ASID).mappings] == [
                (region.gpa, region.size) for region in memory.regions
            ]
            assert procedure.memories.holes.allocate(4096) not in range(0x1000)
            procedure.release()
