# SPDX-License-Identifier: MIT
"""RESUME: the device continues where it was suspended."""

from __future__ import annotations

from ....base.uapi import BackendFeature, Status
from ..bench import LACKING, Bench
from ..rule import CannotTell, Group, NotOffered, demand
from ..work import NetWork, Work, controlled, running, work
from .suspend import suspended

GROUP = Group("resume", "resume")
rule = GROUP.rule
_RESUME = "drivers/vhost/vdpa.c:vhost_vdpa_resume, the comment above it"


def _resumable(bench: Bench, units: int = 2) -> Work:
    bench.needs(BackendFeature.RESUME)
    return suspended(bench, units)


@rule(
    "not_offered", "Where RESUME is not offered it is refused with EOPNOTSUPP", "drivers/vhost/vdpa.c:vhost_vdpa_resume"
)
def not_offered(bench: Bench) -> str:
    if BackendFeature.RESUME in bench.facts.backend:
        raise NotOffered("RESUME is offered")
    running(bench)
    return bench.refused(bench.c.resume, LACKING, "RESUME")


@rule("before_driver_ok", "Before DRIVER_OK it is taken and does nothing", _RESUME)
def before_driver_ok(bench: Bench) -> str:
    bench.needs(BackendFeature.RESUME)
    bench.prepare()
    bench.c.resume()
    job = work(bench)
    job.set_up()
    job.ignored("RESUME before DRIVER_OK")
    return "nothing was used"


@rule("running", "A device that was not suspended is not disturbed", _RESUME)
def resume_running(bench: Bench) -> str:
    bench.needs(BackendFeature.RESUME)
    job = running(bench)
    job.works()
    bench.c.resume()
    return job.works(2, "RESUME while it runs")


@rule("continues", "It continues where it was, without being set up again", _RESUME)
def continues(bench: Bench) -> str:
    job = _resumable(bench)
    # a device that begins anew would use the same descriptors again, and reach the right index by that
    job.main.forget()
    bench.c.resume()
    return job.works(3, "resumed")


@rule("what_waited", "Descriptors made available during a suspension are used after a kick", _RESUME)
def what_waited(bench: Bench) -> str:
    job = _resumable(bench)
    job.offer(3)
    job.rests("suspended")
    bench.c.resume()
    job.kick()
    return job.finish(3, "resumed and kicked")


@rule("kicked_while", "Descriptors kicked during a suspension are used after RESUME", _RESUME)
def kicked_while(bench: Bench) -> str:
    job = _resumable(bench)
    job.ignored("suspended", 2)
    bench.c.resume()
    if len(job.wait(2, 1.0)) < 2:
        raise CannotTell("a kick while suspended is lost; nothing says that it may not be: kick again after RESUME")
    return "used without another kick"


@rule(
    "under_load",
    "Suspended and resumed under load, it loses nothing and repeats nothing",
    f"{_RESUME}; virtio 1.3, 2.7.8",
    deadline=20,
)
def under_load(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND, BackendFeature.RESUME)
    job = running(bench)
    job.works()
    for _ in range(8):
        job.give(6)
        bench.c.suspend()
        bench.c.resume()
        job.kick()
        job.finish(6, "suspended and resumed under load")
    return "48 descriptors, 8 suspensions"


@rule("many", "It can be suspended and resumed again and again", _RESUME, deadline=20)
def many(bench: Bench) -> str:
    job = _resumable(bench)
    for _ in range(20):
        bench.c.resume()
        job.works(1, "resumed")
        bench.c.suspend()
        job.give()
        job.rests("suspended", 0.01)
        bench.c.resume()
        job.kick()
        job.finish(1, "resumed")
        bench.c.suspend()
    return "20 times"


@rule("twice", "A second RESUME changes nothing", _RESUME)
def twice(bench: Bench) -> str:
    job = _resumable(bench)
    bench.c.resume()
    bench.c.resume()
    return job.works(2, "resumed twice")


@rule(
    "runs_again",
    "After it addresses and bases cannot be changed any more",
    "drivers/vhost/vdpa.c:vhost_vdpa_resume (suspended); vhost_vdpa_vring_ioctl",
)
def runs_again(bench: Bench) -> str:
    job = _resumable(bench)
    bench.c.resume()
    q = job.main
    bench.refused_by_core(lambda: bench.c.set_vring_base(q.index, 0), "SET_VRING_BASE")
    return bench.refused_by_core(lambda: bench.c.set_vring_addr(q.index, q.desc, q.avail, q.used), "SET_VRING_ADDR")


@rule("interrupts", "Interrupts come again", f"{_RESUME}; virtio 1.3, 2.7.7.2")
def interrupts(bench: Bench) -> str:
    job = _resumable(bench)
    for q in job.queues:
        q.called(0)
    bench.c.resume()
    job.give()
    demand(job.main.called(3.0), f"no interrupt of queue {job.main.index} after RESUME")
    return job.finish(1, "resumed")


@rule(
    "new_call",
    "A call eventfd that was set while it was suspended is used",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_SET_VRING_CALL",
)
def new_call(bench: Bench) -> str:
    job = _resumable(bench)
    q = job.main
    bench.c.set_vring_call(q.index, -1)
    bench.c.set_vring_call(q.index, q.call_fd)
    q.called(0)
    bench.c.resume()
    job.give()
    demand(q.called(3.0), "no interrupt by the eventfd that was set while suspended")
    return job.finish(1, "resumed")


@rule(
    "other_rings",
    "Rings that were moved while it was suspended are used where they are now",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_SET_VRING_ADDR; mlx5_vnet.c:mlx5_vdpa_set_vq_address",
)
def other_rings(bench: Bench) -> str:
    job = _resumable(bench, 3)
    bases = [bench.base(q.index) for q in job.queues]
    fresh = work(bench, base=bases[0])
    for q, old, base in zip(fresh.queues, job.queues, bases, strict=True):
        q.begin(base)
        bench.c.set_vring_addr(q.index, q.desc, q.avail, q.used)
        bench.set_base(q.index, base)
        bench.c.set_vring_kick(q.index, q.kick_fd)
        bench.c.set_vring_call(q.index, q.call_fd)
        demand(q.num == old.num, "another size")
    bench.c.resume()
    fresh.give(2)
    if len(fresh.wait(2, 1.0)) < 2:
        raise CannotTell("the old rings stay in use until the queues are disabled and enabled, which is allowed")
    return "the new rings are used"


@rule(
    "control",
    "The control queue works again, once it is enabled",
    f"{_RESUME}; drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_cvq_suspend",
)
def control(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND, BackendFeature.RESUME)
    job, queue = controlled(bench)
    queue.command(bytes([0xEE, 0]))
    bench.c.suspend()
    bench.c.resume()
    bench.c.set_vring_enable(queue.queue.index, True)
    queue.command(bytes([0xEE, 0]))
    assert isinstance(job, NetWork)
    demand(Status.NEEDS_RESET not in bench.c.get_status(), "NEEDS_RESET")
    return job.works(1, "resumed")
