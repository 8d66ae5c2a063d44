# SPDX-License-Identifier: MIT
"""Maps by what the device does with them: what it reaches, and what it must not reach."""

from __future__ import annotations

from ....base.uapi import Access, BackendFeature, IotlbType
from ....chardev.message import IotlbMessage
from ....host.drivers import DRIVERS
from ....memory.guest import HUGE_PAGE, PAGE_SIZE
from ....memory.pinned import allow_pinning
from ..bench import SIZE, Arena, Bench
from ..queue import Place
from ..rule import NET, CannotTell, Group, demand
from ..work import BUFFER, FRAME, HEADER, NetWork, running, work

GROUP = Group("maps", "maps, by what the device reaches")
rule = GROUP.rule
_MAP = "drivers/vhost/vdpa.c:vhost_vdpa_map; include/linux/vdpa.h:vdpa_config_ops.set_map"
_UNMAP = "drivers/vhost/vdpa.c:vhost_vdpa_unmap; include/linux/vdpa.h:vdpa_config_ops.set_map"
_EXTRA = 1 << 18
"""Bytes of memory beside the arena."""
_FAR = 64 * HUGE_PAGE
"""Behind the arena: where a rule maps memory of its own."""


def _extra(bench: Bench, number: int = 0) -> Arena:
    """Return memory that lies behind the arena; rings stay where they are."""
    at = bench.iova + _FAR + number * SIZE
    if at + _EXTRA - 1 > bench.facts.last:
        raise CannotTell("the IOVA range is too small for it")
    return bench.memory_at(at, _EXTRA)


def _net(bench: Bench, buffers: Arena) -> NetWork:
    """Start a net device whose rings and buffers lie in maps of their own."""
    bench.own()
    bench.map()
    bench.map(buffers)
    bench.negotiate()
    return NetWork(bench, bench.arena(), buffers).start()


@rule("one_update", "Memory mapped by one UPDATE is reached", _MAP)
def one_update(bench: Bench) -> str:
    bench.own()
    bench.update(bench.arena().all)
    bench.negotiate()
    job = work(bench).start()
    return job.works(2)


@rule("batched", "Memory mapped by a batch is reached", f"{_MAP}; drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_msg")
def batched(bench: Bench) -> str:
    return running(bench).works(2)


@rule("pieces", "Memory that is mapped page by page is reached as one range", _MAP)
def pieces(bench: Bench) -> str:
    bench.own()
    arena = bench.arena()
    allow_pinning(arena.size)
    bench.message(IotlbType.BATCH_BEGIN)
    count = 128
    bench.c.write_iotlb(
        [
            IotlbMessage(
                IotlbType.UPDATE, 0, arena.iova + i * PAGE_SIZE, PAGE_SIZE, arena.memory.hva + i * PAGE_SIZE, 3
            )
            for i in range(count)
        ]
    )
    bench.message(IotlbType.BATCH_END)
    bench.negotiate()
    job = work(bench, num=bench.ring_size(0, 1, most=16)).start()
    return f"{count} entries: {job.works(4)}"


@rule("backwards", "Maps that lead to memory in another order are followed one by one", _MAP)
def backwards(bench: Bench) -> str:
    bench.own()
    bench.map()
    extra = _extra(bench)
    allow_pinning(extra.size)
    pages = 32
    bench.message(IotlbType.BATCH_BEGIN)
    for i in range(pages):
        hva = extra.memory.hva + (pages - 1 - i) * PAGE_SIZE
        bench.message(IotlbType.UPDATE, 0, extra.iova + i * PAGE_SIZE, PAGE_SIZE, hva)
    bench.message(IotlbType.BATCH_END)
    if not bench.facts.is_net:
        raise CannotTell("tried with frames only")
    bench.negotiate()
    job = NetWork(bench).start()
    job.works()
    job.needs_loop()
    # page i of the device is page 31 - i of this process: a frame across two of them comes from two places
    frame = job.frame(200)
    data = bytes(HEADER) + frame
    at, split = PAGE_SIZE - 50, 50
    extra.all.part((pages - 1) * PAGE_SIZE, PAGE_SIZE).write(data[:split], at)
    extra.all.part((pages - 2) * PAGE_SIZE, PAGE_SIZE).write(data[split:])
    job.post()
    source = Place(extra.iova + at, 0, len(data), extra.memory)
    job.tx.publish(job.tx.add([(source, False)]))
    job.sent.append(frame)
    job.kick()
    return job.finish(1, "a frame across two pages that lie in another order")


@rule("moved", "An IOVA that is mapped to other memory leads there", _UNMAP, NET)
def moved(bench: Bench) -> str:
    first, second = _extra(bench), _extra(bench)
    job = _net(bench, first)
    job.works(1, "before the map is changed")
    job.needs_loop()
    allow_pinning(second.size)
    bench.message(IotlbType.BATCH_BEGIN)
    bench.message(IotlbType.INVALIDATE, 0, first.iova, first.size)
    bench.message(IotlbType.UPDATE, 0, second.iova, second.size, second.memory.hva)
    bench.message(IotlbType.BATCH_END)
    old = first.all.read()
    job.inbox, job.outbox = (Place(p.iova, p.offset, p.size, second.memory) for p in (job.inbox, job.outbox))
    seen = job.works(2, "after the map was changed")
    demand(first.all.read() == old, "it wrote to the memory that is not mapped any more")
    return seen


@rule("unmapped", "Memory that was unmapped is not written any more", _UNMAP, NET)
def unmapped(bench: Bench) -> str:
    buffers = _extra(bench)
    job = _net(bench, buffers)
    job.works()
    job.needs_loop()
    bench.unmap(buffers)
    job.submit()
    before = buffers.all.read()
    job.kick()
    job.wait(1, 0.2)
    demand(buffers.all.read() == before, "it wrote to memory that had been unmapped")
    return "the memory stayed as it was"


@rule("nothing_mapped", "With everything unmapped no descriptor is used any more", _UNMAP)
def nothing_mapped(bench: Bench) -> str:
    job = running(bench)
    job.works()
    bench.unmap()
    job.ignored("with nothing mapped", 2)
    return "nothing was used"


@rule(
    "read_only",
    "Memory that is mapped read-only is not written",
    "include/uapi/linux/vhost_types.h:VHOST_ACCESS_RO; drivers/vhost/vdpa.c:perm_to_iommu_flags",
    NET,
)
def read_only(bench: Bench) -> str:
    job = running(bench)
    assert isinstance(job, NetWork)
    job.works()
    job.needs_loop()
    extra = _extra(bench)
    target = extra.allocate(BUFFER)
    target.write(b"\x5a" * BUFFER)
    bench.update(extra.all, perm=Access.RO)
    job.rx.publish(job.rx.add([(target, True)]))
    job.send(job.frame())
    job.kick()
    job.wait(1, 0.2)
    demand(target.read() == b"\x5a" * BUFFER, "it wrote to memory that was mapped read-only")
    return "the memory stayed as it was"


@rule(
    "write_only",
    "Memory that is mapped write-only is not read",
    "include/uapi/linux/vhost_types.h:VHOST_ACCESS_WO; drivers/vhost/vdpa.c:perm_to_iommu_flags",
    NET,
)
def write_only(bench: Bench) -> str:
    job = running(bench)
    assert isinstance(job, NetWork)
    job.works()
    job.needs_loop()
    extra = _extra(bench)
    frame = job.frame(200)
    source = extra.allocate(BUFFER).part(0, HEADER + len(frame))
    source.write(bytes(HEADER) + frame)
    bench.update(extra.all, perm=Access.WO)
    job.post()
    job.tx.publish(job.tx.add([(source, False)]))
    job.kick()
    back = job.receive(1, 0.2)
    seen = "it sent a frame out of memory that was mapped write-only"
    driver = DRIVERS.get(bench.facts.module or "")
    if frame in back and driver and driver.iommu:
        raise CannotTell(f"{seen}; the platform's IOMMU maps it, and some lack write-only (Arm's first stage)")
    demand(frame not in back, seen)
    return "the frame was not sent"


@rule("highest", "The highest IOVAs can be used", "drivers/vhost/vdpa.c:vhost_vdpa_set_iova_range", NET)
def highest(bench: Bench) -> str:
    top = bench.facts.last + 1 - HUGE_PAGE
    if top < bench.iova + SIZE or top % PAGE_SIZE:
        raise CannotTell(f"the IOVA range ends at {bench.facts.last:#x}")
    buffers = bench.memory_at(top)
    return f"at {top:#x}: {_net(bench, buffers).works(2)}"


@rule("lowest", "The lowest IOVAs can be used", "drivers/vhost/vdpa.c:vhost_vdpa_set_iova_range", NET)
def lowest(bench: Bench) -> str:
    low = bench.facts.first
    if low + HUGE_PAGE > bench.iova or low % PAGE_SIZE:
        raise CannotTell(f"the IOVA range begins at {low:#x}")
    buffers = bench.memory_at(low)
    return f"at {low:#x}: {_net(bench, buffers).works(2)}"


@rule("map_while_running", "Maps and unmaps of other memory do not disturb what runs", _MAP)
def map_while_running(bench: Bench) -> str:
    job = running(bench)
    for i in range(4):
        extra = _extra(bench, i)
        bench.map(extra)
        job.works(1, "after another map")
        bench.unmap(extra)
        job.works(1, "after another unmap")
    return "four maps and unmaps while it ran"


@rule("map_under_load", "Maps that come while descriptors are used lose none of them", _MAP, deadline=20)
def map_under_load(bench: Bench) -> str:
    job = running(bench)
    count = 0
    for i in range(6):
        extra = _extra(bench, i)
        job.give(4)
        bench.map(extra)
        job.finish(4, "while memory was mapped")
        count += 4
    return f"{count} descriptors used while memory was mapped six times"


_PERSIST = (
    "include/uapi/linux/vhost_types.h:VHOST_BACKEND_F_IOTLB_PERSIST; drivers/vhost/vdpa.c:vhost_vdpa_has_persistent_map"
)


@rule("persist", "Maps persist over a reset", _PERSIST)
def persist(bench: Bench) -> str:
    bench.needs(BackendFeature.IOTLB_PERSIST)
    running(bench).works()
    bench.reset()
    bench.negotiate()
    job = work(bench).start()
    return f"without mapping again: {job.works(2, 'after a reset, without mapping again')}"


@rule(
    "again_after_reset",
    "Memory that is unmapped and mapped again after a reset is reached",
    "drivers/vhost/vdpa.c:_compat_vdpa_reset; include/linux/vdpa.h:VDPA_RESET_F_CLEAN_MAP",
)
def again_after_reset(bench: Bench) -> str:
    bench.own(bench.facts.backend & ~BackendFeature.IOTLB_PERSIST)
    bench.map()
    for _ in range(2):
        bench.restart()
        job = work(bench).start()
        job.works(2, "mapped again after a reset")
    return "twice"


@rule("frame_sizes", "Buffers at any offset in a page are reached", f"{_MAP}; virtio 1.3, 2.7.5", NET)
def frame_sizes(bench: Bench) -> str:
    job = running(bench)
    assert isinstance(job, NetWork)
    job.works()
    area = bench.arena().allocate(3 * PAGE_SIZE)
    offsets = (1, 7, 63, PAGE_SIZE - HEADER - 1, PAGE_SIZE - HEADER, PAGE_SIZE - HEADER + 1, PAGE_SIZE - 1)
    for at in offsets:
        frame = job.frame(FRAME)
        source = area.part(at, HEADER + len(frame))
        source.write(bytes(HEADER) + frame)
        job.post()
        job.tx.publish(job.tx.add([(source, False)]))
        job.sent.append(frame)
        job.submitted += 1
        job.kick()
        job.finish(1, f"a frame at offset {at} of a page")
    return f"offsets {' '.join(map(str, offsets))}"
