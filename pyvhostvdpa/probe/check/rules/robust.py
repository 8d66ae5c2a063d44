# SPDX-License-Identifier: MIT
"""Bad descriptors, rings and buffers, which a correct driver never creates. The device may stop and ask for a reset.

It must not hang the machine, must not touch memory that is not mapped, and
must work again after a reset.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial

from ....base.uapi import Access, IotlbType, Status, names
from ....memory.guest import HUGE_PAGE, PAGE_SIZE
from ....memory.pinned import allow_pinning
from ..bench import RUNNING, Bench
from ..queue import INDIRECT, NEXT, WRITE, Desc
from ..rule import Broken, CannotTell, Group, demand
from ..work import Work, running, work
from .reset import works_after

GROUP = Group("robust", "bad descriptors, rings and buffers")
rule = GROUP.rule
_ERROR = "virtio 1.3, 2.1.2 and 2.7; drivers/vhost/vringh.c:__vringh_iov"
_SETTLE_S = 0.12
_NOWHERE = 1 << 44
"""An IOVA that nothing is mapped at."""

Spoil = Callable[[Bench, Work], None]


def survives(bench: Bench, spoil: Spoil, what: str) -> str:
    """Do something wrong to a device that runs; demand that it touches nothing else and works after a reset."""
    job = running(bench)
    job.works()
    guard = bench.arena().allocate(4 * PAGE_SIZE)
    guard.write(os.urandom(64) * (guard.size // 64))
    before = guard.read()
    spoil(bench, job)
    job.kick()
    bench.status_becomes(Status.NEEDS_RESET, _SETTLE_S)
    status = bench.c.get_status()
    demand(guard.read() == before, f"{what}: memory that no descriptor names was written")
    works_after(bench, what)
    said = "NEEDS_RESET" if Status.NEEDS_RESET in status else f"status {names(status)}"
    return f"{said}; it works after a reset"


def _bad(name: str, sentence: str, source: str = _ERROR) -> Callable[[Spoil], Spoil]:
    """Register a rule that does one thing wrong and sees the device survive it."""

    def register(spoil: Spoil) -> Spoil:
        act = partial(survives, spoil=spoil, what=sentence[0].lower() + sentence[1:])
        rule(name, f"{sentence}: no harm, and it works after a reset", source)(act)
        return spoil

    return register


def _one(job: Work, *descs: Desc) -> None:
    job.main.write(0, descs)
    job.main.publish(0)


@_bad("head_beyond", "A head beyond the ring")
def _head_beyond(bench: Bench, job: Work) -> None:
    job.main.publish(job.main.num)


@_bad("head_far_beyond", "Head 65535")
def _head_far_beyond(bench: Bench, job: Work) -> None:
    job.main.publish(0xFFFF)


@_bad("next_beyond", "A next descriptor beyond the ring")
def _next_beyond(bench: Bench, job: Work) -> None:
    _one(job, Desc(bench.iova, 64, NEXT, job.main.num + 5))


@_bad("loop_self", "A descriptor that is its own next")
def _loop_self(bench: Bench, job: Work) -> None:
    _one(job, Desc(bench.iova, 64, NEXT, 0))


@_bad("loop_long", "A chain that goes round")
def _loop_long(bench: Bench, job: Work) -> None:
    count = job.main.num
    job.main.write(0, [Desc(bench.iova, 1, NEXT, (i + 1) % count) for i in range(count)])
    job.main.publish(0)


@_bad("avail_jump", "An avail index that is further ahead than the ring is long", "virtio 1.3, 2.7.6")
def _avail_jump(bench: Bench, job: Work) -> None:
    job.main.set_avail(job.main.avail_index + job.main.num + 7)


@_bad("avail_back", "An avail index that goes back", "virtio 1.3, 2.7.6")
def _avail_back(bench: Bench, job: Work) -> None:
    job.main.set_avail(job.main.avail_index - 1)


@_bad("buffer_unmapped", "A buffer that is not mapped")
def _buffer_unmapped(bench: Bench, job: Work) -> None:
    _one(job, Desc(_NOWHERE, 512))


@_bad("buffer_over_end", "A buffer that ends beyond what is mapped")
def _buffer_over_end(bench: Bench, job: Work) -> None:
    _one(job, Desc(bench.iova + bench.arena().size - 64, 1024))


@_bad("buffer_wraps", "A buffer that wraps around 2^64")
def _buffer_wraps(bench: Bench, job: Work) -> None:
    _one(job, Desc((1 << 64) - 256, 1024))


@_bad("length_zero", "A descriptor of no bytes")
def _length_zero(bench: Bench, job: Work) -> None:
    _one(job, Desc(bench.iova, 0))


@_bad("length_huge", "A descriptor of 4 GiB")
def _length_huge(bench: Bench, job: Work) -> None:
    _one(job, Desc(bench.iova, 0xFFFFFFFF))


@_bad("readable_after_writable", "A readable descriptor behind a writable one", "virtio 1.3, 2.7.4.2")
def _readable_after_writable(bench: Bench, job: Work) -> None:
    place = bench.arena().allocate(PAGE_SIZE)
    _one(job, Desc(place.iova, 64, NEXT | WRITE, 1), Desc(place.iova + 64, 64))


@_bad("only_writable", "A request of writable descriptors alone")
def _only_writable(bench: Bench, job: Work) -> None:
    place = bench.arena().allocate(PAGE_SIZE)
    _one(job, Desc(place.iova, 64, WRITE))


@_bad("indirect_unasked", "An indirect table that was not negotiated", "virtio 1.3, 2.7.5.3.1")
def _indirect_unasked(bench: Bench, job: Work) -> None:
    place = bench.arena().allocate(PAGE_SIZE)
    job.main.table(place, [Desc(place.iova + 512, 64)])
    _one(job, Desc(place.iova, 16, INDIRECT))


@_bad("indirect_odd", "An indirect table of an odd size", "virtio 1.3, 2.7.5.3")
def _indirect_odd(bench: Bench, job: Work) -> None:
    _one(job, Desc(bench.iova, 17, INDIRECT))


@_bad("unknown_flags", "Undefined descriptor flags", "virtio 1.3, 2.7.5")
def _unknown_flags(bench: Bench, job: Work) -> None:
    place = bench.arena().allocate(PAGE_SIZE)
    _one(job, Desc(place.iova, 64, 0xFFF8))


def _with_rings(bench: Bench, what: str, desc: int, avail: int, used: int) -> str:
    """Start a device with misplaced rings (an offset each), and see it survive."""
    bench.prepare()
    job = work(bench)
    job.set_up()
    for q in job.queues:
        bench.c.set_vring_addr(q.index, q.desc + desc, q.avail + avail, q.used + used)
    # a device that looks at its rings at once may need a reset before the status is read back
    number = bench.errno_of(lambda: bench.c.set_status(RUNNING))
    job.submit()
    if not number:
        job.kick()
        bench.status_becomes(Status.NEEDS_RESET, _SETTLE_S)
    status = bench.c.get_status()
    works_after(bench, what)
    return f"status {names(status)}; it works after a reset"


@rule("desc_unmapped", "A descriptor table that is not mapped: no harm, and it works after a reset", _ERROR)
def desc_unmapped(bench: Bench) -> str:
    return _with_rings(bench, "descriptor table not mapped", _NOWHERE, 0, 0)


@rule("avail_unmapped", "An avail ring that is not mapped: no harm, and it works after a reset", _ERROR)
def avail_unmapped(bench: Bench) -> str:
    return _with_rings(bench, "avail ring not mapped", 0, _NOWHERE, 0)


@rule("used_unmapped", "A used ring that is not mapped: no harm, and it works after a reset", _ERROR)
def used_unmapped(bench: Bench) -> str:
    return _with_rings(bench, "used ring not mapped", 0, 0, _NOWHERE)


@rule("rings_unmapped_later", "Rings that are unmapped while it runs: no harm, and it works after a reset", _ERROR)
def rings_unmapped_later(bench: Bench) -> str:
    job = running(bench)
    job.works()
    # something stays mapped: a parent may take an empty address space for no translation at all
    other = bench.memory_at(bench.iova + 64 * HUGE_PAGE)
    bench.map(other)
    bench.unmap()
    before = bench.arena().all.read()
    job.submit()
    queued = bench.arena().all.read()
    job.kick()
    bench.status_becomes(Status.NEEDS_RESET, _SETTLE_S)
    demand(bench.arena().all.read() == queued, "memory that had been unmapped was written")
    demand(before != queued, "the rule itself wrote nothing")
    return works_after(bench, "rings unmapped while it runs")


@rule(
    "used_read_only",
    "A used ring that is mapped read-only is not written",
    "include/uapi/linux/vhost_types.h:VHOST_ACCESS_RO",
)
def used_read_only(bench: Bench) -> str:
    bench.own()
    arena = bench.arena()
    allow_pinning(arena.size)
    bench.message(IotlbType.UPDATE, 0, arena.iova, arena.size, arena.memory.hva, Access.RO)
    bench.negotiate()
    job = work(bench)
    job.set_up()
    if bench.errno_of(lambda: bench.c.set_status(RUNNING)):
        raise CannotTell("the device does not start with a used ring that it cannot write")
    job.submit()
    before = [q.ring.read() for q in job.queues]
    job.kick()
    bench.status_becomes(Status.NEEDS_RESET, _SETTLE_S)
    after = [q.ring.read() for q in job.queues]
    demand(after == before, "it wrote to a used ring that was mapped read-only")
    return works_after(bench, "used ring read-only")


@rule("random", "Descriptors of random bytes: no harm, and it works after a reset", _ERROR, deadline=30)
def random_descriptors(bench: Bench) -> str:
    dice = random.Random(7)
    job = running(bench)
    job.works()
    guard = bench.arena().allocate(PAGE_SIZE)
    before = guard.read()
    for _ in range(8):
        q = job.main
        for i in range(q.num):
            q.write(
                i,
                [Desc(dice.getrandbits(64) | 1 << 63, dice.getrandbits(32), dice.getrandbits(3), dice.getrandbits(16))],
            )
        q.publish(*(dice.randrange(2 * q.num) for _ in range(4)))
        job.kick()
        bench.status_becomes(Status.NEEDS_RESET, 0.05)
        demand(guard.read() == before, "memory that no descriptor names was written")
        bench.restart()
        job = work(bench).start()
    return f"8 rings of random descriptors; {job.works(2, 'after them')}"


@rule("needs_reset_stops", "A device that set NEEDS_RESET uses no more descriptors", "virtio 1.3, 2.1.1")
def needs_reset_stops(bench: Bench) -> str:
    job = running(bench)
    job.works()
    job.main.publish(job.main.num)
    job.kick()
    if not bench.status_becomes(Status.NEEDS_RESET, 0.3):
        raise CannotTell("a head beyond the ring does not make the device set NEEDS_RESET")
    job.offer(2)
    job.kick()
    try:
        job.rests("NEEDS_RESET is set")
    except Broken as e:
        raise CannotTell(f"{e}: drivers must not rely on either") from e
    return "nothing was used"
