# SPDX-License-Identifier: MIT
"""A virtio-net device behind vhost-vdpa, with named states.

It can be driven directly (passthrough: the device works on the guest's own
rings) or through shadow virtqueues, and switched between the two; which calls
that takes, in which order, is a procedure's (:mod:`pyvhostvdpa.device.procedure`).
It knows nothing of migration.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..base.errors import MissingFeature, VhostVdpaError
from ..memory.guest import FileRegion, GuestMemory
from ..memory.log import SharedLog
from ..net.control_queue import NetGuestControl
from ..net.guest_config import GuestConfig
from ..virtqueue.layout import GuestQueue
from ..virtqueue.serving import RingServer, ServingOptions
from .log import DirtyLog
from .opened import OpenedDevice
from .provisioned import restore_address
from .target import OWN_ASID, State
from .work import Work

__all__ = ["State", "VdpaNetDevice"]

log = logging.getLogger(__name__)


class VdpaNetDevice(OpenedDevice):
    """An opened device that this process owns, with guest memory to attach to it.

    ``path`` is its vhost-vdpa chardev; ``trace`` records what passes, a new
    one by default. ``use`` masks the backend features to acknowledge of those advertised,
    ``wanted`` the virtio features that the guest takes of those offered; a
    control queue only where it can be kept apart from the data queues. With
    ``wanted=None`` the device is opened, and what it offers is known
    (:attr:`offered`, :attr:`backend_features`, :attr:`ring_sizes`,
    :meth:`config`); :meth:`negotiate` comes before the first start then, and
    may come again whenever the device is reset. Memory can be attached before.

    A front-end that sends everything late drives it like this: open,
    :meth:`attach` empty memory, :meth:`negotiate`, :meth:`add_memory`,
    :meth:`start` with the rings, and their bases, of the front-end;
    :meth:`set_eventfds`, :meth:`set_log` and more memory while it runs;
    :meth:`stop`, then :meth:`bases`.

    ``procedure`` is the way in which it is started, switched and stopped: the
    best that the device can do by default, one of
    :data:`~pyvhostvdpa.device.procedure.best.NAMES` to force one, or a
    function that makes one. Which it became is in :attr:`procedure`.
    ``control_deadline`` is how many seconds the device may take to answer
    control commands (:attr:`control_deadline`), ``shadow`` is how queues are
    shadowed, one of :data:`pyvhostvdpa.device.shadowing.NAMES`.
    Raises :class:`~pyvhostvdpa.DeviceBusy` naming the holder,
    :class:`~pyvhostvdpa.NotVhostVdpa`,
    :class:`~pyvhostvdpa.MissingFeature` if it is not a net device, or cannot do
    the procedure that is asked for.
    """

    @property
    def shadows(self) -> Sequence[RingServer]:
        """What serves the guest's rings, by queue index; nothing in passthrough."""
        return self._procedure.shadows

    @property
    def serving_options(self) -> ServingOptions:
        """How shadow virtqueues are served from the next start on."""
        return self._procedure.serving_options

    @serving_options.setter
    def serving_options(self, options: ServingOptions) -> None:
        self._procedure.serving_options = options

    @property
    def relay_options(self) -> ServingOptions:
        """:attr:`serving_options`, the earlier name: a relay serves a used ring."""
        warnings.warn("relay_options is called serving_options now", DeprecationWarning, stacklevel=2)
        return self.serving_options

    @relay_options.setter
    def relay_options(self, options: ServingOptions) -> None:
        warnings.warn("relay_options is called serving_options now", DeprecationWarning, stacklevel=2)
        self.serving_options = options

    @property
    def control_deadline(self) -> float:
        """Seconds that the device may take without answering control commands, from the next start on."""
        return self._procedure.control_deadline

    @control_deadline.setter
    def control_deadline(self, seconds: float) -> None:
        self._procedure.control_deadline = seconds

    @property
    def guest_config(self) -> GuestConfig | None:
        """What the guest sees beside its queues; it is kept up from the next start on."""
        config = self._procedure.guest_config
        assert config is None or isinstance(config, GuestConfig)
        return config

    @guest_config.setter
    def guest_config(self, config: GuestConfig | None) -> None:
        self._procedure.guest_config = config

    @property
    def ring_asid(self) -> int:
        """Where shadow rings are mapped: apart from guest memory if the device can fetch descriptors from there."""
        return self._procedure.ring_asid

    def attach(self, memory: GuestMemory) -> None:
        """Map ``memory``, IOVA = GPA, in one batch, and get memory for shadow rings ready.

        Everything slow is done here, before a queue runs. The memory stays its
        owner's, which closes it after the device. Raises
        :class:`~pyvhostvdpa.MapRejected` if the device cannot have memory
        there, :class:`~pyvhostvdpa.KernelError` for a map that the kernel
        refuses, and :class:`~pyvhostvdpa.MissingFeature` for private memory
        unless the parent is known to pin what it is given.
        """
        if memory.private and not self.iotlb.limits.private:
            raise MissingFeature(f"{self.path} is not known to pin memory, so it cannot be given private memory")
        self.memory = memory
        self._log = DirtyLog(memory)
        memory.devices += 1
        self._procedure.attach(memory)
        self._tell_notes()

    def _tell_notes(self) -> None:
        for note in self.iotlb.notes:
            log.info("%s", note)
        self.iotlb.notes.clear()

    def _attached_memory(self) -> GuestMemory:
        if self.memory is None:
            raise MissingFeature(f"{self.path}: attach() guest memory first")
        return self.memory

    def _changeable_memory(self) -> GuestMemory:
        memory = self._attached_memory()
        if memory.devices > 1:
            raise MissingFeature(
                f"{self.path}: guest memory of {memory.devices} devices cannot change below one of them"
            )
        return memory

    def add_memory(self, pieces: Iterable[FileRegion], populate: bool | None = None) -> None:
        """Add the regions ``pieces`` to the attached memory, which no other device may have.

        A device that is running gets them at once, in one batch. Otherwise
        they are collected, and mapped with all others in one batch by the next
        start, :meth:`stand_by` or :meth:`map_memory`: a parent with set_map
        rebuilds its whole table for each batch. ``populate`` allocates every
        page now; by default if the parent may pin pages, which does that anyway.

        Raises, with nothing changed, what :meth:`GuestMemory.from_files`
        raises, :class:`MapRejected` if the device cannot have memory there or
        uses shadow rings in the same place, and :class:`MissingFeature` if
        the dirty log has no bits for it. Shadow rings that are not in use
        move aside.
        """
        memory = self._changeable_memory()
        if populate is None:
            populate = self.iotlb.limits.pinned is not False
        regions = memory.map_files(pieces, populate)
        try:
            self._log.check_holds(regions)
            self._procedure.add_regions(regions)
        except BaseException:
            for region in regions:
                region.memory.close()
            raise
        self._tell_notes()

    def map_memory(self) -> None:
        """Map what :meth:`add_memory` has collected, now and not at the next start.

        Raises :class:`~pyvhostvdpa.MissingFeature` before :meth:`attach`, and
        what a map raises.
        """
        self._attached_memory()
        self._procedure.map_collected()
        self._tell_notes()

    def remove_memory(self, places: Iterable[tuple[int, int]]) -> None:
        """Remove the regions at ``places`` (GPA, bytes), each as it was added: from the device, then from this process.

        The device has no access to them when this returns. Raises, with
        nothing changed, ValueError for an unknown region, and
        :class:`MissingFeature` if a queue that is running has its rings there,
        or a shadowed one buffers in flight. A suspended device with rings there
        is reset.
        """
        there = {(int(region.gpa), region.size): region for region in self._changeable_memory().regions}
        wanted = [(int(gpa), size) for gpa, size in places]
        for gpa, size in wanted:
            if (gpa, size) not in there:
                raise ValueError(f"{gpa:#x}+{size:#x} is not a region of guest memory")
        regions = [there[place] for place in wanted]
        self._procedure.remove_regions(regions)
        for region in regions:
            region.memory.close()

    def set_log(self, log: SharedLog | None) -> None:
        """Mark in ``log`` from now on which pages the device writes, for another process; None ends that.

        Buffers are logged in shadow mode only; in passthrough the rings are,
        when they are stopped. Marks are moved into the log every
        :data:`~pyvhostvdpa.device.log.INTERVAL`, and all that are left before
        :meth:`stop`, :meth:`halt` or :meth:`reset` returns. A log that is
        replaced, or ended, gets not one bit more when this returns; its owner
        closes it then, and not before. Raises :class:`MissingFeature` before
        :meth:`attach`, and if no thread can be started for it.
        """
        self._attached_memory()
        self._log.replace(log)

    @contextmanager
    def _logged(self) -> Iterator[None]:
        """Have everything in the log that the device has written when the block ends."""
        if not self._log.active:
            yield
            return
        written = self._procedure.written_rings()
        try:
            yield
        finally:
            self._log.flush(written)

    def stand_by(self, queues: Sequence[GuestQueue], control: NetGuestControl | None = None) -> str:
        """Do what :meth:`start_passthrough` with ``queues`` and ``control`` needs, before the guest comes.

        The device works on nothing of the guest before it is started. How far
        this goes depends on what the device can do; the return value says it
        in words. Raises :class:`~pyvhostvdpa.MissingFeature` and what else
        starting raises, with the device reset.
        """
        self._check_startable(queues, control)
        return self._procedure.stand_by(queues, control)

    def prepare_start(self, queues: Sequence[GuestQueue], control: NetGuestControl | None = None) -> Work | None:
        """Return a start in passthrough, prepared while the guest still runs on the source, after :meth:`stand_by`.

        ``queues`` and ``control`` are those of :meth:`stand_by`. It is done
        together with that of other devices
        (:class:`~pyvhostvdpa.device.work.Crew`), once. None if this device
        cannot prepare it. Raises :class:`~pyvhostvdpa.MissingFeature` as
        :meth:`start` does.
        """
        self._check_startable(queues, control)
        return self._procedure.prepare_start(queues, control)

    def prepare_stop(self) -> Work | None:
        """Return :meth:`stop`, prepared while the guest still runs; see :meth:`prepare_start`.

        What the stop need not do while the guest is paused is done before the
        device is started again, reset or closed.
        """
        return None if self._log.active else self._procedure.prepare_stop()

    def start_passthrough(self, queues: Sequence[GuestQueue], control: NetGuestControl | None = None) -> None:
        """Let the device work on the guest's rings, each from its used index on: see :meth:`start`.

        ``queues`` are the guest's data queues, by index; ``control`` its
        control queue with the state that it has set, None without one. That
        queue is driven by this process in either mode, and the state replayed
        (virtio 1.3, 5.1.6.5). Raises :class:`MissingFeature` if it cannot be
        isolated, :class:`~pyvhostvdpa.net.control_queue.ControlFailed` if the
        device refuses the state.
        """
        self.start(State.PASSTHROUGH, queues, control)

    def start_shadow(self, queues: Sequence[GuestQueue], control: NetGuestControl | None = None) -> None:
        """Let the device work on shadow rings of the guest's ``queues``, which are read from their used index on.

        ``control`` and the errors raised are those of :meth:`start_passthrough`.
        """
        self.start(State.SHADOW, queues, control)

    def start(
        self,
        mode: State,
        queues: Sequence[GuestQueue],
        control: NetGuestControl | None = None,
        bases: Mapping[int, int] | None = None,
    ) -> None:
        """Start ``queues`` and ``control`` in ``mode``: :meth:`start_passthrough` or :meth:`start_shadow`.

        ``bases`` are the bases at which another process stopped, by queue
        index, if they are known (vhost-user's SET_VRING_BASE). A split
        ring's base is the avail index up to which descriptors were taken. No
        vDPA device can be given a used index beside it, so all of them, and
        vhost-user back-ends, take the base for both: what lies between used
        index and base would never be used, and the used ring would jump. So
        the device always starts at the ring's used index. That is where
        :meth:`stop` leaves a ring: base and used index are equal then. If the
        base is ahead, the descriptors from the used index up to it are in
        flight: their owner took them and went away. They are taken again,
        which is right if descriptors were used in order; a frame that was
        sent and not marked used is sent twice.

        Raises :class:`OutOfOrder` if the ring shows that they were not used
        in order, so that it is not known which are in flight, and
        :class:`QueueBroken` if a base lies outside of used and avail index;
        the device is left as it was then. Raises :class:`MissingFeature`
        before :meth:`negotiate` and :meth:`attach`, while the device is
        running, and for queues that it does not have; ValueError for a ring
        that is not guest memory.
        """
        self._check_startable(queues, control)
        self._procedure.start(mode, queues, control, bases)

    def bases(self) -> dict[int, int]:
        """Return the base of each queue that was stopped last, by index: what answers vhost-user's GET_VRING_BASE.

        It is the used index. A device that continues there finds each descriptor
        that is not used, those in flight included: :meth:`stop` has seen to
        that. Raises :class:`MissingFeature` while the device is running.
        """
        return self._procedure.bases()

    def set_eventfds(self, index: int, kick: int | None = None, call: int | None = None) -> None:
        """Replace the eventfds of queue ``index``, which is running in either mode; None leaves one as it is.

        ``kick`` notifies the device, ``call`` the guest; ``call`` is -1 for a
        guest that wants none. The old ones are not used any more when this
        returns. Both sides are notified once, since the old ones' notifications may
        be lost. Queues that do not run get their eventfds
        by :meth:`start`. Raises :class:`MissingFeature` if the queue is not
        running, :class:`KernelError` if one is not an eventfd.
        """
        self._procedure.set_eventfds(index, kick, call)

    def _check_startable(self, queues: Sequence[GuestQueue], control: NetGuestControl | None) -> None:
        if not self.features:
            raise MissingFeature(f"{self.path}: negotiate() features first")
        if self.memory is None:
            raise MissingFeature(f"{self.path}: attach() guest memory first")
        if self.state is not State.RESET:
            raise MissingFeature(f"{self.path} is in state {self.state.value}: stop() it first")
        for queue in queues:
            if queue.kick < 0:
                raise MissingFeature(f"{self.path}: virtqueue {queue.index} has no kick eventfd; rings are not polled")
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

    def command(self, data: bytes) -> int:
        """Carry out a control command on the running device; return its answer, 0 for OK (virtio 1.3, 5.1.6.5).

        ``data`` is the command: class, number, then its fields. What the device
        accepts is remembered as if the guest had sent it, and restored by later
        starts. Raises :class:`MissingFeature` if the device
        is not running or was started without a control queue. A device that
        does not answer gives the queue up: the answer is an error then, and
        :meth:`check` raises.
        """
        return self._procedure.command(data)

    def suspend(self) -> None:
        """Make the device stop processing (VHOST_VDPA_SUSPEND).

        Raises :class:`~pyvhostvdpa.MissingFeature` without the SUSPEND backend feature.
        """
        self._procedure.suspend()

    def stop(self, then: State | None = None) -> None:
        """Suspend, reclaim the queues, reset; a procedure may leave the reset to the next start or :meth:`close`.

        Afterwards each guest ring stands as a device finds it that starts at
        the ring's used index. ``then`` is the state in which the device will
        be started next, if it is known: a procedure may keep what that needs.
        Raises :class:`OutOfOrder` if a passthrough device finishes out of
        order, which is known only once it is suspended: with the RESUME
        backend feature it then continues, without it is reset, and
        :attr:`state` shows which. Raises :class:`QueueBroken`, with the device
        reset, if a ring is invalid.
        """
        with self._logged():
            self._procedure.stop(then)

    def halt(self) -> None:
        """Reset a device that cannot be suspended, and reclaim the queues as :meth:`stop` does.

        A reset stops it as surely, but descriptors that it had started and not
        marked used are processed again by the next owner. Raises, with the device reset,
        :class:`OutOfOrder` if in passthrough the rings do not show which descriptors are
        open, and :class:`QueueBroken`.
        """
        with self._logged():
            self._procedure.halt()

    def resume(self) -> None:
        """Let a suspended device continue, and notify it of its queues once.

        A notification that was raised while it was suspended may be lost.
        Raises :class:`MissingFeature` without the RESUME backend feature.
        """
        self._procedure.resume()

    def reset(self) -> None:
        """Reset the device and take shadow rings away. Guest memory stays mapped, or is when it is started again."""
        with self._logged():
            self._procedure.reset()

    def check(self) -> None:
        """Look whether the device still works.

        Raises :class:`~pyvhostvdpa.QueueBroken` if a queue failed, and
        :class:`~pyvhostvdpa.DeviceNeedsReset` if the device set NEEDS_RESET
        (virtio 1.3, 2.1).
        """
        self._procedure.check()

    def stalled(self) -> dict[int, float]:
        """Return the transmit queues that have work and do not move, with the seconds since they last did.

        Only the caller's patience separates a dead device from a slow one,
        so nothing fails by itself. Seconds count from the first call on.
        """
        return self._procedure.stalled()

    def standing(self) -> dict[int, float]:
        """Return :meth:`stalled`, the name since "standing" meant a suspended device too."""
        warnings.warn("standing() is called stalled() now", DeprecationWarning, stacklevel=2)
        return self.stalled()

    def close(self) -> None:
        """Reset and close; the kernel drops every map. Idempotent.

        A MAC address that a guest has set is not left behind: the device gets the one back that it had when it was
        opened. If that fails it is logged.
        """
        if self.chardev.closed:
            return
        self._procedure.abandon()
        try:
            self._log.end()
            self._restore_address()
        finally:
            if self.memory is not None:
                self.memory.devices -= 1
            self.chardev.close()
            self._procedure.release()

    def _restore_address(self) -> None:
        procedure = self._procedure
        if self._mac is None or self._settable is None or not procedure.attached or procedure.control_died:
            return
        try:
            if restore_address(self._settable, procedure.memories, self._mac, procedure.control_deadline):
                log.info("%s has its MAC address %s again", self.path, self._mac.hex(":"))
        except VhostVdpaError as e:
            log.warning(
                "%s keeps the MAC address of the guest that left it (%s); delete it and make it again: vdpa dev del",
                self.path,
                e,
            )
