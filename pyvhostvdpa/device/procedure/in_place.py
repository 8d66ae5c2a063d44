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
import dataclasses
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..._cdefs import ffi
from ...base.errors import KernelError, MissingFeature
from ...base.uapi import Access, BackendFeature, names
from ...chardev.calls import PreparedCalls
from ...memory.guest import PAGE_SIZE
from ...net.control import ControlModel
from ...net.control_queue import GuestControl
from ...net.features import Feature, ring_bits
from ...virtqueue.layout import GuestQueue, RingLayout, ring_layout
from ...virtqueue.serving import RingServer
from .base import OWN_ASID, State, Target
from .direct import Direct, set_eventfds, set_ring

Addresses = tuple[int, int, int]
"""Of a ring, as the device sees them: descriptors, avail ring, used ring."""
Face = tuple[Addresses, tuple[int, int]]
"""What a device is told of a queue: its ring, and the eventfds for kick and call."""

_NEEDED = BackendFeature.SUSPEND | BackendFeature.RESUME


class InPlace(Direct):
    """Starts a device as :class:`Direct` does, switches it in place.

    What a suspend, a move of the rings and a resume will ask of the device is
    put into lists while it runs (:mod:`pyvhostvdpa.chardev.calls`), and so are
    shadow queues made; while it stands still the lists are run.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        if lacking := self.lacks(target):
            raise MissingFeature(f"{target.path} cannot be switched in place: {lacking}")
        self._standing = False
        """Whether the device is suspended and could go on."""
        self._stopped_in: State | None = None
        """The mode that the last stop ended."""
        self._guest_control: GuestControl | None = None
        self._known: tuple[Sequence[GuestQueue], ControlModel | None] = ((), None)
        """The queues that the device has, and what it was told by its control queue."""
        self._places: dict[int, tuple[RingLayout, int, int]] = {}
        """Layout, address and IOVA of each shadow ring by queue index."""
        self._spare: list[RingServer] = []
        """Shadow queues that the next switch will need, made before the device stands still."""
        self._given: dict[int, Face] = {}
        """What the device was told last of each queue."""
        self._stopping: PreparedCalls | None = None
        self._bases: list[int] = []
        """Where in the list of a stop the bases are asked for."""
        self._base_failed: KernelError | None = None
        self._moving: dict[State, _Move] = {}

    @staticmethod
    def lacks(target: Target) -> str:
        """Why a device cannot be switched in place; "" if it can."""
        if missing := _NEEDED & ~target.backend_features:
            return f"it takes SUSPEND and RESUME, and {names(missing)} is not offered"
        if not target.descriptors_apart:
            return f"descriptors cannot lie in an address space of their own: {target.why_not_apart}"
        if Feature.INDIRECT_DESC in target.features:
            # vhost_types.h names the descriptor table, driver and device area; devices differ in where they look
            return (
                "the guest may use indirect descriptor tables, which lie in its memory, and it is not specified "
                "whether a device looks for them there when descriptors have an address space of their own"
            )
        return ""

    # -- start ------------------------------------------------------------------

    def _start(self, mode: State, control: GuestControl | None) -> None:
        # such shadow rings start over at the same addresses; vdpa_hwsim was seen to go on there where it had stopped
        moved = not (mode is State.SHADOW and self._stopped_in is State.SHADOW)
        if moved and self._stands_for(control):
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
            self._take(queues)
        self._guest_control = control
        super()._start(mode, control)
        faces: Sequence[GuestQueue | RingServer] = self.shadows if mode is State.SHADOW else self._queues
        self._given = {queue.index: self._face(queue, face) for queue, face in zip(self._queues, faces, strict=True)}

    def _face(self, queue: GuestQueue, face: GuestQueue | RingServer) -> Face:
        """Return what the device is told of a queue: the addresses of one of its rings, and its eventfds."""
        guest = isinstance(face, GuestQueue)
        ring = (queue.desc, queue.avail, queue.used) if guest else self._shadow_ring(queue)
        return ring, (face.kick, face.call)

    def _stands_for(self, control: GuestControl | None) -> bool:
        """Whether the device stands suspended with these queues, and knows what their control queue has set."""
        queues, model = self._known
        same = control is self._guest_control and queues == self._queues
        return self._standing and same and _same(model, control)

    def _stand_by(self, control: GuestControl | None) -> str:
        """Start the device on empty rings of ours and suspend it: ring addresses, bases and RESUME are left.

        It finds no descriptor there, and writes nothing into guest memory.
        """
        self._guest_control = control
        self._begin()
        self._bind_descriptors(State.PASSTHROUGH)
        if control is not None and self.target.groups.control is not None:
            self._set_up_control(control, self.target.groups.control)
        self._set_up_empty_rings()
        self._let_run()
        self.suspend()
        if not self._can_move_rings():
            queues = self._queues
            self.reset()
            self._take(queues)
            return super()._stand_by(control)
        self._known = self._queues, _copy(control)
        self._standing = True
        self._stopped_in = None
        self._moving[State.PASSTHROUGH] = self._prepare_move(State.PASSTHROUGH)
        return "it stands suspended with its queues and the control queue's state; rings and RESUME come at the start"

    def _set_up_empty_rings(self) -> None:
        calls = self.target.chardev.prepare()
        for queue in self._queues:
            layout, at, _ = self._places[queue.index]
            ffi.memmove(ffi.cast("char *", at), bytes(layout.size), layout.size)
            set_ring(calls, queue.index, queue.num, 0, self._shadow_ring(queue))
            set_eventfds(calls, queue.index, queue.kick, queue.call)
            self._given[queue.index] = (self._shadow_ring(queue), (queue.kick, queue.call))
        calls.run()

    def _shadow_ring(self, queue: GuestQueue) -> Addresses:
        """Return where the device finds the shadow ring of a queue: descriptors, avail and used ring."""
        layout, _, iova = self._places[queue.index]
        return iova, iova + layout.avail_offset, iova + layout.driver_area

    def _can_move_rings(self) -> bool:
        """Whether this kernel lets a suspended device's rings be moved; before Linux 6.8 it did not."""
        try:
            self.target.chardev.set_vring_base(self._queues[0].index, 0)
        except KernelError as e:
            if e.errno != errno.EINVAL:
                raise
            return False
        return True

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
                layout = ring_layout(queue.num, ring_bits(self.target.features))
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
        """Return where the shadow rings are mapped, by queue index; they were before the first start."""
        if not self.shadows:
            self._make_spare()
            self.shadows, self._spare = self._spare, []
        return {index: (iova, iova + layout.driver_area) for index, (layout, _, iova) in self._places.items()}

    def _make_spare(self) -> None:
        """Make the shadow queues of a switch; nothing of the device is touched, so it may run."""
        if self._spare:
            return
        ring = ring_bits(self.target.features)
        for queue in self._queues:
            _, at, _ = self._places[queue.index]
            self._spare.append(self.target.serving.queue(queue, self.memories.guest, at, ring, None))

    # -- switch -------------------------------------------------------------------

    def _prepare_move(self, mode: State) -> _Move:
        """Put into a list what gives a suspended device its queues' other rings and lets it go on."""
        calls = self.target.chardev.prepare()
        bases: list[int] = []
        faces: Sequence[GuestQueue | RingServer] = self._spare if mode is State.SHADOW else self._queues
        given: dict[int, Face] = {}
        for queue, face in zip(self._queues, faces, strict=True):
            ring, eventfds = given[queue.index] = self._face(queue, face)
            had_ring, had_eventfds = self._given.get(queue.index, ((), ()))
            bases.append(calls.set_vring_base(queue.index, 0))
            if ring != had_ring:
                calls.set_vring_addr(queue.index, *ring)
            if eventfds != had_eventfds:
                set_eventfds(calls, queue.index, *eventfds)
        calls.resume()
        if self._control is not None:
            # mlx5_vdpa forgets that its control queue is ready
            # (drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_cvq_suspend)
            calls.set_vring_enable(self._control.queue.index, True)
        return _Move(calls.seal(), tuple(bases), tuple(self._spare) if mode is State.SHADOW else (), given)

    def _go_on(self, mode: State) -> None:
        """Give a suspended device its queues' other rings and let it go on."""
        if mode is State.SHADOW:
            self._make_spare()
        move = self._moving.pop(mode, None)
        if move is None or move.shadows != (tuple(self._spare) if mode is State.SHADOW else ()):
            move = self._prepare_move(mode)
        if mode is State.SHADOW:
            self.shadows, self._spare = self._spare, []
            for shadow in self.shadows:
                shadow.take_up()
        else:
            for place, used in zip(move.bases, self._used_indices(), strict=True):
                move.calls.put(place, used)
        if self._control is not None:
            self._control.take_up()
        move.calls.run()
        self._standing = False
        self._given = move.given
        if mode is State.SHADOW:
            self._serve()
        self._serve_control()

    # -- stop -------------------------------------------------------------------

    def _prepare_stop(self, then: State | None) -> None:
        calls = self.target.chardev.prepare()
        calls.suspend()
        passthrough = self.state is State.PASSTHROUGH
        self._bases = [calls.get_vring_base(queue.index) for queue in self._queues] if passthrough else []
        self._stopping = calls.seal()
        self._moving.clear()
        if then is State.SHADOW and passthrough:
            self._make_spare()
        if then is not None and (then is State.PASSTHROUGH or self._spare):
            self._moving[then] = self._prepare_move(then)
        # the control queue may set something until it is stopped, so this is compared then
        self._known = self._queues, _copy(self._guest_control)

    def _suspend(self) -> None:
        stopping, self._stopping = self._stopping, None
        if stopping is None:
            super()._suspend()
            return
        try:
            stopping.run()
        except KernelError as e:
            if not stopping.done:
                raise
            # it is suspended: the stop fails, not the suspend
            self._base_failed = e
        self._bases = [stopping.got(place) for place in self._bases]

    def _check_guest_queues(self) -> None:
        failed, self._base_failed = self._base_failed, None
        if failed is not None:
            raise failed
        self._check_bases(self._bases)

    def _stop(self, then: State | None) -> None:
        self._take_queues()
        if self.guest_config is not None:
            self.guest_config.disconnect()
        self._close_shadows()
        if not _same(self._known[1], self._guest_control):
            self._known = self._queues, _copy(self._guest_control)
        self._standing = True
        self._stopped_in = self.state
        self.state = State.RESET

    def _reset(self) -> None:
        self._standing = False
        self._places.clear()
        self._moving.clear()
        self._close_spare()
        super()._reset()

    def _close_spare(self) -> None:
        spare, self._spare = self._spare, []
        for shadow in spare:
            shadow.close()

    def _close_queues(self) -> None:
        super()._close_queues()
        self._close_spare()


@dataclass(frozen=True, slots=True)
class _Move:
    """What moves a suspended device to other rings: the list, and where in it the bases are."""

    calls: PreparedCalls
    bases: tuple[int, ...]
    shadows: tuple[RingServer, ...]
    """Whose eventfds are in the list."""
    given: dict[int, Face]
    """What the device has of each queue afterwards."""


def _copy(control: GuestControl | None) -> ControlModel | None:
    """Return what the guest's control queue has set so far; it may go on changing on another device."""
    return None if control is None else copy.deepcopy(control.model)


def _same(known: ControlModel | None, control: GuestControl | None) -> bool:
    """Whether a device that knows this knows what the guest has set. A request to announce is no matter of its."""
    if known is None or control is None:
        return known is None and control is None
    return dataclasses.replace(known, announce=False) == dataclasses.replace(control.model, announce=False)
