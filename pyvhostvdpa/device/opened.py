# SPDX-License-Identifier: MIT
"""A virtio-net device that is opened: what it offers, and the features that are chosen of that, once or again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable

from ..base.closing import Closing
from ..base.errors import DeviceBusy, MissingFeature
from ..base.uapi import ALL_BACKEND_FEATURES, VIRTIO_ID_NET, BackendFeature
from ..chardev.door import VhostVdpa, check_path
from ..chardev.iotlb import Iotlb, Limits
from ..host import mgmt
from ..host.parents import check_served, parent_of
from ..memory.guest import GuestMemory
from ..net.control_queue import DEFAULT_DEADLINE
from ..net.features import CONTROL, SUPPORTED, Feature, check_implemented, negotiate
from ..trace.recorder import DeviceTrace, Trace
from . import shadowing
from .groups import Groups, ring_sizes
from .log import DirtyLog
from .net_kind import NET, offered_pairs, probe_groups
from .procedure import best
from .procedure.base import Procedure
from .provisioned import SETTABLE
from .target import OWN_ASID, State, Target
from .work import ConfigLook

log = logging.getLogger(__name__)


class OpenedDevice(Closing):
    """What :class:`~pyvhostvdpa.VdpaNetDevice` is before memory is attached; see there for its arguments."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        trace: Trace | None = None,
        use: BackendFeature = ALL_BACKEND_FEATURES,
        wanted: Feature | None = SUPPORTED,
        procedure: str | Callable[[Target], Procedure] | None = None,
        control_deadline: float = DEFAULT_DEADLINE,
        shadow: str | None = None,
    ) -> None:
        # before the device is opened, which resets it
        check_implemented(wanted or Feature(0))
        self._serving = None if shadow is None else shadowing.choose(shadow, NET)
        check_path(path)
        check_served(path)
        try:
            self.chardev = VhostVdpa(path, trace)
        except DeviceBusy as e:
            raise mgmt.busy(path) from e
        try:
            self._inspect(use)
            self._asked_for = procedure
            self._made: Procedure | None = None
            self._settable: Target | None = None
            """As the device was when a guest could set its MAC address last."""
            if wanted is None:
                self._await_features()
            else:
                self.negotiate(wanted)
            self._procedure.control_deadline = control_deadline
            self.memory: GuestMemory | None = None
            """What is attached."""
            self._log = DirtyLog(GuestMemory.empty())
        except BaseException:
            self.chardev.close()
            raise

    def _inspect(self, use: BackendFeature) -> None:
        c = self.chardev
        if c.get_device_id() != VIRTIO_ID_NET:
            raise MissingFeature(f"{c.path} is not a virtio-net device (virtio id {c.get_device_id()})")
        self.offered = Feature(c.get_features())
        """What the device offers."""
        self.advertised = c.get_backend_features()
        self.backend_features = self.advertised & use & ALL_BACKEND_FEATURES
        c.set_backend_features(self.backend_features)
        c.set_owner()
        first, last = c.get_iova_range()
        self.vqs_count = c.get_vqs_count()
        self.max_ring = c.get_vring_num()
        self.ring_sizes = ring_sizes(c, self.vqs_count)
        """The largest ring of each queue, by index, a power of two."""
        parent = parent_of(c.path)
        limits = Limits(
            first=first,
            last=last,
            as_num=c.get_as_num(),
            pinned=parent.pinned,
            entries=parent.max_iotlb_entries,
            private=parent.pins_for_certain,
        )
        self.iotlb = Iotlb(c, limits)
        self._config_size = 0
        self._mac = c.get_config(0, 6) if Feature.MAC in self.offered else None

    def _await_features(self) -> None:
        """Be a device of which features have not been chosen: memory can be attached, nothing started."""
        pairs = offered_pairs(self.chardev, self.offered)
        self.features = Feature(0)
        self.groups = Groups(pairs, None, None, None, self.config())
        self.target = self._target(self.features, self.groups)
        self.procedure = best.Choice(best.DIRECT, "no features have been negotiated")
        self._made = best.make(self.procedure, self.target)

    def negotiate(self, wanted: Feature) -> Feature:
        """Choose the features of the next start on, and return them: what is offered of ``wanted``, and what must be.

        :data:`~pyvhostvdpa.net.features.REQUIRED` is always taken, a control
        queue only where it can be kept apart from the data queues: compare
        the result with what the guest was promised. Groups, :attr:`target` and
        :attr:`procedure` follow from it. A suspended device is reset.
        Attached memory stays mapped, or is mapped again by the next start.

        Raises :class:`MissingFeature` if the device is running, lacks what is
        required, or cannot do the procedure that was asked for, and if a bit
        of ``wanted`` is not implemented here; the choice before stays in force.
        """
        if self._made is not None and self.state is not State.RESET:
            raise MissingFeature(f"{self.path} is in state {self.state.value}: stop() it before negotiating again")
        features = negotiate(self.offered, wanted)
        if self._made is not None:
            self._made.reset()
        groups = probe_groups(self.chardev, features, self.vqs_count)
        if groups.control is None or self.iotlb.limits.as_num <= OWN_ASID:
            # passthrough would hide what the guest sets, and replay nothing
            features &= ~CONTROL
            groups = probe_groups(self.chardev, features, self.vqs_count)
        target = self._target(features, groups)
        choice, made = self._make(target)
        if self._made is not None:
            made.inherit(self._made)
        self.features, self.groups, self.target = features, groups, target
        self.procedure, self._made = choice, made
        if SETTABLE in features:
            self._settable = target
        log.debug("%s: procedure %s", self.path, self.procedure)
        return features

    def _target(self, features: Feature, groups: Groups) -> Target:
        c, backend = self.chardev, self.backend_features
        return Target(c, self.iotlb, features, backend, groups, self.ring_sizes, self._serving)

    def _make(self, target: Target) -> tuple[best.Choice, Procedure]:
        if self._asked_for is None or isinstance(self._asked_for, str):
            choice = best.choose(target, self._asked_for)
            return choice, best.make(choice, target)
        made = self._asked_for(target)
        return best.Choice(type(made).__name__), made

    @property
    def _procedure(self) -> Procedure:
        assert self._made is not None
        return self._made

    @property
    def shadow(self) -> str:
        """How its queues are shadowed: one of :data:`pyvhostvdpa.device.shadowing.NAMES`."""
        return self._procedure.serving.name

    @property
    def mac(self) -> bytes | None:
        """The MAC address that the device had when it was opened; None if it has none, or it was not negotiated."""
        return self._mac if Feature.MAC in self.features else None

    @property
    def path(self) -> str:
        """The chardev's path."""
        return self.chardev.path

    @property
    def trace(self) -> DeviceTrace:
        """The recorder of what passes the door."""
        return self.chardev.trace

    @property
    def state(self) -> State:
        """What the device is doing for us."""
        return State.CLOSED if self.chardev.closed else self._procedure.state

    def config(self) -> bytes:
        """Return the configuration space as it is now."""
        if not self._config_size:
            # a parent has one size (struct vdpa_config_ops, get_config_size)
            self._config_size = self.chardev.get_config_size()
        return self.chardev.get_config(0, self._config_size)

    def prepare_config(self) -> ConfigLook:
        """Return a look, to be taken by C, at whether :meth:`config` still is what it was when this was opened."""
        return ConfigLook(self.chardev.prepare(), self.groups.config)

    def largest_ring(self, queues: Iterable[int]) -> int:
        """Return the largest ring that each of ``queues`` can have (GET_VRING_SIZE, or GET_VRING_NUM without it)."""
        return min((self.ring_sizes[index] for index in queues if index < self.vqs_count), default=self.max_ring)
