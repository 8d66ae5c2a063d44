# SPDX-License-Identifier: MIT
"""Why the kernel refused a map: it says EFAULT, and this looks for the reason afterwards.

Every error of the message handler becomes EFAULT on its way out
(drivers/vhost/vhost.c:vhost_chr_write_iter). What could be known before was
checked before (:mod:`pyvhostvdpa.chardev.iotlb`); what is left is asked of the
machine here, most certain first.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..base.causes import Cause
from ..base.errors import KernelError
from ..base.uapi import IotlbType
from ..memory.guest import PAGE_SIZE
from ..memory.mapped import physical_runs
from ..memory.pinned import pinned_bytes
from .door import VhostVdpa
from .message import IotlbMessage


class Vma(NamedTuple):
    """A line of /proc/self/maps: addresses, ``shared`` and the file, "" for anonymous memory."""

    start: int
    end: int
    shared: bool
    path: str


def process_maps() -> Iterator[Vma]:
    """Yield this process's memory by address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, inode, *path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        yield Vma(start, end, permissions[3] == "s", path[0] if path and inode != "0" else "")


def likely_cause(chardev: VhostVdpa, message: IotlbMessage, pinned: bool | None, limit: int | None) -> Cause:
    """Return the likely reason for which the kernel refused ``message``.

    ``pinned`` and ``limit`` are the device's, see :class:`pyvhostvdpa.chardev.iotlb.Limits`.
    """
    if not _owner(chardev):
        return Cause("this process is not the device's owner", "call set_owner() in the process that maps")
    if message.type is not IotlbType.UPDATE:
        return Cause("the address space was never used, or another one's batch is open", "map something there first")
    return _memory(message) or (_pinning(message, limit) if pinned is not False else None) or _tree(message)


def _owner(chardev: VhostVdpa) -> bool:
    # the least that only an owner may ask, and that every kernel answers
    try:
        chardev.get_vring_busyloop_timeout(0)
    except KernelError as e:
        return e.errno != errno.EPERM
    return True


def _memory(message: IotlbMessage) -> Cause | None:
    at, end = message.uaddr, message.uaddr + message.size
    for vma in process_maps():
        if vma.start <= at < vma.end:
            at = vma.end
    if at >= end:
        return None
    return Cause(f"there is no memory of this process at {at:#x}", "map it with SharedMemory before the device does")


def _pinning(message: IotlbMessage, limit: int | None) -> Cause | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    need = pinned_bytes() + message.size
    if soft != resource.RLIM_INFINITY and need > soft:
        return Cause(
            f"RLIMIT_MEMLOCK is {soft >> 10} KiB and {need >> 10} KiB would be pinned, root not exempt",
            "ulimit -l unlimited",
        )
    runs = physical_runs(message.uaddr, message.size)
    if limit is not None and runs > limit:
        return Cause(f"{runs} contiguous runs, the kernel allows {limit} entries", "use huge pages")
    if any(
        vma.shared and vma.path.startswith("/dev/") for vma in process_maps() if vma.start <= message.uaddr < vma.end
    ):
        return Cause("memory of a device cannot be pinned for long", "use SharedMemory")
    return None


def _tree(message: IotlbMessage) -> Cause:
    last = message.iova + message.size - 1
    text = f"something is mapped within {message.iova:#x}-{last:#x} of ASID {message.asid} by a message written past it"
    if message.size % PAGE_SIZE or message.iova % PAGE_SIZE:
        text = "not whole pages, or " + text
    return Cause(f"{text}; or the parent refused the map", "dmesg | tail; vhost-vdpa doctor")
