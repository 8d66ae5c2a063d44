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
from .errors import DeviceBusy, KernelError, MissingFeature, QueueBroken, VhostVdpaError
from .iotlb import Iotlb, Layout, Limits
from .memory import HUGE_PAGE, GuestMemory, IovaAllocator, SharedMemory
from .net.features import Feature, negotiate
from .trace import DeviceTrace, Trace
from .uapi import ALL_BACKEND_FEATURES, VIRTIO_ID_NET, Access, BackendFeature, Status, names
from .virtqueue.layout import GuestQueue, indices
from .virtqueue.shadow import Relay, ShadowVirtqueue

log = logging.getLogger(__name__)

GUEST_ASID = 0
"""The address space in which guest memory is mapped, IOVA = GPA."""


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

    ``use`` masks the backend features to acknowledge of those advertised.
    Raises :class:`~pyvhostvdpa.errors.DeviceBusy` naming the holder,
    :class:`~pyvhostvdpa.errors.NotVhostVdpa`,
    :class:`~pyvhostvdpa.errors.MissingFeature` if it is not a net device.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        trace: Trace | None = None,
        use: BackendFeature = ALL_BACKEND_FEATURES,
    ) -> None:
        try:
            self.chardev = VhostVdpa(path, trace)
        except DeviceBusy as e:
            raise mgmt.busy(path) from e
        self.state = State.RESET
        self.memory: GuestMemory | None = None
        self.shadows: list[ShadowVirtqueue] = []
        self._relay: Relay | None = None
        self._rings: SharedMemory | None = None
        self._queues: tuple[GuestQueue, ...] = ()
        self._holes: IovaAllocator | None = None
        self._translation_lost = False
        try:
            self._inspect(use)
        except BaseException:
            self.chardev.close()
            raise

    def _inspect(self, use: BackendFeature) -> None:
        c = self.chardev
        if c.get_device_id() != VIRTIO_ID_NET:
            raise MissingFeature(f"{c.path} is not a virtio-net device (virtio id {c.get_device_id()})")
        self.features: Feature = negotiate(c.get_features())
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

    def start_passthrough(self, queues: Sequence[GuestQueue]) -> None:
        """Let the device work on the guest's rings, each from its used index on.

        That is where :meth:`stop` leaves a ring, and where a device left it
        that finishes in order; what was taken and not used is taken again.
        """
        memory = self._check_startable(queues)
        try:
            self._begin(queues)
            for queue in queues:
                _, used = indices(queue, memory)
                self._set_vring(queue, used, queue.kick, queue.call)
            self._driver_ok()
        except BaseException:
            self._abandon()
            raise
        self.state = State.PASSTHROUGH
        self._notify()

    def start_shadow(self, queues: Sequence[GuestQueue]) -> None:
        """Let the device work on shadow rings; the guest's are read on from their used index."""
        self._check_startable(queues)
        try:
            self._begin(queues)
            self._map_shadow_rings(queues)
            for shadow in self.shadows:
                self._set_vring(shadow.queue, 0, shadow.kick, shadow.call)
            self._driver_ok()
            self._relay = Relay(self.shadows)
            self._relay.start()
        except BaseException:
            self._abandon()
            raise
        self.state = State.SHADOW
        self._notify()

    def _check_startable(self, queues: Sequence[GuestQueue]) -> GuestMemory:
        memory, _, _ = self._attached()
        if self.state is not State.RESET:
            raise MissingFeature(f"{self.path} is in state {self.state.value}: stop() it first")
        for queue in queues:
            if queue.index >= self.vqs_count or queue.num > self.max_ring:
                raise MissingFeature(
                    f"{self.path} has {self.vqs_count} virtqueues of at most {self.max_ring}; "
                    f"the guest uses queue {queue.index} of {queue.num}"
                )
        return memory

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
        c, index = self.chardev, queue.index
        c.set_vring_num(index, queue.num)
        c.set_vring_base(index, base)
        shadow = next((s for s in self.shadows if s.queue is queue), None)
        if shadow is None:
            c.set_vring_addr(index, desc=queue.desc, avail=queue.avail, used=queue.used)
        else:
            desc, used = self._shadow_iova[index]
            c.set_vring_addr(index, desc=desc, avail=desc + shadow.layout.avail_offset, used=used)
        c.set_vring_kick(index, kick)
        c.set_vring_call(index, call)
        # before DRIVER_OK: works on every parent, with and without
        # ENABLE_AFTER_DRIVER_OK (VDUSE looks at its queues at DRIVER_OK)
        c.set_vring_enable(index, True)

    def _driver_ok(self) -> None:
        c = self.chardev
        c.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
        if not c.get_status() & Status.DRIVER_OK:
            raise KernelError(5, "VHOST_VDPA_SET_STATUS", "DRIVER_OK", cause=f"{self.path} did not accept it")

    def _map_shadow_rings(self, queues: Sequence[GuestQueue]) -> None:
        memory, rings, holes = self._attached()
        self._shadow_iova: dict[int, tuple[int, int]] = {}
        at: int = rings.hva
        with self.iotlb.space(GUEST_ASID).batch() as batch:
            for queue in queues:
                shadow = ShadowVirtqueue(queue, memory, at)
                self.shadows.append(shadow)
                layout = shadow.layout
                if at + layout.size > rings.hva + rings.size:
                    raise MissingFeature(f"{self.path}: the shadow rings do not fit {rings.size} bytes")
                desc = holes.allocate(layout.driver_area)
                used = holes.allocate(layout.device_area)
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
        the ring's used index. Raises :class:`QueueBroken` if a ring holds
        nonsense; the device is reset then all the same.
        """
        self.suspend()
        try:
            if self.state is State.SHADOW:
                self._take_shadow_queues()
            else:
                self._check_guest_queues()
        except BaseException:
            self._abandon()
            raise
        self.reset()

    def _check_guest_queues(self) -> None:
        """Between used index and base lie the descriptors that the device took and did not finish.

        They are not lost: whoever goes on starts at the used index. That the
        device finished in order is all one can know in passthrough.
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

    def _take_shadow_queues(self) -> None:
        self._stop_relay()
        for shadow in self.shadows:
            shadow.drain()
        for shadow in self.shadows:
            shadow.republish()

    def _stop_relay(self) -> None:
        if self._relay is not None:
            self._relay.stop()
            self._relay = None

    def reset(self) -> None:
        """Reset the device and take shadow rings away. Guest memory stays mapped.

        Without IOTLB_PERSIST the device has forgotten its maps; they are
        renewed at the next start, not here, since there may be none.
        """
        self._stop_relay()
        self.chardev.set_status(Status(0))
        self.state = State.RESET
        self._queues = ()
        if BackendFeature.IOTLB_PERSIST not in self.backend_features:
            self._translation_lost = True
        self._drop_shadows()

    def _drop_shadows(self) -> None:
        shadows, self.shadows = self.shadows, []
        if not shadows or self._holes is None:
            return
        mapped = {m.iova: m for m in self.iotlb.space(GUEST_ASID).mappings}
        with self.iotlb.space(GUEST_ASID).batch() as batch:
            for shadow in shadows:
                for iova in self._shadow_iova.pop(shadow.queue.index, ()):
                    self._holes.free(iova)
                    if iova in mapped:
                        batch.unmap(iova, mapped[iova].size)
                shadow.close()

    def _abandon(self) -> None:
        """After a failure: reset as far as that goes, and let the first error be the one that is told."""
        try:
            self.reset()
        except VhostVdpaError as e:
            log.warning("%s could not be reset: %s", self.path, e)
            self._stop_relay()

    def check(self) -> None:
        """Raise :class:`QueueBroken` if a shadow queue was given up."""
        for shadow in self.shadows:
            if shadow.broken:
                raise QueueBroken(f"{self.path} virtqueue {shadow.queue.index}: {shadow.broken}")

    def close(self) -> None:
        """Reset and close; the kernel drops every map. Twice is no error."""
        if self.state is State.CLOSED:
            return
        self._abandon()
        self.state = State.CLOSED
        for shadow in self.shadows:
            shadow.close()
        self.chardev.close()
        if self._rings is not None:
            self._rings.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
