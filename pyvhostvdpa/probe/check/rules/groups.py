# SPDX-License-Identifier: MIT
"""Groups of queues and the address spaces that they are bound to."""

from __future__ import annotations

import errno
import os

from ....base.uapi import Status
from ..bench import Bench
from ..rule import CannotTell, Group, NotOffered, demand, offered
from ..work import Control, NetWork, work

GROUP = Group("groups", "groups and address spaces")
rule = GROUP.rule
_GROUP = "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_VDPA_GET_VRING_GROUP"
_ASID = "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_VDPA_SET_GROUP_ASID"


def _data_groups(bench: Bench) -> set[int]:
    """Return every group that queues 0 and 1 need: the data groups and the descriptor groups."""
    data = set(bench.group_of[: 1 if bench.facts.is_block else 2])
    return data | set((bench.facts.desc_groups or ())[: 1 if bench.facts.is_block else 2])


@rule("below_number", "Each queue is in a group that the device has", _GROUP)
def below_number(bench: Bench) -> str:
    bench.own()
    bench.negotiate()
    lacking = bench.errno_of(lambda: bench.c.get_vring_group(0)) == errno.EOPNOTSUPP
    offered(not lacking, "the parent does not implement get_vq_group")
    groups = [bench.c.get_vring_group(i) for i in range(bench.facts.vqs_count)]
    demand(all(g < bench.facts.group_num for g in groups), f"groups {groups} of {bench.facts.group_num}")
    return f"by queue: {' '.join(map(str, groups))}"


@rule("same_again", "A queue stays in its group as long as the features are the same", _GROUP)
def same_again(bench: Bench) -> str:
    bench.group_of  # noqa: B018
    found = []
    bench.own()
    for _ in range(2):
        bench.reset()
        bench.negotiate()
        found.append([bench.c.get_vring_group(i) for i in range(bench.facts.vqs_count)])
    demand(found[0] == found[1], f"{found[0]}, then {found[1]}")
    return "the same after a reset"


@rule("asid_range", "An address space that the device does not have is refused with EINVAL", _ASID)
def asid_range(bench: Bench) -> str:
    bench.own()
    bench.negotiate()
    beyond = bench.facts.as_num
    return bench.refused(lambda: bench.c.set_group_asid(0, beyond), [errno.EINVAL], f"ASID {beyond}")


@rule("group_range", "A group that the device does not have is refused", _ASID)
def group_range(bench: Bench) -> str:
    bench.own()
    bench.negotiate()
    beyond = bench.facts.group_num
    # kernels that did not compare with the number of groups ask the parent, which may lack set_group_asid
    numbers = [errno.EINVAL, errno.ENOBUFS, errno.EOPNOTSUPP]
    return bench.refused(lambda: bench.c.set_group_asid(beyond, 0), numbers, f"group {beyond}")


@rule("bind_each", "Each group can be bound to each address space", _ASID)
def bind_each(bench: Bench) -> str:
    bench.needs_address_spaces()
    bench.own()
    bench.negotiate()
    groups = sorted({g for g in (*bench.group_of, *(bench.facts.desc_groups or ())) if g < bench.facts.vqs_count})
    for group in groups:
        for asid in range(min(bench.facts.as_num, 8)):
            bench.c.set_group_asid(group, asid)
    return f"groups {groups}, {bench.facts.as_num} address spaces"


@rule("works_in_1", "Queues that are bound to address space 1 work in it", _ASID)
def works_in_1(bench: Bench) -> str:
    bench.needs_address_spaces()
    bench.own()
    bench.map(asid=1)
    bench.negotiate()
    bench.bind(dict.fromkeys(_data_groups(bench), 1))
    job = work(bench).start()
    return job.works(2, "in ASID 1")


@rule("apart", "The same IOVA leads to other memory in another address space", _ASID)
def apart(bench: Bench) -> str:
    bench.needs_address_spaces()
    bench.own()
    for asid in (0, 1):
        other = bench.arena(1 - asid)
        before = other.all.read()
        bench.reset()
        # a parent may forget its maps over a reset
        for each in (0, 1):
            bench.unmap(bench.arena(each), each)
            bench.map(bench.arena(each), each)
        bench.negotiate()
        bench.bind(dict.fromkeys(_data_groups(bench), asid))
        job = work(bench, bench.arena(asid)).start()
        job.works(2, f"in ASID {asid}")
        demand(
            other.all.read() == before,
            f"bound to ASID {asid}, it wrote to the memory that is mapped in ASID {1 - asid}",
        )
    return "memory of the other address space was not touched"


@rule(
    "reset_to_0",
    "A reset binds every group to address space 0 again",
    "drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_compat_reset; drivers/vdpa/vdpa_sim/vdpa_sim.c:vdpasim_do_reset",
)
def reset_to_0(bench: Bench) -> str:
    bench.needs_address_spaces()
    bench.own()
    for asid in (0, 1):
        bench.map(bench.arena(asid), asid)
    bench.negotiate()
    bench.bind(dict.fromkeys(_data_groups(bench), 1))
    bench.reset()
    bench.unmap(bench.arena(0), 0)
    bench.map(bench.arena(0), 0)
    bench.negotiate()
    job = work(bench, bench.arena(0)).start()
    return job.works(2, "in ASID 0 after a reset")


@rule("bind_running", "Binding while the device runs is refused, or does not change the running queues", _ASID)
def bind_running(bench: Bench) -> str:
    bench.needs_address_spaces()
    bench.own()
    bench.map(asid=0)
    bench.map(asid=1)
    bench.negotiate()
    job = work(bench).start()
    job.works()
    number = bench.errno_of(lambda: bench.c.set_group_asid(min(_data_groups(bench)), 1))
    job.works(2, "after a group was bound while the device runs")
    if number:
        return os.strerror(number)
    raise CannotTell("this kernel lets the parent decide, which took it; later ones refuse it with EBUSY")


@rule("control_apart", "The control queue works in an address space of its own", _ASID)
def control_apart(bench: Bench) -> str:
    bench.needs_address_spaces()
    index = bench.needs_control()
    group = bench.group_of[index]
    mine = {group, *((bench.facts.desc_groups[index],) if bench.facts.desc_groups else ())}
    if mine & _data_groups(bench):
        raise NotOffered("the control queue is in a group of the data queues, or its descriptors are")
    bench.own()
    bench.map(bench.arena(0), 0)
    bench.map(bench.arena(1), 1)
    bench.negotiate()
    bench.bind(dict.fromkeys(mine, 1))
    job = NetWork(bench, bench.arena(0))
    job.set_up()
    control = Control(bench, index, bench.arena(1))
    control.set_up()
    bench.driver_ok()
    job.works()
    ack = control.command(bytes([0xEE, 0]))
    demand(Status.NEEDS_RESET not in bench.c.get_status(), "NEEDS_RESET")
    return f"a command in ASID 1 was answered with {ack}"


@rule("control_in_1", "The control queue works in the address space that its group is bound to", _ASID)
def control_in_1(bench: Bench) -> str:
    bench.needs_address_spaces()
    index = bench.needs_control()
    mine = {bench.group_of[index], *((bench.facts.desc_groups[index],) if bench.facts.desc_groups else ())}
    bench.own()
    bench.map(asid=1)
    bench.negotiate()
    # groups of these queues and no others: a queue in another group than its parent says is left behind
    bench.bind(dict.fromkeys(mine | _data_groups(bench), 1))
    job = NetWork(bench)
    job.set_up()
    control = Control(bench, index)
    control.set_up()
    bench.driver_ok()
    ack = control.command(bytes([0xEE, 0]))
    return f"answered with {ack}; {job.works(1, 'beside the control queue')}"


@rule("together", "Two groups can be bound to the same address space", _ASID)
def together(bench: Bench) -> str:
    bench.needs_address_spaces()
    bench.own()
    bench.map(asid=1)
    bench.negotiate()
    groups = {g for g in (*bench.group_of, *(bench.facts.desc_groups or ())) if g < bench.facts.vqs_count}
    bench.bind(dict.fromkeys(groups, 1))
    job = work(bench).start()
    return job.works(2, "all groups in ASID 1")
