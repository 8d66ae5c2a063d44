# SPDX-License-Identifier: MIT
"""A guest's life around its migration: started on the source, sent, run on the destination, accounted for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import MigrationEnded, MigrationRefused, VhostVdpaError
from ..chardev.door import check_path
from ..device.net import VdpaNetDevice
from ..guest.nic import MAX_FRAME, MIN_FRAME, FrameCounts
from ..guest.synthetic import Guest, GuestOptions
from ..host import mgmt
from ..memory.guest import Progress, check_available
from ..net.features import CONTROL, SUPPORTED
from ..trace import gap
from ..trace.downtime import DT1, DT2, PHASES, PhaseCost, cost, interval, milliseconds
from ..trace.recorder import Trace
from .cancel import Cancel
from .destination import Arrived, Destination, Stray, take
from .dirty import probe_interface
from .endpoint import Inherited, Listener, NoPeer
from .report import Drops, Part, downtimes, environment, procedures
from .saved import DEFAULT_FOLDER, check_room
from .source import Observer, SendOptions, Sent, Source, Tell
from .stream import Channel, Frame

SENT_SCHEMA = "pyvhostvdpa/send/1"
RECEIVED_SCHEMA = "pyvhostvdpa/receive/1"

_DRAIN_SECONDS = 10.0
_CHECK_SECONDS = 0.05
_TELL_SECONDS = 2.0
_ALIVE_SECONDS = 20.0

Connect = Callable[[Cancel], Channel]
"""Returns a greeted channel to the other side."""


@dataclass(frozen=True, slots=True)
class SentReport:
    """What sending a guest was. ``outcome`` is "sent" or "stayed on source"; ``frames`` is its account when it left."""

    outcome: str
    sent: Sent
    frames: FrameCounts
    parts: dict[str, Part]
    dt1_ms: dict[str, float]
    dt2_ms: dict[str, float]
    gap_switch_ms: float
    phases: dict[str, PhaseCost]
    drops: dict[str, dict[str, int]]
    environment: dict[str, Any]
    procedure: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[gap.Piece] = field(default_factory=list)
    """Of the time in which the guest stood still, those of this side."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON schema ``pyvhostvdpa/send/1`` has it."""
        return {
            "schema": SENT_SCHEMA,
            "outcome": self.outcome,
            "id": self.sent.id,
            "frames": self.frames.to_dict(),
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
            **downtimes(self.dt1_ms, self.dt2_ms),
            **gap.to_dict(gap.join(self.steps)),
            "guest_gap_ms": {"switch": round(self.gap_switch_ms, 3)},
            **self.sent.to_dict(),
            "phases": {name: phase.to_dict() for name, phase in self.phases.items()},
            "device_drops": self.drops,
            "procedure": self.procedure,
            "environment": self.environment,
        }


@dataclass(frozen=True, slots=True)
class ReceivedReport:
    """What receiving a guest was. ``frames`` are all since its first start, ``bad_pages`` what its CPU found wrong."""

    id: str
    source: str
    frames: FrameCounts
    bad_pages: int
    parts: dict[str, Part]
    gap_move_ms: float
    hash: str
    note: str
    phases: dict[str, PhaseCost]
    drops: dict[str, dict[str, int]]
    environment: dict[str, Any]
    procedure: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[gap.Piece] = field(default_factory=list)
    """Of the time in which the guest stood still, those of this side."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON schema ``pyvhostvdpa/receive/1`` has it."""
        return {
            "schema": RECEIVED_SCHEMA,
            "id": self.id,
            "source": self.source,
            "frames": self.frames.to_dict(),
            "bad_pages": self.bad_pages,
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
            **gap.to_dict(gap.join(self.steps)),
            "stop_to_run_steps_ns": gap.to_numbers(self.steps),
            "guest_gap_ms": {"move": round(self.gap_move_ms, 3)},
            "memory_hash": self.hash or None,
            "note": self.note or None,
            "phases": {name: phase.to_dict() for name, phase in self.phases.items()},
            "device_drops": self.drops,
            "procedure": self.procedure,
            "environment": self.environment,
        }


def check_devices(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Raise if these are not different vhost-vdpa devices that nobody has open; opens none."""
    for path in paths:
        check_path(path)
        if mgmt.holders(path):
            raise mgmt.busy(path)
    if len({mgmt.device_number(path) for path in paths}) != len(paths):
        raise MigrationRefused("the same device twice", hint="vhost-vdpa list shows the others")


def check_pairs(devices: Sequence[VdpaNetDevice], pairs: int) -> None:
    """Raise if a device has fewer queue pairs that can be used."""
    for device in devices:
        if pairs > device.groups.max_pairs:
            raise MigrationRefused(
                f"{device.path} has {device.groups.max_pairs} queue pairs that can be used, {pairs} were asked for",
                hint="vdpa dev add … max_vqp N makes one with more, where the driver can",
            )


def let_run(
    guest: Guest, devices: Sequence[VdpaNetDevice], seconds: float, enough: Callable[[], bool] = lambda: False
) -> Part:
    """Let a guest run, with an eye on its devices, for ``seconds`` or until that is enough."""
    before, begin = guest.counts().received, time.monotonic()
    while (left := begin + seconds - time.monotonic()) > 0 and not enough():
        time.sleep(min(left, _CHECK_SECONDS))
        for device in devices:
            device.check()
    return Part(guest.counts().received - before, time.monotonic() - begin)


@dataclass
class Sending:
    """A guest with traffic, started here, that is sent away.

    ``seconds`` of traffic before, and after if it stays; ``shadowed`` seconds
    of it between the switch and the first round of memory; ``procedure`` forces
    one on the devices (:class:`~pyvhostvdpa.VdpaNetDevice`).
    """

    paths: Sequence[str | os.PathLike[str]]
    connect: Connect
    guest_options: GuestOptions
    options: SendOptions = field(default_factory=SendOptions)
    seconds: float = 5.0
    shadowed: float = 0.0
    observer: Observer = lambda phase: None
    tell: Tell = lambda text: None
    trace: Trace = field(default_factory=Trace)
    procedure: str | None = None

    def run(self) -> SentReport:
        """Start the guest, let it run, send it. What :meth:`Source.run` raises has a ``report`` if the guest stayed."""
        check_devices(self.paths)
        if not MIN_FRAME <= self.guest_options.frame_size <= MAX_FRAME:
            raise MigrationRefused(f"frames of {self.guest_options.frame_size} bytes: {MIN_FRAME} to {MAX_FRAME}")
        check_available(self.guest_options.memory)
        check_room(self.options.folder, self.guest_options.memory)
        # whether the kernel can tell what was written is no news for a guest that runs
        probe_interface()
        self._parts: dict[str, Part] = {}
        self._lost: dict[str, dict[str, int]] = {}
        with ExitStack() as stack, Cancel() as cancel:
            self.observer("start")
            devices = [
                stack.enter_context(
                    VdpaNetDevice(path, self.trace, wanted=SUPPORTED | CONTROL, procedure=self.procedure)
                )
                for path in self.paths
            ]
            check_pairs(devices, self.guest_options.pairs)
            guest = self._guest(devices, stack)
            self._drops = drops_of(guest, devices)
            self.observer("passthrough")
            self._parts["passthrough"] = let_run(guest, devices, self.seconds)
            sent = Sent()
            with cancel.on_signals():
                try:
                    self.observer("connect")
                    channel = stack.enter_context(self._connected(cancel))
                    observe = self._shadowing(guest, devices, cancel, channel)
                    source = Source(guest, devices, channel, cancel, self.options, observe, self.tell)
                    sent = source.sent
                    source.run()
                except MigrationEnded as e:
                    try:
                        self._stayed(e, guest, devices, sent)
                    except VhostVdpaError as worse:
                        self.tell(f"the guest that stayed cannot be accounted for: {worse}")
                    raise
            return self._report("sent", guest, devices, sent)

    def _shadowing(self, guest: Guest, devices: Sequence[VdpaNetDevice], cancel: Cancel, channel: Channel) -> Observer:
        """Return an observer that lets the guest run between the switch and the first round of memory."""
        told = time.monotonic()

        def enough() -> bool:
            nonlocal told
            if time.monotonic() - told > _ALIVE_SECONDS:
                told = time.monotonic()
                channel.send_text(Frame.ALIVE, "the guest runs on shadow virtqueues")
            return cancel.wanted

        def observe(phase: str) -> None:
            if phase == "memory":
                if self.shadowed:
                    self.observer("shadow")
                    self._parts["shadow"] = let_run(guest, devices, self.shadowed, enough)
                # what a device counts it may forget when it is reset, and asking takes too long for a guest that stands
                self._lost = {path: drops.now() for path, drops in self._drops.items()}
            self.observer(phase)

        return observe

    def _connected(self, cancel: Cancel) -> Channel:
        try:
            return self.connect(cancel)
        except MigrationEnded as e:
            where = ", ".join(os.fspath(path) for path in self.paths)
            raise type(e)(f"{e}; the guest goes on in passthrough on {where}", hint=e.hint) from e

    def _guest(self, devices: Sequence[VdpaNetDevice], stack: ExitStack) -> Guest:
        guest = Guest.create(devices, self.guest_options, self._allocated())
        stack.callback(guest.close)
        for device in devices:
            # devices let go of the memory before it goes: a second close is none
            stack.callback(device.close)
        stack.callback(guest.pause)
        for number, device in enumerate(devices):
            device.attach(guest.memory)
            guest.start(number, device)
            guest.use_pairs(number, device.path)
        guest.run()
        return guest

    def _allocated(self) -> Progress:
        done, told = 0, time.monotonic()

        def tell(step: int) -> None:
            nonlocal done, told
            done += step
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                self.tell(f"allocated {done >> 20} of {self.guest_options.memory >> 20} MiB of guest memory")

        return tell

    def _stayed(self, error: MigrationEnded, guest: Guest, devices: Sequence[VdpaNetDevice], sent: Sent) -> None:
        """Let a guest that goes on here run, and account for it; one that is stopped has no report."""
        if not all(traffic.running for traffic in guest.traffic):
            return
        self.observer("source again")
        self._parts["source again"] = let_run(guest, devices, self.seconds)
        self.observer("drain")
        guest.drain(_DRAIN_SECONDS)
        self._lost = {path: drops.now() for path, drops in self._drops.items()}
        guest.pause()
        error.report = self._report("stayed on source", guest, devices, sent)

    def _report(self, outcome: str, guest: Guest, devices: Sequence[VdpaNetDevice], sent: Sent) -> SentReport:
        spans = [interval(self.trace, device.path, DT1) for device in devices]
        return SentReport(
            outcome=outcome,
            sent=sent,
            frames=guest.counts(),
            parts=self._parts,
            dt1_ms={device.path: milliseconds(self.trace, device.path, DT1) for device in devices},
            dt2_ms={device.path: milliseconds(self.trace, device.path, DT2) for device in devices},
            gap_switch_ms=max((guest.longest_gap(*span) for span in spans if span), default=0.0),
            phases=_phases(self.trace),
            drops=self._lost,
            environment=environment({device.path: device for device in devices}, guest.memory.size),
            procedure=procedures(devices),
            steps=gap.steps(self.trace.events) if sent.stopped else [],
        )


@dataclass
class Receiving:
    """A guest that arrives, or is started from a file, and runs here for ``seconds``.

    ``procedure`` forces one on the devices (:class:`~pyvhostvdpa.VdpaNetDevice`).
    """

    paths: Sequence[str | os.PathLike[str]]
    seconds: float = 5.0
    folder: Path = DEFAULT_FOLDER
    observer: Observer = lambda phase: None
    tell: Tell = lambda text: None
    trace: Trace = field(default_factory=Trace)
    procedure: str | None = None

    def receive(self, listener: Listener | Inherited) -> ReceivedReport:
        """Wait for a source, receive its guest, let it run.

        Whoever brings no guest is told of, and the next waited for; a guest that does not fit ends it.
        """
        check_devices(self.paths)
        while True:
            self.tell(f"waiting for a source on {listener.address}")
            try:
                with Cancel() as cancel:
                    channel = listener.accept(cancel.fileno())
                    with channel, cancel.on_signals():
                        arrived = Destination(
                            self.paths,
                            channel,
                            cancel,
                            self.trace,
                            self.folder,
                            self.observer,
                            self.tell,
                            self.procedure,
                        ).run()
            except (NoPeer, Stray) as e:
                self.tell(f"refused: {e}")
            else:
                return self._live(arrived)

    def take(self, path: Path) -> ReceivedReport:
        """Start the guest saved in a file, let it run."""
        check_devices(self.paths)
        return self._live(take(path, self.paths, self.trace, self.tell, self.procedure))

    def _live(self, arrived: Arrived) -> ReceivedReport:
        with arrived:
            if arrived.note:
                self.tell(arrived.note)
            self.observer("destination")
            guest, devices = arrived.guest, arrived.devices
            guest.announce()
            drops = drops_of(guest, devices)
            part = let_run(guest, devices, self.seconds)
            self.observer("drain")
            guest.drain(_DRAIN_SECONDS)
            lost = {path: each.now() for path, each in drops.items()}
            guest.pause()
            spans = [interval(self.trace, device.path, ("dest.start",)) for device in devices]
            return ReceivedReport(
                id=arrived.id,
                source=arrived.source,
                frames=guest.counts(),
                bad_pages=guest.writer.bad_pages() if guest.writer is not None else 0,
                parts={"destination": part},
                gap_move_ms=max((guest.longest_gap(*span) for span in spans if span), default=0.0),
                hash=arrived.hash,
                note=arrived.note,
                phases=_phases(self.trace),
                drops=lost,
                environment=environment({device.path: device for device in devices}, guest.memory.size),
                procedure=procedures(devices),
                steps=gap.steps(self.trace.events),
            )


def drops_of(guest: Guest, devices: Sequence[VdpaNetDevice]) -> dict[str, Drops]:
    """Return the counters of lost frames from now on, by device."""
    return {device.path: Drops(device.path, nic.queues) for device, nic in zip(devices, guest.nics, strict=True)}


def _phases(trace: Trace) -> dict[str, PhaseCost]:
    costs = {phase: cost(trace, phase) for phase in PHASES}
    return {phase: measured for phase, measured in costs.items() if measured is not None}
