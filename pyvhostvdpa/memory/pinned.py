# SPDX-License-Identifier: MIT
"""Sizes of pages, and what this process has pinned: known without the C library."""

from __future__ import annotations

import os
import resource

from ..base import sysfs
from ..base.errors import MapRejected

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
HUGE_PAGE = 2 << 20


def pinned_bytes() -> int:
    """Return what this process has pinned (VmPin), in bytes."""
    for line in (sysfs.read("/proc/self/status") or "").splitlines():
        if line.startswith("VmPin:"):
            return int(line.split()[1]) * 1024
    return 0


def allow_pinning(size: int) -> str:
    """Make room for ``size`` more pinned bytes under RLIMIT_MEMLOCK.

    vhost-vdpa compares with the limit alone, CAP_IPC_LOCK does not help
    (drivers/vhost/vdpa.c:vhost_vdpa_pa_map). Returns what was changed, "" if
    nothing had to be; raises :class:`MapRejected` if it may not be changed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    need = pinned_bytes() + size
    if soft == resource.RLIM_INFINITY or need <= soft:
        return ""
    try:
        # all that is allowed: devices are prepared at the same time, and each would set what it alone needs
        enough = hard if hard >= need or hard == resource.RLIM_INFINITY else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (enough, enough))
    except (ValueError, OSError) as e:
        raise MapRejected(
            f"RLIMIT_MEMLOCK is {soft >> 10} KiB; pinning this takes {need >> 10} KiB in all "
            "(each address space and each device counts separately, root is not exempt)",
            hint="ulimit -l unlimited, or LimitMEMLOCK=infinity in the service unit",
        ) from e
    to = "unlimited" if enough == resource.RLIM_INFINITY else f"{enough >> 10} KiB"
    return f"RLIMIT_MEMLOCK raised from {soft >> 10} KiB to {to}"
