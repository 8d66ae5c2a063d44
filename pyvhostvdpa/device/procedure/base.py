# SPDX-License-Identifier: MIT
"""What every procedure shares: the states of a device, and what to do when a step fails.

A procedure decides which calls reach the device and in which order. Which
heads are open, what the guest finds in its rings
(:mod:`~pyvhostvdpa.device.procedure.served`) and that a failure leaves the
device reset is the same for all.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ...base.errors import DeviceNeedsReset, KernelError, MissingFeature, OutOfOrder, QueueBroken, VhostVdpaError
from ...base.uapi import BackendFeature, Status, names
from ...virtqueue.layout import GuestQueue
from ..kind import GuestControl
from ..target import GUEST_ASID, OWN_ASID, State, Target
from ..work import Work
from .attached import Memories
from .served import Served, raise_eventfd

__all__ = ["GUEST_ASID", "OWN_ASID", "Memories", "Procedure", "State", "Target"]

log = logging.getLogger(__name__)


class Procedure(Served):
    """A way to start and stop the queues of one device."""

    # -- what differs ------------------------------------------------------------

    @property
    @abstractmethod
    def ring_asid(self) -> int:
        """The address space in which shadow rings are mapped."""

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

    def inherit(self, before: Procedure) -> None:
        """Replace another procedure of the same device, which is reset: with its options and its memory."""
        self.serving_options, self.control_deadline = before.serving_options, before.control_deadline
        self.guest_config, self.control_died = before.guest_config, before.control_died
        if before.attached:
            self._memories, self._unmapped = before.memories, before._unmapped
            self._inherit_maps(before)
            before._memories = None
        before.release()

    def _inherit_maps(self, before: Procedure) -> None:
        before._detach()
        self._attached()

    def stand_by(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> str:
        """Do what a start in passthrough needs of the device before the guest comes, if possible.

        Returns how far the device got, in words; a failure leaves it reset.
        """
        self._set_queues(queues, control)
        try:
            self.map_collected()
            return self._stand_by(control)
        except BaseException:
            self.abandon()
            raise

    def _stand_by(self, control: GuestControl | None) -> str:
        return "guest memory is mapped; the rest comes at the start"

    def start(
        self,
        mode: State,
        queues: Sequence[GuestQueue],
        control: GuestControl | None,
        bases: Mapping[int, int] | None = None,
    ) -> None:
        """Start the device in ``mode`` on a guest's queues; a failure leaves it reset.

        ``bases`` as in :meth:`~pyvhostvdpa.device.net.VdpaNetDevice.start`: they are looked at before the device is
        touched.
        """
        self._set_queues(queues, control)
        self._check_given(bases or {})
        self._note_shadowed(mode, control)
        try:
            self.map_collected()
            self._start(mode, control)
        except BaseException:
            self.abandon()
            raise
        self.state = mode
        self._notify()

    def _note_shadowed(self, mode: State, control: GuestControl | None) -> None:
        """Trace which queues are shadowed from now on; the control queue always is."""
        relays = self.serving.relays
        shadowed = [queue.index for queue in self._queues if relays(queue.index)] if mode is State.SHADOW else []
        if control is not None:
            shadowed.append(control.index)
        self.target.chardev.trace.note("shadow_vqs", queues=" ".join(map(str, shadowed)))

    def suspend(self) -> None:
        """Make the device stop processing; MissingFeature without the SUSPEND backend feature."""
        if BackendFeature.SUSPEND not in self.target.backend_features:
            raise MissingFeature(
                f"{self.target.path} cannot be suspended, so its queues cannot be stopped without loss",
                hint="vhost-vdpa list shows the driver; SUSPEND needs support there",
            )
        # a command of the guest is answered before the device is suspended, or never
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
        """Let a suspended device continue; MissingFeature without the RESUME backend feature."""
        if BackendFeature.RESUME not in self.target.backend_features:
            raise MissingFeature(f"{self.target.path} is suspended and cannot be resumed; only a reset brings it back")
        self.target.chardev.resume()
        if self._control is not None:
            # mlx5_vdpa forgets that its control queue is ready
            # (drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_cvq_suspend)
            self.target.chardev.set_vring_enable(self._control.index, True)
        # a device need not remember what it was notified of while it was suspended
        for kick in self._device_kicks():
            raise_eventfd(kick)
        self._serve_control()

    def stop(self, then: State | None = None) -> None:
        """Suspend, take the queues over, reset; see :meth:`pyvhostvdpa.device.net.VdpaNetDevice.stop`."""
        self._prepare_stop(then)
        self.suspend()
        try:
            self._check_order(self.state)
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

    def _prepare_stop(self, then: State | None) -> None:
        """Make what a stop, and a start in ``then`` behind it, will need, while the device still runs."""

    def prepare_stop(self) -> Work | None:
        """Return a :meth:`stop` that is prepared, for a guest that will be paused; None if it cannot be."""
        return None

    def prepare_start(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> Work | None:
        """Return a :meth:`start` in passthrough that is prepared, behind :meth:`stand_by`; None if it cannot be."""
        return None

    def command(self, data: bytes) -> int:
        """Carry out a control command on the running device; see :meth:`VdpaNetDevice.command`."""
        if self._control is None or self.state not in (State.PASSTHROUGH, State.SHADOW):
            raise MissingFeature(f"{self.target.path} is not running with a control queue")
        return self._control.handle(data)

    def reset(self) -> None:
        """Reset the device. Guest rings stand as they are."""
        self._end(taking_over=False)

    def halt(self) -> None:
        """Reset a device that cannot be suspended and take its queues over; see :meth:`VdpaNetDevice.halt`."""
        self._end(taking_over=True)

    def _end(self, taking_over: bool) -> None:
        mode = self.state
        self._stop_serving()
        try:
            if self.guest_config is not None:
                self.guest_config.disconnect()
        finally:
            try:
                self._reset()
            finally:
                # also if only our memory could not be unmapped: the device is off, and what served its queues is closed
                if self.state is State.RESET:
                    self._end_queues(taking_over, mode)

    def _end_queues(self, taking_over: bool, mode: State) -> None:
        try:
            if taking_over:
                self._take_over_shadows()
                self._check_order(mode)
        finally:
            self._forget()

    def abandon(self) -> None:
        """After a failure: halt if possible; the original error is raised, a later one is logged."""
        try:
            with suppress(OutOfOrder, QueueBroken):
                self.halt()
        except VhostVdpaError as e:
            log.warning("%s could not be reset: %s", self.target.path, e)
            self._stop_serving()

    def _forget(self) -> None:
        self._close_queues()
        self._queues = ()
        self.state = State.RESET

    def _forget_rings(self) -> None:
        left_at = self.bases()
        self.reset()
        self._left_at, self._known = left_at, []
        self._guest_rings = self._passed_rings = self._stalls = None

    def check(self) -> None:
        """Raise QueueBroken if a queue is broken, DeviceNeedsReset if the device failed."""
        if broken := self._broken_queue():
            raise QueueBroken(f"{self.target.path} {broken}")
        if self._needs_reset():
            raise DeviceNeedsReset(f"{self.target.path} failed: it set NEEDS_RESET")

    def stalled(self) -> dict[int, float]:
        """Seconds since each queue with work last moved, by its index, for queues that have to; if looked at."""
        running = self.state in (State.PASSTHROUGH, State.SHADOW)
        return self._stalls.stalled() if running and self._stalls is not None else {}

    def _needs_reset(self) -> bool:
        running = self.state in (State.PASSTHROUGH, State.SHADOW)
        return running and bool(self.target.chardev.get_status() & Status.NEEDS_RESET)

    # -- what the guest's configuration stands on ------------------------------------

    @property
    def path(self) -> str:
        """The chardev's path."""
        return self.target.path

    def failure(self) -> str:
        """Why the guest has to reset its device; "" while it works."""
        return self._broken_queue() or ("the device failed" if self._needs_reset() else "")

    def read_config(self) -> bytes:
        """The device's configuration space."""
        return self.target.chardev.get_config(0, self.target.chardev.get_config_size())

    def set_config_call(self, eventfd: int) -> None:
        """Where the device raises its configuration interrupt, -1 for nowhere."""
        self.target.chardev.set_config_call(eventfd)

    def release(self) -> None:
        """Release everything; the device must be closed."""
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
