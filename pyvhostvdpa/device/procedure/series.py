# SPDX-License-Identifier: MIT
"""QEMU's procedure, with each optimization of the descriptor-ASID series as a switch.

The order of calls is that of QEMU's vhost-vdpa code (net/vhost-vdpa.c,
hw/virtio/vhost-vdpa.c) at the base of the series "vdpa-net: improve migration
downtime through descriptor ASID and persistent IOTLB", with its patches where
a switch is on. It is kept even where it does more than a device needs: what
such a row costs is the point. Calls for guest notifiers are left out.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ...base.errors import MissingFeature
from ...base.eventfds import close_all
from ...base.uapi import Access, BackendFeature, Status
from ...chardev.iotlb import GuestMapping
from ...memory.guest import Translation
from ...net.control_queue import BUFFER_SIZE
from ...virtqueue import SHADOWED
from ...virtqueue.layout import GuestQueue, RingLayout
from ..kind import GuestControl
from ..target import GUEST_ASID, OWN_ASID, READY, State, Target
from .base import Procedure


class Optimization(enum.Flag):
    """What a row of the series switches on; each works without the others."""

    DEST_PREMAP = enum.auto()
    """Guest memory is mapped at attach and not at the first start (RFC ".load_setup", the map thread)."""
    CAPS_AT_INIT = enum.auto()
    """Backend features are acknowledged once, not at every start (same)."""
    DESC_ASID = enum.auto()
    """Shadow rings have an address space of their own, guest memory stays at IOVA = GPA (patches 2 to 10)."""
    PERSIST = enum.auto()
    """Maps survive a reset; guest memory is mapped again only for another layout (patches 11 to 20)."""
    BATCH_RINGS = enum.auto()
    """Rings and control buffers of a net client are mapped and unmapped in one batch (patches 21 to 31)."""
    DEFER_UNMAP = enum.auto()
    """All own memory is unmapped at the end of a stop, in one batch (patches 32 and 33)."""
    KEEP_AT_SWITCH = enum.auto()
    """A switch keeps maps though PERSIST is not acknowledged: only right where a reset drops none."""


@dataclass(frozen=True, slots=True)
class NetClient:
    """What QEMU has one of for each pair, and one for the control queue."""

    queues: tuple[GuestQueue, ...]
    control: bool
    first: bool
    last: bool


class Series(Procedure):
    """Starts and stops a device as QEMU does, net client by net client."""

    def __init__(self, target: Target, switches: Optimization) -> None:
        # guest memory has other IOVAs than GPAs in some rows, and QEMU copies descriptors in all
        super().__init__(replace(target, serving=SHADOWED))
        self.switches = switches
        self._guest_control: GuestControl | None = None
        self._config_eventfd = -1
        self._bound = GUEST_ASID
        """Address space of the descriptor group, as QEMU remembers it across resets."""
        self._guest_at: list[tuple[int, int]] = []
        """IOVA and size of each region of guest memory that is mapped."""
        self._translation: Translation | None = None
        self._rings: dict[int, list[int]] = {}
        """IOVAs of ring areas by queue index."""
        self._buffers: list[int] = []
        """IOVAs of the control queue's buffers."""
        self._control_asid = OWN_ASID

    def _on(self, switch: Optimization) -> bool:
        return switch in self.switches

    @property
    def ring_asid(self) -> int:
        """Apart from guest memory if DESC_ASID is on and the device can do it."""
        return OWN_ASID if self._on(Optimization.DESC_ASID) and self.target.separate_descriptors else GUEST_ASID

    def _mapping_for(self, mode: State) -> GuestMapping:
        legacy = mode is State.SHADOW and self.ring_asid == GUEST_ASID
        return GuestMapping.TRANSLATED if legacy else GuestMapping.IDENTITY

    def _clients(self) -> list[NetClient]:
        queues = self._queues
        pairs = [queues[at : at + 2] for at in range(0, len(queues), 2)]
        guest = self._guest_control
        control = [(guest.queue,)] if guest is not None and guest.queue is not None else []
        count = len(pairs) + len(control)
        return [
            NetClient(each, number >= len(pairs), number == 0, number == count - 1)
            for number, each in enumerate([*pairs, *control])
        ]

    def _attached(self) -> None:
        self._config_eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._add_status(READY)
        if self._on(Optimization.DEST_PREMAP):
            self._place_guest(GuestMapping.IDENTITY)
            self._map_guest(GuestMapping.IDENTITY)

    def _detach(self) -> None:
        self._flush()

    def _add_status(self, bits: Status) -> Status:
        c = self.target.chardev
        c.set_status(c.get_status() | bits)
        return c.get_status()

    # -- start ----------------------------------------------------------------------

    def _start(self, mode: State, control: GuestControl | None) -> None:
        if control is not None and control.queue is None:
            raise MissingFeature(f"{self.target.path}: QEMU's procedure takes the control queue of a guest only")
        self._guest_control = control
        mapping = self._mapping_for(mode)
        self._place_guest(mapping)
        for client in self._clients():
            self._start_client(client, mode, mapping)
        if mode is State.SHADOW:
            self._serve()
        self._serve_control()

    def _start_client(self, client: NetClient, mode: State, mapping: GuestMapping) -> None:
        c = self.target.chardev
        if client.first:
            self._bind_descriptors(mode)
        if client.control:
            self._prepare_control(mode)
        if client.first:
            self._set_features()
            self._check_features(self._add_status(Status.FEATURES_OK))
        if not self._on(Optimization.CAPS_AT_INIT):
            c.get_backend_features()
            if client.first:
                c.set_backend_features(self.target.backend_features)
        self._start_queues(client, mode)
        if client.last:
            self._map_guest(mapping)
            self._check_running(self._add_status(Status.DRIVER_OK))
        c.set_config_call(self._config_call if self.guest_config is not None else self._config_eventfd)
        self._load(client)

    def _bind_descriptors(self, mode: State) -> None:
        group = self.target.groups.descriptors
        asid = self.ring_asid if mode is State.SHADOW else GUEST_ASID
        # a reset binds to 0, so only the way to 1 is needed; QEMU also makes the one back
        if group is not None and OWN_ASID in (asid, self._bound):
            self.target.chardev.set_group_asid(group, asid)
            self._bound = asid

    def _start_queues(self, client: NetClient, mode: State) -> None:
        if client.control:
            self._start_control_queue()
        elif mode is State.SHADOW:
            self._start_shadow_queues(client)
        else:
            for queue in client.queues:
                self._start_guest_queue(queue)

    def _start_guest_queue(self, queue: GuestQueue) -> None:
        c = self.target.chardev
        c.set_vring_num(queue.index, queue.num)
        c.set_vring_base(queue.index, self._used_index(queue))
        c.set_vring_addr(queue.index, desc=queue.desc, avail=queue.avail, used=queue.used)
        c.set_vring_kick(queue.index, queue.kick)
        c.set_vring_call(queue.index, queue.call)

    def _start_shadow_queues(self, client: NetClient) -> None:
        for queue in client.queues:
            self.target.chardev.set_vring_num(queue.index, queue.num)
        with self._batch(Optimization.BATCH_RINGS, self.ring_asid):
            for queue in client.queues:
                shadow = self._shadow(queue, self._translation)
                iovas = self._allocate(shadow.layout.driver_area), self._allocate(shadow.layout.device_area)
                self._start_ring(queue.index, shadow.layout, shadow.area, iovas, (shadow.kick, shadow.call))

    def _start_ring(
        self, index: int, layout: RingLayout, hva: int, iovas: tuple[int, int], eventfds: tuple[int, int]
    ) -> None:
        c = self.target.chardev
        asid = self._control_asid if self._is_control(index) else self.ring_asid
        desc, used = iovas
        kick, call = eventfds
        c.set_vring_base(index, 0)
        c.set_vring_kick(index, kick)
        c.set_vring_call(index, call)
        self._rings[index] = []
        for iova, at, size, perm in (
            (desc, hva, layout.driver_area, Access.RO),
            (used, hva + layout.driver_area, layout.device_area, Access.RW),
        ):
            self._map_own(asid, iova, at, size, perm)
            self._rings[index].append(iova)
        c.set_vring_addr(index, desc=desc, avail=desc + layout.avail_offset, used=used)

    def _load(self, client: NetClient) -> None:
        """Restore the control queue's state, then let the data queues go; without one each client lets its own go."""
        c = self.target.chardev
        if self._guest_control is None:
            for queue in client.queues:
                c.set_vring_enable(queue.index, True)
        elif client.control and self._control is not None:
            c.set_vring_enable(self._control.index, True)
            self._control.replay()
            for queue in self._queues:
                c.set_vring_enable(queue.index, True)

    # -- the control queue, shadowed in either mode -------------------------------------

    def _is_control(self, index: int) -> bool:
        return self._control is not None and self._control.index == index

    def _prepare_control(self, mode: State) -> None:
        """Choose the control queue's address space and map its two buffers."""
        guest = self._guest_control
        if guest is None:
            raise MissingFeature(f"{self.target.path}: there is no control queue")
        c, area = self.target.chardev, self._make_control(guest).area
        self._control_asid = GUEST_ASID if self._mapping_for(mode) is GuestMapping.TRANSLATED else OWN_ASID
        if self._control_asid == OWN_ASID:
            c.set_group_asid(c.get_vring_group(guest.index), OWN_ASID)
        with self._batch(Optimization.BATCH_RINGS, self._control_asid):
            self._buffers = []
            for offset, perm in ((area.commands, Access.RO), (area.answers, Access.RW)):
                self._map_own(self._control_asid, area.iova + offset, area.hva + offset, BUFFER_SIZE, perm)
                self._buffers.append(area.iova + offset)

    def _start_control_queue(self) -> None:
        control = self._control
        if control is None:
            raise MissingFeature(f"{self.target.path}: there is no control queue")
        index, area = control.index, control.area
        self.target.chardev.set_vring_num(index, area.layout.num)
        with self._batch(Optimization.BATCH_RINGS, self._control_asid):
            iovas = area.iova, area.iova + area.device_area
            self._start_ring(index, area.layout, area.hva, iovas, (control.kick, control.call))

    # -- maps -------------------------------------------------------------------------

    @contextmanager
    def _batch(self, switch: Optimization, asid: int) -> Iterator[None]:
        """Hold a batch open for the block if ``switch`` is on."""
        if self._on(switch):
            with self.target.iotlb.space(asid).held():
                yield
        else:
            yield

    def _map_own(self, asid: int, iova: int, hva: int, size: int, perm: Access) -> None:
        self._ours.append((asid, iova))
        self.target.iotlb.space(asid).map(iova, hva, size, perm)

    def _unmap_own(self, asid: int, iovas: list[int]) -> None:
        space = self.target.iotlb.space(asid)
        for iova in iovas:
            [size] = [m.size for m in space.mappings if m.iova == iova]
            space.unmap(iova, size)
            self._ours.remove((asid, iova))

    def _place_guest(self, mapping: GuestMapping) -> None:
        """Decide where guest memory goes in ``mapping``; memory mapped differently is unmapped."""
        space = self.target.iotlb.space(GUEST_ASID)
        if space.guest_mapping is mapping:
            return
        self._flush()
        regions = self.memories.guest.regions
        if mapping is GuestMapping.IDENTITY:
            self._translation = None
            self._guest_at = [(region.gpa, region.size) for region in regions]
        else:
            iovas = [self.memories.holes.allocate(region.size) for region in regions]
            self._translation = self.memories.guest.translate(iovas)
            self._guest_at = [(iova, region.size) for iova, region in zip(iovas, regions, strict=True)]

    def _map_guest(self, mapping: GuestMapping) -> None:
        space = self.target.iotlb.space(GUEST_ASID)
        if space.guest_mapping is mapping:
            return
        with space.batch() as batch:
            for (iova, size), region in zip(self._guest_at, self.memories.guest.regions, strict=True):
                batch.map(iova, region.memory.hva, size)
        space.guest_mapping = mapping

    def _flush(self) -> None:
        """Unmap all guest memory that is mapped."""
        space = self.target.iotlb.space(GUEST_ASID)
        mapped = {m.iova for m in space.mappings}
        with space.batch() as batch:
            for iova, size in self._guest_at:
                if iova in mapped:
                    batch.unmap(iova, size)
        space.guest_mapping = GuestMapping.NONE
        if self._translation is not None:
            self._translation = None
            for iova, _ in self._guest_at:
                self.memories.holes.free(iova)
        self._guest_at = []

    # -- stop -------------------------------------------------------------------------

    def _stop(self, then: State | None) -> None:
        clients = self._clients()
        if not clients:
            self.reset()
            return
        self._stop_serving()
        if self.guest_config is not None:
            self.guest_config.disconnect()
        self._take_over_shadows()
        for client in clients:
            self._stop_client(client, then)
        if self._on(Optimization.DEFER_UNMAP):
            self._unmap_everything(clients)
        self._drop_own_maps()
        self._forget()

    def _is_shadowed(self, client: NetClient) -> bool:
        return client.control or self.state is State.SHADOW

    def _stop_client(self, client: NetClient, then: State | None) -> None:
        c, deferred = self.target.chardev, self._on(Optimization.DEFER_UNMAP)
        self._note_verdict(client, then)
        if not self._is_shadowed(client):
            for queue in client.queues:
                self._check_base(queue, c.get_vring_base(queue.index))
        elif not deferred:
            with self._batch(Optimization.BATCH_RINGS, self._asid_of(client)):
                self._unmap_rings(client)
        if client.last:
            c.set_status(Status(0))
            self._add_status(READY)
            self._maybe_flush(then)
        c.set_config_call(-1)
        if client.control and not deferred:
            with self._batch(Optimization.BATCH_RINGS, self._control_asid):
                self._unmap_own(self._control_asid, self._buffers)

    def _note_verdict(self, client: NetClient, then: State | None) -> None:
        """For the trace: what patch 17 decides before each net client is stopped."""
        if self._on(Optimization.PERSIST):
            switch = {None: 0, State.SHADOW: 1}.get(then, -1)
            kind = "cvq" if client.control else "data"
            self.target.chardev.trace.note(
                f"vhost_vdpa_net_{kind}_eval_flush",
                # QEMU counts pairs here; the control queue comes behind the last
                qindex=client.queues[0].index // 2,
                svq_switch=switch,
                flush_map=not self._keeps(then),
            )

    def _maybe_flush(self, then: State | None) -> None:
        keeps = self._keeps(then)
        if self._on(Optimization.PERSIST):
            self.target.chardev.trace.note(
                "vhost_vdpa_maybe_flush_map",
                registered=self.target.iotlb.space(GUEST_ASID).guest_mapping is not GuestMapping.NONE,
                flush_map=not keeps,
                iotlb_persistent=BackendFeature.IOTLB_PERSIST in self.target.backend_features,
            )
        if not keeps:
            self._flush()

    def _asid_of(self, client: NetClient) -> int:
        return self._control_asid if client.control else self.ring_asid

    def _unmap_rings(self, client: NetClient) -> None:
        for queue in client.queues:
            self._unmap_own(self._asid_of(client), self._rings.pop(queue.index))

    def _unmap_everything(self, clients: list[NetClient]) -> None:
        """One batch for all net clients, or one each time that the address space changes."""
        shadowed = [client for client in clients if self._is_shadowed(client)]
        while shadowed:
            asid = self._asid_of(shadowed[0])
            with self.target.iotlb.space(asid).held():
                while shadowed and self._asid_of(shadowed[0]) == asid:
                    client = shadowed.pop(0)
                    self._unmap_rings(client)
                    if client.control:
                        self._unmap_own(asid, self._buffers)

    def _keeps(self, then: State | None) -> bool:
        """Whether guest memory stays mapped across this reset.

        Decided by the layout that is installed and the one that follows, not
        by the direction of the switch: a stop in shadow mode whose next start
        is not known leaves a translated layout, which that start replaces.
        """
        if BackendFeature.IOTLB_PERSIST not in self.target.backend_features and not (
            self._on(Optimization.KEEP_AT_SWITCH) and then is not None
        ):
            return False
        return then is None or self._mapping_for(then) is self.target.iotlb.space(GUEST_ASID).guest_mapping

    def _reset(self) -> None:
        self.target.chardev.set_status(Status(0))
        self.state = State.RESET
        self._add_status(READY)
        if BackendFeature.IOTLB_PERSIST not in self.target.backend_features:
            self._flush()
        self._rings.clear()
        self._drop_own_maps()

    def release(self) -> None:
        """Release everything; the device must be closed."""
        super().release()
        eventfd, self._config_eventfd = self._config_eventfd, -1
        close_all([eventfd])
