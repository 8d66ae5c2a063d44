# SPDX-License-Identifier: MIT
"""Switching a device without a reset: suspend it, give its queues other rings, let it go on.

Whatever a switch needs is made before the guest runs. Descriptors are bound
to an address space of their own from the first start on (later the kernel
refuses), and that space holds at once the guest's rings, at IOVA = GPA, the
shadow rings, in the holes, and the control queue. A switch then maps nothing,
and keeps features, bindings, queues and what the control queue has set:
vhost-vdpa lets a suspended device's rings be moved since Linux 6.8
(drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl). After a stop nothing is undone
either; the reset comes with the next start or with close().
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterator, Sequence

from ...base.errors import KernelError, MissingFeature
from ...base.uapi import Access, BackendFeature, names
from ...memory.guest import PAGE_SIZE
from ...net.control import ControlModel
from ...net.control_queue import GuestControl
from ...virtqueue.layout import GuestQueue, RingLayout, ring_layout
from .base import OWN_ASID, State, Target
from .direct import Direct

_NEEDED = BackendFeature.SUSPEND | BackendFeature.RESUME


class InPlace(Direct):
    """Starts a device as :class:`Direct` does, switches it in place."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        if lacking := self.lacks(target):
            raise MissingFeature(f"{target.path} cannot be switched in place: {lacking}")
        self._standing = False
        """Whether the device is suspended and could go on."""
        self._guest_control: GuestControl | None = None
        self._known: tuple[Sequence[GuestQueue], ControlModel | None] = ((), None)
        """The queues that the device has, and what it was told by its control queue."""
        self._places: dict[int, tuple[RingLayout, int, int]] = {}
        """Layout, address and IOVA of each shadow ring by queue index."""

    @staticmethod
    def lacks(target: Target) -> str:
        """Why a device cannot be switched in place; "" if it can."""
        if missing := _NEEDED & ~target.backend_features:
            return f"it takes SUSPEND and RESUME, and {names(missing)} is not offered"
        if not target.descriptors_apart:
            return f"descriptors cannot lie in an address space of their own: {target.why_not_apart}"
        return ""

    # -- start ------------------------------------------------------------------

    def _start(self, mode: State, control: GuestControl | None) -> None:
        if self._standing and control is self._guest_control and self._known == (self._queues, _copy(control)):
            try:
                self._go_on(mode)
                return
            except KernelError as e:
                # before Linux 6.8 rings could not be moved
                if e.errno != errno.EINVAL:
                    raise
        queues = self._queues
        if self._standing:
            self.reset()
            self._queues = queues
        self._guest_control = control
        super()._start(mode, control)

    def _bind_descriptors(self, mode: State) -> None:
        group = self.target.groups.descriptors
        if group is not None:
            self.target.chardev.set_group_asid(group, OWN_ASID)
        self._map_rings()

    def _map_rings(self) -> None:
        """Map the guest's rings and the shadow ones in one batch, whichever are used first."""
        with self.target.iotlb.space(OWN_ASID).batch() as batch:
            for gpa, size in self._guest_pages():
                self._ours.append((OWN_ASID, gpa))
                batch.map(gpa, self.memories.guest.hva(gpa, size), size)
            at: int = self.memories.own.hva
            for queue in self._queues:
                layout = ring_layout(queue.num)
                iova = self._allocate(layout.size)
                used = iova + layout.driver_area
                self._ours += [(OWN_ASID, iova), (OWN_ASID, used)]
                batch.map(iova, at, layout.driver_area, Access.RO)
                batch.map(used, at + layout.driver_area, layout.device_area)
                self._places[queue.index] = (layout, at, iova)
                at += layout.size

    def _guest_pages(self) -> Iterator[tuple[int, int]]:
        """Yield what the guest's rings lie in, as ranges (GPA, bytes) of whole pages of one region each."""
        pages: set[int] = set()
        for queue in self._queues:
            parts = ((queue.desc, 16 * queue.num), (queue.avail, 6 + 2 * queue.num), (queue.used, 6 + 8 * queue.num))
            for gpa, size in parts:
                pages.update(range(gpa // PAGE_SIZE, (gpa + size - 1) // PAGE_SIZE + 1))
        ends = {region.end // PAGE_SIZE for region in self.memories.guest.regions}
        first: int | None = None
        for page in sorted(pages):
            first = page if first is None else first
            if page + 1 not in pages or page + 1 in ends:
                yield first * PAGE_SIZE, (page + 1 - first) * PAGE_SIZE
                first = None

    def _map_shadow_rings(self) -> dict[int, tuple[int, int]]:
        placed = {}
        for queue in self._queues:
            layout, at, iova = self._places[queue.index]
            if self._shadow(queue).area != at:
                raise MissingFeature(f"{self.target.path}: virtqueue {queue.index} is not where its shadow was mapped")
            placed[queue.index] = (iova, iova + layout.driver_area)
        return placed

    # -- switch -------------------------------------------------------------------

    def _go_on(self, mode: State) -> None:
        """Give a suspended device its queues' other rings and let it go on."""
        c = self.target.chardev
        if mode is State.SHADOW:
            placed = self._map_shadow_rings()
            for shadow in self.shadows:
                desc, used = placed[shadow.queue.index]
                self._move(shadow.queue.index, 0, (desc, desc + shadow.layout.avail_offset, used))
                self._set_eventfds(shadow.queue.index, shadow.kick, shadow.call)
        else:
            for queue in self._queues:
                self._move(queue.index, self._used_index(queue), (queue.desc, queue.avail, queue.used))
                self._set_eventfds(queue.index, queue.kick, queue.call)
        c.resume()
        if self._control is not None:
            c.set_vring_enable(self._control.queue.index, True)
        self._standing = False
        if mode is State.SHADOW:
            self._serve()
        self._serve_control()

    def _move(self, index: int, base: int, addresses: tuple[int, int, int]) -> None:
        desc, avail, used = addresses
        self.target.chardev.set_vring_base(index, base)
        self.target.chardev.set_vring_addr(index, desc=desc, avail=avail, used=used)

    # -- stop -------------------------------------------------------------------

    def _stop(self, then: State | None) -> None:
        self._take_queues()
        if self.guest_config is not None:
            self.guest_config.disconnect()
        shadows, self.shadows = self.shadows, []
        for shadow in shadows:
            shadow.close()
        self._known = self._queues, _copy(self._guest_control)
        self._standing = True
        self.state = State.RESET

    def _reset(self) -> None:
        self._standing = False
        self._places.clear()
        super()._reset()


def _copy(control: GuestControl | None) -> ControlModel | None:
    """Return what the guest's control queue has set so far; it may go on changing on another device."""
    return None if control is None else copy.deepcopy(control.model)
