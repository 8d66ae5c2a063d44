# SPDX-License-Identifier: MIT
"""Interrupts: an eventfd is raised when something was used, no interrupt is lost or comes after the end."""

from __future__ import annotations

import os

from ....base.uapi import BackendFeature
from ..bench import PATIENCE_S, REST_S, Bench
from ..queue import NO_INTERRUPT
from ..rule import NET, CannotTell, Group, demand
from ..work import Work, running, running_net, work

GROUP = Group("interrupts", "interrupts and eventfds")
rule = GROUP.rule
_CALL = "drivers/vhost/vdpa.c:vhost_vdpa_virtqueue_cb; virtio 1.3, 2.7.7.2"
_SET = "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_SET_VRING_CALL"


def _quiet(job: Work) -> None:
    """Let interrupts that are still on their way arrive, and clear them."""
    for q in job.queues:
        q.called(0.02)
        q.called(0)


@rule("raised", "A used descriptor raises the queue's eventfd", _CALL)
def raised(bench: Bench) -> str:
    job = running(bench)
    job.give()
    demand(job.main.called(PATIENCE_S), f"queue {job.main.index}: no interrupt")
    return job.finish(1)


@rule("receive", "A received frame raises the receive queue's eventfd", _CALL, NET)
def receive(bench: Bench) -> str:
    job = running_net(bench)
    job.works()
    job.needs_loop()
    _quiet(job)
    job.give()
    demand(job.rx.called(PATIENCE_S), "no interrupt of the receive queue")
    return job.finish(1)


@rule("after_used", "When it comes the used index has moved already", "virtio 1.3, 2.7.8.2 and 2.7.14")
def after_used(bench: Bench) -> str:
    job = running(bench)
    job.works()
    for _ in range(20):
        _quiet(job)
        before = job.main.used_index
        job.give()
        demand(job.main.called(PATIENCE_S), "no interrupt")
        demand(job.main.used_index != before, "an interrupt, and the used index has not moved")
        job.finish(1)
    return "20 times"


@rule("none_lost", "A driver that only waits for interrupts sees everything", _CALL, deadline=25)
def none_lost(bench: Bench) -> str:
    job = running(bench)
    done = 0
    for i in range(60):
        count = 1 + i % 5
        job.give(count)
        left = count
        while left:
            demand(job.main.called(PATIENCE_S), f"no interrupt for {left} of {count} descriptors in round {i + 1}")
            left -= len(job.wait(left, 0))
        done += count
    return f"{done} descriptors in 60 rounds"


@rule(
    "none_without_work",
    "None comes when nothing was used",
    "virtio 1.3, 2.7.7.1 (drivers must handle spurious ones); drivers/vhost/vdpa.c:vhost_vdpa_virtqueue_cb",
)
def none_without_work(bench: Bench) -> str:
    job = running(bench)
    job.works()
    _quiet(job)
    job.kick()
    noisy = [q.index for q in job.queues if q.called(REST_S)]
    if noisy:
        raise CannotTell(f"queues {noisy} interrupted, and nothing was used: drivers must handle that (2.7.7.1)")
    return "none"


@rule("set_while_running", "A call eventfd can be set while the device runs", _SET)
def set_while_running(bench: Bench) -> str:
    job = running(bench)
    job.works()
    q = job.main
    fresh = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    old, q.call_fd = q.call_fd, fresh
    os.close(old)
    bench.c.set_vring_call(q.index, fresh)
    job.give()
    demand(q.called(PATIENCE_S), "the new eventfd was not raised")
    return job.finish(1)


@rule("old_one_rests", "An eventfd that was replaced is not raised any more", _SET)
def old_one_rests(bench: Bench) -> str:
    job = running(bench)
    job.works()
    _quiet(job)
    fresh = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    bench.c.set_vring_call(job.main.index, fresh)
    _quiet(job)
    job.works(2)
    demand(not job.main.called(REST_S), "the old eventfd was raised")
    os.close(fresh)
    return "the old one rests"


@rule("unbound", "A queue without an eventfd works without interrupts", _SET)
def unbound(bench: Bench) -> str:
    job = running(bench)
    job.works()
    for q in job.queues:
        bench.c.set_vring_call(q.index, -1)
    _quiet(job)
    job.works(3, "without call eventfds")
    for q in job.queues:
        demand(not q.called(REST_S), f"queue {q.index}: an unbound eventfd was raised")
    return "none came"


@rule("never_bound", "A queue that never had an eventfd works", _SET)
def never_bound(bench: Bench) -> str:
    bench.prepare()
    job = work(bench)
    c = bench.c
    for q in job.queues:
        c.set_vring_num(q.index, q.num)
        c.set_vring_addr(q.index, q.desc, q.avail, q.used)
        c.set_vring_kick(q.index, q.kick_fd)
        c.set_vring_enable(q.index, True)
    bench.driver_ok()
    return job.works(2, "without call eventfds")


@rule("suppressed", "With NO_INTERRUPT set none comes", "virtio 1.3, 2.7.7.2 (SHOULD NOT)")
def suppressed(bench: Bench) -> str:
    job = running(bench)
    job.works()
    for q in job.queues:
        q.set_flags(NO_INTERRUPT)
    _quiet(job)
    job.works(4)
    noisy = [q.index for q in job.queues if q.called(REST_S)]
    if noisy:
        raise CannotTell(f"queues {noisy} still interrupt; the specification says SHOULD NOT")
    return "none came"


@rule("wanted_again", "With NO_INTERRUPT cleared they come again", "virtio 1.3, 2.7.7.2")
def wanted_again(bench: Bench) -> str:
    job = running(bench)
    for q in job.queues:
        q.set_flags(NO_INTERRUPT)
    job.works(2)
    for q in job.queues:
        q.set_flags(0)
    _quiet(job)
    job.give()
    demand(job.main.called(PATIENCE_S), "no interrupt after NO_INTERRUPT was cleared")
    return job.finish(1)


@rule("none_after_close", "None comes after the device was closed", "drivers/vhost/vdpa.c:vhost_vdpa_release")
def none_after_close(bench: Bench) -> str:
    job = running(bench)
    job.give(4)
    bench.c.close()
    _quiet(job)
    job.give(2)
    for q in job.queues:
        demand(not q.called(REST_S), f"queue {q.index}: an interrupt after close")
    return "none"


@rule("full_eventfd", "A full call eventfd does not stop the device", "fs/eventfd.c:eventfd_signal_mask")
def full_eventfd(bench: Bench) -> str:
    job = running(bench)
    os.eventfd_write(job.main.call_fd, (1 << 64) - 3)
    for _ in range(4):
        job.works(2, "with a call eventfd at its limit")
    return "it kept working"


@rule("both_directions", "Each queue raises its own eventfd", _CALL, NET)
def both_directions(bench: Bench) -> str:
    job = running_net(bench)
    job.works()
    job.needs_loop()
    _quiet(job)
    bench.c.set_vring_call(job.tx.index, -1)
    _quiet(job)
    job.works(1)
    demand(job.rx.called(PATIENCE_S), "no interrupt of the receive queue")
    demand(not job.tx.called(REST_S), "the transmit queue's eventfd was raised, which was unbound")
    return "the receive queue alone"


@rule(
    "after_resume",
    "None that is due is lost over suspend and resume",
    f"{_CALL}; drivers/vhost/vdpa.c:vhost_vdpa_resume",
)
def after_resume(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND, BackendFeature.RESUME)
    job = running(bench)
    job.works()
    for _ in range(8):
        _quiet(job)
        job.give(2)
        bench.c.suspend()
        before = job.main.taken
        due = job.main.used_index != before
        came = job.main.called(0.05)
        if due and not came:
            bench.c.resume()
            demand(job.main.called(PATIENCE_S), "something was used before SUSPEND, and no interrupt ever came")
        else:
            bench.c.resume()
        job.kick()
        job.finish(2, "resumed")
    return "8 times"
