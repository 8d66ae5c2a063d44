# SPDX-License-Identifier: MIT
"""What a procedure works on: an opened device, what was negotiated with it, and which address space is for what."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..base.uapi import BackendFeature, Status
from ..chardev.door import VhostVdpa
from ..chardev.iotlb import Iotlb
from ..net.features import Feature
from ..virtqueue import SHADOWED
from ..virtqueue.serving import Serving
from .groups import Groups
from .kind import DeviceKind
from .net_kind import NET

GUEST_ASID = 0
"""The address space in which guest memory is mapped."""
OWN_ASID = 1
"""The address space of own memory: the control queue, and shadow rings where descriptors have their own group."""

READY = Status.ACKNOWLEDGE | Status.DRIVER
FEATURES_SET = READY | Status.FEATURES_OK
RUNNING = FEATURES_SET | Status.DRIVER_OK


class State(enum.Enum):
    """What the device is doing for us."""

    RESET = "reset"
    """No queue is set up."""
    PASSTHROUGH = "passthrough"
    """The device works on the guest's rings."""
    SHADOW = "shadow"
    """The device works on shadow rings, threads of this process serve the guest's."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Target:
    """An opened device: its door, its address spaces, what was negotiated, how its queues are grouped and served.

    ``ring_sizes`` are the largest of each queue, by index; empty if they were not read. ``serving`` is how queues are
    shadowed, None to leave it to the procedure.
    """

    chardev: VhostVdpa
    iotlb: Iotlb
    features: Feature
    backend_features: BackendFeature
    groups: Groups
    ring_sizes: tuple[int, ...] = ()
    serving: Serving | None = SHADOWED
    kind: DeviceKind = NET

    @property
    def path(self) -> str:
        """The chardev's path."""
        return self.chardev.path

    @property
    def ring_bits(self) -> int:
        """The ring features negotiated, ``SVQ_F_*``."""
        return self.kind.ring_bits(self.features)

    @property
    def separate_descriptors(self) -> bool:
        """Whether shadow rings can lie in another address space than the buffers."""
        return not self.why_not_separate

    @property
    def why_not_separate(self) -> str:
        """Why shadow rings have to share the buffers' address space; "" if they need not."""
        if BackendFeature.DESC_ASID not in self.backend_features:
            return "DESC_ASID is not offered"
        if self.groups.descriptors is None:
            return "descriptors have no group of their own"
        if self.iotlb.limits.as_num <= OWN_ASID:
            return f"there are {self.iotlb.limits.as_num} address spaces, {OWN_ASID + 1} are needed"
        return ""

    def fitting(self, index: int, num: int) -> int:
        """Return the size of a shadow ring for a queue: ``num``, or what the device takes if that is less."""
        return min(num, self.ring_sizes[index]) if index < len(self.ring_sizes) else num
