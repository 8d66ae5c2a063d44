# SPDX-License-Identifier: MIT
"""SUSPEND: nothing is used any more, and the queues' positions can be read."""

from __future__ import annotations

import errno
from functools import partial

from ....base.uapi import BackendFeature, Status, names
from ..bench import LACKING, READY, REST_S, RUNNING, STARTED, Bench
from ..rule import Broken, CannotTell, Group, NotOffered, demand
from ..work import NetWork, Work, controlled, running, work

GROUP = Group("suspend", "suspend")
rule = GROUP.rule
_SUSPEND = "drivers/vhost/vdpa.c:vhost_vdpa_suspend, the comment above it"
_ROUNDS = 5


def suspended(bench: Bench, units: int = 2) -> Work:
    """Return work on a device that did some of it and was suspended."""
    bench.needs(BackendFeature.SUSPEND)
    job = running(bench)
    job.works(units)
    bench.c.suspend()
    return job


@rule(
    "not_offered",
    "Where SUSPEND is not offered it is refused with EOPNOTSUPP",
    "drivers/vhost/vdpa.c:vhost_vdpa_suspend",
)
def not_offered(bench: Bench) -> str:
    if BackendFeature.SUSPEND in bench.facts.backend:
        raise NotOffered("SUSPEND is offered")
    running(bench)
    return bench.refused(bench.c.suspend, LACKING, "SUSPEND")


@rule("before_driver_ok", "Before DRIVER_OK it is taken and does nothing", _SUSPEND)
def before_driver_ok(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    bench.prepare()
    bench.c.suspend()
    job = work(bench).start()
    return job.works(2, "started after a SUSPEND before DRIVER_OK")


@rule("stops", "After it no descriptor is used, even under load", _SUSPEND)
def stops(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    job = running(bench)
    job.works()
    for _ in range(_ROUNDS):
        job.give(8)
        bench.c.suspend()
        job.rests("suspended")
        bench.restart()
        job = work(bench).start()
    return f"{_ROUNDS} suspensions under load"


@rule("kick_while", "Kicks while it is suspended start nothing", _SUSPEND)
def kick_while(bench: Bench) -> str:
    job = suspended(bench)
    job.offer(4)
    for _ in range(5):
        job.kick()
    job.rests("kicked while suspended")
    return "nothing was used"


@rule("enable_while", "Enabling a queue while it is suspended starts nothing", _SUSPEND)
def enable_while(bench: Bench) -> str:
    job = suspended(bench)
    job.offer(2)
    for q in job.queues:
        bench.c.set_vring_enable(q.index, True)
    job.kick()
    job.rests("enabled while suspended")
    return "nothing was used"


@rule("disable_and_enable_while", "Disabling and enabling a queue while it is suspended starts nothing", _SUSPEND)
def disable_and_enable_while(bench: Bench) -> str:
    job = suspended(bench)
    job.offer(2)
    for q in job.queues:
        bench.c.set_vring_enable(q.index, False)
        bench.c.set_vring_enable(q.index, True)
    job.kick()
    job.rests("disabled and enabled while suspended")
    return "nothing was used"


@rule("status_while", "The status stays what it was", f"{_SUSPEND}; virtio 1.3, 2.1")
def status_while(bench: Bench) -> str:
    suspended(bench)
    got = bench.c.get_status()
    demand(got == RUNNING, f"status {names(got)} while suspended")
    return names(got)


@rule("driver_ok_again", "Writing DRIVER_OK again while it is suspended starts nothing", _SUSPEND)
def driver_ok_again(bench: Bench) -> str:
    job = suspended(bench)
    job.offer(2)
    bench.c.set_status(RUNNING)
    job.kick()
    job.rests("DRIVER_OK written again while suspended")
    return "nothing was used"


@rule("twice", "A second SUSPEND is taken and changes nothing", _SUSPEND)
def twice(bench: Bench) -> str:
    job = suspended(bench)
    bench.c.suspend()
    job.ignored("suspended twice", 2)
    return "nothing was used"


@rule("bases_stay", "The bases stay what they are", _SUSPEND)
def bases_stay(bench: Bench) -> str:
    job = suspended(bench)
    first = [bench.base(q.index) for q in job.queues]
    job.ignored("suspended", 2)
    second = [bench.base(q.index) for q in job.queues]
    demand(first == second, f"bases {first}, then {second}")
    return f"bases {first}"


@rule(
    "base_idle",
    "With nothing in flight the base is the index that both sides have",
    f"{_SUSPEND}; drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_GET_VRING_BASE",
)
def base_idle(bench: Bench) -> str:
    job = suspended(bench, 5)
    got, used, avail = bench.base(job.main.index), job.main.used_index, job.main.avail_index
    demand(used == avail, f"used index {used}, avail index {avail} after all was used")
    demand(got == used, f"base {got}, and both indices are {used}")
    return f"base {got}"


@rule(
    "base_between",
    "Under load the base lies between the used and the avail index",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_GET_VRING_BASE; virtio 1.3, 2.7.6",
)
def base_between(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    job = running(bench)
    seen = []
    for _ in range(_ROUNDS):
        job.give(8)
        bench.c.suspend()
        for q in job.queues:
            got = bench.base(q.index)
            open_ = (q.avail_index - q.used_index) & 0xFFFF
            demand(
                (got - q.used_index) & 0xFFFF <= open_,
                f"queue {q.index}: base {got}, used index {q.used_index}, avail index {q.avail_index}",
            )
            seen.append(got)
        bench.restart()
        job = work(bench).start()
    return f"bases {seen}"


@rule(
    "addr_while",
    "Addresses may be changed while it is suspended",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_SET_VRING_ADDR",
)
def addr_while(bench: Bench) -> str:
    job = suspended(bench)
    for q in job.queues:
        number = bench.errno_of(partial(bench.c.set_vring_addr, q.index, q.desc, q.avail, q.used))
        if number:
            raise CannotTell(f"the kernel lets it through, the parent refuses it (errno {number})")
    return "SET_VRING_ADDR taken"


@rule(
    "base_while",
    "A base may be set while it is suspended",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_SET_VRING_BASE",
)
def base_while(bench: Bench) -> str:
    job = suspended(bench)
    q = job.main
    number = bench.errno_of(lambda: bench.set_base(q.index, bench.base(q.index)))
    if number:
        raise CannotTell(f"the kernel lets it through, the parent refuses it (errno {number})")
    return "SET_VRING_BASE taken"


@rule(
    "call_while",
    "Call eventfds may be changed while it is suspended",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_SET_VRING_CALL",
)
def call_while(bench: Bench) -> str:
    job = suspended(bench)
    for q in job.queues:
        bench.c.set_vring_call(q.index, -1)
        bench.c.set_vring_call(q.index, q.call_fd)
    return "SET_VRING_CALL taken"


@rule("memory_stays", "Nothing is written to the driver's memory any more", _SUSPEND)
def memory_stays(bench: Bench) -> str:
    job = suspended(bench)
    job.offer(4)
    before = bench.arena().all.read()
    job.kick()
    job.rests("suspended")
    demand(bench.arena().all.read() == before, "memory changed while it was suspended")
    return "rings and buffers stay as they were"


@rule("no_interrupt", "No interrupt comes any more", _SUSPEND)
def no_interrupt(bench: Bench) -> str:
    job = suspended(bench)
    for q in job.queues:
        q.called(REST_S)
        q.called(0)
    before = [q.used_index for q in job.queues]
    job.give(2)
    noisy = [q.index for q in job.queues if q.called(REST_S)]
    now = [q.used_index for q in job.queues]
    demand(now == before, f"used indices moved from {before} to {now} while suspended")
    if noisy:
        raise CannotTell(f"queues {noisy} interrupted, and nothing was used: drivers must handle that (2.7.7.1)")
    return "none"


@rule("control_stops", "The control queue stops as well", _SUSPEND)
def control_stops(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    _, control = controlled(bench)
    control.command(bytes([0xEE, 0]))
    bench.c.suspend()
    control.submit(bytes([0xEE, 0]))
    control.queue.kick()
    demand(control.answer(REST_S) is None, "a command was answered while suspended")
    return "a command was not answered"


@rule(
    "reset_ends_it",
    "A reset ends it: status 0, and the device works again",
    f"{_SUSPEND}; drivers/vhost/vdpa.c:_compat_vdpa_reset",
)
def reset_ends_it(bench: Bench) -> str:
    suspended(bench)
    bench.restart()
    job = work(bench).start()
    seen = job.works(2, "after a reset")
    bench.refused_by_core(lambda: bench.c.set_vring_base(job.main.index, 0), "SET_VRING_BASE while it runs again")
    return seen


@rule(
    "continue_elsewhere",
    "Started at the base that it returned, on the same rings, a device continues where it was",
    f"{_SUSPEND}; virtio 1.3, 2.7.13",
)
def continue_elsewhere(bench: Bench) -> str:
    job = suspended(bench, 3)
    bases = {q.index: bench.base(q.index) for q in job.queues}
    job.submit(3)
    bench.restart()
    for q in job.queues:
        bench.set_up(q, bases[q.index])
    bench.driver_ok()
    job.kick()
    job.finish(3, f"started again at {bases}")
    return f"started again at {bases}"


@rule(
    "nothing_lost",
    "Descriptors in flight at SUSPEND are used after a restart at the base",
    f"{_SUSPEND}; virtio 1.3, 2.7.8",
    deadline=20,
)
def nothing_lost(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    job = running(bench)
    total = 0
    for _ in range(_ROUNDS):
        job.submit(8)
        total += 8
        job.kick()
        bench.c.suspend()
        bases = {q.index: bench.base(q.index) for q in job.queues}
        for q in job.queues:
            # with heads that are fetched and not used, a base beyond the used index leaves them to the driver
            if bases[q.index] != q.used_index:
                raise CannotTell(
                    f"queue {q.index}: base {bases[q.index]}, used index {q.used_index}: "
                    "the driver has to know what was in flight"
                )
        bench.restart()
        for q in job.queues:
            bench.set_up(q, bases[q.index])
        bench.driver_ok()
        job.kick()
        got = job.main.collect(8, 3.0)
        demand(len(got) == 8, f"{len(got)} of 8 descriptors were used after {bases}")
        if isinstance(job, NetWork):
            job.sent.clear()
            job.receive(8, 0.3)
    return f"{total} descriptors over {_ROUNDS} suspensions"


@rule(
    "old_kick",
    "A kick from before a reset starts nothing after it",
    "virtio 1.3, 2.4; drivers/vdpa/vdpa_sim/vdpa_sim.c:vdpasim_do_reset (pending_kick)",
)
def old_kick(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND, BackendFeature.RESUME)

    def moves(kicked: bool) -> bool:
        bench.restart()
        job = work(bench).start()
        # what an earlier kick left is done with here
        bench.c.suspend()
        bench.c.resume()
        bench.c.suspend()
        if kicked:
            job.give()
        bench.restart()
        fresh = work(bench).start()
        # a device may look once when it starts, and late
        fresh.rests("started")
        fresh.submit()
        bench.c.suspend()
        bench.c.resume()
        return bool(fresh.wait(1, REST_S))

    bench.own()
    bench.map()
    if moves(False):
        raise CannotTell("the device looks at its queues when it is resumed, kicked or not")
    if moves(True):
        raise Broken("a kick that came while suspended, before a reset, was acted on after it")
    return "the kick went with the reset"


@rule(
    "features_while",
    "The features that were negotiated stay",
    f"{_SUSPEND}; drivers/vhost/vdpa.c:vhost_vdpa_set_features",
)
def features_while(bench: Bench) -> str:
    suspended(bench)
    bench.refused(
        lambda: bench.c.set_features(int(bench.facts.features)), [errno.EBUSY], "SET_FEATURES while suspended"
    )
    demand(bench.c.get_status() & READY == READY, "FEATURES_OK is gone")
    demand(bench.c.get_status() & STARTED == STARTED, "DRIVER is gone")
    demand(Status.NEEDS_RESET not in bench.c.get_status(), "NEEDS_RESET")
    return "features cannot be changed"
