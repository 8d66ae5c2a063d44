# SPDX-License-Identifier: MIT
"""A virtio-net device behind vhost-vdpa, with named states.

It can be driven directly (passthrough: the device works on the guest's own
rings) or through shadow virtqueues, and switched between the two; which calls
that takes, in which order, is a procedure's (:mod:`pyvhostvdpa.device.procedure`).
It knows nothing of migration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence

from ..base.closing import Closing
from ..base.errors import DeviceBusy, MissingFeature, VhostVdpaError
from ..base.uapi import ALL_BACKEND_FEATURES, VIRTIO_ID_NET, BackendFeature
from ..chardev.door import VhostVdpa, check_path
from ..chardev.iotlb import Iotlb, Limits
from ..host import mgmt
from ..host.parents import check_served, parent_of
from ..memory.guest import GuestMemory
from ..net.control_queue import DEFAULT_DEADLINE, GuestControl
from ..net.features import CONTROL, SUPPORTED, Feature, check_implemented, negotiate
from ..net.guest_config import GuestConfig
from ..trace.recorder import DeviceTrace, Trace
from ..virtqueue.layout import GuestQueue
from ..virtqueue.serving import RelayOptions, RingServer
from .groups import probe_groups, ring_sizes
from .procedure import best
from .procedure.base import OWN_ASID, Procedure, State, Target
from .provisioned import restore_address

__all__ = ["State", "VdpaNetDevice"]

log = logging.getLogger(__name__)


class VdpaNetDevice(Closing):
    """An opened device that this process owns, with guest memory to attach to it.

    ``use`` masks the backend features to acknowledge of those advertised,
    ``wanted`` the virtio features that the guest takes of those offered; a
    control queue only where it can be kept apart from the data queues.
    ``procedure`` is the way in which it is started, switched and stopped: the
    best that the device can do by default, one of
    :data:`~pyvhostvdpa.device.procedure.best.NAMES` if it is to be forced, or a
    function that makes one. Which it became is in :attr:`procedure`.
    ``control_deadline`` is :attr:`control_deadline`.
    Raises :class:`~pyvhostvdpa.DeviceBusy` naming the holder,
    :class:`~pyvhostvdpa.NotVhostVdpa`,
    :class:`~pyvhostvdpa.MissingFeature` if it is not a net device, or cannot do
    the procedure that is asked for.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        trace: Trace | None = None,
        use: BackendFeature = ALL_BACKEND_FEATURES,
        wanted: Feature = SUPPORTED,
        procedure: str | Callable[[Target], Procedure] | None = None,
        control_deadline: float = DEFAULT_DEADLINE,
    ) -> None:
        # before the device is opened, which resets it
        check_implemented(wanted)
        check_path(path)
        check_served(path)
        try:
            self.chardev = VhostVdpa(path, trace)
        except DeviceBusy as e:
            raise mgmt.busy(path) from e
        self.memory: GuestMemory | None = None
        try:
            self._inspect(use, wanted)
            self.target = Target(
                self.chardev, self.iotlb, self.features, self.backend_features, self.groups, self.ring_sizes
            )
            if procedure is None or isinstance(procedure, str):
                self.procedure = best.choose(self.target, procedure)
                self._procedure = best.make(self.procedure, self.target)
            else:
                self._procedure = procedure(self.target)
                self.procedure = best.Choice(type(self._procedure).__name__)
            self._procedure.control_deadline = control_deadline
            log.debug("%s: procedure %s", self.path, self.procedure)
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
        self.ring_sizes = ring_sizes(c, self.vqs_count)
        """The largest ring of each queue, by index, a power of two."""
        parent = parent_of(c.path)
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

    @property
    def state(self) -> State:
        """What the device is doing for us."""
        return State.CLOSED if self.chardev.closed else self._procedure.state

    def config(self) -> bytes:
        """Return the configuration space as it is now."""
        return self.chardev.get_config(0, self.chardev.get_config_size())

    def largest_ring(self, queues: Iterable[int]) -> int:
        """Return the largest ring that each of ``queues`` can have (GET_VRING_SIZE, or GET_VRING_NUM without it)."""
        return min((self.ring_sizes[index] for index in queues if index < self.vqs_count), default=self.max_ring)

    @property
    def shadows(self) -> Sequence[RingServer]:
        """What serves the guest's rings, by queue index; nothing in passthrough."""
        return self._procedure.shadows

    @property
    def relay_options(self) -> RelayOptions:
        """How shadow virtqueues are served from the next start on."""
        return self._procedure.relay_options

    @relay_options.setter
    def relay_options(self, options: RelayOptions) -> None:
        self._procedure.relay_options = options

    @property
    def control_deadline(self) -> float:
        """Seconds that the device may go on without answering control commands, from the next start on."""
        return self._procedure.control_deadline

    @control_deadline.setter
    def control_deadline(self, seconds: float) -> None:
        self._procedure.control_deadline = seconds

    @property
    def guest_config(self) -> GuestConfig | None:
        """What the guest sees beside its queues; it is kept up from the next start on."""
        return self._procedure.guest_config

    @guest_config.setter
    def guest_config(self, config: GuestConfig | None) -> None:
        self._procedure.guest_config = config

    @property
    def ring_asid(self) -> int:
        """Where shadow rings are mapped: apart from guest memory if the device can fetch descriptors from there."""
        return self._procedure.ring_asid

    def attach(self, memory: GuestMemory) -> None:
        """Map guest memory, IOVA = GPA, in one batch, and get memory for shadow rings ready.

        Everything slow is done here, before a queue runs.
        """
        self.memory = memory
        self._procedure.attach(memory)
        for note in self.iotlb.notes:
            log.info("%s", note)
        self.iotlb.notes.clear()

    def stand_by(self, queues: Sequence[GuestQueue], control: GuestControl | None = None) -> str:
        """Do what :meth:`start_passthrough` with these queues needs of the device, before the guest comes.

        The device works on nothing of the guest before it is started. How far
        this goes depends on what the device can do; the return value says it
        in words. Raises what starting raises, with the device reset.
        """
        self._check_startable(queues, control)
        return self._procedure.stand_by(queues, control)

    def start_passthrough(self, queues: Sequence[GuestQueue], control: GuestControl | None = None) -> None:
        """Let the device work on the guest's rings, each from its used index on.

        That is where :meth:`stop` leaves a ring, and where a device left it
        that finishes in order; what was taken and not used is taken again.
        The control queue is served by us in either mode, and the guest's
        state replayed. Raises :class:`MissingFeature` if it cannot be
        isolated, :class:`~pyvhostvdpa.net.control_queue.ControlFailed` if the
        device refuses the state.
        """
        self.start(State.PASSTHROUGH, queues, control)

    def start_shadow(self, queues: Sequence[GuestQueue], control: GuestControl | None = None) -> None:
        """Let the device work on shadow rings; the guest's are read on from their used index."""
        self.start(State.SHADOW, queues, control)

    def start(self, mode: State, queues: Sequence[GuestQueue], control: GuestControl | None = None) -> None:
        """Start in ``mode``: :meth:`start_passthrough` or :meth:`start_shadow`."""
        self._check_startable(queues, control)
        self._procedure.start(mode, queues, control)

    def _check_startable(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> None:
        if self.memory is None:
            raise MissingFeature(f"{self.path}: attach() guest memory first")
        if self.state is not State.RESET:
            raise MissingFeature(f"{self.path} is in state {self.state.value}: stop() it first")
        for queue in queues:
            if queue.index >= self.vqs_count or queue.num > self.ring_sizes[queue.index]:
                most = self.largest_ring([queue.index]) if queue.index < self.vqs_count else self.max_ring
                raise MissingFeature(
                    f"{self.path} has {self.vqs_count} virtqueues of at most {most}; "
                    f"the guest uses queue {queue.index} of {queue.num}"
                )
        if control is not None and (self.groups.control is None or self.iotlb.limits.as_num <= OWN_ASID):
            raise MissingFeature(
                f"{self.path}: the control queue shares its group or address space with the data queues, "
                "so its state could not be known"
            )

    def suspend(self) -> None:
        """Make the device stop processing. Needs the SUSPEND backend feature."""
        self._procedure.suspend()

    def stop(self, then: State | None = None) -> None:
        """Suspend, take the queues over, reset; a procedure may leave the reset to the next start or :meth:`close`.

        Afterwards each guest ring stands as a device finds it that starts at
        the ring's used index. ``then`` is the state in which the device is to
        be started next, if it is known: a procedure may keep what that needs.
        Raises :class:`OutOfOrder` if a passthrough device finishes out of
        order, which is known only once it is suspended: with the RESUME
        backend feature it then continues, without it is reset, and
        :attr:`state` tells which. Raises :class:`QueueBroken`, with the device
        reset, if a ring holds nonsense.
        """
        self._procedure.stop(then)

    def halt(self) -> None:
        """Reset a device that cannot be suspended, and take the queues over as :meth:`stop` does.

        A reset stops it as surely, but what it had begun and not told of is
        done again by whoever goes on. Raises, with the device reset,
        :class:`OutOfOrder` if in passthrough the rings do not tell what is
        open, and :class:`QueueBroken`.
        """
        self._procedure.halt()

    def resume(self) -> None:
        """Let a suspended device continue, and notify it of its queues once.

        A notification that was raised while it was suspended may be lost.
        Raises :class:`MissingFeature` without the RESUME backend feature.
        """
        self._procedure.resume()

    def reset(self) -> None:
        """Reset the device and take shadow rings away. Guest memory stays mapped, or is when it is started again."""
        self._procedure.reset()

    def check(self) -> None:
        """Raise :class:`QueueBroken` if a queue was given up, :class:`DeviceNeedsReset` if the device gave up."""
        self._procedure.check()

    def standing(self) -> dict[int, float]:
        """Return the transmit queues that have work and do not move, with the seconds since they last did.

        A dead device is told from a slow one by the caller's patience only,
        so nothing fails by itself. Seconds count from the first call on.
        """
        return self._procedure.standing()

    def close(self) -> None:
        """Reset and close; the kernel drops every map. Twice is no error.

        A MAC address that a guest has set is not left behind: the device gets the one back that it had when it was
        opened. If that fails it is logged.
        """
        if self.chardev.closed:
            return
        self._procedure.abandon()
        try:
            self._restore_address()
        finally:
            self.chardev.close()
            self._procedure.release()

    def _restore_address(self) -> None:
        procedure = self._procedure
        if self.mac is None or not procedure.attached or procedure.control_died:
            return
        try:
            if restore_address(self.target, procedure.memories, self.mac, procedure.control_deadline):
                log.info("%s has its MAC address %s again", self.path, self.mac.hex(":"))
        except VhostVdpaError as e:
            log.warning(
                "%s keeps the MAC address of the guest that left it (%s); delete it and make it again: vdpa dev del",
                self.path,
                e,
            )
