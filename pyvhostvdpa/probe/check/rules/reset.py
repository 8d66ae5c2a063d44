# SPDX-License-Identifier: MIT
"""A reset, out of every state: it ends everything, and the device works again."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from ....base.uapi import BackendFeature, IotlbType, Status, names
from ....net.control import Class, Rx, command
from ....net.features import Feature
from ..bench import READY, REST_S, STARTED, Bench
from ..queue import Desc
from ..rule import NET, CannotTell, Group, NotOffered, demand
from ..work import NetWork, controlled, running, second_pair_rests, work

GROUP = Group("reset", "reset in every state")
rule = GROUP.rule
_RESET = "virtio 1.3, 2.4; drivers/vhost/vdpa.c:vhost_vdpa_set_status and _compat_vdpa_reset"


def works_after(bench: Bench, what: str) -> str:
    """Reset, and demand status 0 and a device that works."""
    bench.reset()
    status = bench.c.get_status()
    demand(status == 0, f"{what}: status {names(status)} after a reset")
    bench.unmap()
    bench.map()
    bench.negotiate()
    job = work(bench).start()
    return f"{what}: {job.works(2, f'{what}, then reset')}"


def _opened(bench: Bench) -> None:
    bench.own()


def _acknowledged(bench: Bench) -> None:
    bench.own()
    bench.c.set_status(Status.ACKNOWLEDGE)


def _driver(bench: Bench) -> None:
    bench.own()
    bench.c.set_status(STARTED)


def _features_set(bench: Bench) -> None:
    _driver(bench)
    bench.c.set_features(int(bench.facts.features))


def _features_ok(bench: Bench) -> None:
    bench.own()
    bench.negotiate()


def _set_up(bench: Bench) -> None:
    _features_ok(bench)
    bench.map()
    work(bench).set_up()


def _idle(bench: Bench) -> None:
    running(bench)


def _worked(bench: Bench) -> None:
    running(bench).works(4)


def _loaded(bench: Bench) -> None:
    job = running(bench)
    job.give(16)


def _suspended(bench: Bench) -> None:
    bench.needs(BackendFeature.SUSPEND)
    job = running(bench)
    job.works()
    bench.c.suspend()
    job.give(4)


def _resumed(bench: Bench) -> None:
    bench.needs(BackendFeature.RESUME)
    _suspended(bench)
    bench.c.resume()


def _failed(bench: Bench) -> None:
    _features_ok(bench)
    bench.c.set_status(READY | Status.FAILED)


def _in_a_batch(bench: Bench) -> None:
    bench.own()
    bench.message(IotlbType.BATCH_BEGIN)
    bench.negotiate()


def _needs_reset(bench: Bench) -> None:
    job = running(bench)
    q = job.main
    q.write(0, [Desc(bench.iova, 64)])
    q.publish(q.num)
    q.kick()
    if not bench.status_becomes(Status.NEEDS_RESET, 0.5):
        raise CannotTell("a head beyond the ring does not make the device set NEEDS_RESET")


_STATES: tuple[tuple[str, str, Callable[[Bench], None]], ...] = (
    ("opened", "A device that was just opened can be reset", _opened),
    ("acknowledged", "With ACKNOWLEDGE set it can be reset", _acknowledged),
    ("driver", "With DRIVER set it can be reset", _driver),
    ("features_set", "With features written and not accepted yet it can be reset", _features_set),
    ("features_ok", "With FEATURES_OK set it can be reset", _features_ok),
    ("set_up", "With queues set up and enabled it can be reset", _set_up),
    ("idle", "With DRIVER_OK set and nothing to do it can be reset", _idle),
    ("worked", "After work it can be reset", _worked),
    ("loaded", "With work under way it can be reset", _loaded),
    ("suspended", "Suspended it can be reset", _suspended),
    ("resumed", "Resumed it can be reset", _resumed),
    ("failed", "With FAILED set it can be reset", _failed),
    ("in_a_batch", "With a batch of maps open it can be reset", _in_a_batch),
    ("needs_reset", "With NEEDS_RESET set it can be reset", _needs_reset),
)


def comes_back(bench: Bench, bring: Callable[[Bench], None], what: str) -> str:
    """Bring a device into a state, reset it, and demand that it works."""
    bring(bench)
    return works_after(bench, what)


for _name, _sentence, _bring in _STATES:
    rule(_name, f"{_sentence}, and works after it", _RESET)(partial(comes_back, bring=_bring, what=_name))


@rule(
    "stops",
    "After a reset nothing is used and nothing is written",
    "virtio 1.3, 2.4.1; include/linux/vdpa.h:vdpa_config_ops.reset",
)
def stops(bench: Bench) -> str:
    for _ in range(4):
        job = work(bench).start() if bench.queues else running(bench)
        job.give(8)
        bench.reset()
        before = bench.arena().all.read()
        job.from_now()
        job.kick()
        job.rests("reset")
        demand(bench.arena().all.read() == before, "memory changed after a reset")
        bench.restart()
    return "memory stays as it was, four times"


@rule(
    "no_interrupt", "After a reset no interrupt comes", "virtio 1.3, 2.4.1; include/linux/vdpa.h:vdpa_config_ops.reset"
)
def no_interrupt(bench: Bench) -> str:
    job = running(bench)
    job.give(4)
    bench.reset()
    for q in job.queues:
        q.called(0)
    job.kick()
    for q in job.queues:
        demand(not q.called(REST_S), f"queue {q.index} interrupted after a reset")
    return "none"


@rule(
    "disables",
    "A reset disables every queue",
    "virtio 1.3, 2.4 and 4.2.2.1 (QueueReady); include/linux/vdpa.h:vdpa_config_ops.reset",
)
def disables(bench: Bench) -> str:
    running(bench).works()
    bench.restart()
    job = work(bench)
    job.set_up(enable=False)
    bench.driver_ok()
    job.ignored("not enabled since a reset")
    return "nothing was used"


@rule("twice", "A second reset changes nothing", _RESET)
def twice(bench: Bench) -> str:
    running(bench).works()
    bench.reset()
    return works_after(bench, "reset before")


@rule("many", "It can be reset and started again and again", _RESET, deadline=30)
def many(bench: Bench) -> str:
    running(bench).works()
    for i in range(10):
        works_after(bench, f"reset {i + 1}")
    return "10 times"


@rule(
    "features_forgotten",
    "Features have to be negotiated again",
    "virtio 1.3, 2.4; drivers/vhost/vdpa.c:vhost_vdpa_set_features",
)
def features_forgotten(bench: Bench) -> str:
    _features_ok(bench)
    bench.refused(
        lambda: bench.c.set_features(int(bench.facts.features)), [errno.EBUSY], "SET_FEATURES after FEATURES_OK"
    )
    bench.reset()
    bench.negotiate()
    return "negotiated again"


@rule(
    "old_kicks",
    "Kicks after a reset do no harm",
    "drivers/vhost/vdpa.c:handle_vq_kick; include/linux/vdpa.h:vdpa_config_ops.kick_vq",
)
def old_kicks(bench: Bench) -> str:
    job = running(bench)
    job.works()
    bench.reset()
    job.from_now()
    for _ in range(50):
        job.kick()
    job.rests("kicked after a reset")
    return works_after(bench, "kicked 50 times after a reset")


@rule(
    "control_state",
    "A reset discards control queue state, except the MAC address",
    "virtio 1.3, 2.4 and 5.1.6.5",
)
def control_state(bench: Bench) -> str:
    if not bench.facts.is_net or Feature.MQ not in bench.facts.features or bench.facts.pairs < 2:
        raise NotOffered("the device has one queue pair")
    _, control = controlled(bench)
    control.accepts(bytes([4, 0]) + (2).to_bytes(2, "little"), "VQ_PAIRS_SET 2")
    bench.restart()
    second = NetWork(bench, pair=1).start()
    second_pair_rests(second, "the second pair, after a reset")
    return "one pair is in use again"


@rule("receive_modes", "A reset discards receive modes", "virtio 1.3, 2.4 and 5.1.6.5.1", NET)
def receive_modes(bench: Bench) -> str:
    bench.needs_feature(Feature.CTRL_RX_EXTRA)
    bench.needs_feature(Feature.CTRL_RX)
    if not bench.facts.loops:
        raise CannotTell("the device does not send frames back to itself")
    modes = Feature.CTRL_RX | Feature.CTRL_RX_EXTRA
    _, control = controlled(bench, int(bench.facts.features | modes))
    control.accepts(command(Class.RX, Rx.NOBCAST, b"\1"), "NOBCAST 1")
    bench.reset()
    bench.unmap()
    bench.map()
    # not negotiated any more: nothing that a device begins with (promiscuous or not) hides what is left
    bench.negotiate(int(bench.facts.features & ~modes))
    return NetWork(bench).start().works(2, "broadcast frames, after a reset that followed NOBCAST")
