# SPDX-License-Identifier: MIT
"""Several queue pairs of a network device."""

from __future__ import annotations

import struct

from ....base.uapi import BackendFeature
from ....net.control import OK, VQ_PAIRS_SET, Class, command
from ....net.features import Feature
from ..bench import Bench
from ..rule import NET, Group, NotOffered, demand
from ..work import Control, NetWork, second_pair_rests

GROUP = Group("mq", "multi-queue")
rule = GROUP.rule
_MQ = "virtio 1.3, 5.1.6.5.6"
_MOST = 4


def _pairs(bench: Bench) -> int:
    bench.needs_feature(Feature.MQ)
    if bench.facts.pairs < 2 or Feature.MQ not in bench.facts.features:
        raise NotOffered("the device has one queue pair")
    return min(bench.facts.pairs, _MOST)


def _start(bench: Bench) -> tuple[list[NetWork], Control]:
    pairs = _pairs(bench)
    index = bench.needs_control()
    bench.prepare()
    size = bench.ring_size(*range(2 * pairs), most=16)
    jobs = [NetWork(bench, num=size, pair=pair) for pair in range(pairs)]
    for job in jobs:
        job.set_up()
    control = Control(bench, index)
    control.set_up()
    bench.driver_ok()
    return jobs, control


def _set(control: Control, pairs: int) -> int:
    return control.command(command(Class.MQ, VQ_PAIRS_SET, struct.pack("<H", pairs)))


@rule(
    "one_at_first",
    "Only the first pair is used until the driver says otherwise",
    "virtio 1.3, 5.1.5 and 5.1.6.5.6",
    NET,
)
def one_at_first(bench: Bench) -> str:
    jobs, _ = _start(bench)
    jobs[0].works(2, "the first pair")
    second_pair_rests(jobs[1], "the second pair, not asked for")
    return "the second pair rests"


@rule("set", "As many pairs as there are can be asked for", _MQ, NET)
def set_pairs(bench: Bench) -> str:
    jobs, control = _start(bench)
    for pairs in range(1, len(jobs) + 1):
        demand(_set(control, pairs) == OK, f"{pairs} pairs: answered with ERR")
    return f"1 to {len(jobs)} pairs"


@rule("zero", "No pair at all is refused", f"{_MQ} (VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN)", NET)
def zero(bench: Bench) -> str:
    _, control = _start(bench)
    demand(_set(control, 0) != OK, "0 pairs: answered with OK")
    return "ERR"


@rule("too_many", "More pairs than there are are refused", f"{_MQ} (max_virtqueue_pairs)", NET)
def too_many(bench: Bench) -> str:
    _, control = _start(bench)
    demand(_set(control, bench.facts.pairs + 1) != OK, f"{bench.facts.pairs + 1} pairs: answered with OK")
    return "ERR"


@rule("each_works", "Each pair sends and receives once it is asked for", _MQ, NET)
def each_works(bench: Bench) -> str:
    jobs, control = _start(bench)
    demand(_set(control, len(jobs)) == OK, f"{len(jobs)} pairs: answered with ERR")
    for pair, job in enumerate(jobs):
        job.give(3)
        got = job.wait(3)
        demand(len(got) == 3, f"pair {pair}: {len(got)} of 3 descriptors were used")
    return f"{len(jobs)} pairs"


@rule("back_to_one", "With one pair again the others rest", f"{_MQ} (MUST NOT, for receive queues)", NET)
def back_to_one(bench: Bench) -> str:
    jobs, control = _start(bench)
    demand(_set(control, 2) == OK and _set(control, 1) == OK, "2, then 1 pair: answered with ERR")
    jobs[0].works(2, "the first pair")
    second_pair_rests(jobs[1], "the second pair, with one asked for again")
    return "the second pair rests"


@rule("suspend_all", "SUSPEND stops every pair", "drivers/vhost/vdpa.c:vhost_vdpa_suspend, the comment above it", NET)
def suspend_all(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    jobs, control = _start(bench)
    demand(_set(control, len(jobs)) == OK, f"{len(jobs)} pairs: answered with ERR")
    bench.c.suspend()
    for job in jobs:
        job.offer(2)
        job.kick()
    for pair, job in enumerate(jobs):
        job.rests(f"pair {pair}, suspended")
    return f"{len(jobs)} pairs rest"
