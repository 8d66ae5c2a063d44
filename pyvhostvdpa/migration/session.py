# SPDX-License-Identifier: MIT
"""A guest's life around its migration: started on the source, sent, run on the destination, accounted for."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..base.errors import MigrationEnded, MigrationFailed, MigrationRefused, VhostVdpaError
from ..chardev.door import check_path
from ..device.net import VdpaNetDevice
from ..guest.protocol import Kinds, NewGuest, TrafficGuest, Window
from ..guest.shape import GuestShape
from ..host import mgmt
from ..memory.guest import check_available
from ..memory.mapped import ProgressCallback
from ..net.control_queue import DEFAULT_DEADLINE
from ..net.features import CONTROL, SUPPORTED
from ..trace import gap
from ..trace.downtime import Downtimes, PhaseCost, cost, measured
from ..trace.phases import DT1, DT2, PHASES
from ..trace.recorder import Trace
from .cancel import Cancel, ending_early, unheard
from .common import PhaseCallback, ReportCallback, attempt, harmless
from .destination import Arrived, Destination, receive_shape
from .dirty import probe_interface
from .endpoint import Inherited, Listener
from .from_file import start_saved
from .reception import Reception
from .report import STAYED, DropCounts, Drops, Part, ReceivedReport, SentReport, environment, procedures
from .rescue import rescue
from .saved import DEFAULT_FOLDER, SavedGuest, check_room, save
from .sent import SendResult
from .source import SendOptions, Source, stop_or_halt
from .stream import Channel, Frame

_STALLED_SECONDS = 2.0
_CHECK_SECONDS = 0.05
_TELL_SECONDS = 2.0
_ALIVE_SECONDS = 20.0

Connect = Callable[[Cancel], Channel]
"""Returns a greeted channel to the other side."""


def check_devices(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Raise if these are not different vhost-vdpa devices that no process has open; opens none."""
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
    guest: TrafficGuest, devices: Sequence[VdpaNetDevice], seconds: float, enough: Callable[[], bool] = lambda: False
) -> Part:
    """Let a guest run, with an eye on its devices, for ``seconds`` or until that is enough."""
    before, begin = guest.counts().received, time.monotonic()
    while (left := begin + seconds - time.monotonic()) > 0 and not enough():
        time.sleep(min(left, _CHECK_SECONDS))
        for device in devices:
            device.check()
            # stalled queues are timed from the first look on
            device.stalled()
    return Part(guest.counts().received - before, time.monotonic() - begin)


def drain(guest: TrafficGuest, devices: Sequence[VdpaNetDevice], part: Part, seconds: float) -> list[str]:
    """Send no more and wait ``seconds`` for the frames in flight.

    Returns sentences on what did not arrive, and why, if known.
    """
    if guest.drain(seconds):
        return []
    counts = guest.counts()
    where = ", ".join(device.path for device in devices)
    if not part.received:
        why = [f"no frame came back since the guest runs on {where}: a queue of it never started, or it stalls"]
    else:
        why = [
            f"virtqueue {queue} of {device.path} has work and has not moved for {still:.1f} s: the device stalls"
            for device in devices
            for queue, still in device.stalled().items()
            if still > _STALLED_SECONDS
        ]
    lost = f"{counts.sent - counts.received} frames did not come back within {seconds:g} s (--drain)"
    return [f"{lost}: {'; '.join(why) or f'{where} lost them'}"]


@dataclass
class Sending:
    """A guest with traffic, started here, that is sent away.

    ``seconds`` of traffic before, and after if it stays; ``shadowed`` seconds
    of it between the switch and the first round of memory.
    """

    paths: Sequence[str | os.PathLike[str]]
    connect: Connect
    guest_options: NewGuest
    options: SendOptions = field(default_factory=SendOptions)
    seconds: float = 5.0
    shadowed: float = 0.0
    observer: PhaseCallback = lambda phase: None
    tell: ReportCallback = lambda text: None
    trace: Trace = field(default_factory=Trace)
    procedure: str | None = None
    """Forced on the devices; the best that each can do without (:class:`~pyvhostvdpa.VdpaNetDevice`)."""
    afterwards: Callable[[Cancel], None] = lambda cancel: None
    """Called once the guest is away and the devices are closed; a signal still only sets ``cancel`` then."""
    shadow: str | None = None
    """How queues are shadowed, one of :data:`pyvhostvdpa.device.shadowing.NAMES`; None for the default."""

    def run(self) -> SentReport:
        """Start the guest, let it run, send it. What :meth:`Source.run` raises has a ``report`` if the guest stayed.

        SIGINT and SIGTERM cancel from the phase "connect" on until the guest
        is given away, after which they are too late; in a thread other than
        the main one they do what the program does with them. What ``observer``
        and ``tell`` raise is logged.
        """
        check_devices(self.paths)
        self.guest_options.check()
        check_available(self.guest_options.memory)
        check_room(self.options.folder, self.guest_options.memory)
        # whether the kernel can track written pages must be known before the guest runs
        probe_interface()
        self.observer, self.tell = harmless(self.observer), harmless(self.tell)
        self._parts: dict[str, Part] = {}
        self._lost: DropCounts = {}
        self._warnings: list[str] = []
        with Cancel() as cancel, ExitStack() as signals:
            report = self._send(cancel, signals)
            self.afterwards(cancel)
        return report

    def _send(self, cancel: Cancel, signals: ExitStack) -> SentReport:
        with ExitStack() as stack:
            self.observer("start")
            devices = [
                stack.enter_context(
                    VdpaNetDevice(
                        path,
                        self.trace,
                        wanted=SUPPORTED | CONTROL,
                        procedure=self.procedure,
                        control_deadline=self.options.control_deadline,
                        shadow=self.shadow,
                    )
                )
                for path in self.paths
            ]
            check_pairs(devices, self.guest_options.pairs)
            guest = self._guest(devices, stack)
            self._drops = drops_of(guest, devices, self._warn)
            self.observer("passthrough")
            self._parts["passthrough"] = let_run(guest, devices, self.seconds)
            sent = SendResult()
            signals.enter_context(cancel.on_signals())
            try:
                self.observer("connect")
                channel = stack.enter_context(self._connected(cancel))
                source = Source(
                    guest,
                    devices,
                    channel,
                    cancel,
                    self.options,
                    self.observer,
                    self.tell,
                    lambda: self._shadowing(guest, devices, cancel, channel),
                )
                sent = source.sent
                source.run()
            except MigrationEnded as e:
                e.report = attempt(
                    lambda: self._stayed(guest, devices, sent),
                    "the guest that stayed cannot be accounted for",
                    self.tell,
                )
                raise
            return self._report("sent", guest, devices, sent)

    def _warn(self, text: str) -> None:
        self._warnings.append(text)
        self.tell(text)

    def _shadowing(
        self, guest: TrafficGuest, devices: Sequence[VdpaNetDevice], cancel: Cancel, channel: Channel
    ) -> None:
        """Let the guest run between the switch and the first round of memory, and read the devices' counters."""
        told = time.monotonic()

        def enough() -> bool:
            nonlocal told
            if time.monotonic() - told > _ALIVE_SECONDS:
                told = time.monotonic()
                channel.send_text(Frame.ALIVE, "the guest runs on shadow virtqueues")
            return cancel.wanted

        if self.shadowed:
            self.observer("shadow")
            self._parts["shadow"] = let_run(guest, devices, self.shadowed, enough)
        # what a device counts it may forget when it is reset, and asking takes too long for a guest that is paused
        self._lost = {path: drops.now() for path, drops in self._drops.items()}

    def _connected(self, cancel: Cancel) -> Channel:
        try:
            return self.connect(cancel)
        except MigrationEnded as e:
            where = ", ".join(os.fspath(path) for path in self.paths)
            raise type(e)(f"{e}; the guest continues in passthrough on {where}", hint=e.hint) from e

    def _guest(self, devices: Sequence[VdpaNetDevice], stack: ExitStack) -> TrafficGuest:
        guest = self.guest_options.create(devices, self._allocated())
        stack.callback(guest.close)
        for device in devices:
            # devices release the memory before it is freed: closing them again has no effect
            stack.callback(device.close)
        stack.callback(guest.pause)
        for number, device in enumerate(devices):
            device.attach(guest.memory)
            guest.start(number, device)
            guest.use_pairs(number, device.path)
        guest.run()
        return guest

    def _allocated(self) -> ProgressCallback:
        done, told = 0, time.monotonic()

        def tell(step: int) -> None:
            nonlocal done, told
            done += step
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                self.tell(f"allocated {done >> 20} of {self.guest_options.memory >> 20} MiB of guest memory")

        return tell

    def _stayed(self, guest: TrafficGuest, devices: Sequence[VdpaNetDevice], sent: SendResult) -> SentReport | None:
        """Let a guest that stays here run, and account for it; one that is stopped has no report."""
        if not guest.running:
            return None
        self.observer("source again")
        self._parts["source again"] = part = let_run(guest, devices, self.seconds)
        self.observer("drain")
        for warning in drain(guest, devices, part, self.options.drain):
            self._warn(warning)
        self._lost = {path: drops.now() for path, drops in self._drops.items()}
        guest.pause()
        return self._report(STAYED, guest, devices, sent)

    def _report(
        self, outcome: str, guest: TrafficGuest, devices: Sequence[VdpaNetDevice], sent: SendResult
    ) -> SentReport:
        stayed, paths = outcome == STAYED, [device.path for device in devices]
        return SentReport(
            outcome=outcome,
            sent=sent,
            frames=guest.counts(),
            bad_pages=guest.bad_pages() if stayed else None,
            parts=self._parts,
            downtimes=Downtimes(
                {path: measured(self.trace, path, DT1) if path in sent.switched else None for path in paths},
                {path: measured(self.trace, path, DT2) if path in sent.halted else None for path in paths},
            ),
            gap_switch_ms=guest.window_gap(Window.SWITCH) if sent.switched >= set(paths) else None,
            gap_back_ms=guest.window_gap(Window.START) if stayed else None,
            phases=_phases(self.trace),
            drops=self._lost,
            environment=environment({device.path: device for device in devices}, guest.memory.size),
            warnings=self._warnings,
            procedure=procedures(devices),
            steps=gap.steps(self.trace.events) if sent.stopped else [],
        )


@dataclass
class Receiving:
    """A guest that arrives, or is started from a file, and runs here for ``seconds``. ``kinds`` are what may arrive."""

    paths: Sequence[str | os.PathLike[str]]
    seconds: float = 5.0
    folder: Path = DEFAULT_FOLDER
    observer: PhaseCallback = lambda phase: None
    tell: ReportCallback = lambda text: None
    trace: Trace = field(default_factory=Trace)
    control_deadline: float = DEFAULT_DEADLINE
    drain: float = 10.0
    procedure: str | None = None
    """Forced on the devices; the best that each can do without (:class:`~pyvhostvdpa.VdpaNetDevice`)."""
    kinds: Kinds[TrafficGuest] = field(kw_only=True)

    def receive(self, listener: Listener | Inherited) -> ReceivedReport:
        """Wait for a source, receive its guest, let it run.

        A peer that brings no guest, or one that does not fit, is reported and refused, and the next is waited for.
        Raises :class:`~pyvhostvdpa.MigrationRefused` if there is no next, because the stream was inherited.
        """
        check_devices(self.paths)
        if isinstance(listener, Inherited):
            self._wait(listener)
            with Cancel() as cancel:
                return self._live(self._arrive(listener.accept(cancel.fileno()), cancel))
        # one for all sources: when the next one comes there may be no descriptor left
        with Reception(listener, receive_shape) as reception, Cancel() as cancel:
            self._wait(listener)
            while True:
                try:
                    channel, shape = reception.next()
                    arrived = self._arrive(channel, cancel, shape)
                except MigrationRefused as e:
                    self.tell(f"refused: {e}")
                    self._wait(listener)
                else:
                    reception.stop()
                    return self._live(arrived)

    def _wait(self, listener: Listener | Inherited) -> None:
        self.tell(f"waiting for a source on {listener.address}")

    def _arrive(self, channel: Channel, cancel: Cancel, shape: GuestShape | None = None) -> Arrived[TrafficGuest]:
        with channel, cancel.on_signals():
            return Destination(
                self.paths,
                channel,
                cancel,
                self.kinds,
                self.trace,
                self.folder,
                self.observer,
                self.tell,
                self.control_deadline,
                shape,
                self.procedure,
            ).run()

    def start_saved(self, path: Path) -> ReceivedReport:
        """Start the guest saved in a file, let it run."""
        check_devices(self.paths)
        tell = harmless(self.tell)
        return self._live(
            start_saved(path, self.paths, self.kinds, self.trace, tell, self.control_deadline, self.procedure)
        )

    def _live(self, arrived: Arrived[TrafficGuest]) -> ReceivedReport:
        """Let a guest that arrived run, and account for it. What only reports may fail, and the guest runs on.

        A signal ends the traffic early; the frames are still counted. If a device fails the guest is saved, and
        :class:`~pyvhostvdpa.MigrationFailed` names the file.
        """
        observer, tell, warnings = harmless(self.observer), harmless(self.tell), list[str]()

        def warn(text: str) -> None:
            warnings.append(text)
            tell(text)

        with arrived, ending_early() as ended:
            if arrived.note:
                tell(arrived.note)
            observer("destination")
            guest, devices = arrived.guest, arrived.devices
            attempt(guest.announce, "the guest could not announce itself to its networks", warn)
            drops = drops_of(guest, devices, warn)
            try:
                part = let_run(guest, devices, self.seconds, ended.is_set)
            except VhostVdpaError as e:
                raise self._saved(arrived, e) from e
            observer("drain")
            for warning in drain(guest, devices, part, self.drain):
                warn(warning)
            lost = {path: each.now() for path, each in drops.items()}
            guest.pause()
            return ReceivedReport(
                id=arrived.shape.id.hex(),
                source=arrived.shape.source,
                frames=guest.counts(),
                bad_pages=guest.bad_pages(),
                parts={"destination": part},
                gap_move_ms=guest.window_gap(Window.START),
                hash=arrived.hash,
                note=arrived.note,
                phases=_phases(self.trace),
                drops=lost,
                environment=environment({device.path: device for device in devices}, guest.memory.size),
                warnings=warnings,
                procedure=procedures(devices),
                steps=gap.steps(self.trace.events),
            )

    def _saved(self, arrived: Arrived[TrafficGuest], error: VhostVdpaError) -> MigrationFailed:
        """Save a guest whose device failed: it can continue on another one, or on this one after a reset."""
        guest, devices = arrived.guest, arrived.devices

        def once() -> Path:
            own, sections = guest.state()
            return save(self.folder, "destination", SavedGuest(arrived.shape, own, tuple(sections)), guest.memory)

        # a signal that raised here would end the guest
        with unheard():
            guest.pause()
            for device in devices:
                with suppress(VhostVdpaError, OSError):
                    stop_or_halt(device)
                with suppress(VhostVdpaError, OSError):
                    device.reset()
            path = rescue(once, self.folder, guest.memory.size)
        command = ["vhost-vdpa", "receive", "--take", str(path), *(device.path for device in devices)]
        return MigrationFailed(f"{error}. The guest is stopped and saved in {path}", hint=shlex.join(command))


def drops_of(guest: TrafficGuest, devices: Sequence[VdpaNetDevice], tell: ReportCallback) -> dict[str, Drops]:
    """Return the counters of lost frames from now on, by device; ``tell`` gets why some are unknown."""
    return {device.path: Drops(device.path, guest.queues(number), tell) for number, device in enumerate(devices)}


def _phases(trace: Trace) -> dict[str, PhaseCost]:
    costs = {phase: cost(trace, phase) for phase in PHASES}
    return {phase: measured for phase, measured in costs.items() if measured is not None}
