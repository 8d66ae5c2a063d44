# SPDX-License-Identifier: MIT
"""Identity of the device, offered features, ownership."""

from __future__ import annotations

import errno
import os
from functools import partial

from ....base.uapi import BackendFeature, Status
from ....net.features import Feature
from ..bench import Bench
from ..rule import NET, Broken, CannotTell, Group, demand, offered

GROUP = Group("identity", "identity, ownership and what is offered")
rule = GROUP.rule

_NEEDS = {
    Feature.CTRL_RX: (Feature.CTRL_VQ,),
    Feature.CTRL_VLAN: (Feature.CTRL_VQ,),
    Feature.CTRL_MAC_ADDR: (Feature.CTRL_VQ,),
    Feature.GUEST_ANNOUNCE: (Feature.CTRL_VQ,),
    Feature.MQ: (Feature.CTRL_VQ,),
    Feature.RSS: (Feature.CTRL_VQ,),
    Feature.GUEST_TSO4: (Feature.GUEST_CSUM,),
    Feature.GUEST_TSO6: (Feature.GUEST_CSUM,),
    Feature.GUEST_UFO: (Feature.GUEST_CSUM,),
    Feature.GUEST_ECN: (Feature.GUEST_TSO4, Feature.GUEST_TSO6),
    Feature.HOST_TSO4: (Feature.CSUM,),
    Feature.HOST_TSO6: (Feature.CSUM,),
    Feature.HOST_UFO: (Feature.CSUM,),
    Feature.HOST_ECN: (Feature.HOST_TSO4, Feature.HOST_TSO6),
    Feature.RSC_EXT: (Feature.HOST_TSO4, Feature.HOST_TSO6),
    Feature.HASH_TUNNEL: (Feature.CTRL_VQ,),
    Feature.VQ_NOTF_COAL: (Feature.CTRL_VQ,),
    Feature.NOTF_COAL: (Feature.CTRL_VQ,),
    Feature.GUEST_USO4: (Feature.GUEST_CSUM,),
    Feature.GUEST_USO6: (Feature.GUEST_CSUM,),
    Feature.HOST_USO: (Feature.CSUM,),
}
"""A feature bit and those of which it needs one (virtio 1.3, 5.1.3.1).

CTRL_RX_EXTRA and HASH_REPORT only SHOULD NOT be offered without CTRL_VQ (5.1.4.1), so they are not here.
"""


@rule(
    "device_id",
    "The device says what kind it is, and always the same",
    "drivers/vhost/vdpa.c:vhost_vdpa_get_device_id; virtio 1.3, 5",
)
def device_id(bench: Bench) -> str:
    first = bench.c.get_device_id()
    demand(first, "virtio id 0 is reserved")
    bench.reset()
    demand(bench.c.get_device_id() == first, f"virtio id {first} became {bench.c.get_device_id()} after a reset")
    return f"virtio id {first}"


@rule("open_once", "A second open is refused with EBUSY", "drivers/vhost/vdpa.c:vhost_vdpa_open")
def open_once(bench: Bench) -> str:
    try:
        os.close(os.open(bench.path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        demand(e.errno == errno.EBUSY, f"a second open: {e.strerror}, not EBUSY")
        return "EBUSY"
    raise Broken("a second open succeeded")


@rule(
    "status_zero",
    "A device that was just opened is reset: status 0",
    "drivers/vhost/vdpa.c:vhost_vdpa_open; virtio 1.3, 2.1.2",
)
def status_zero(bench: Bench) -> str:
    status = bench.c.get_status()
    demand(status == 0, f"status {int(status):#x} after opening")
    return "status 0"


@rule(
    "vqs_count",
    "It has as many queues as its kind needs",
    "drivers/vhost/vdpa.c:vhost_vdpa_get_vqs_count; virtio 1.3, 5.1.2 and 5.2.2",
)
def vqs_count(bench: Bench) -> str:
    count = bench.c.get_vqs_count()
    least = 2 if bench.facts.is_net else 1
    demand(count >= least, f"{count} queues, at least {least} are needed")
    return f"{count} queues"


@rule(
    "vring_num",
    "The largest ring is a size that a split ring can have",
    "drivers/vhost/vdpa.c:vhost_vdpa_get_vring_num; virtio 1.3, 2.7",
)
def vring_num(bench: Bench) -> str:
    most = bench.c.get_vring_num()
    demand(0 < most <= 32768, f"largest ring {most}, not between 1 and 32768")
    if most & (most - 1) and Feature.RING_PACKED in bench.facts.offered:
        raise CannotTell(f"largest ring {most} is not a power of two, which packed rings allow")
    demand(not most & (most - 1), f"largest ring {most} is not a power of two")
    return f"at most {most}"


@rule(
    "vring_size",
    "The size reported for one queue is within the maximum of all queues",
    "drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl, VHOST_VDPA_GET_VRING_SIZE",
)
def vring_size(bench: Bench) -> str:
    bench.own()
    most = bench.c.get_vring_num()
    offered(
        bench.errno_of(lambda: bench.c.get_vring_size(0)) not in (errno.EOPNOTSUPP, errno.ENOTTY),
        "the parent does not implement get_vq_size",
    )
    sizes = [bench.c.get_vring_size(i) for i in range(bench.facts.vqs_count)]
    demand(all(0 <= size <= most for size in sizes), f"ring sizes {sizes}, at most {most}")
    return f"ring sizes {' '.join(map(str, sizes))}"


@rule(
    "iova_range",
    "The range of IOVAs is not empty and holds whole pages",
    "drivers/vhost/vdpa.c:vhost_vdpa_set_iova_range",
)
def iova_range(bench: Bench) -> str:
    first, last = bench.c.get_iova_range()
    demand(first < last, f"IOVA range {first:#x}-{last:#x}")
    demand(last - first >= 4095, f"IOVA range {first:#x}-{last:#x} holds no page")
    return f"{first:#x}-{last:#x}"


@rule(
    "group_num",
    "There is at least one group and one address space",
    "drivers/vdpa/vdpa.c:__vdpa_alloc_device; include/linux/vdpa.h:vdpa_device",
)
def group_num(bench: Bench) -> str:
    groups, spaces = bench.c.get_group_num(), bench.c.get_as_num()
    demand(groups >= 1 and spaces >= 1, f"{groups} groups, {spaces} address spaces")
    return f"{groups} groups, {spaces} address spaces"


@rule(
    "numbers_stay",
    "Constant properties are the same after a reset and after another open",
    "drivers/vhost/vdpa.c:vhost_vdpa_probe; include/linux/vdpa.h:vdpa_config_ops",
)
def numbers_stay(bench: Bench) -> str:
    def all_of_it() -> tuple[int, ...]:
        c = bench.c
        return (
            c.get_vqs_count(),
            c.get_vring_num(),
            c.get_group_num(),
            c.get_as_num(),
            c.get_config_size(),
            *c.get_iova_range(),
        )

    first = all_of_it()
    bench.reset()
    after = all_of_it()
    demand(after == first, f"{first} became {after} after a reset")
    bench.reopen()
    after = all_of_it()
    demand(after == first, f"{first} became {after} after another open")
    return "queues, rings, groups, address spaces, configuration size and IOVA range stay"


@rule(
    "features_stay",
    "It offers the same features before and after a negotiation and a reset",
    "virtio 1.3, 2.2; drivers/vhost/vdpa.c:vhost_vdpa_get_features",
)
def features_stay(bench: Bench) -> str:
    first = bench.c.get_features()
    bench.negotiate()
    during = bench.c.get_features()
    demand(during == first, f"offered {first:#x}, and {during:#x} after FEATURES_OK")
    bench.reset()
    after = bench.c.get_features()
    demand(after == first, f"offered {first:#x}, and {after:#x} after a reset")
    return f"{first:#x}"


@rule("version_1", "It offers VIRTIO_F_VERSION_1", "virtio 1.3, 6.2")
def version_1(bench: Bench) -> str:
    demand(bench.c.get_features() & Feature.VERSION_1, "VIRTIO_F_VERSION_1 is not offered: a legacy device")
    return "offered"


@rule(
    "access_platform",
    "It offers VIRTIO_F_ACCESS_PLATFORM, since its memory is what was mapped",
    "virtio 1.3, 6.2 (SHOULD); drivers/vdpa/vdpa_user/vduse_dev.c:features_is_valid",
)
def access_platform(bench: Bench) -> str:
    if not bench.c.get_features() & Feature.ACCESS_PLATFORM:
        raise CannotTell("VIRTIO_F_ACCESS_PLATFORM is not offered; the specification says SHOULD")
    return "offered"


@rule(
    "feature_needs",
    "It offers no feature that needs another one which it does not offer",
    "virtio 1.3, 2.2.2 and 5.1.3.1",
    NET,
)
def feature_needs(bench: Bench) -> str:
    have = Feature(bench.c.get_features())
    for feature, needs in _NEEDS.items():
        names = " or ".join(need.name or "" for need in needs)
        demand(feature not in have or any(need in have for need in needs), f"{feature.name} without {names}")
    return "every feature that is offered has what it needs"


@rule(
    "backend_bits",
    "MSG_V2, BATCH and ASID are always offered",
    "drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl, VHOST_GET_BACKEND_FEATURES",
)
def backend_bits(bench: Bench) -> str:
    have = bench.c.get_backend_features()
    always = BackendFeature.IOTLB_MSG_V2 | BackendFeature.IOTLB_BATCH | BackendFeature.IOTLB_ASID
    demand(have & always == always, f"backend features {int(have):#x} lack one of {int(always):#x}")
    return f"{int(have):#x}"


@rule(
    "backend_refused",
    "A backend feature that is not offered is refused with EOPNOTSUPP",
    "drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl, VHOST_SET_BACKEND_FEATURES",
)
def backend_refused(bench: Bench) -> str:
    seen = bench.refused(lambda: bench.c.set_backend_features(BackendFeature(1 << 40)), [errno.EOPNOTSUPP], "bit 40")
    for feature in (BackendFeature.SUSPEND, BackendFeature.RESUME, BackendFeature.IOTLB_PERSIST):
        if feature not in bench.facts.backend:
            refuse = partial(bench.c.set_backend_features, BackendFeature.IOTLB_ASID | feature)
            seen = bench.refused(refuse, [errno.EOPNOTSUPP], feature.name or "")
    return seen


@rule(
    "resume_needs_suspend",
    "RESUME is offered only together with SUSPEND",
    "include/uapi/linux/vhost_types.h:VHOST_BACKEND_F_RESUME; drivers/vhost/vdpa.c:vhost_vdpa_can_resume",
)
def resume_needs_suspend(bench: Bench) -> str:
    have = bench.facts.backend
    offered(BackendFeature.RESUME in have, "RESUME is not offered")
    demand(BackendFeature.SUSPEND in have, "RESUME is offered without SUSPEND: there is nothing to resume from")
    return "both are offered"


@rule("owner_once", "A second SET_OWNER is refused with EBUSY", "drivers/vhost/vhost.c:vhost_dev_set_owner")
def owner_once(bench: Bench) -> str:
    bench.c.set_owner()
    return bench.refused(bench.c.set_owner, [errno.EBUSY], "SET_OWNER again")


@rule(
    "owner_needed",
    "Without an owner queues cannot be set up",
    "drivers/vhost/vhost.c:vhost_dev_check_owner; drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl",
)
def owner_needed(bench: Bench) -> str:
    c = bench.c
    bench.refused(lambda: c.set_vring_num(0, 2), [errno.EPERM], "SET_VRING_NUM")
    bench.refused(lambda: c.get_vring_base(0), [errno.EPERM], "GET_VRING_BASE")
    return bench.refused(lambda: c.set_vring_enable(0, True), [errno.EPERM], "SET_VRING_ENABLE")


@rule(
    "owner_forgotten",
    "Ownership and acknowledged backend features end with close",
    "drivers/vhost/vhost.c:vhost_dev_cleanup",
)
def owner_forgotten(bench: Bench) -> str:
    bench.own()
    bench.reopen()
    bench.refused(lambda: bench.c.set_vring_num(0, 2), [errno.EPERM], "SET_VRING_NUM after another open")
    bench.own()
    return "it can be owned again after close"


@rule(
    "no_dirty_log",
    "A dirty log is refused with ENOTTY",
    "drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl, VHOST_SET_LOG_BASE",
)
def no_dirty_log(bench: Bench) -> str:
    bench.own()
    bench.refused(lambda: bench.c.request("VHOST_SET_LOG_FD"), [errno.ENOTTY], "SET_LOG_FD")
    return bench.refused(lambda: bench.c.request("VHOST_SET_LOG_BASE"), [errno.ENOTTY], "SET_LOG_BASE")


@rule(
    "null_pointer",
    "A request with a null pointer is refused with EFAULT",
    "drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl",
)
def null_pointer(bench: Bench) -> str:
    names = ("VHOST_GET_FEATURES", "VHOST_VDPA_GET_STATUS", "VHOST_VDPA_GET_DEVICE_ID", "VHOST_VDPA_GET_CONFIG_SIZE")
    for name in (*names, "VHOST_VDPA_GET_VRING_NUM", "VHOST_VDPA_GET_IOVA_RANGE", "VHOST_VDPA_GET_AS_NUM"):
        bench.refused(partial(bench.c.request, name, None), [errno.EFAULT], name)
    demand(bench.c.get_status() == Status(0), "the status changed by it")
    return "EFAULT to each"
