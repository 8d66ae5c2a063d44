# SPDX-License-Identifier: MIT
"""The device side of a vhost-user session: when the device is started, stopped and switched, and what is logged.

It knows no messages. What a front-end asks for is done at once, or refused with the device left as it was, or the
device is left reset and the failure reported: nothing continues in an unknown state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..base.closing import Closing
from ..base.errors import MissingFeature, OutOfOrder, VhostVdpaError
from ..base.uapi import BackendFeature, names
from ..device.net import State
from ..memory.guest import GuestMemory
from ..memory.mapped import cannot_shrink
from ..net.control import OK, VQ_PAIRS_SET, Class, ControlModel, command
from ..net.control_queue import NetGuestControl
from ..net.features import Feature
from ..trace.phases import CANCEL_START, DEST_STAND_BY, DEST_START, DT1_START, DT1_STOP, DT2_STOP
from ..trace.recorder import Trace
from ..virtqueue.layout import GuestQueue
from .coming import ComingGuest, check
from .device import Device
from .dirty_log import FrontEndLog
from .features import LOG_ALL, for_device, negotiated_offer, not_taken
from .filters import RxFilter
from .mapped import DeviceMemory
from .memory import FrontEndMemory, SharedRegion
from .messages import LogArea, MessageRefused
from .notices import FailureNotice
from .options import BackendOptions, EventCallback
from .timings import Timings

log = logging.getLogger(__name__)


class Backend(Closing):
    """One device and the front-end's wishes for it. One thread drives it.

    The device stays the caller's, and so does ``memory``, which is empty and filled with what front-ends share.
    """

    def __init__(
        self, device: Device, memory: GuestMemory, trace: Trace, options: BackendOptions, report: EventCallback
    ) -> None:
        self.device = device
        self.options = options
        self.report = report
        self._guest_memory = memory
        self.memory = FrontEndMemory(options.max_memory)
        self.mapped = DeviceMemory(device, self.memory)
        self.offer, without_indirect = negotiated_offer(device, options)
        """What the front-end is offered, with reasons."""
        self._negotiated: Feature | None = without_indirect
        """What the device was asked for last."""
        self.acknowledged = 0
        self._accepted: tuple[int, Feature] | None = None
        """What :meth:`acknowledge` has accepted last, and the features that the device had then."""
        self.failed = ""
        """Why the device is not running though the front-end thinks so; "" while all is well."""
        self.dirty_log = FrontEndLog(device, memory)
        """Where what the device writes is marked."""
        self._timings = Timings(trace, device.trace)
        self._filter: RxFilter | None = None
        """What the guest wants to receive, if that is followed."""
        self._moved_control: Mapping[str, Any] | None = None
        self._moved_bases: dict[int, int] = {}
        self._failure = FailureNotice()
        self._queues: list[GuestQueue] = []
        self._control: NetGuestControl | None = None
        self.device.attach(memory)

    # -- what is known of the device -------------------------------------------------

    @property
    def max_pairs(self) -> int:
        """Queue pairs that can be offered."""
        pairs = 1
        if self.offer.features & Feature.MQ:
            pairs = int(self.device.target.groups.max_pairs)
        return max(1, min(pairs, len(self.device.ring_sizes) // 2))

    @property
    def mtu(self) -> int | None:
        """The device's MTU, None if it does not say."""
        if Feature.MTU not in self.device.offered:
            return None
        return int.from_bytes(self.device.config()[10:12], "little") or None

    @property
    def running(self) -> bool:
        """Whether the device works on the guest's queues."""
        return self.device.state in (State.PASSTHROUGH, State.SHADOW)

    @property
    def mode(self) -> State:
        """The mode in which the device is, or would be started now."""
        return State.SHADOW if self.dirty_log.wanted and not self.dirty_log.inexact else State.PASSTHROUGH

    @property
    def awaits_guest(self) -> bool:
        """Whether a guest has announced itself, by its memory or by the state of its device, and has not started."""
        return bool(self.mapped.unclaimed or self._moved_bases)

    @property
    def needs_ticks(self) -> bool:
        """Whether :meth:`tick` has something to do, so that it has to be called periodically."""
        unheard = self.running and not self._failure.given
        shadowed = self.device.state is State.SHADOW
        return shadowed or unheard or bool(self.dirty_log.inexact) or self.mapped.has_to_be_looked_at

    @property
    def notices(self) -> tuple[int, ...]:
        """Descriptors that are readable once :meth:`tick` has something to do though it need not be called else."""
        return (self._failure.fd, *self.mapped.notices)

    @property
    def migration(self) -> Mapping[str, float | None]:
        """What the last switch, stop and start took of the device, ms, read from the trace."""
        return self._timings.ms

    @property
    def queues(self) -> Sequence[GuestQueue]:
        """The queues that the device was started with last."""
        return self._queues

    @property
    def pairs(self) -> int:
        """Queue pairs in use."""
        return len(self._queues) // 2 if self._control is None else self._control.model.pairs

    @property
    def control_model(self) -> ControlModel | None:
        """What the device's control queue has set, None without one."""
        return None if self._control is None else self._control.model

    # -- negotiation -----------------------------------------------------------------

    def acknowledge(self, features: int) -> None:
        """Set the features that the front-end acknowledged; :class:`MessageRefused` if one was not offered."""
        again = self._accepted == (features, self.device.features) and self._negotiated is not None
        if again and self._control is not None:
            # the same again, as at each start
            self.acknowledged = features
            return
        if beyond := features & ~self.offer.features:
            raise MessageRefused(f"features that were not offered: {names(Feature(beyond))}")
        wanted = for_device(features, self.device.offered, self.options.control)
        if wanted != self._negotiated:
            if self.running:
                raise MessageRefused("features cannot be changed while the device runs")
            self._negotiate(wanted)
        if lost := not_taken(features, self.device.features):
            raise MessageRefused(f"{self.device.path} did not take {names(lost)}")
        if self._control is None:
            self._control = self._make_control(self.device.features)
        self.acknowledged = features
        self._accepted = features, self.device.features

    def _negotiate(self, wanted: Feature) -> None:
        self._negotiated = None
        taken = self.device.negotiate(wanted)
        self._negotiated = wanted
        self._control = self._make_control(taken)
        self.report("negotiated", {"features": hex(taken), "procedure": self.device.procedure.name})

    def _make_control(self, taken: Feature) -> NetGuestControl | None:
        index = self.device.target.groups.control_index
        if Feature.CTRL_VQ not in taken or index is None:
            return None
        if self._control is not None:
            model = self._control.model
            model.features = taken
        else:
            model = ControlModel(taken)
            _set(model, self._moved_control or {})
            for each in self._filter.commands(model) if self._filter is not None else ():
                model.apply(each)
        return NetGuestControl(None, model, index)

    # -- memory ----------------------------------------------------------------------

    def look_for_holes(self) -> None:
        """If memory was discarded, report it, and map all again: the device has pages that the guest no longer has."""
        lost = self.mapped.lost()
        if not lost:
            return
        so = "the guest and the device saw different pages there; memory is mapped again"
        self.report("memory-discarded", {"bytes": lost, "so": so})
        try:
            running, pairs, well = self.running, self.pairs, not self.failed
            bases = self.stop() if running else {}
            self.mapped.map_again()
            # a device whose queues could not be stopped in order is left reset, and stays reported as failed
            if running and (well and not self.failed):
                self.start(self._queues, bases, pairs)
        except (VhostVdpaError, ValueError) as e:
            self._fail("map again", e)
            self._force_reset()

    def prepare(self, guest: ComingGuest, files: Sequence[int]) -> str:
        """Map, set up and suspend the device for a guest that is about to come; how far that went, in words.

        ``files`` are descriptors of the guest's memory files here. VhostVdpaError if there is a guest already, or if
        the device cannot do what the guest needs; the device is reset then, and has none of the guest's memory.
        """
        if self.running or self.memory.regions:
            raise MessageRefused("the device has a guest already")
        if self.mapped.unclaimed:
            # the last attempt was cancelled: its result may have changed since
            self._force_reset()
            self.mapped.drop_early()
            self._control = None
        try:
            with self.device.trace.in_phase(DEST_STAND_BY):
                return self._prepare(guest, files)
        except BaseException:
            self._force_reset()
            self.mapped.drop_early()
            raise

    def _prepare(self, guest: ComingGuest, files: Sequence[int]) -> str:
        check(guest, self.max_pairs)
        self.acknowledge(guest.features & ~LOG_ALL)
        if self._control is not None and guest.control is not None:
            _set(self._control.model, {**guest.control, "pairs": guest.pairs})
        keys = [(status.st_dev, status.st_ino) for status in map(os.fstat, files)]
        regions = [SharedRegion(each.gpa, each.size, each.gpa, each.offset, keys[each.file]) for each in guest.regions]
        self.memory.check_together(regions)
        self.mapped.take_early(regions, dict(zip(keys, files, strict=True)))
        kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            words = self.device.stand_by([ring.queue(kick) for ring in guest.rings], self._control)
        finally:
            os.close(kick)
        self.report("prepared", {"bytes": self.mapped.unclaimed, "how": words})
        return words

    # -- start and stop ----------------------------------------------------------------

    def start(self, queues: Sequence[GuestQueue], bases: Mapping[int, int], pairs: int) -> None:
        """Start the device on the guest's queues with ``pairs`` in use.

        A failure leaves it reset, is reported, and raised.
        """
        self._queues = self._same_or_new(queues)
        if self._control is not None:
            self._control.model.pairs = max(1, pairs)
        elif len(queues) > 2:
            raise MessageRefused(f"{len(queues)} rings without MQ")
        if self.mapped.unclaimed:
            self.report("early-memory", {"unclaimed": self.mapped.unclaimed})
            self.mapped.drop_early()
        moved, self._moved_bases = self._moved_bases, {}
        if differing := sorted(index for index, base in moved.items() if bases.get(index, base) != base):
            self.report("bases-differ", {"rings": differing, "said": dict(bases), "state": moved})
        with self._timings.measured("start_ms", DEST_START):
            try:
                self.mapped.complete()
                self._start_or_give_up_exact({**bases, **moved})
            except (VhostVdpaError, ValueError) as e:
                self._fail("start", e)
                raise
        self.failed = ""
        found = {"mode": self.device.state.value, "rings": len(queues), "pairs": self.pairs}
        self.report("running", {**found, **self._timings.took("start_ms")})

    def _start_or_give_up_exact(self, bases: Mapping[int, int]) -> None:
        """Start; a guest that begins while dirty pages are logged runs also if the device cannot be shadowed."""
        mode = self.mode
        try:
            self._start(mode, bases)
        except (VhostVdpaError, ValueError) as e:
            if mode is not State.SHADOW:
                raise
            self._start(State.PASSTHROUGH, bases)
            self._give_up_exact(str(e))

    def _start(self, mode: State, bases: Mapping[int, int]) -> None:
        self._failure.given = False
        if not self.mapped.ready:
            self.mapped.before_mapping()
        self.device.start(mode, self._queues, self._control, bases)
        if mode is State.SHADOW:
            self.dirty_log.shadowed()

    def _same_or_new(self, queues: Sequence[GuestQueue]) -> list[GuestQueue]:
        """Return the queues; those that have not changed as the same objects, which the device knows."""
        known = {queue.index: queue for queue in self._queues}
        return [known[queue.index] if known.get(queue.index) == queue else queue for queue in queues]

    def stop(self) -> Mapping[int, int]:
        """Stop the device, keep it suspended if it can be, and return where its queues stand.

        What is in flight out of order is reported: it is done again, or lost. Nothing is written afterwards.
        """
        with self._timings.measured("stop_ms", DT2_STOP):
            try:
                self._stop(self.mode)
            except (VhostVdpaError, ValueError) as e:
                self._fail("stop", e)
                self._force_reset()
        self.dirty_log.stopped()
        bases = dict(self.device.bases())
        self.report("stopped", {"bases": bases, **self._timings.took("stop_ms")})
        return bases

    def bases(self) -> Mapping[int, int]:
        """Return where the queues of a device stand that was lost: reset without a stop."""
        return dict(self.device.bases())

    def _stop(self, then: State) -> None:
        if BackendFeature.SUSPEND in self.device.backend_features:
            self.device.stop(then)
        else:
            self.device.halt()

    def _force_reset(self) -> None:
        try:
            # also one that only stands suspended
            self.device.reset()
        except VhostVdpaError as e:
            log.error("%s could not be reset: %s", self.device.path, e)

    def _fail(self, what: str, error: Exception) -> None:
        self.failed = f"{what}: {error}"
        self.report("device-failed", {"what": what, "error": str(error), "state": self.device.state.value})

    def reset(self) -> None:
        """Reset the device and what its control queue has set; memory stays."""
        self._force_reset()
        self.dirty_log.publish_all()
        if self._control is not None:
            self._control = NetGuestControl(None, ControlModel(self.device.features), self._control.index)
        self.failed = ""
        self._moved_control, self._moved_bases = None, {}
        self.report("reset", {})

    # -- while it runs -----------------------------------------------------------------

    def set_eventfds(self, index: int, kick: int | None = None, call: int | None = None) -> None:
        """Exchange the eventfds of a running queue; None keeps one, a call of -1 removes it."""
        self.device.set_eventfds(index, kick=kick, call=call)
        for at, queue in enumerate(self._queues):
            if queue.index == index:
                given = {"kick": kick, "call": call}
                self._queues[at] = replace(queue, **{name: fd for name, fd in given.items() if fd is not None})

    def set_pairs(self, pairs: int) -> None:
        """Have the running device use another number of queue pairs; :class:`MessageRefused` if it does not.

        Pairs that it was not started with are not counted: they come with the next start.
        """
        pairs = min(pairs, len(self._queues) // 2)
        if self._control is None or not self.running or self._control.model.pairs == pairs:
            return
        if not self._command(command(Class.MQ, VQ_PAIRS_SET, pairs.to_bytes(2, "little"))):
            raise MessageRefused(f"{self.device.path} did not accept {pairs} queue pairs")
        self.report("pairs", {"pairs": pairs})

    def set_filter(self, wanted: RxFilter) -> None:
        """Have the device receive what the guest wants; without a device that runs, from its next start on."""
        self._filter = wanted
        refused = 0
        if (control := self._control) is not None:
            for each in wanted.commands(control.model):
                if not self.running:
                    control.model.apply(each)
                elif not self._command(each):
                    refused += 1
        self.report("filter", {"mac": wanted.mac.hex(":"), "refused": refused, "set": self.running})

    def _command(self, data: bytes) -> bool:
        """Send a control command to the device that runs; whether it accepted it."""
        if self.device.command(data) == OK:
            return True
        # it may have been no answer at all: have the next tick ask whether the device still works
        self._failure.give()
        return False

    def tick(self) -> None:
        """Look at what nothing notifies of: failures, holes in guest memory, a log without exact marks."""
        # in passthrough the device is asked when it raises its interrupt: nothing of this process should run
        raised = self._failure.drain()
        due = self.device.state is State.SHADOW or raised or not self._failure.given
        if due and self.running and not self.failed:
            try:
                self._give_interrupt()
                self.device.check()
            except VhostVdpaError as e:
                self._fail("check", e)
        self.look_for_holes()
        self._look_for_lost()
        if self.dirty_log.inexact and self.dirty_log.wanted and self.running:
            self.dirty_log.mark_all()

    def _look_for_lost(self) -> None:
        """If rings or buffers were gone when they were looked at, the guest has lost its device."""
        if self._guest_memory.lost and self.running and not self.failed:
            why = f"{self._guest_memory.lost} bytes were gone: a file of guest memory has become shorter"
            self._fail("guest memory", MissingFeature(why))
            self._force_reset()

    def _give_interrupt(self) -> None:
        """Give the device its configuration interrupt, after a start: the guest waits for what is within one."""
        if not self._failure.given:
            self.device.target.chardev.set_config_call(self._failure.fd)
            self._failure.given = True

    # -- dirty log ---------------------------------------------------------------------

    def set_log(self, area: LogArea, fd: int) -> None:
        """Log into another bitmap from now on; not one bit goes to the old one when this returns."""
        replaced = self.dirty_log.set(area, fd)
        self.report("log", {"bytes": area.size, "replaced": replaced, "sealed": cannot_shrink(fd)})

    def set_logging(self, wanted: bool) -> None:
        """Log from now on, or no more. A device that runs is switched, which never fails for the front-end.

        QEMU before 10.1 aborts when log start fails. So a device that cannot be switched continues in passthrough, and
        all memory is logged as dirty until it is stopped.
        """
        if wanted == self.dirty_log.wanted:
            return
        self.dirty_log.want(wanted)
        if self.running:
            name = "switch_ms" if self.mode is State.SHADOW else "back_ms"
            phases = (DT1_STOP, DT1_START) if self.mode is State.SHADOW else (CANCEL_START,)
            with self._timings.measured(name, *phases):
                self._switch(self.mode)
            self.report("switched", {"mode": self.device.state.value, **self._timings.took(name)})
        if not wanted:
            self.dirty_log.end()

    def _switch(self, mode: State) -> None:
        if self.device.state is mode:
            return
        try:
            self._stop(mode)
        except OutOfOrder as e:
            if self.running:
                self._give_up_exact(str(e))
            else:
                self._fail("switch", e)
            return
        except (VhostVdpaError, ValueError) as e:
            self._fail("switch", e)
            self._force_reset()
            return
        try:
            with self.device.trace.in_phase(DT1_START if mode is State.SHADOW else CANCEL_START):
                self._start(mode, {})
        except (VhostVdpaError, ValueError) as e:
            self._go_back(mode, e)

    def _go_back(self, mode: State, error: Exception) -> None:
        """Start in passthrough again, after a start in ``mode`` has failed and left the device reset."""
        if mode is State.SHADOW:
            self._give_up_exact(str(error))
        try:
            self._start(State.PASSTHROUGH, {})
        except (VhostVdpaError, ValueError) as e:
            self._fail("switch", e)

    def _give_up_exact(self, why: str) -> None:
        self.dirty_log.inexact = why
        self.report("log-inexact", {"why": why, "so": "all guest memory is logged as dirty until the device stops"})
        self.dirty_log.mark_all()

    # -- state of another back-end -----------------------------------------------------

    def adopt(self, control: Mapping[str, Any] | None, bases: Mapping[int, int]) -> None:
        """Adopt the settings of another back-end's device, and its queues' bases; both are checked."""
        self._moved_bases = dict(bases)
        self._moved_control = control
        if self._control is not None:
            # the same object: a device that was set up for it may know all of it
            _set(self._control.model, control or {})
        self.report("state-loaded", {"control": control is not None, "bases": dict(bases)})

    # -- begin and end of a session ------------------------------------------------------------

    def begin_session(self) -> None:
        """Begin from scratch; VhostVdpaError if the device still has the memory of a front-end that left."""
        self.dirty_log.drop()
        self.mapped.drop()
        self.failed = ""

    def end_session(self) -> None:
        """The front-end is gone: reset the device, and give its memory and its log back."""
        if self.running:
            try:
                self._stop(State.PASSTHROUGH)
            except (VhostVdpaError, ValueError) as e:
                log.info("%s was not stopped in order when the front-end left: %s", self.device.path, e)
        self._force_reset()
        for what, step in (("log", self.dirty_log.drop), ("unmap", self.mapped.drop)):
            try:
                step()
            except (VhostVdpaError, ValueError) as e:
                self._fail(what, e)
        self.dirty_log.forget()
        self._queues, self._control, self.acknowledged = [], None, 0
        self._moved_control, self._moved_bases = None, {}

    def close(self) -> None:
        """End the session. Device and memory are closed by the code that opened them, in this order."""
        self.end_session()
        self._failure.close()


def _set(model: ControlModel, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(model, name, value)
