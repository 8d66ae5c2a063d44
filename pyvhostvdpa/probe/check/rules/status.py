# SPDX-License-Identifier: MIT
"""Status bits and the negotiation of features."""

from __future__ import annotations

import errno

from ....base.errors import KernelError
from ....base.uapi import Status, names
from ....net.features import REQUIRED, Feature
from ..bench import READY, RUNNING, STARTED, Bench
from ..rule import Broken, CannotTell, Group, demand
from ..work import running, work

GROUP = Group("status", "status and feature negotiation")
rule = GROUP.rule
_SET_STATUS = "drivers/vhost/vdpa.c:vhost_vdpa_set_status"
_SET_FEATURES = "drivers/vhost/vdpa.c:vhost_vdpa_set_features"


@rule(
    "acknowledge",
    "ACKNOWLEDGE and DRIVER are read back as they were written",
    f"virtio 1.3, 2.1 and 3.1.1; {_SET_STATUS}",
)
def acknowledge(bench: Bench) -> str:
    for status in (Status.ACKNOWLEDGE, STARTED):
        bench.c.set_status(status)
        got = bench.c.get_status()
        demand(got == status, f"wrote {names(status)}, read {names(got)}")
    return "each step is read back"


@rule("features_ok", "FEATURES_OK is accepted for features that were offered", "virtio 1.3, 2.2.2 and 3.1.1")
def features_ok(bench: Bench) -> str:
    bench.negotiate()
    got = bench.c.get_status()
    demand(got == READY, f"status {names(got)}")
    return f"features {int(bench.facts.features):#x}"


@rule(
    "required_features",
    "A driver that accepts only the required features is accepted",
    "virtio 1.3, 2.2.2 (SHOULD accept any valid subset)",
)
def required_features(bench: Bench) -> str:
    wanted = int(bench.facts.offered & REQUIRED)
    bench.c.set_status(STARTED)
    number = bench.errno_of(lambda: bench.c.set_features(wanted))
    if number:
        raise CannotTell(
            f"features {wanted:#x} are refused; the specification says that it SHOULD accept a valid subset"
        )
    bench.c.set_status(READY)
    if Status.FEATURES_OK not in bench.c.get_status():
        raise CannotTell(f"FEATURES_OK is refused for {wanted:#x}; the specification says SHOULD")
    return f"features {wanted:#x}"


@rule("other_features", "After a reset other features can be negotiated", f"virtio 1.3, 2.1 and 3.1.1; {_SET_FEATURES}")
def other_features(bench: Bench) -> str:
    bench.negotiate()
    bench.reset()
    fewer = int(bench.facts.features & ~Feature.MTU if bench.facts.is_net else bench.facts.features)
    try:
        bench.negotiate(fewer)
    except (Broken, KernelError) as e:
        bench.reset()
        bench.negotiate()
        raise CannotTell(f"{fewer:#x} is not accepted, and a subset only SHOULD be") from e
    return "negotiated twice"


@rule("features_late", "Features are refused with EBUSY after FEATURES_OK", _SET_FEATURES)
def features_late(bench: Bench) -> str:
    bench.negotiate()
    return bench.refused(
        lambda: bench.c.set_features(int(bench.facts.features)), [errno.EBUSY], "SET_FEATURES after FEATURES_OK"
    )


@rule("features_changed", "Features can be written again until FEATURES_OK", _SET_FEATURES)
def features_changed(bench: Bench) -> str:
    bench.c.set_status(STARTED)
    bench.c.set_features(int(bench.facts.features))
    bench.c.set_features(int(bench.facts.features))
    bench.c.set_status(READY)
    demand(Status.FEATURES_OK in bench.c.get_status(), "FEATURES_OK was not accepted")
    return "written twice, then accepted"


@rule("no_bit_cleared", "A write that would clear a bit is refused with EINVAL and changes nothing", _SET_STATUS)
def no_bit_cleared(bench: Bench) -> str:
    bench.negotiate()
    seen = bench.refused(lambda: bench.c.set_status(Status.ACKNOWLEDGE), [errno.EINVAL], "clearing DRIVER")
    demand(bench.c.get_status() == READY, f"status {names(bench.c.get_status())} after it was refused")
    return seen


@rule("no_driver_ok_cleared", "DRIVER_OK cannot be taken back but by a reset", _SET_STATUS)
def no_driver_ok_cleared(bench: Bench) -> str:
    job = running(bench)
    bench.refused(lambda: bench.c.set_status(READY), [errno.EINVAL], "clearing DRIVER_OK")
    return job.works(what="after clearing DRIVER_OK was refused")


@rule("driver_ok", "DRIVER_OK is read back", f"virtio 1.3, 3.1.1; {_SET_STATUS}")
def driver_ok(bench: Bench) -> str:
    running(bench)
    got = bench.c.get_status()
    demand(got == RUNNING, f"status {names(got)}")
    return names(got)


@rule(
    "driver_ok_alone",
    "DRIVER_OK without a queue starts nothing and breaks nothing",
    "virtio 1.3, 3.1.1; include/linux/vdpa.h:vdpa_config_ops.set_status",
)
def driver_ok_alone(bench: Bench) -> str:
    bench.prepare()
    job = work(bench)
    job.offer()
    bench.driver_ok()
    job.rests("DRIVER_OK without a queue")
    bench.reset()
    demand(bench.c.get_status() == 0, "the reset after it did not work")
    return "nothing moved"


@rule(
    "written_again", "Writing the same status again while it runs changes nothing", f"virtio 1.3, 2.1.1; {_SET_STATUS}"
)
def written_again(bench: Bench) -> str:
    job = running(bench)
    job.works()
    bench.c.set_status(RUNNING)
    return job.works(what="after RUNNING was written again")


@rule("failed", "FAILED can be set and is read back", "virtio 1.3, 2.1; drivers/vhost/vdpa.c:vhost_vdpa_set_status")
def failed(bench: Bench) -> str:
    bench.c.set_status(STARTED)
    bench.c.set_status(STARTED | Status.FAILED)
    got = bench.c.get_status()
    demand(Status.FAILED in got, f"status {names(got)}")
    return names(got)


@rule("zero_resets", "Writing 0 makes the status 0", f"virtio 1.3, 2.1.2; {_SET_STATUS}")
def zero_resets(bench: Bench) -> str:
    running(bench)
    bench.reset()
    got = bench.c.get_status()
    demand(got == 0, f"status {names(got)} after a reset")
    return "status 0"


@rule("no_needs_reset", "A device that is driven correctly does not set NEEDS_RESET", "virtio 1.3, 2.1.2")
def no_needs_reset(bench: Bench) -> str:
    job = running(bench)
    job.works(4)
    got = bench.c.get_status()
    demand(Status.NEEDS_RESET not in got, f"status {names(got)}")
    return names(got)


@rule("without_owner", "Status and features need no owner", "drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl")
def without_owner(bench: Bench) -> str:
    bench.negotiate()
    return "negotiated before SET_OWNER"
