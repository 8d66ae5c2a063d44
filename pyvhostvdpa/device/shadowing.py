# SPDX-License-Identifier: MIT
"""How a device's queues are shadowed: every descriptor copied, or only what the device writes relayed."""

from __future__ import annotations

from ..base.errors import MissingFeature
from ..virtqueue import SHADOWED, used_ring
from ..virtqueue.serving import Serving
from .kind import DeviceKind

FULL = SHADOWED.name
"""Every element goes through a shadow ring: :mod:`pyvhostvdpa.virtqueue.shadow`."""
USED = "used"
"""The device has the guest's descriptors, and of queues that it only reads all: :mod:`pyvhostvdpa.virtqueue.used`."""
USED_ALL = "used-all"
"""The same with every data queue relayed, for a device that may use any of them out of order."""

NAMES = (FULL, USED, USED_ALL)
"""The ways that can be asked for; the procedure chooses one else."""


def choose(name: str, kind: DeviceKind) -> Serving:
    """Return the way to shadow queues of that name; :class:`MissingFeature` for another name."""
    if name == FULL:
        return SHADOWED
    if name == USED:
        return used_ring(kind.writes, USED)
    if name == USED_ALL:
        return used_ring(lambda _: True, USED_ALL)
    raise MissingFeature(f"there is no way {name!r} to shadow queues", hint=f"there are {', '.join(NAMES)}")
