# SPDX-License-Identifier: MIT
"""What an errno of vhost-vdpa means, by the request that it answers, and what to run next.

The kernel uses few numbers for many reasons. Each row was observed on a real
kernel or stands in the function that it cites; a request that is not listed
keeps the errno's general meaning.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from .uapi import IOCTLS

ENOTSUPP = 524
"""Not an errno of user space: leaks from drivers/vhost/vdpa.c (doorbell mmap, non-coherent IOMMU)."""

_EXPLAINED = {
    ENOTSUPP: "ENOTSUPP: the parent driver has no such operation",
    errno.ENOBUFS: "ENOBUFS: index not below the number of virtqueues",
}


class Cause(NamedTuple):
    """Why a request failed, as its errno suggests, and the command to run next."""

    cause: str
    hint: str


_PROBE = "vhost-vdpa probe DEV shows what the device has"
_OWNER = Cause(
    "only the process that called set_owner() may ask, a forked child may not", "call set_owner() once after opening"
)
_NO_QUEUE = Cause("the device has no such virtqueue", "get_vqs_count() returns how many it has: vhost-vdpa probe DEV")
_POINTER = Cause("the argument is not memory of this process", "hand over a buffer of the argument's size")
_FD = "os.eventfd(0, os.EFD_NONBLOCK) makes one; -1 unbinds"
_EVENTFD_CALLS = (
    "VHOST_SET_VRING_KICK",
    "VHOST_SET_VRING_CALL",
    "VHOST_SET_VRING_ERR",
    "VHOST_VDPA_SET_CONFIG_CALL",
)
_RUNNING = "suspend() or reset (set_status 0) first"

_CAUSES: dict[tuple[str, int], Cause] = {
    **{(call, errno.EBADF): Cause("the descriptor is not open", _FD) for call in _EVENTFD_CALLS},
    **{(call, errno.EINVAL): Cause("the descriptor is not an eventfd", _FD) for call in _EVENTFD_CALLS},
    ("open", errno.EBUSY): Cause("another process holds the device", "vhost-vdpa list shows the holder"),
    ("open", errno.EACCES): Cause(
        "the node belongs to root", "run as root, or add a udev rule: vhost-vdpa doctor prints one"
    ),
    ("open", errno.EPERM): Cause("this process may not open devices", "allow the device in the container's cgroup"),
    ("open", errno.ENXIO): Cause("the device behind the node is gone", "vhost-vdpa list"),
    ("open", ENOTSUPP): Cause(
        "the platform IOMMU's domain is not cache coherent (drivers/vhost/vdpa.c:vhost_vdpa_alloc_domain)",
        "boot with iommu=on and a platform that enforces snooping: vhost-vdpa doctor",
    ),
    ("mmap", ENOTSUPP): Cause(
        "the parent has no doorbell page (get_vq_notification)", "kick by eventfd: set_vring_kick()"
    ),
    ("mmap", errno.EINVAL): Cause("a doorbell is one write-only page whose offset is the queue's index", _PROBE),
    ("VHOST_SET_OWNER", errno.EBUSY): Cause("the device has an owner already", "call set_owner() only once"),
    ("VHOST_SET_FORK_FROM_OWNER", errno.EBUSY): Cause("the device has an owner already", "call it before set_owner()"),
    ("VHOST_SET_FEATURES", errno.EBUSY): Cause("FEATURES_OK is set, features are final", "set_status(Status(0)) first"),
    ("VHOST_SET_FEATURES", errno.EINVAL): Cause(
        "the parent refuses this set; many demand ACCESS_PLATFORM", "add Feature.ACCESS_PLATFORM, or take less"
    ),
    ("VHOST_SET_BACKEND_FEATURES", errno.EOPNOTSUPP): Cause(
        "a bit that this kernel or parent does not know", "acknowledge only what get_backend_features() returns"
    ),
    ("VHOST_SET_BACKEND_FEATURES", errno.EINVAL): Cause("DESC_ASID needs IOTLB_ASID in the same call", "add it"),
    ("VHOST_SET_MEM_TABLE", errno.EOPNOTSUPP): Cause("the table has a padding word that must be 0", "pad with 0"),
    ("VHOST_VDPA_SET_STATUS", errno.EINVAL): Cause("a status bit can only be cleared by a reset", "write 0 first"),
    ("VHOST_VDPA_GET_CONFIG", errno.EINVAL): Cause("no bytes, or beyond the end", "get_config_size() returns the end"),
    ("VHOST_VDPA_SET_CONFIG", errno.EINVAL): Cause("no bytes, or beyond the end", "get_config_size() returns the end"),
    ("VHOST_SET_VRING_NUM", errno.EINVAL): Cause(
        "not a power of two, or more than the device allows", "get_vring_num() returns the maximum"
    ),
    ("VHOST_SET_VRING_BASE", errno.EINVAL): Cause("beyond 16 bits, or the device runs", _RUNNING),
    ("VHOST_SET_VRING_ADDR", errno.EINVAL): Cause(
        "avail not 2-aligned, used not 4-aligned, or the device runs", f"align the rings; {_RUNNING}"
    ),
    ("VHOST_SET_VRING_ADDR", errno.EOPNOTSUPP): Cause("a flag other than LOG", "flags must be 0"),
    ("VHOST_VDPA_GET_VRING_SIZE", errno.EOPNOTSUPP): Cause(
        "the parent has no size per queue", "get_vring_num() returns the maximum for all"
    ),
    ("VHOST_VDPA_GET_VRING_GROUP", errno.EOPNOTSUPP): Cause("the parent has no groups", "all queues are in group 0"),
    ("VHOST_VDPA_GET_VRING_GROUP", errno.EIO): Cause("the parent reported a group that does not exist", "a driver bug"),
    ("VHOST_VDPA_GET_VRING_DESC_GROUP", errno.EOPNOTSUPP): Cause(
        "descriptors share their queue's group; on mlx5 the firmware lacks desc_group_mkey", _PROBE
    ),
    ("VHOST_VDPA_GET_VRING_DESC_GROUP", errno.EIO): Cause(
        "the parent reported a group that does not exist", "driver bug"
    ),
    ("VHOST_VDPA_SET_GROUP_ASID", errno.EINVAL): Cause(
        "beyond the device's groups or address spaces, or the parent refuses",
        "get_group_num() and get_as_num() return the counts",
    ),
    ("VHOST_VDPA_SET_GROUP_ASID", errno.EBUSY): Cause("a group is bound before DRIVER_OK", "reset, bind, then start"),
    ("VHOST_VDPA_SET_GROUP_ASID", errno.ENOBUFS): Cause(
        "a group's number must be below the number of virtqueues too", _PROBE
    ),
    ("VHOST_VDPA_SET_GROUP_ASID", errno.EOPNOTSUPP): Cause("the parent binds no groups", "use address space 0"),
    ("VHOST_VDPA_SUSPEND", errno.EOPNOTSUPP): Cause(
        "the parent cannot suspend: its queues cannot be stopped without loss", _PROBE
    ),
    ("VHOST_VDPA_RESUME", errno.EOPNOTSUPP): Cause("the parent cannot resume", "reset and start again"),
    **{
        (call, errno.EIO): Cause(
            "the parent did not answer: a VDUSE daemon that is gone or stuck; the kernel waits for it as long as "
            "/sys/devices/virtual/vduse/NAME/msg_timeout says, 30 s by default",
            "vhost-vdpa doctor names the daemon",
        )
        for call in ("open", "VHOST_VDPA_SET_STATUS", "VHOST_VDPA_GET_STATUS", "VHOST_GET_VRING_BASE")
    },
}


def errno_text(number: int) -> str:
    """Return the errno's name with its meaning for vhost-vdpa."""
    explained = _EXPLAINED.get(number)
    if explained:
        return explained
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


def explain(call: str, number: int) -> Cause:
    """Return what is known of ``call`` answering the errno ``number``; empty strings if nothing is."""
    known = _CAUSES.get((call, number))
    row = IOCTLS.get(call)
    if known or row is None:
        return known or Cause("", "")
    if row.rejected:
        return Cause(f"never served: {row.rejected}", "do without it")
    if number == errno.ENOTTY:
        return Cause(f"this kernel lacks {call} (in mainline since {row.since})", "use a newer kernel, or do without")
    general = {errno.EPERM: _OWNER, errno.ENOBUFS: _NO_QUEUE, errno.EFAULT: _POINTER}
    return general.get(number, Cause("", _PROBE))


def explain_all() -> list[tuple[str, int, Cause]]:
    """Return every row: the call, the errno, and what is known."""
    return [(call, number, cause) for (call, number), cause in sorted(_CAUSES.items())]
