# SPDX-License-Identifier: MIT
"""What is asked of the device once, before the rules: they need it to choose what to try."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from ...base.errors import KernelError
from ...base.uapi import BackendFeature, Status
from ...chardev.door import VhostVdpa
from ...device.groups import ring_sizes
from ...host import mgmt
from ...host.parents import parent_of
from ...net.config import control_index
from ...net.features import Feature
from ...trace.recorder import Trace
from .rule import BLOCK, NET

_STARTED = Status.ACKNOWLEDGE | Status.DRIVER
_UNUSABLE = (
    Feature.RING_PACKED | Feature.NOTIFICATION_DATA | Feature.IN_ORDER | Feature.RING_RESET
    | Feature.EVENT_IDX | Feature.INDIRECT_DESC | Feature.RSS | Feature.HASH_REPORT | Feature.GUEST_ANNOUNCE
    | Feature.HASH_TUNNEL
)  # fmt: skip
"""What is not taken, whatever the device offers: the driver here does without, or takes it for one rule only."""
_FIXED_RINGS = ("snet_vdpa", "eni_vdpa")
"""Parents whose rings have one size only, which no ioctl returns: their get_vq_num_min is their get_vq_num_max."""
_LACKING = (errno.EOPNOTSUPP, errno.ENOTTY)

Opener = Callable[[str, Trace], VhostVdpa]
"""Opens a device; what passes is recorded in the trace."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The device as it describes itself. ``features`` are those that were accepted, ``groups`` are by queue."""

    path: str
    name: str
    module: str | None
    pinned: bool | None
    max_entries: int | None
    device_id: int
    offered: Feature
    features: Feature
    backend: BackendFeature
    vqs_count: int
    ring_max: int
    ring_sizes: tuple[int, ...]
    group_num: int
    as_num: int
    first: int
    last: int
    config_size: int
    groups: tuple[int, ...] | None
    desc_groups: tuple[int, ...] | None
    pairs: int
    mac: bytes | None = None
    """The address in a network device's configuration; None if it has none."""
    loops: bool | None = None
    """Whether a network device sends frames back to itself; None if that was not tried."""

    @property
    def is_net(self) -> bool:
        """Whether it is a network device."""
        return self.device_id == NET

    @property
    def is_block(self) -> bool:
        """Whether it is a block device."""
        return self.device_id == BLOCK

    @property
    def control(self) -> int | None:
        """The control queue's index with :attr:`features`, None without one."""
        return control_index(self.features, self.pairs) if self.is_net else None

    @property
    def ring_least(self) -> int:
        """The smallest ring that its queues can have, as far as that is known."""
        return self.ring_max if self.module in _FIXED_RINGS else 1

    @property
    def queues(self) -> tuple[int, ...]:
        """The queues that exist with :attr:`features`: a parent may refuse to set up others (virtio 1.3, 5.1.2)."""
        if not self.is_net:
            return tuple(range(self.vqs_count))
        there = {*range(2 * self.pairs), *([] if self.control is None else [self.control])}
        return tuple(sorted(index for index in there if index < self.vqs_count))

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return {NET: "net", BLOCK: "block"}.get(self.device_id, f"virtio id {self.device_id}")

    def to_dict(self) -> dict[str, Any]:
        """Return them for JSON."""
        return {
            "chardev": self.path,
            "name": self.name,
            "parent": self.module,
            "pinned": self.pinned,
            "kernel": platform.release(),
            "virtio_id": self.device_id,
            "features": hex(self.offered),
            "features_taken": hex(self.features),
            "backend_features": hex(self.backend),
            "vqs_count": self.vqs_count,
            "vring_num": self.ring_max,
            "group_num": self.group_num,
            "as_num": self.as_num,
            "mac": None if self.mac is None else self.mac.hex(":"),
            "loops": self.loops,
            "vring_groups": None if self.groups is None else list(self.groups),
            "vring_desc_groups": None if self.desc_groups is None else list(self.desc_groups),
        }


def ask(path: str, opener: Opener = VhostVdpa) -> Facts:
    """Open the device, which resets it, and ask. Raises what opening and asking raises."""
    with closing(opener(path, Trace())) as c:
        c.set_backend_features(c.get_backend_features())
        c.set_owner()
        parent = parent_of(path)
        offered = Feature(c.get_features())
        device_id = c.get_device_id()
        count = c.get_vqs_count()
        features = _accepted(c, offered)
        size = c.get_config_size()
        pairs = int.from_bytes(c.get_config(8, 2), "little") if device_id == NET and size >= 10 else 1
        many = bool(features & (Feature.MQ | Feature.RSS)) and device_id == NET
        first, last = c.get_iova_range()
        return Facts(
            path=os.fspath(path),
            name=mgmt.name_of(path) or os.path.basename(path),
            module=parent.module,
            pinned=parent.pinned,
            max_entries=parent.max_iotlb_entries,
            device_id=device_id,
            offered=offered,
            features=features,
            backend=c.get_backend_features(),
            vqs_count=count,
            ring_max=c.get_vring_num(),
            ring_sizes=ring_sizes(c, count),
            group_num=c.get_group_num(),
            as_num=c.get_as_num(),
            first=first,
            last=last,
            config_size=size,
            groups=_each(c.get_vring_group, count),
            desc_groups=_each(c.get_vring_desc_group, count),
            pairs=pairs if many else 1,
            mac=c.get_config(0, 6) if device_id == NET and Feature.MAC in features and size >= 6 else None,
        )


def _accepted(c: VhostVdpa, offered: Feature) -> Feature:
    """Negotiate what the driver here can do of what is offered; what the device takes of it."""
    for without in (_UNUSABLE, _UNUSABLE | Feature.MQ | Feature.RSS, _UNUSABLE | Feature.CTRL_VQ | Feature.MQ):
        c.set_status(Status(0))
        c.set_status(_STARTED)
        try:
            c.set_features(int(offered & ~without))
        except KernelError:
            continue
        c.set_status(_STARTED | Status.FEATURES_OK)
        if c.get_status() & Status.FEATURES_OK:
            return offered & ~without
    return Feature(0)


def _each(ask_one: Callable[[int], int], count: int) -> tuple[int, ...] | None:
    try:
        return tuple(ask_one(index) for index in range(count))
    except KernelError as e:
        # EIO: a group that does not exist; groups.below_number reports it
        if e.errno in (*_LACKING, errno.EIO):
            return None
        raise
