# SPDX-License-Identifier: MIT
"""The configuration space."""

from __future__ import annotations

import errno

from ....base.uapi import BackendFeature, Status
from ....net.features import Feature
from ..bench import Bench
from ..rule import BLOCK, NET, CannotTell, Group, demand
from ..work import running

GROUP = Group("config", "configuration space")
rule = GROUP.rule
_CONFIG = "drivers/vhost/vdpa.c:vhost_vdpa_get_config"
_VALIDATE = "drivers/vhost/vdpa.c:vhost_vdpa_config_validate"


def _whole(bench: Bench) -> bytes:
    return bench.c.get_config(0, bench.c.get_config_size())


@rule(
    "size",
    "It is large enough for the fields of the features that are offered",
    "virtio 1.3, 5.1.4 and 5.2.4; drivers/vhost/vdpa.c:vhost_vdpa_get_config_size",
)
def size(bench: Bench) -> str:
    there = bench.c.get_config_size()
    have = bench.facts.offered
    needs = {Feature.MAC: 6, Feature.STATUS: 8, Feature.MQ: 10, Feature.MTU: 12} if bench.facts.is_net else {}
    least = max([8 if bench.facts.is_block else 1, *(end for feature, end in needs.items() if feature in have)])
    demand(there >= least, f"{there} bytes, {least} are needed")
    return f"{there} bytes"


@rule("whole", "All of it can be read at once", _CONFIG)
def whole(bench: Bench) -> str:
    return f"{len(_whole(bench))} bytes read"


@rule("parts", "Read byte by byte it is what it is as a whole", f"{_CONFIG}; virtio 1.3, 2.5")
def parts(bench: Bench) -> str:
    bench.negotiate()
    together = _whole(bench)
    apart = b"".join(bench.c.get_config(at, 1) for at in range(len(together)))
    demand(apart == together, f"byte by byte {apart.hex()}, as a whole {together.hex()}")
    return f"{len(together)} bytes, the same either way"


@rule("again", "Read twice it is the same", "virtio 1.3, 2.5; include/linux/vdpa.h:vdpa_config_ops.get_config")
def again(bench: Bench) -> str:
    bench.negotiate()
    first, second = _whole(bench), _whole(bench)
    demand(first == second, f"{first.hex()}, then {second.hex()}")
    return "the same twice"


@rule(
    "survives_reset",
    "A reset does not change the MAC address",
    "virtio 1.3, 5.1.4; include/linux/vdpa.h:vdpa_config_ops.reset",
    NET,
)
def survives_reset(bench: Bench) -> str:
    bench.needs_feature(Feature.MAC)
    bench.negotiate()
    first = bench.c.get_config(0, 6)
    bench.reset()
    bench.negotiate()
    second = bench.c.get_config(0, 6)
    demand(first == second, f"MAC {first.hex(':')} became {second.hex(':')}")
    return "the MAC address stays"


@rule("beyond_end", "Reading beyond its end is refused with EINVAL", _VALIDATE)
def beyond_end(bench: Bench) -> str:
    end = bench.c.get_config_size()
    bench.refused(lambda: bench.c.get_config(end, 1), [errno.EINVAL], "behind its end")
    bench.refused(lambda: bench.c.get_config(0xFFFFFFFF, 1), [errno.EINVAL], "at 2^32-1")
    return bench.refused(lambda: bench.c.get_config(end - 1, 2), [errno.EINVAL], "across its end")


@rule("no_length", "Reading nothing is refused with EINVAL", _VALIDATE)
def no_length(bench: Bench) -> str:
    return bench.refused(lambda: bench.c.get_config(0, 0), [errno.EINVAL], "0 bytes")


@rule("write_beyond_end", "Writing beyond its end is refused with EINVAL", "drivers/vhost/vdpa.c:vhost_vdpa_set_config")
def write_beyond_end(bench: Bench) -> str:
    end = bench.c.get_config_size()
    bench.refused(lambda: bench.c.set_config(0, b""), [errno.EINVAL], "0 bytes")
    return bench.refused(lambda: bench.c.set_config(end, b"\0"), [errno.EINVAL], "behind its end")


@rule(
    "before_features",
    "Reading it before features are set does not disturb their negotiation",
    "drivers/vdpa/vdpa.c:vdpa_get_config_unlocked; virtio 1.3, 2.5.2",
)
def before_features(bench: Bench) -> str:
    _whole(bench)
    bench.negotiate()
    demand(bench.c.get_status() & Status.FEATURES_OK, "FEATURES_OK was not accepted")
    return "read, then negotiated"


@rule("while_running", "It can be read while the device runs", f"{_CONFIG}; virtio 1.3, 2.5")
def while_running(bench: Bench) -> str:
    job = running(bench)
    first = _whole(bench)
    job.works(2)
    demand(len(_whole(bench)) == len(first), "another size")
    return "read while descriptors are used"


@rule(
    "while_suspended",
    "It can be read while the device is suspended",
    "drivers/vhost/vdpa.c:vhost_vdpa_suspend, the comment above it",
)
def while_suspended(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    running(bench).works()
    first = _whole(bench)
    bench.c.suspend()
    demand(_whole(bench) == first, "it reads otherwise while suspended")
    return "the same as before"


@rule("mac", "The MAC address is one that a device can have", "virtio 1.3, 5.1.4 and 5.1.5", NET)
def mac(bench: Bench) -> str:
    bench.needs_feature(Feature.MAC)
    bench.negotiate()
    address = bench.c.get_config(0, 6)
    if address == bytes(6):
        raise CannotTell("the address is 0: none was given when the device was made (vdpa dev add … mac)")
    demand(not address[0] & 1, f"{address.hex(':')} is a group address")
    return address.hex(":")


@rule("mtu", "The MTU is between 68 and 65535", "virtio 1.3, 5.1.4.1", NET)
def mtu(bench: Bench) -> str:
    bench.needs_feature(Feature.MTU)
    bench.negotiate()
    value = int.from_bytes(bench.c.get_config(10, 2), "little")
    demand(value >= 68, f"MTU {value}")
    return f"MTU {value}"


@rule(
    "max_pairs",
    "The number of queue pairs is between 1 and 32768, and the queues are there",
    "virtio 1.3, 5.1.4.1 and 5.1.2",
    NET,
)
def max_pairs(bench: Bench) -> str:
    bench.needs_feature(Feature.MQ)
    bench.negotiate()
    pairs = int.from_bytes(bench.c.get_config(8, 2), "little")
    demand(1 <= pairs <= 0x8000, f"max_virtqueue_pairs {pairs}")
    needed = 2 * pairs + (Feature.CTRL_VQ in bench.facts.offered)
    demand(
        needed <= bench.facts.vqs_count, f"{pairs} pairs need {needed} queues; the device has {bench.facts.vqs_count}"
    )
    return f"{pairs} pairs, {bench.facts.vqs_count} queues"


@rule("capacity", "A disk has a size", "virtio 1.3, 5.2.4", BLOCK)
def capacity(bench: Bench) -> str:
    bench.negotiate()
    sectors = int.from_bytes(bench.c.get_config(0, 8), "little")
    if not sectors:
        raise CannotTell("capacity 0, which a drive without a medium may have")
    return f"{sectors} sectors of 512 bytes"


@rule("block_size", "The block size is a power of two of at least 512", "virtio 1.3, 5.2.4", BLOCK)
def block_size(bench: Bench) -> str:
    bench.needs_feature(Feature(1 << 6))
    bench.negotiate()
    value = int.from_bytes(bench.c.get_config(20, 4), "little")
    demand(value >= 512 and not value & (value - 1), f"blk_size {value}")
    return f"{value} bytes"
