# SPDX-License-Identifier: MIT
"""IOTLB messages: which are accepted and which are refused. The kernel answers EFAULT to every refusal."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from ....base.uapi import Access, BackendFeature, IotlbType, MessageFormat, Status
from ....chardev.message import IotlbMessage
from ....memory.guest import PAGE_SIZE
from ....memory.pinned import allow_pinning, pinned_bytes
from ..bench import Bench
from ..queue import Place
from ..rule import CannotTell, Group, NotOffered, demand

GROUP = Group("iotlb", "IOTLB messages")
rule = GROUP.rule
_UPDATE = "drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_update"
_MESSAGE = "drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_msg"
_UNMAP = "drivers/vhost/vdpa.c:vhost_vdpa_unmap"
_FULL = (1 << 64) - 1


def _refused(bench: Bench, act: Callable[[], object], what: str) -> str:
    return bench.refused(act, [errno.EFAULT, errno.EINVAL], what)


def _pages(bench: Bench, count: int = 4) -> Place:
    bench.own()
    return bench.arena().allocate(count * PAGE_SIZE)


@rule("update", "An UPDATE within the range is taken", _UPDATE)
def update(bench: Bench) -> str:
    bench.update(_pages(bench))
    return "taken"


@rule("adjacent", "Two UPDATEs side by side are taken", _UPDATE)
def adjacent(bench: Bench) -> str:
    pages = _pages(bench)
    bench.update(pages.part(0, PAGE_SIZE))
    bench.update(pages.part(PAGE_SIZE, PAGE_SIZE))
    return "taken"


@rule("overlap_same", "An UPDATE of a mapped range is refused", _UPDATE)
def overlap_same(bench: Bench) -> str:
    pages = _pages(bench)
    bench.update(pages)
    return _refused(bench, lambda: bench.update(pages), "the same range again")


@rule("overlap_part", "An UPDATE that overlaps a mapped range is refused, at its begin, end or middle", _UPDATE)
def overlap_part(bench: Bench) -> str:
    pages = _pages(bench)
    bench.update(pages.part(PAGE_SIZE, 2 * PAGE_SIZE))
    for at, size in ((0, 2), (2, 2), (0, 4), (1, 1)):
        part = pages.part(at * PAGE_SIZE, size * PAGE_SIZE)
        _refused(bench, partial(bench.update, part), f"pages {at} to {at + size - 1}")
    bench.update(pages.part(0, PAGE_SIZE))
    return "four overlaps refused; what was free is still free"


@rule("size_zero", "An UPDATE of no bytes is refused", "drivers/vhost/vhost.c:vhost_chr_write_iter")
def size_zero(bench: Bench) -> str:
    pages = _pages(bench)
    return _refused(bench, lambda: bench.message(IotlbType.UPDATE, 0, pages.iova, 0, pages.hva), "0 bytes")


@rule("wraparound", "An UPDATE that wraps around is refused", _UPDATE)
def wraparound(bench: Bench) -> str:
    pages = _pages(bench)
    return _refused(
        bench,
        lambda: bench.message(IotlbType.UPDATE, 0, _FULL - PAGE_SIZE + 1, 2 * PAGE_SIZE, pages.hva),
        "across 2^64",
    )


@rule("outside", "An UPDATE outside of the IOVA range is refused", _UPDATE)
def outside(bench: Bench) -> str:
    pages, facts = _pages(bench), bench.facts
    seen = ""
    if facts.first:
        seen = _refused(
            bench, lambda: bench.message(IotlbType.UPDATE, 0, facts.first - PAGE_SIZE, PAGE_SIZE, pages.hva), "below"
        )
    if facts.last < _FULL:
        seen = _refused(
            bench, lambda: bench.message(IotlbType.UPDATE, 0, facts.last + 1, PAGE_SIZE, pages.hva), "above"
        )
    if not seen:
        raise NotOffered("every IOVA can be mapped")
    return seen


@rule(
    "read_only",
    "An UPDATE is taken with each access: read, write, both",
    "drivers/vhost/vdpa.c:vhost_vdpa_map; include/uapi/linux/vhost_types.h",
)
def read_only(bench: Bench) -> str:
    pages = _pages(bench)
    for i, perm in enumerate((Access.RO, Access.WO, Access.RW)):
        bench.update(pages.part(i * PAGE_SIZE, PAGE_SIZE), perm=perm)
    return "RO, WO and RW"


@rule(
    "bad_address",
    "An UPDATE of memory that this process does not have is refused",
    "drivers/vhost/vdpa.c:vhost_vdpa_pa_map and vhost_vdpa_va_map",
)
def bad_address(bench: Bench) -> str:
    _pages(bench)
    number = bench.errno_of(lambda: bench.message(IotlbType.UPDATE, 0, bench.iova, PAGE_SIZE, 0x10000))
    if not number:
        raise CannotTell("accepted: a parent on user addresses silently skips memory that is not a shared file")
    return "refused"


@rule("unmap_and_map", "An unmapped range can be mapped again", _UNMAP)
def unmap_and_map(bench: Bench) -> str:
    pages = _pages(bench)
    for _ in range(3):
        bench.update(pages)
        bench.message(IotlbType.INVALIDATE, 0, pages.iova, pages.size)
    bench.update(pages)
    return "mapped four times, unmapped three times"


@rule("unmap_nothing", "An INVALIDATE of an unmapped range is accepted", _UNMAP)
def unmap_nothing(bench: Bench) -> str:
    pages = _pages(bench)
    bench.update(pages.part(0, PAGE_SIZE))
    bench.message(IotlbType.INVALIDATE, 0, pages.iova + PAGE_SIZE, PAGE_SIZE)
    _refused(bench, lambda: bench.update(pages.part(0, PAGE_SIZE)), "what stayed mapped")
    return "taken; what lies beside it stays"


@rule("unmap_all", "An INVALIDATE of everything unmaps everything", _UNMAP)
def unmap_all(bench: Bench) -> str:
    pages = _pages(bench)
    for i in (0, 2):
        bench.update(pages.part(i * PAGE_SIZE, PAGE_SIZE))
    bench.message(IotlbType.INVALIDATE, 0, 0, _FULL)
    bench.update(pages)
    return "two maps gone by one message"


@rule("unmap_unused_space", "An INVALIDATE in an address space that was never used is refused", _MESSAGE)
def unmap_unused_space(bench: Bench) -> str:
    bench.needs_second_space()
    pages = _pages(bench)
    return _refused(bench, lambda: bench.message(IotlbType.INVALIDATE, 1, pages.iova, PAGE_SIZE), "ASID 1")


@rule(
    "space_range",
    "A message for an address space that the device does not have is refused",
    "drivers/vhost/vdpa.c:vhost_vdpa_alloc_as",
)
def space_range(bench: Bench) -> str:
    pages = _pages(bench)
    beyond = bench.facts.as_num
    _refused(bench, lambda: bench.message(IotlbType.BATCH_BEGIN, beyond), f"BATCH_BEGIN in ASID {beyond}")
    return _refused(bench, lambda: bench.update(pages, beyond), f"UPDATE in ASID {beyond}")


@rule("spaces_apart", "Each address space has maps of its own", "drivers/vhost/vdpa.c:vhost_vdpa_alloc_as")
def spaces_apart(bench: Bench) -> str:
    bench.needs_second_space()
    pages = _pages(bench)
    bench.update(pages, 0)
    bench.update(pages, 1)
    bench.message(IotlbType.INVALIDATE, 1, pages.iova, pages.size)
    return _refused(bench, lambda: bench.update(pages, 0), "ASID 0 after ASID 1 was unmapped")


@rule(
    "asid_ignored",
    "Without IOTLB_ASID acknowledged every message is for address space 0",
    "drivers/vhost/vhost.c:vhost_chr_write_iter",
)
def asid_ignored(bench: Bench) -> str:
    bench.own(BackendFeature.IOTLB_MSG_V2 | BackendFeature.IOTLB_BATCH)
    pages = bench.arena().allocate(PAGE_SIZE)
    bench.update(pages, 1)
    return _refused(bench, lambda: bench.update(pages, 0), "the same range, ASID 1 and ASID 0")


@rule("version_1_message", "Messages of the first format are taken", "drivers/vhost/vhost.c:vhost_chr_write_iter")
def version_1_message(bench: Bench) -> str:
    pages = _pages(bench)
    allow_pinning(pages.size)
    message = IotlbMessage(IotlbType.UPDATE, 0, pages.iova, pages.size, pages.hva, int(Access.RW))
    bench.c.write_iotlb([message], MessageFormat.V1)
    return _refused(bench, lambda: bench.update(pages), "the same range in the second format")


@rule("batch", "A batch with maps and unmaps is taken", _MESSAGE)
def batch(bench: Bench) -> str:
    pages = _pages(bench)
    bench.message(IotlbType.BATCH_BEGIN)
    bench.update(pages.part(0, PAGE_SIZE))
    bench.update(pages.part(PAGE_SIZE, PAGE_SIZE))
    bench.message(IotlbType.INVALIDATE, 0, pages.iova, PAGE_SIZE)
    bench.message(IotlbType.BATCH_END)
    bench.update(pages.part(0, PAGE_SIZE))
    return "what a batch unmapped is free after it"


@rule("batch_twice", "A batch that is begun twice is one batch", _MESSAGE)
def batch_twice(bench: Bench) -> str:
    _pages(bench)
    bench.message(IotlbType.BATCH_BEGIN)
    bench.message(IotlbType.BATCH_BEGIN)
    bench.message(IotlbType.BATCH_END)
    return "taken"


@rule("batch_end_alone", "The end of a batch that was not begun is taken", _MESSAGE)
def batch_end_alone(bench: Bench) -> str:
    bench.update(_pages(bench))
    bench.message(IotlbType.BATCH_END)
    return "taken"


@rule("batch_other_space", "Within a batch another address space is refused", _MESSAGE)
def batch_other_space(bench: Bench) -> str:
    bench.needs_second_space()
    pages = _pages(bench)
    bench.message(IotlbType.BATCH_BEGIN, 0)
    _refused(bench, lambda: bench.update(pages, 1), "UPDATE in ASID 1 within a batch of ASID 0")
    bench.message(IotlbType.BATCH_END, 0)
    bench.update(pages, 1)
    return "refused within, taken after"


@rule(
    "batch_over_reset", "A reset does not end a batch", "drivers/vhost/vdpa.c:vhost_vdpa_reset and _compat_vdpa_reset"
)
def batch_over_reset(bench: Bench) -> str:
    bench.needs_second_space()
    pages = _pages(bench)
    bench.message(IotlbType.BATCH_BEGIN, 0)
    bench.reset()
    _refused(bench, lambda: bench.update(pages, 1), "UPDATE in ASID 1 after a reset within a batch of ASID 0")
    bench.message(IotlbType.BATCH_END, 0)
    return "still open after a reset"


@rule("bad_type", "Messages that only a device sends are refused", _MESSAGE)
def bad_type(bench: Bench) -> str:
    pages = _pages(bench)
    bench.update(pages)
    for kind in (IotlbType.MISS, IotlbType.ACCESS_FAIL):
        _refused(bench, partial(bench.message, kind, 0, pages.iova, PAGE_SIZE), kind.name)
    return "MISS and ACCESS_FAIL refused"


@rule("no_owner", "Without an owner nothing can be mapped", _MESSAGE)
def no_owner(bench: Bench) -> str:
    pages = bench.arena().allocate(PAGE_SIZE)
    return _refused(bench, lambda: bench.update(pages), "UPDATE before SET_OWNER")


@rule("survives_reset", "A reset does not empty the kernel's tree", "drivers/vhost/vdpa.c:vhost_vdpa_reset")
def survives_reset(bench: Bench) -> str:
    pages = _pages(bench)
    bench.update(pages)
    bench.negotiate()
    bench.reset()
    _refused(bench, lambda: bench.update(pages), "the same range after a reset")
    bench.message(IotlbType.INVALIDATE, 0, pages.iova, pages.size)
    bench.update(pages)
    return "mapped until it is unmapped"


@rule("in_every_state", "Maps are taken in every state of the device", _MESSAGE)
def in_every_state(bench: Bench) -> str:
    pages = _pages(bench, 8)
    bench.update(pages.part(0, PAGE_SIZE))
    bench.negotiate()
    bench.update(pages.part(PAGE_SIZE, PAGE_SIZE))
    bench.driver_ok()
    bench.update(pages.part(2 * PAGE_SIZE, PAGE_SIZE))
    if BackendFeature.SUSPEND in bench.facts.backend:
        bench.c.suspend()
        bench.update(pages.part(3 * PAGE_SIZE, PAGE_SIZE))
    bench.reset()
    bench.update(pages.part(4 * PAGE_SIZE, PAGE_SIZE))
    demand(bench.c.get_status() == Status(0), "the status is not 0 after a reset")
    return "before, during and after running"


@rule(
    "limit",
    "As many entries as the limit says are taken, and not one more",
    "drivers/vhost/iotlb.c:vhost_iotlb_add_range_ctx; drivers/vhost/vdpa.c:max_iotlb_entries",
    deadline=40,
)
def limit(bench: Bench) -> str:
    most = bench.facts.max_entries
    if most is None or most > 8192:
        raise CannotTell(
            "the kernel does not limit the entries" if most is None else f"the limit is {most}: too many to try"
        )
    bench.own()
    page = bench.arena().allocate(PAGE_SIZE)
    allow_pinning((most + 1) * PAGE_SIZE)
    entry = [
        IotlbMessage(IotlbType.UPDATE, 0, bench.iova + 2 * i * PAGE_SIZE, PAGE_SIZE, page.hva, int(Access.RW))
        for i in range(most + 1)
    ]
    if entry[-1].iova > bench.facts.last:
        raise CannotTell("the IOVA range is too small")
    bench.message(IotlbType.BATCH_BEGIN)
    bench.c.write_iotlb(entry[:most])
    number = bench.errno_of(lambda: bench.c.write_iotlb(entry[most:]))
    bench.message(IotlbType.INVALIDATE, 0, 0, _FULL)
    bench.message(IotlbType.BATCH_END)
    if not number:
        raise CannotTell(f"entry {most + 1} was taken: the limit is not kept by this kernel")
    return f"{most} taken, one more refused"


@rule(
    "pinned",
    "Mapped memory counts as pinned, and no longer once it is unmapped",
    "drivers/vhost/vdpa.c:vhost_vdpa_pa_map and vhost_vdpa_pa_unmap",
)
def pinned(bench: Bench) -> str:
    bench.needs_pinning()
    pages = _pages(bench, 16)
    before = pinned_bytes()
    bench.update(pages)
    during = pinned_bytes() - before
    bench.message(IotlbType.INVALIDATE, 0, pages.iova, pages.size)
    after = pinned_bytes() - before
    demand(during == pages.size, f"{pages.size} bytes mapped, {during} pinned")
    demand(after == 0, f"{after} bytes are pinned after INVALIDATE")
    return f"{during} bytes, then 0"
