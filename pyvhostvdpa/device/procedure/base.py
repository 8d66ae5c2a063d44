# SPDX-License-Identifier: MIT
"""What every procedure shares: the queues' states, taking them over, and what to do when a step fails.

A procedure decides which calls reach the device and in which order. Which
heads are open, what the guest finds in its rings and that a failure leaves
the device reset is the same for all.
"""

from __future__ import annotations

import enum
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...base.errors import DeviceNeedsReset, KernelError, MissingFeature, OutOfOrder, QueueBroken, VhostVdpaError
from ...base.uapi import BackendFeature, Status, names
from ...chardev.door import VhostVdpa
from ...chardev.iotlb import Iotlb
from ...memory.guest import HUGE_PAGE, GuestMemory, IovaAllocator, SharedMemory, Translation
from ...net.control_queue import DEFAULT_DEADLINE, ControlArea, ControlOptions, ControlQueue, GuestControl
from ...net.features import Feature, ring_bits
from ...net.guest_config import GuestConfig
from ...virtqueue import SHADOWED
from ...virtqueue.layout import GuestQueue, RingStart, in_order, indices, ring_layout
from ...virtqueue.rings import GuestRings
from ...virtqueue.serving import RelayOptions, RingServer, ServerThreads, Serving
from ...virtqueue.stall import StallDetector
from ..groups import Groups

log = logging.getLogger(__name__)

GUEST_ASID = 0
"""The address space in which guest memory is mapped."""
OWN_ASID = 1
"""The address space of what is ours: the control queue, and shadow rings where descriptors have their own group."""

CONTROL_ROOM = 1 << 20
"""Bytes of our own memory that are kept for the control queue, at its end."""

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
    """The device works on shadow rings, a relay serves the guest's."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Target:
    """An opened device: its door, its address spaces, what was negotiated, how its queues are grouped and served.

    ``ring_sizes`` are the largest of each queue, by index; empty where nobody asked.
    """

    chardev: VhostVdpa
    iotlb: Iotlb
    features: Feature
    backend_features: BackendFeature
    groups: Groups
    ring_sizes: tuple[int, ...] = ()
    serving: Serving = SHADOWED

    @property
    def path(self) -> str:
        """The chardev's path."""
        return self.chardev.path

    @property
    def descriptors_apart(self) -> bool:
        """Whether shadow rings can lie in another address space than the buffers."""
        return not self.why_not_apart

    @property
    def why_not_apart(self) -> str:
        """Why shadow rings have to share the buffers' address space; "" if they need not."""
        if BackendFeature.DESC_ASID not in self.backend_features:
            return "DESC_ASID is not offered"
        if self.groups.descriptors is None:
            return "descriptors have no group of their own"
        if self.iotlb.limits.as_num <= OWN_ASID:
            return f"there are {self.iotlb.limits.as_num} address spaces, {OWN_ASID + 1} are needed"
        return ""

    def fitting(self, index: int, num: int) -> int:
        """Return the size of a ring of ours for a queue: ``num``, or what the device takes if that is less."""
        return min(num, self.ring_sizes[index]) if index < len(self.ring_sizes) else num

    @property
    def control_apart(self) -> bool:
        """Whether the control queue can be kept from the data queues."""
        return self.groups.control is not None and self.iotlb.limits.as_num > OWN_ASID


@dataclass(frozen=True, slots=True)
class Memories:
    """The guest's memory, ours, and where ours can go in the device's address spaces."""

    guest: GuestMemory
    own: SharedMemory
    holes: IovaAllocator


class Procedure(ABC):
    """A way to start and stop the queues of one device."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.state = State.RESET
        self.shadows: list[RingServer] = []
        self._placed = 0
        """Bytes of our memory that the shadow rings take."""
        self.relay_options = RelayOptions()
        self.control_deadline = DEFAULT_DEADLINE
        self.control_died = False
        """Whether the control queue has stopped answering, since the device was opened."""
        self.guest_config: GuestConfig | None = None
        self._relay: ServerThreads | None = None
        self._control: ControlQueue | None = None
        self._memories: Memories | None = None
        self._queues: tuple[GuestQueue, ...] = ()
        self._guest_rings: GuestRings | None = None
        self._progress: StallDetector | None = None
        self._started_at: dict[int, RingStart] = {}
        """What each guest ring held when passthrough started, by queue index."""
        self._ours: list[tuple[int, int]] = []
        """(ASID, IOVA) of each map of our own memory."""
        self._allocated: list[int] = []
        """IOVAs that were taken for it."""

    # -- what differs ------------------------------------------------------------

    @property
    @abstractmethod
    def ring_asid(self) -> int:
        """The address space in which shadow rings are mapped."""

    @abstractmethod
    def _attached(self) -> None:
        """Do what can be done before a queue runs; guest memory has just been given."""

    @abstractmethod
    def _start(self, mode: State, control: GuestControl | None) -> None:
        """Get the device from reset to running in ``mode``."""

    @abstractmethod
    def _stop(self, then: State | None) -> None:
        """Take the queues of a suspended device over and reset it; ``then`` is the mode that follows, if known."""

    @abstractmethod
    def _reset(self) -> None:
        """Reset the device and take our own memory away from it."""

    # -- what all do ---------------------------------------------------------------

    def attach(self, memory: GuestMemory) -> None:
        """Take the guest's memory, and get memory for shadow rings ready."""
        limits = self.target.iotlb.limits
        self._memories = Memories(
            guest=memory,
            own=SharedMemory("shadow-rings", self._own_size()),
            holes=IovaAllocator(limits.first, limits.last, [(r.gpa, r.size) for r in memory.regions]),
        )
        self._attached()

    def _own_size(self) -> int:
        """Room for every ring at its largest and the control queue, in huge pages: each ring is one physical run."""
        c = self.target.chardev
        rings = c.get_vqs_count() * ring_layout(c.get_vring_num(), ring_bits(self.target.features)).size
        return -(-(rings + CONTROL_ROOM) // HUGE_PAGE) * HUGE_PAGE

    @property
    def attached(self) -> bool:
        """Whether :meth:`attach` was called."""
        return self._memories is not None

    @property
    def memories(self) -> Memories:
        """What :meth:`attach` was given and made; MissingFeature before it."""
        if self._memories is None:
            raise MissingFeature(f"{self.target.path}: attach() guest memory first")
        return self._memories

    def stand_by(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> str:
        """Do what a start in passthrough needs of the device before the guest comes, as far as that can be.

        Returns how far the device got, in words; a failure leaves it reset.
        """
        self._take(queues)
        try:
            return self._stand_by(control)
        except BaseException:
            self.abandon()
            raise

    def _stand_by(self, control: GuestControl | None) -> str:
        return "guest memory is mapped; the rest comes at the start"

    def _take(self, queues: Sequence[GuestQueue]) -> None:
        self._queues = tuple(queues)
        if self._guest_rings is None or self._guest_rings.queues != self._queues:
            self._guest_rings = GuestRings(self._queues, self.memories.guest)
            self._progress = StallDetector(queues, self.memories.guest)

    def start(self, mode: State, queues: Sequence[GuestQueue], control: GuestControl | None) -> None:
        """Start the device in ``mode`` on a guest's queues; a failure leaves it reset."""
        self._take(queues)
        self._note_shadowed(mode, control)
        try:
            self._start(mode, control)
        except BaseException:
            self.abandon()
            raise
        self.state = mode
        self._notify()

    def _note_shadowed(self, mode: State, control: GuestControl | None) -> None:
        """For the trace: whose rings are ours from now on. The control queue's always are."""
        shadowed = [*(self._queues if mode is State.SHADOW else ()), *([control.queue] if control else [])]
        self.target.chardev.trace.note("shadow_vqs", queues=" ".join(str(queue.index) for queue in shadowed))

    def _note_base(self, queue: GuestQueue, base: int) -> None:
        """For the trace: a shadowed queue's base, which no call tells."""
        self.target.chardev.trace.note("vhost_vdpa_get_vring_base", index=queue.index, num=base, svq=True)

    def suspend(self) -> None:
        """Make the device stop processing; MissingFeature without the SUSPEND backend feature."""
        if BackendFeature.SUSPEND not in self.target.backend_features:
            raise MissingFeature(
                f"{self.target.path} cannot be suspended, so its queues cannot be taken over without loss",
                hint="vhost-vdpa list shows the driver; SUSPEND needs support there",
            )
        # a command of the guest is answered before the device stands still, or never
        if self._control is not None:
            self._control.stop()
        try:
            self._suspend()
        except BaseException:
            self._serve_control()
            raise

    def _suspend(self) -> None:
        self.target.chardev.suspend()

    def resume(self) -> None:
        """Let a suspended device go on; MissingFeature without the RESUME backend feature."""
        if BackendFeature.RESUME not in self.target.backend_features:
            raise MissingFeature(f"{self.target.path} is suspended and cannot be resumed; only a reset brings it back")
        self.target.chardev.resume()
        if self._control is not None:
            # mlx5_vdpa forgets that its control queue is ready
            # (drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_cvq_suspend)
            self.target.chardev.set_vring_enable(self._control.queue.index, True)
        # a device need not remember what it was notified of while it was suspended
        for kick in self._device_kicks():
            os.eventfd_write(kick, 1)
        self._serve_control()

    def _device_kicks(self) -> list[int]:
        """The eventfds by which the device is notified of its data queues, RX before TX."""
        if self.state is State.SHADOW:
            return [shadow.kick for shadow in self.shadows]
        return [queue.kick for queue in self._queues] if self.state is State.PASSTHROUGH else []

    def stop(self, then: State | None = None) -> None:
        """Suspend, take the queues over, reset; see :meth:`pyvhostvdpa.device.net.VdpaNetDevice.stop`."""
        self._prepare_stop(then)
        self.suspend()
        try:
            if self.state is not State.SHADOW:
                self._check_order()
            self._stop(then)
        except OutOfOrder as e:
            if BackendFeature.RESUME in self.target.backend_features:
                self.resume()
                raise
            self.abandon()
            raise OutOfOrder(f"{e}; it cannot be resumed and was reset, which the guest's driver has to do too") from e
        except BaseException:
            self.abandon()
            raise

    def _prepare_stop(self, then: State | None) -> None:  # noqa: B027
        """Make what a stop, and a start in ``then`` behind it, will need, while the device still runs."""

    def reset(self) -> None:
        """Reset the device. Guest rings stand as they are."""
        self._end(taking_over=False)

    def halt(self) -> None:
        """Reset a device that cannot be suspended and take its queues over; see :meth:`VdpaNetDevice.halt`."""
        self._end(taking_over=True)

    def _end(self, taking_over: bool) -> None:
        passthrough = self.state is State.PASSTHROUGH
        self._stop_serving()
        try:
            if self.guest_config is not None:
                self.guest_config.disconnect()
        finally:
            self._reset()
            try:
                if taking_over:
                    self._take_over_shadows()
                if taking_over and passthrough:
                    self._check_order()
            finally:
                self._forget()

    def abandon(self) -> None:
        """After a failure: halt as far as that goes, and let the first error be the one that is told."""
        try:
            with suppress(OutOfOrder, QueueBroken):
                self.halt()
        except VhostVdpaError as e:
            log.warning("%s could not be reset: %s", self.target.path, e)
            self._stop_serving()

    def check(self) -> None:
        """Raise QueueBroken if a queue was given up, DeviceNeedsReset if the device gave up."""
        if broken := self._broken_queue():
            raise QueueBroken(f"{self.target.path} {broken}")
        if self._gave_up():
            raise DeviceNeedsReset(f"{self.target.path} gave up and asks to be reset (NEEDS_RESET)")

    def standing(self) -> dict[int, float]:
        """Seconds that each transmit queue with work has not moved, as far as this was asked for; by queue index."""
        running = self._progress is not None and self.state in (State.PASSTHROUGH, State.SHADOW)
        return self._progress.standing() if running and self._progress is not None else {}

    def _broken_queue(self) -> str:
        for shadow in self.shadows:
            if shadow.broken:
                return f"virtqueue {shadow.queue.index}: {shadow.broken}"
        if self._control is not None and self._control.failed:
            return f"control queue: {self._control.failed}"
        return ""

    def _gave_up(self) -> bool:
        running = self.state in (State.PASSTHROUGH, State.SHADOW)
        return running and bool(self.target.chardev.get_status() & Status.NEEDS_RESET)

    # -- what the guest's configuration stands on ------------------------------------

    @property
    def path(self) -> str:
        """The chardev's path."""
        return self.target.path

    def failure(self) -> str:
        """Why the guest has to reset its device; "" while it works."""
        return self._broken_queue() or ("the device gave up" if self._gave_up() else "")

    def read_config(self) -> bytes:
        """The device's configuration space."""
        return self.target.chardev.get_config(0, self.target.chardev.get_config_size())

    def set_config_call(self, eventfd: int) -> None:
        """Where the device raises its configuration interrupt, -1 for nowhere."""
        self.target.chardev.set_config_call(eventfd)

    def release(self) -> None:
        """Let go of everything; the device must be closed."""
        self._close_queues()
        if self._memories is not None:
            self._memories.own.close()

    # -- steps ----------------------------------------------------------------------

    def _set_features(self) -> None:
        self.target.chardev.set_features(int(self.target.features))

    def _check_features(self, status: Status) -> None:
        if not status & Status.FEATURES_OK:
            raise MissingFeature(f"{self.target.path} refused the features {names(self.target.features)}")

    def _check_running(self, status: Status) -> None:
        if not status & Status.DRIVER_OK:
            raise KernelError(5, "VHOST_VDPA_SET_STATUS", "DRIVER_OK", cause=f"{self.target.path} did not accept it")

    def _shadow(self, queue: GuestQueue, translation: Translation | None = None) -> RingServer:
        """Make the shadow of a guest's queue, its ring behind those that there are."""
        own = self.memories.own
        at = own.hva + self._placed
        ring = ring_bits(self.target.features)
        layout = ring_layout(queue.num, ring)
        if at + layout.size > own.hva + own.size - CONTROL_ROOM:
            raise MissingFeature(f"{self.target.path}: the shadow rings do not fit {own.size - CONTROL_ROOM} bytes")
        shadow = self.target.serving.queue(queue, self.memories.guest, at, ring, translation)
        self._placed += layout.size
        self.shadows.append(shadow)
        return shadow

    def _make_control(self, control: GuestControl) -> ControlQueue:
        """Make our side of the control queue, at the end of our memory; its IOVA is taken from the holes."""
        own = self.memories.own
        # it need not be as long as the guest's: commands are copied
        num = self.target.fitting(control.queue.index, control.queue.num)
        layout = ring_layout(num, ring_bits(self.target.features))
        size = ControlArea(layout, 0, 0).size
        area = ControlArea(layout, own.hva + own.size - size, self._allocate(size))
        options = ControlOptions(self.control_deadline, ring_bits(self.target.features), self._config_call)
        self._control = ControlQueue(control, self.memories.guest, area, options, self.target.chardev.trace)
        return self._control

    @property
    def _config_call(self) -> int:
        return -1 if self.guest_config is None else self.guest_config.call

    def _allocate(self, size: int) -> int:
        """Return an IOVA for memory of ours, free again once the device is reset."""
        iova = self.memories.holes.allocate(size)
        self._allocated.append(iova)
        return iova

    def _drop_ours(self) -> None:
        """Unmap what is left of our own memory, one batch an address space."""
        ours, self._ours = self._ours, []
        for asid in sorted({asid for asid, _ in ours}):
            space = self.target.iotlb.space(asid)
            mapped = {m.iova: m for m in space.mappings}
            with space.batch() as batch:
                for iova in (iova for owner, iova in ours if owner == asid and iova in mapped):
                    batch.unmap(iova, mapped[iova].size)
        allocated, self._allocated = self._allocated, []
        for iova in allocated:
            self.memories.holes.free(iova)

    def _serve(self) -> None:
        self._relay = self.target.serving.threads(self.shadows, self.relay_options, self._config_call)
        self._relay.start()

    def _serve_control(self) -> None:
        if self._control is not None:
            self._control.start()

    def _notify(self) -> None:
        # a notification raised while nobody listened must not be lost; RX
        # queues come first, so buffers are there before the first frame
        for queue in self._queues:
            os.eventfd_write(queue.kick, 1)
            os.eventfd_write(queue.call, 1)
        if self.guest_config is not None:
            self.guest_config.connect(self, None if self._control is None else self._control.model)

    def _used_indices(self) -> list[int]:
        """Return from where a device is to go on in each of the guest's rings, and remember what they hold."""
        assert self._guest_rings is not None
        self._started_at.clear()
        return self._guest_rings.remember()

    def _used_index(self, queue: GuestQueue) -> int:
        """Return from where a device is to go on in one guest's ring, and remember it."""
        start = self._started_at[queue.index] = RingStart(queue, self.memories.guest)
        return start.used_index

    def _take_over_shadows(self) -> None:
        """Hand the guest what the device used and what it did not; a broken queue keeps no other from that."""
        first: QueueBroken | None = None
        for shadow in self.shadows:
            try:
                shadow.drain()
            except QueueBroken as e:
                first = first or e
        for shadow in self.shadows:
            if not shadow.broken:
                self._note_base(shadow.queue, shadow.republish())
        if first is not None:
            raise first

    def _check_order(self) -> None:
        if self._guest_rings is not None and not self._started_at:
            wrong = self._guest_rings.out_of_order()
        else:
            memory, started = self.memories.guest, self._started_at
            wrong = next((q for q in self._queues if not in_order(q, memory, started.get(q.index))), None)
        if wrong is not None:
            raise OutOfOrder(
                f"{self.target.path} virtqueue {wrong.index}: the device uses descriptors out of order, "
                "so in passthrough nobody can tell which are open"
            )

    def _check_base(self, queue: GuestQueue, base: int) -> None:
        """Between used index and base lie the descriptors that the device took and did not finish.

        They are not lost: whoever goes on starts at the used index. That is
        right for a device that finishes in order, which was looked at before.
        """
        avail, used = indices(queue, self.memories.guest)
        taken = (base - used) & 0xFFFF
        if taken > queue.num or (avail - used) & 0xFFFF < taken:
            raise QueueBroken(
                f"{self.target.path} virtqueue {queue.index}: the device reports base {base}, "
                f"the ring has avail {avail} and used {used}"
            )

    def _stop_serving(self) -> None:
        if self._relay is not None:
            self._relay.stop()
            self._relay = None
        if self._control is not None:
            self._control.stop()

    def _forget(self) -> None:
        self._close_queues()
        self._queues = ()
        self.state = State.RESET

    def _close_queues(self) -> None:
        self._close_shadows()
        if self._control is not None:
            self.control_died |= self._control.died
            self._control.close()
            self._control = None

    def _close_shadows(self) -> None:
        shadows, self.shadows, self._placed = self.shadows, [], 0
        for shadow in shadows:
            shadow.close()
