# SPDX-License-Identifier: MIT
"""Descriptor groups: rings in an address space of their own."""

from __future__ import annotations

import errno

from ....base.uapi import BackendFeature
from ..bench import LACKING, REST_S, Bench
from ..rule import CannotTell, Group, NotOffered, demand
from ..work import Control, NetWork, Work, work

GROUP = Group("desc", "descriptor groups")
rule = GROUP.rule
_UAPI = "include/uapi/linux/vhost.h:VHOST_VDPA_GET_VRING_DESC_GROUP"
_IOCTL = "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_VDPA_GET_VRING_DESC_GROUP"


def _groups(bench: Bench) -> tuple[int, int]:
    """Return the data group and the descriptor group of the first queues; :class:`NotOffered` if they are one."""
    bench.needs(BackendFeature.DESC_ASID)
    bench.needs_address_spaces()
    data, desc = bench.group_of, bench.facts.desc_groups
    if desc is None:
        raise NotOffered("no queue has a descriptor group")
    if desc[0] == data[0]:
        raise NotOffered("descriptors are in their queues' own group")
    return data[0], desc[0]


def _split(bench: Bench, rings_in: int, buffers_in: int) -> Work:
    """Return work with rings and buffers in memory of their own, at the same IOVAs, each in an address space."""
    rings, buffers = bench.arena(0), bench.arena(1)
    # the same place twice: what is a ring here is other memory there
    buffers.allocate(1 << 20)
    bench.own()
    bench.map(rings, rings_in)
    bench.map(buffers, buffers_in)
    bench.negotiate()
    return work(bench, rings, buffers)


def _works_apart(bench: Bench, rings_in: int, buffers_in: int) -> str:
    data, desc = _groups(bench)
    job = _split(bench, rings_in, buffers_in)
    bench.bind({data: buffers_in, desc: rings_in})
    return job.start().works(3, f"rings in ASID {rings_in}, buffers in ASID {buffers_in}")


@rule(
    "refused",
    "Where DESC_ASID is not offered it is refused",
    "drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl, VHOST_SET_BACKEND_FEATURES",
)
def refused(bench: Bench) -> str:
    if BackendFeature.DESC_ASID in bench.facts.backend:
        raise NotOffered("DESC_ASID is offered")
    both = BackendFeature.DESC_ASID | BackendFeature.IOTLB_ASID
    bench.refused(lambda: bench.c.set_backend_features(both), [errno.EOPNOTSUPP], "DESC_ASID")
    bench.own()
    return bench.refused(lambda: bench.c.get_vring_desc_group(0), LACKING, "GET_VRING_DESC_GROUP")


@rule(
    "needs_asid",
    "DESC_ASID without IOTLB_ASID is refused with EINVAL",
    "drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl, VHOST_SET_BACKEND_FEATURES",
)
def needs_asid(bench: Bench) -> str:
    return bench.refused(
        lambda: bench.c.set_backend_features(BackendFeature.DESC_ASID),
        [errno.EINVAL, errno.EOPNOTSUPP],
        "DESC_ASID alone",
    )


@rule("below_number", "Each queue's descriptor group is one that the device has", _IOCTL)
def below_number(bench: Bench) -> str:
    bench.needs(BackendFeature.DESC_ASID)
    bench.own()
    bench.negotiate()
    found = [bench.c.get_vring_desc_group(i) for i in range(bench.facts.vqs_count)]
    demand(all(g < bench.facts.group_num for g in found), f"descriptor groups {found} of {bench.facts.group_num}")
    return f"by queue: {' '.join(map(str, found))}"


@rule(
    "same_for_data",
    "All data queues have the same descriptor group",
    "QEMU hw/virtio/vhost-vdpa.c looks at the first queue only; " + _UAPI,
)
def same_for_data(bench: Bench) -> str:
    _groups(bench)
    control = bench.facts.control
    found = {g for i, g in enumerate(bench.facts.desc_groups or ()) if i != control}
    if len(found) > 1:
        raise CannotTell(f"descriptor groups {sorted(found)}: allowed, but drivers look at one queue only")
    return f"group {found.pop()}"


@rule("apart", "Rings in one address space and buffers in another work", _UAPI)
def apart(bench: Bench) -> str:
    return _works_apart(bench, 1, 0)


@rule("apart_other", "They work the other way round", _UAPI)
def apart_other(bench: Bench) -> str:
    return _works_apart(bench, 0, 1)


@rule("wrong_space", "Rings that are not in their group's address space are not found", _UAPI)
def wrong_space(bench: Bench) -> str:
    data, desc = _groups(bench)
    job = _split(bench, 1, 0)
    bench.bind({data: 0, desc: 0})
    job.set_up()
    job.offer()
    bench.driver_ok()
    job.kick()
    job.rests("rings in ASID 1, their group bound to ASID 0")
    return "nothing was used"


@rule("buffers_only_there", "Buffers are looked for in the data group's address space only", _UAPI)
def buffers_only_there(bench: Bench) -> str:
    data, desc = _groups(bench)
    job = _split(bench, 1, 0)
    bench.bind({data: 0, desc: 1})
    before = bench.arena(0).all.read(1 << 20, 1 << 20)
    job.start().works(2, "rings in ASID 1, buffers in ASID 0")
    demand(bench.arena(0).all.read(1 << 20, 1 << 20) == before, "it wrote to the rings' memory at a buffer's IOVA")
    return "the rings' memory was not written but for the used rings"


@rule(
    "reset_to_0",
    "A reset binds descriptor groups to address space 0 again",
    "drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_compat_reset",
)
def reset_to_0(bench: Bench) -> str:
    data, desc = _groups(bench)
    bench.own()
    bench.map(bench.arena(0), 0)
    bench.map(bench.arena(1), 1)
    bench.negotiate()
    bench.bind({data: 0, desc: 1})
    bench.reset()
    for asid in (0, 1):
        bench.unmap(bench.arena(asid), asid)
        bench.map(bench.arena(asid), asid)
    bench.negotiate()
    job = work(bench, bench.arena(0)).start()
    return job.works(2, "after a reset, all in ASID 0")


@rule("suspended", "Suspended and started again with other groups, it works", _UAPI)
def suspended(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    data, desc = _groups(bench)
    job = _split(bench, 1, 0)
    bench.bind({data: 0, desc: 1})
    job.start().works(2)
    bench.c.suspend()
    bases = [bench.base(q.index) for q in job.queues]
    bench.reset()
    for asid, arena in ((1, bench.arena(0)), (0, bench.arena(1))):
        bench.unmap(arena, asid)
        bench.map(arena, asid)
    bench.negotiate()
    bench.bind({data: 0, desc: 1})
    for q, base in zip(job.queues, bases, strict=True):
        bench.set_up(q, base)
    bench.driver_ok()
    return job.works(2, "started again at its bases")


@rule("control_with_rings", "The control queue works with its descriptors in its own group", _UAPI)
def control_with_rings(bench: Bench) -> str:
    _groups(bench)
    index = bench.needs_control()
    data = {*bench.group_of[:2], *(bench.facts.desc_groups or ())[:2]}
    if bench.facts.desc_groups is None or {bench.facts.desc_groups[index], bench.group_of[index]} & data:
        raise NotOffered("the control queue is in a group of the data queues, or its descriptors are")
    group = bench.facts.desc_groups[index]
    bench.own()
    bench.map(bench.arena(0), 0)
    bench.map(bench.arena(1), 1)
    bench.negotiate()
    bench.bind({group: 1, bench.group_of[index]: 1})
    job = NetWork(bench, bench.arena(0))
    job.set_up()
    control = Control(bench, index, bench.arena(1))
    control.set_up()
    bench.driver_ok()
    ack = control.command(bytes([0xEE, 0]))
    job.works()
    demand(not control.queue.collect(1, REST_S), "a command was answered twice")
    return f"answered with {ack}"
