# SPDX-License-Identifier: MIT
"""Queues: what may be set when, and whether the device works with it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from ....base.errors import KernelError
from ....base.uapi import BackendFeature, Status
from ....virtqueue.layout import SplitLayout
from ..bench import REST_S, RUNNING, SIZE, Bench
from ..rule import NET, Broken, CannotTell, Group, NotOffered, demand
from ..work import NetWork, Work, running, work

GROUP = Group("queues", "queues: sizes, bases, addresses, enabling, kicks")
rule = GROUP.rule
_VRING = "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl"
_NUM = "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, or drivers/vhost/vhost.c:vhost_vring_set_num before"
_ADDR = "drivers/vhost/vhost.c:vhost_vring_set_addr"
_READY = "virtio 1.3, 4.2.2.1 (QueueReady); include/linux/vdpa.h:vdpa_config_ops.set_vq_ready"
_UNASKED = "the device looks at its queues without being kicked"
_ENOTSUPP = 524
_MOST = 1024
"""Ring sizes beyond this are tried by the largest one alone."""
_AROUND = 64


@rule("num_power_of_two", "A ring size that is not a power of two is refused with EINVAL", f"{_NUM}; virtio 1.3, 2.7")
def num_power_of_two(bench: Bench) -> str:
    bench.own()
    bench.refused(lambda: bench.c.set_vring_num(0, 0), [errno.EINVAL], "0")
    bench.refused(lambda: bench.c.set_vring_num(0, 65536), [errno.EINVAL], "65536")
    return bench.refused(lambda: bench.c.set_vring_num(0, 3), [errno.EINVAL], "3")


@rule("num_maximum", "A ring larger than the device's largest is refused with EINVAL", f"{_VRING}, VHOST_SET_VRING_NUM")
def num_maximum(bench: Bench) -> str:
    bench.own()
    beyond = 1 << bench.facts.ring_max.bit_length()
    if beyond > 32768:
        raise CannotTell(f"the largest ring is {bench.facts.ring_max}: a larger one cannot be requested")
    number = bench.errno_of(lambda: bench.c.set_vring_num(0, beyond))
    if not number:
        raise CannotTell(f"{beyond} is accepted: kernels did not compare with get_vq_num_max at first")
    demand(number == errno.EINVAL, f"{beyond}: {os.strerror(number)}")
    return f"{beyond}: EINVAL"


@rule("index", "A queue that the device does not have is refused with ENOBUFS", _VRING)
def index(bench: Bench) -> str:
    c, beyond = bench.own(), bench.facts.vqs_count
    for what, act in (
        ("SET_VRING_NUM", lambda: c.set_vring_num(beyond, 2)),
        ("SET_VRING_BASE", lambda: c.set_vring_base(beyond, 0)),
        ("GET_VRING_BASE", lambda: c.get_vring_base(beyond)),
        ("SET_VRING_ADDR", lambda: c.set_vring_addr(beyond, 0x1000, 0x2000, 0x3000)),
        ("SET_VRING_KICK", lambda: c.set_vring_kick(beyond, -1)),
        ("SET_VRING_CALL", lambda: c.set_vring_call(beyond, -1)),
        ("SET_VRING_ENABLE", lambda: c.set_vring_enable(beyond, True)),
    ):
        bench.refused(act, [errno.ENOBUFS], f"{what} of queue {beyond}")
    return bench.refused(lambda: c.set_vring_num(0xFFFFFFFF, 2), [errno.ENOBUFS], "queue 2^32-1")


@rule(
    "base_kept",
    "A base that was set is the base that is returned",
    f"{_VRING}, VHOST_SET_VRING_BASE and VHOST_GET_VRING_BASE",
)
def base_kept(bench: Bench) -> str:
    bench.own()
    bench.negotiate()
    for queue in bench.facts.queues:
        for base in (0, 1, 255, 256, 32767, 32768, 65535):
            bench.set_base(queue, base)
            got = bench.base(queue)
            demand(got == base, f"queue {queue}: set {base}, returned {got}")
    return "0, 1, 255, 256, 32767, 32768 and 65535 of every queue"


@rule("base_zero", "A queue's base is 0 after a reset", f"{_VRING}, VHOST_GET_VRING_BASE; virtio 1.3, 2.4")
def base_zero(bench: Bench) -> str:
    bench.own()
    bench.negotiate()
    queues = bench.facts.queues
    for queue in queues:
        bench.set_base(queue, 77)
    bench.reset()
    bench.negotiate()
    got = [bench.base(queue) for queue in queues]
    demand(not any(got), f"bases {got} after a reset")
    return f"base 0 of {len(queues)} queues"


@rule("base_unset", "After a reset a queue whose base is not set starts at 0", f"{_VRING}; virtio 1.3, 2.4")
def base_unset(bench: Bench) -> str:
    running(bench).works(3, "before a reset")
    bench.restart()
    job = work(bench)
    for queue in job.queues:
        bench.set_up(queue, None)
    bench.driver_ok()
    return job.works(2, "after a reset, without a base")


@rule(
    "base_16_bits",
    "A base beyond 16 bits is refused with EINVAL",
    "drivers/vhost/vhost.c:vhost_vring_ioctl, VHOST_SET_VRING_BASE",
)
def base_16_bits(bench: Bench) -> str:
    bench.own()
    bench.negotiate()
    return bench.refused(lambda: bench.c.set_vring_base(0, 0x10000), [errno.EINVAL], "65536")


@rule("addr_alignment", "An avail or used ring that is not aligned is refused with EINVAL", f"{_ADDR}; virtio 1.3, 2.7")
def addr_alignment(bench: Bench) -> str:
    c = bench.own()
    bench.refused(lambda: c.set_vring_addr(0, 0x1000, 0x2001, 0x3000), [errno.EINVAL], "avail ring at an odd address")
    return bench.refused(lambda: c.set_vring_addr(0, 0x1000, 0x2000, 0x3002), [errno.EINVAL], "used ring at 2 modulo 4")


@rule("addr_flags", "Unknown flags of an address are refused with EOPNOTSUPP", _ADDR)
def addr_flags(bench: Bench) -> str:
    bench.own()
    return bench.refused(
        lambda: bench.c.request("VHOST_SET_VRING_ADDR", b"\0\0\0\0\2"), [errno.EOPNOTSUPP], "flag bit 1"
    )


@rule("addr_running", "Addresses cannot be changed while the device runs: EINVAL", f"{_VRING}, VHOST_SET_VRING_ADDR")
def addr_running(bench: Bench) -> str:
    job = running(bench)
    q = job.main
    bench.refused_by_core(lambda: bench.c.set_vring_addr(q.index, q.desc, q.avail, q.used), "SET_VRING_ADDR")
    return job.works(what="after SET_VRING_ADDR was refused")


@rule("base_running", "The base cannot be changed while the device runs: EINVAL", f"{_VRING}, VHOST_SET_VRING_BASE")
def base_running(bench: Bench) -> str:
    job = running(bench)
    bench.refused_by_core(lambda: bench.c.set_vring_base(job.main.index, 1), "SET_VRING_BASE")
    return job.works(what="after SET_VRING_BASE was refused")


def _works_with(bench: Bench, sizes: Sequence[int]) -> str:
    bench.prepare()
    for size in sizes:
        bench.restart()
        job = work(bench, num=size).start()
        at_once = 1 if size < 16 else 4
        # around a small ring, so that a device with another idea of its size is seen
        for _ in range(max(3, (size + 8) // at_once if size <= _AROUND else 0)):
            job.works(at_once, f"ring size {size}")
        for q in job.queues:
            behind = q.used - q.ring.iova + 6 + 8 * size
            rest = q.ring.read(q.ring.size - behind, behind)
            demand(not any(rest), f"ring size {size}: queue {q.index} was written behind the used ring")
    return f"ring sizes {' '.join(map(str, sizes))}"


@rule("size_smallest", "It works with the smallest ring", f"virtio 1.3, 2.7; {_NUM}")
def size_smallest(bench: Bench) -> str:
    least = max(bench.facts.ring_least, 4 if bench.facts.is_block else 1)
    try:
        return _works_with(bench, [least])
    except Broken as e:
        raise CannotTell(
            f"ring size {least}: {e}; a parent may have a minimum that no ioctl returns (get_vq_num_min)"
        ) from e


@rule(
    "size_each",
    "It works with each power of two up to its largest ring",
    f"virtio 1.3, 2.7; {_VRING}, VHOST_SET_VRING_NUM",
    deadline=30,
)
def size_each(bench: Bench) -> str:
    most = bench.ring_size(0, 1, most=_MOST)
    least = max(bench.facts.ring_least, 16)
    return _works_with(bench, [1 << k for k in range(most.bit_length()) if least <= 1 << k <= most] or [most])


@rule("size_largest", "It works with its largest ring", f"virtio 1.3, 2.7; {_VRING}, VHOST_SET_VRING_NUM")
def size_largest(bench: Bench) -> str:
    most = bench.ring_size(0, 1, most=32768)
    bench.arena(size=SIZE + 4 * SplitLayout(most).size)
    return _works_with(bench, [most])


@rule(
    "num_default_forgotten",
    "A ring size that was set before a reset does not apply after it",
    "virtio 1.3, 2.4; include/linux/vdpa.h:vdpa_config_ops.set_vq_num",
)
def num_default_forgotten(bench: Bench) -> str:
    most = bench.ring_size(0, 1)
    if most < 32 or bench.facts.ring_least > 16:
        raise CannotTell(f"rings of {max(16, bench.facts.ring_least)} to {most} descriptors: no two sizes to try")
    bench.prepare()
    for size in (16, most):
        bench.restart()
        job = work(bench, num=size).start()
        for _ in range(3 * size // 4):
            job.works(2, f"ring size {size}")
    return f"16, then {most} descriptors"


def _from_base(bench: Bench, base: int, units: int) -> str:
    bench.prepare()
    job = work(bench, base=base).start(base)
    for _ in range(units):
        job.works(1, f"from base {base}")
    return f"{units} descriptors from base {base}"


@rule("base_start", "It starts where the base says", f"{_VRING}, VHOST_SET_VRING_BASE; virtio 1.3, 2.7.13")
def base_start(bench: Bench) -> str:
    return _from_base(bench, 1000, 3)


@rule("base_wrap", "The indices wrap at 65536", "virtio 1.3, 2.7.6 and 2.7.8")
def base_wrap(bench: Bench) -> str:
    return _from_base(bench, 65533, 6)


@rule(
    "any_order",
    "A queue can be set up in any order",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl; include/linux/vdpa.h:vdpa_config_ops",
)
def any_order(bench: Bench) -> str:
    bench.prepare()
    job = work(bench)
    c = bench.c
    for q in job.queues:
        c.set_vring_call(q.index, q.call_fd)
        c.set_vring_kick(q.index, q.kick_fd)
        c.set_vring_addr(q.index, q.desc, q.avail, q.used)
        bench.set_base(q.index, 0)
        c.set_vring_num(q.index, q.num)
        c.set_vring_enable(q.index, True)
    bench.driver_ok()
    return job.works()


@rule("before_driver_ok", "Nothing is used before DRIVER_OK, kicked or not", "virtio 1.3, 2.1.2")
def before_driver_ok(bench: Bench) -> str:
    bench.prepare()
    job = work(bench)
    job.set_up()
    job.ignored("before DRIVER_OK", 2)
    bench.driver_ok()
    job.kick()
    return job.finish(2, "after DRIVER_OK")


@rule("not_enabled", "A queue that is not enabled is not touched", _READY)
def not_enabled(bench: Bench) -> str:
    bench.prepare()
    job = work(bench)
    job.set_up(enable=False)
    job.offer(2)
    bench.driver_ok()
    job.kick()
    job.rests("not enabled")
    return "nothing was used"


@rule("receive_not_enabled", "A receive queue that is not enabled gets no frames", _READY, NET)
def receive_not_enabled(bench: Bench) -> str:
    if not bench.facts.loops:
        raise CannotTell("the device does not send frames back to itself")
    bench.prepare()
    job = NetWork(bench)
    bench.set_up(job.rx, 0, enable=False)
    bench.set_up(job.tx, 0)
    bench.driver_ok()
    job.give(2)
    # whether the transmit queue works alone is the device's affair
    job.tx.collect(2, REST_S)
    time.sleep(REST_S)
    demand(not job.rx.used_index, f"{job.rx.used_index} receive buffers of a queue that is not enabled were used")
    return "nothing was received"


def _late(bench: Bench) -> Work:
    bench.needs(BackendFeature.ENABLE_AFTER_DRIVER_OK)
    bench.prepare()
    job = work(bench)
    job.set_up(enable=False)
    bench.driver_ok()
    return job


_AFTER = "include/uapi/linux/vhost_types.h:VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK"


@rule("enable_after_driver_ok", "Queues can be enabled after DRIVER_OK", _AFTER)
def enable_after_driver_ok(bench: Bench) -> str:
    job = _late(bench)
    for q in job.queues:
        bench.c.set_vring_enable(q.index, True)
    return job.works(what="enabled after DRIVER_OK")


@rule("enable_one_by_one", "A queue that is enabled later than the others works", _AFTER)
def enable_one_by_one(bench: Bench) -> str:
    job = _late(bench)
    for q in reversed(job.queues):
        bench.c.set_vring_enable(q.index, True)
        q.kick()
    return job.works(2, "enabled one by one")


@rule("enable_twice", "Enabling a queue that is enabled changes nothing", _READY)
def enable_twice(bench: Bench) -> str:
    job = running(bench)
    job.works()
    for q in job.queues:
        bench.c.set_vring_enable(q.index, True)
    return job.works(what="after enabling twice")


@rule(
    "kick_pending",
    "A kick eventfd that has a count when it is set kicks at once",
    "drivers/vhost/vhost.c:vhost_poll_start",
)
def kick_pending(bench: Bench) -> str:
    job = running(bench)
    job.works()
    for q in job.queues:
        bench.c.set_vring_kick(q.index, -1)
    if not job.waits_for_kick():
        raise CannotTell(_UNASKED)
    job.kick()
    for q in job.queues:
        bench.c.set_vring_kick(q.index, q.kick_fd)
    return job.finish(1, "kick set with a count")


@rule(
    "kick_replaced",
    "Another kick eventfd takes the place of the old one",
    "drivers/vhost/vhost.c:vhost_vring_ioctl, VHOST_SET_VRING_KICK",
)
def kick_replaced(bench: Bench) -> str:
    job = running(bench)
    job.works()
    fds = []
    for q in job.queues:
        fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        bench.c.set_vring_kick(q.index, fds[-1])
    if not job.waits_for_kick():
        raise CannotTell(_UNASKED)
    for fd in fds:
        os.eventfd_write(fd, 1)
    return job.finish(1, "kicked by another eventfd")


@rule(
    "kick_unbound",
    "An eventfd that was unbound does not kick",
    "drivers/vhost/vhost.c:vhost_vring_ioctl, VHOST_SET_VRING_KICK",
)
def kick_unbound(bench: Bench) -> str:
    job = running(bench)
    job.works()
    if not job.waits_for_kick():
        raise CannotTell(_UNASKED)
    for q in job.queues:
        bench.c.set_vring_kick(q.index, -1)
    job.from_now()
    job.kick()
    job.rests("kicked by an unbound eventfd")
    return "nothing was used"


@rule("kick_many", "Kicks for nothing do no harm", "virtio 1.3, 2.7.13.4; drivers/vhost/vdpa.c:handle_vq_kick")
def kick_many(bench: Bench) -> str:
    job = running(bench)
    for _ in range(200):
        job.kick()
    job.rests("kicked with nothing to do")
    return job.works(2, "after 200 kicks for nothing")


@rule(
    "bad_eventfd",
    "A descriptor that is not an eventfd is refused",
    "drivers/vhost/vhost.c:vhost_vring_ioctl (eventfd_fget)",
)
def bad_eventfd(bench: Bench) -> str:
    c = bench.own()
    reading, writing = os.pipe()
    try:
        bench.refused(lambda: c.set_vring_kick(0, reading), [errno.EINVAL], "a pipe as kick")
        bench.refused(lambda: c.set_vring_call(0, reading), [errno.EINVAL], "a pipe as call")
    finally:
        os.close(reading)
        os.close(writing)
    return bench.refused(lambda: c.set_vring_kick(0, 9999), [errno.EBADF], "a closed descriptor")


@rule(
    "doorbell",
    "Writing to the doorbell page notifies the device",
    "drivers/vhost/vdpa.c:vhost_vdpa_mmap; include/linux/vdpa.h:vdpa_config_ops.get_vq_notification",
)
def doorbell(bench: Bench) -> str:
    job = running(bench)
    job.works()
    try:
        pages = [(q.index, bench.c.mmap_doorbell(q.index)) for q in job.queues]
    except KernelError as e:
        raise NotOffered(f"the parent does not have a doorbell page ({os.strerror(e.errno or 0)})") from e
    for q in job.queues:
        bench.c.set_vring_kick(q.index, -1)
    if not job.waits_for_kick():
        raise CannotTell(_UNASKED)
    for number, page in pages:
        page[0:2] = number.to_bytes(2, "little")
    seen = job.finish(1, "rung by the doorbell")
    for _, page in pages:
        page.close()
    return seen


@rule("doorbell_form", "A doorbell that is not one writable page is refused", "drivers/vhost/vdpa.c:vhost_vdpa_mmap")
def doorbell_form(bench: Bench) -> str:
    import mmap  # noqa: PLC0415

    bench.own()
    try:
        mmap.mmap(bench.c.fileno(), mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ).close()
    except OSError as e:
        demand(e.errno in (errno.EINVAL, _ENOTSUPP), f"a readable page: {e.strerror}")
        return f"a readable page: {os.strerror(e.errno or 0)}"
    raise Broken("a readable doorbell page was mapped")


@rule("other_queues_untouched", "Queues that were not set up do not disturb the others", _READY)
def other_queues_untouched(bench: Bench) -> str:
    if bench.facts.vqs_count <= (1 if bench.facts.is_block else 2):
        raise NotOffered("the device does not have other queues")
    job = running(bench)
    bench.c.set_status(RUNNING)
    seen = job.works(4)
    demand(Status.NEEDS_RESET not in bench.c.get_status(), "NEEDS_RESET")
    return seen
