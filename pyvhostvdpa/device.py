# SPDX-License-Identifier: MIT
"""A virtio-net device behind vhost-vdpa, with named states.

It can be driven directly (passthrough: the device works on the guest's own
rings) or through shadow virtqueues, and switched between the two. It knows
nothing of migration; it names the phases that the trace is stamped with.
"""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from . import mgmt
from .chardev import VhostVdpa
from .errors import DeviceBusy, KernelError, MissingFeature, OutOfOrder, QueueBroken, VhostVdpaError
from .groups import probe_groups
from .iotlb import Iotlb, Layout, Limits
from .memory import HUGE_PAGE, GuestMemory, IovaAllocator, SharedMemory
from .net.control_queue import ControlArea, ControlQueue, GuestControl
from .net.features import CONTROL, SUPPORTED, Feature, negotiate, ring_bits
from .trace import DeviceTrace, Trace
from .uapi import ALL_BACKEND_FEATURES, VIRTIO_ID_NET, Access, BackendFeature, Status, names
from .virtqueue.layout import GuestQueue, SplitLayout, in_order, indices
from .virtqueue.shadow import RelayOptions, Relays, ShadowVirtqueue

log = logging.getLogger(__name__)

GUEST_ASID = 0
"""The address space in which guest memory is mapped, IOVA = GPA."""
OWN_ASID = 1
"""The address space of what is ours: the control queue, and shadow rings where descriptors have their own group."""


class State(enum.Enum):
    """What the device is doing for us."""

    RESET = "reset"
    """No queue is set up."""
    PASSTHROUGH = "passthrough"
    """The device works on the guest's rings."""
    SHADOW = "shadow"
    """The device works on shadow rings, a relay serves the guest's."""
    CLOSED = "closed"


class VdpaNetDevice:
    """An opened device that this process owns, with guest memory to attach to it.

    ``use`` masks the backend features to acknowledge of those advertised,
    ``wanted`` the virtio features that the guest takes of those offered; a
    control queue only where it can be kept apart from the data queues.
    Raises :class:`~pyvhostvdpa.errors.DeviceBusy` naming the holder,
    :class:`~pyvhostvdpa.errors.NotVhostVdpa`,
    :class:`~pyvhostvdpa.errors.MissingFeature` if it is not a net device.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        trace: Trace | None = None,
        use: BackendFeature = ALL_BACKEND_FEATURES,
        wanted: Feature = SUPPORTED,
    ) -> None:
        try:
            self.chardev = VhostVdpa(path, trace)
        except DeviceBusy as e:
            raise mgmt.busy(path) from e
        self.state = State.RESET
        self.memory: GuestMemory | None = None
        self.shadows: list[ShadowVirtqueue] = []
        self._relay: Relays | None = None
        self.relay_options = RelayOptions()
        self._rings: SharedMemory | None = None
        self._control: ControlQueue | None = None
        self._ours: list[tuple[int, int]] = []
        """(ASID, IOVA) of each map of our own memory."""
        self._started_at: dict[int, int] = {}
        """Used index of each guest ring when passthrough started, by queue index."""
        self._queues: tuple[GuestQueue, ...] = ()
        self._holes: IovaAllocator | None = None
        self._translation_lost = False
        try:
            self._inspect(use, wanted)
        except BaseException:
            self.chardev.close()
            raise

    def _inspect(self, use: BackendFeature, wanted: Feature) -> None:
        c = self.chardev
        if c.get_device_id() != VIRTIO_ID_NET:
            raise MissingFeature(f"{c.path} is not a virtio-net device (virtio id {c.get_device_id()})")
        self.features: Feature = negotiate(c.get_features(), wanted)
        self.advertised = c.get_backend_features()
        self.backend_features = self.advertised & use & ALL_BACKEND_FEATURES
        c.set_backend_features(self.backend_features)
        c.set_owner()
        first, last = c.get_iova_range()
        self.vqs_count = c.get_vqs_count()
        self.max_ring = c.get_vring_num()
        parent = mgmt.parent_of(c.path)
        limits = Limits(
            first=first,
            last=last,
            as_num=c.get_as_num(),
            pinned=parent.pinned,
            entries=parent.max_iotlb_entries,
        )
        self.iotlb = Iotlb(c, limits)
        self.groups = probe_groups(c, self.features, self.vqs_count)
        if self.groups.control is None or limits.as_num <= OWN_ASID:
            # passthrough would hide what the guest sets, and replay nothing
            self.features &= ~CONTROL
            self.groups = probe_groups(c, self.features, self.vqs_count)
        self.mac = c.get_config(0, 6) if Feature.MAC in self.features else None

    @property
    def path(self) -> str:
        """The chardev's path."""
        return self.chardev.path

    @property
    def trace(self) -> DeviceTrace:
        """The recorder of what passes the door."""
        return self.chardev.trace

    # -- attach ---------------------------------------------------------------

    def attach(self, memory: GuestMemory) -> None:
        """Map guest memory, IOVA = GPA, in one batch, and get memory for shadow rings ready.

        Everything slow is done here, before a queue runs.
        """
        self.memory = memory
        space = self.iotlb.space(GUEST_ASID)
        with space.batch() as batch:
            for region in memory.regions:
                batch.map(region.gpa, region.memory.hva, region.size)
        space.layout = Layout.IDENTITY
        limits = self.iotlb.limits
        self._holes = IovaAllocator(limits.first, limits.last, [(r.gpa, r.size) for r in memory.regions])
        # a huge page: each ring is one physically contiguous run
        self._rings = SharedMemory("shadow-rings", HUGE_PAGE)
        for note in self.iotlb.notes:
            log.info("%s", note)
        self.iotlb.notes.clear()

    def _attached(self) -> tuple[GuestMemory, SharedMemory, IovaAllocator]:
        if self.memory is None or self._rings is None or self._holes is None:
            raise MissingFeature(f"{self.path}: attach() guest memory first")
        return self.memory, self._rings, self._holes

    # -- start ----------------------------------------------------------------

    @property
    def ring_asid(self) -> int:
        """Where shadow rings are mapped: apart from guest memory if the device can fetch descriptors from there."""
        apart = (
            BackendFeature.DESC_ASID in self.backend_features
            and self.groups.descriptors is not None
            and self.iotlb.limits.as_num > OWN_ASID
        )
        return OWN_ASID if apart else GUEST_ASID

    def start_passthrough(self, queues: Sequence[GuestQueue], control: GuestControl | None = None) -> None:
        """Let the device work on the guest's rings, each from its used index on.

        That is where :meth:`stop` leaves a ring, and where a device left it
        that finishes in order; what was taken and not used is taken again.
        The control queue is served by us in either mode, and the guest's
        state replayed. Raises :class:`MissingFeature` if it cannot be
        isolated, :class:`~pyvhostvdpa.net.control_queue.ControlFailed` if the
        device refuses the state.
        """
        memory = self._check_startable(queues, control)
        self._note_shadowed((), control)
        try:
            self._begin(queues)
            self._set_up_control(control)
            for queue in queues:
                _, used = indices(queue, memory)
                self._started_at[queue.index] = used
                self._set_vring(queue, used, queue.kick, queue.call)
            self._go()
        except BaseException:
            self._abandon()
            raise
        self.state = State.PASSTHROUGH
        self._notify()

    def start_shadow(self, queues: Sequence[GuestQueue], control: GuestControl | None = None) -> None:
        """Let the device work on shadow rings; the guest's are read on from their used index."""
        self._check_startable(queues, control)
        self._note_shadowed(queues, control)
        try:
            self._begin(queues)
            if self.ring_asid == OWN_ASID and self.groups.descriptors is not None:
                self.chardev.set_group_asid(self.groups.descriptors, OWN_ASID)
            self._set_up_control(control)
            self._map_shadow_rings(queues)
            for shadow in self.shadows:
                self._set_vring(shadow.queue, 0, shadow.kick, shadow.call)
            self._go()
            self._relay = Relays(self.shadows, self.relay_options)
            self._relay.start()
        except BaseException:
            self._abandon()
            raise
        self.state = State.SHADOW
        self._notify()

    def _check_startable(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> GuestMemory:
        memory, _, _ = self._attached()
        if self.state is not State.RESET:
            raise MissingFeature(f"{self.path} is in state {self.state.value}: stop() it first")
        for queue in queues:
            if queue.index >= self.vqs_count or queue.num > self.max_ring:
                raise MissingFeature(
                    f"{self.path} has {self.vqs_count} virtqueues of at most {self.max_ring}; "
                    f"the guest uses queue {queue.index} of {queue.num}"
                )
        if control is not None and (self.groups.control is None or self.iotlb.limits.as_num <= OWN_ASID):
            raise MissingFeature(
                f"{self.path}: the control queue shares its group or address space with the data queues, "
                "so its state could not be known"
            )
        return memory

    def _note_shadowed(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> None:
        """For the trace: whose queues are ours from now on. The control queue always is."""
        shadowed = [*queues, *([control.queue] if control else [])]
        self.trace.note("shadow_vqs", queues=" ".join(str(queue.index) for queue in shadowed))

    def _begin(self, queues: Sequence[GuestQueue]) -> None:
        if self._translation_lost:
            self.iotlb.map_again()
            self._translation_lost = False
        c = self.chardev
        self._queues = tuple(queues)
        c.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        c.set_features(int(self.features))
        c.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        if not c.get_status() & Status.FEATURES_OK:
            raise MissingFeature(f"{self.path} refused the features {names(self.features)}")

    def _set_vring(self, queue: GuestQueue, base: int, kick: int, call: int) -> None:
        shadow = next((s for s in self.shadows if s.queue is queue), None)
        if shadow is None:
            self._set_ring(queue.index, queue.num, base, (queue.desc, queue.avail, queue.used))
        else:
            desc, used = self._shadow_iova[queue.index]
            self._set_ring(queue.index, queue.num, base, (desc, desc + shadow.layout.avail_offset, used))
        self._set_eventfds(queue.index, kick, call)

    def _set_ring(self, index: int, num: int, base: int, addresses: tuple[int, int, int]) -> None:
        desc, avail, used = addresses
        self.chardev.set_vring_num(index, num)
        self.chardev.set_vring_base(index, base)
        self.chardev.set_vring_addr(index, desc=desc, avail=avail, used=used)

    def _set_eventfds(self, index: int, kick: int, call: int) -> None:
        self.chardev.set_vring_kick(index, kick)
        self.chardev.set_vring_call(index, call)

    def _go(self) -> None:
        """Make the queues ready and set DRIVER_OK.

        Before DRIVER_OK works on every parent (VDUSE looks at its queues
        then). With a control queue the data queues wait until the guest's
        state is back, where the parent can be told late.
        """
        c, control = self.chardev, self._control
        late = control is not None and BackendFeature.ENABLE_AFTER_DRIVER_OK in self.backend_features
        if control is not None:
            c.set_vring_enable(control.queue.index, True)
        if not late:
            self._enable_data_queues()
        c.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
        if not c.get_status() & Status.DRIVER_OK:
            raise KernelError(5, "VHOST_VDPA_SET_STATUS", "DRIVER_OK", cause=f"{self.path} did not accept it")
        if control is not None:
            control.replay()
        if late:
            self._enable_data_queues()
        if control is not None:
            control.start()

    def _enable_data_queues(self) -> None:
        for queue in self._queues:
            self.chardev.set_vring_enable(queue.index, True)

    # -- our own memory in the device -------------------------------------------

    def _set_up_control(self, control: GuestControl | None) -> None:
        """Place our control queue in its own address space, behind the shadow rings."""
        if control is None or self.groups.control is None:
            return
        memory, rings, holes = self._attached()
        self.chardev.set_group_asid(self.groups.control, OWN_ASID)
        layout = SplitLayout(control.queue.num)
        size = ControlArea(layout, 0, 0).size
        area = ControlArea(layout, rings.hva + rings.size - size, holes.allocate(size))
        self._ours.append((OWN_ASID, area.iova))
        self.iotlb.space(OWN_ASID).map(area.iova, area.hva, size)
        self._control = ControlQueue(control, memory, area, trace=self.trace)
        index, desc = control.queue.index, area.iova
        addresses = (desc, desc + layout.avail_offset, desc + area.device_area)
        self._set_ring(index, layout.num, 0, addresses)
        self._set_eventfds(index, self._control.kick, self._control.call)

    def _map_shadow_rings(self, queues: Sequence[GuestQueue]) -> None:
        memory, rings, holes = self._attached()
        self._shadow_iova: dict[int, tuple[int, int]] = {}
        at: int = rings.hva
        with self.iotlb.space(self.ring_asid).batch() as batch:
            for queue in queues:
                layout = SplitLayout(queue.num)
                if at + layout.size > rings.hva + rings.size // 2:
                    raise MissingFeature(f"{self.path}: the shadow rings do not fit {rings.size // 2} bytes")
                shadow = ShadowVirtqueue(queue, memory, at, ring_bits(self.features))
                self.shadows.append(shadow)
                desc = holes.allocate(layout.driver_area)
                used = holes.allocate(layout.device_area)
                self._ours += [(self.ring_asid, desc), (self.ring_asid, used)]
                self._shadow_iova[queue.index] = (desc, used)
                batch.map(desc, at, layout.driver_area, Access.RO)
                batch.map(used, at + layout.driver_area, layout.device_area, Access.RW)
                at += layout.size

    def _notify(self) -> None:
        # a notification raised while nobody listened must not be lost; RX
        # queues come first, so buffers are there before the first frame
        for queue in self._queues:
            os.eventfd_write(queue.kick, 1)
            os.eventfd_write(queue.call, 1)

    # -- stop -----------------------------------------------------------------

    def suspend(self) -> None:
        """Make the device stop processing. Needs the SUSPEND backend feature."""
        if BackendFeature.SUSPEND not in self.backend_features:
            raise MissingFeature(
                f"{self.path} cannot be suspended, so its queues cannot be taken over without loss",
                hint="vhost-vdpa list shows the driver; SUSPEND needs support there",
            )
        self.chardev.suspend()

    def stop(self) -> None:
        """Suspend, take the queues over, reset.

        Afterwards each guest ring stands as a device finds it that starts at
        the ring's used index. Raises :class:`OutOfOrder`, with the device
        going on, if a passthrough device finishes out of order;
        :class:`QueueBroken`, with the device reset, if a ring holds nonsense.
        """
        self.suspend()
        try:
            if self.state is State.SHADOW:
                self._take_shadow_queues()
            else:
                self._check_guest_queues()
        except OutOfOrder:
            self.resume()
            raise
        except BaseException:
            self._abandon()
            raise
        self.reset()

    def resume(self) -> None:
        """Let a suspended device go on; :class:`MissingFeature` without the RESUME backend feature."""
        if BackendFeature.RESUME not in self.backend_features:
            raise MissingFeature(f"{self.path} is suspended and cannot be resumed; only a reset brings it back")
        self.chardev.resume()
        if self._control is not None:
            # mlx5_vdpa forgets that its control queue is ready
            # (drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_cvq_suspend)
            self.chardev.set_vring_enable(self._control.queue.index, True)

    def _check_guest_queues(self) -> None:
        """Between used index and base lie the descriptors that the device took and did not finish.

        They are not lost: whoever goes on starts at the used index. That is
        right for a device that finishes in order; where the rings show that
        it did not, nobody knows what is open.
        """
        memory, _, _ = self._attached()
        bases = [(queue, self.chardev.get_vring_base(queue.index)) for queue in self._queues]
        for queue, base in bases:
            avail, used = indices(queue, memory)
            taken = (base - used) & 0xFFFF
            if taken > queue.num or (avail - used) & 0xFFFF < taken:
                raise QueueBroken(
                    f"{self.path} virtqueue {queue.index}: the device reports base {base}, "
                    f"the ring has avail {avail} and used {used}"
                )
            if not in_order(queue, memory, self._started_at.get(queue.index, used)):
                raise OutOfOrder(
                    f"{self.path} virtqueue {queue.index}: the device uses descriptors out of order, "
                    "so in passthrough nobody can tell which are open"
                )

    def _take_shadow_queues(self) -> None:
        self._stop_serving()
        for shadow in self.shadows:
            shadow.drain()
        for shadow in self.shadows:
            base = shadow.republish()
            self.trace.note("vhost_vdpa_get_vring_base", index=shadow.queue.index, num=base, svq=True)

    def _stop_serving(self) -> None:
        if self._relay is not None:
            self._relay.stop()
            self._relay = None
        if self._control is not None:
            self._control.stop()

    def reset(self) -> None:
        """Reset the device and take shadow rings away. Guest memory stays mapped.

        Without IOTLB_PERSIST the device has forgotten its maps; they are
        renewed at the next start, not here, since there may be none.
        """
        self._stop_serving()
        self.chardev.set_status(Status(0))
        self.state = State.RESET
        self._queues = ()
        if BackendFeature.IOTLB_PERSIST not in self.backend_features:
            self._translation_lost = True
        self._drop_ours()

    def _drop_ours(self) -> None:
        """Unmap our own memory, one batch an address space, and let the queues go."""
        ours, self._ours = self._ours, []
        shadows, self.shadows = self.shadows, []
        for asid in sorted({asid for asid, _ in ours}):
            space = self.iotlb.space(asid)
            mapped = {m.iova: m for m in space.mappings}
            with space.batch() as batch:
                for iova in (iova for owner, iova in ours if owner == asid and iova in mapped):
                    batch.unmap(iova, mapped[iova].size)
        for _, iova in ours:
            if self._holes is not None:
                self._holes.free(iova)
        for shadow in shadows:
            shadow.close()
        if self._control is not None:
            self._control.close()
            self._control = None

    def _abandon(self) -> None:
        """After a failure: reset as far as that goes, and let the first error be the one that is told."""
        try:
            self.reset()
        except VhostVdpaError as e:
            log.warning("%s could not be reset: %s", self.path, e)
            self._stop_serving()

    def check(self) -> None:
        """Raise :class:`QueueBroken` if a shadow queue or the control queue was given up."""
        for shadow in self.shadows:
            if shadow.broken:
                raise QueueBroken(f"{self.path} virtqueue {shadow.queue.index}: {shadow.broken}")
        if self._control is not None and self._control.failed:
            raise QueueBroken(f"{self.path} control queue: {self._control.failed}")

    def close(self) -> None:
        """Reset and close; the kernel drops every map. Twice is no error."""
        if self.state is State.CLOSED:
            return
        self._abandon()
        self.state = State.CLOSED
        for shadow in self.shadows:
            shadow.close()
        if self._control is not None:
            self._control.close()
        self.chardev.close()
        if self._rings is not None:
            self._rings.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
