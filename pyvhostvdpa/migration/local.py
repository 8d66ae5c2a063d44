# SPDX-License-Identifier: MIT
"""Migration between two devices of one machine, in one process.

The guest starts in passthrough on the source, is switched to shadow
virtqueues (DT1), stopped there (DT2) and started in passthrough on the
destination, with traffic before, between and after. Whatever fails before
the destination runs, the guest goes on in passthrough on the source.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from .. import mgmt
from ..chardev import check_path
from ..device import State, VdpaNetDevice
from ..errors import MigrationFailed, MigrationRefused, VhostVdpaError
from ..memory import DEFAULT_GPA, GuestMemory, check_available
from ..net.control import ANNOUNCE_ACK, OK, VQ_PAIRS_SET, Class, ControlModel, command
from ..net.control_queue import GuestControl
from ..net.features import CONTROL, SUPPORTED
from ..net.nic import MAX_FRAME, MIN_FRAME, GuestNic, NicOptions
from ..net.traffic import Traffic
from ..trace import Trace
from ..uapi import ALL_BACKEND_FEATURES, BackendFeature, names
from .downtime import DT1, DT2, PHASES, PhaseCost, cost, interval, milliseconds
from .report import Part, Report, environment

Observer = Callable[[str], None]
"""Called with the name of each part of a migration as it begins, and with words of progress in long ones."""

_DRAIN_SECONDS = 10.0
_CHECK_SECONDS = 0.05
_TELL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """How to migrate. ``memory`` in bytes; ``seconds`` of traffic, a third in each part; ``pairs`` of queues."""

    memory: int = 1 << 30
    pairs: int = 1
    seconds: float = 20.0
    ring_size: int = 256
    frame_size: int = 256
    use: BackendFeature = ALL_BACKEND_FEATURES


def migrate(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: Options | None = None,
    observer: Observer = lambda part: None,
    trace: Trace | None = None,
) -> Report:
    """Migrate a guest with traffic from ``source`` to ``destination``; both are reset in the end.

    ``trace`` takes what passed the doors of both, also of a migration that failed.
    Raises :class:`~pyvhostvdpa.errors.MigrationRefused` before anything is
    touched, :class:`~pyvhostvdpa.errors.MigrationFailed` (with ``report``)
    if the guest had to stay on the source, and whatever opening or mapping
    raises. An exception of ``observer`` ends the migration in that part, with
    the devices reset.
    """
    options = options or Options()
    if not MIN_FRAME <= options.frame_size <= MAX_FRAME:
        raise MigrationRefused(f"frames of {options.frame_size} bytes: from {MIN_FRAME} to {MAX_FRAME} are possible")
    for path in (source, destination):
        check_path(path)
    if mgmt.device_number(source) == mgmt.device_number(destination):
        raise MigrationRefused(
            f"source and destination are the same device: {source}",
            hint="vhost-vdpa list shows the others; vdpa dev add creates one",
        )
    check_available(options.memory)
    with ExitStack() as stack:
        observer("prepare")
        return _Migration((source, destination), options, observer, stack, trace or Trace()).run()


@dataclass
class _Bookkeeping:
    parts: dict[str, Part] = field(default_factory=dict)
    drops_before: dict[str, dict[str, int]] = field(default_factory=dict)
    drops: dict[str, dict[str, int]] = field(default_factory=dict)


class _Migration:
    def __init__(
        self,
        paths: tuple[str | os.PathLike[str], str | os.PathLike[str]],
        options: Options,
        observer: Observer,
        stack: ExitStack,
        trace: Trace,
    ) -> None:
        self.options = options
        self.observe = observer
        self.trace = trace
        self.source, self.destination = (
            stack.enter_context(VdpaNetDevice(path, self.trace, options.use, SUPPORTED | CONTROL)) for path in paths
        )
        self._check_devices()
        self._memory_done, self._memory_told = 0, time.monotonic()
        self.memory = stack.enter_context(GuestMemory([(DEFAULT_GPA, options.memory)], self._allocated))
        self.nic = GuestNic(self.memory, self._nic_options())
        stack.callback(self.nic.close)
        self.source.guest_config = self.destination.guest_config = self.nic.config
        self.control: GuestControl | None = None
        if self.nic.control is not None:
            model = ControlModel(self.source.features, mac=self.source.mac)
            self.control = GuestControl(self.nic.control.queue, model)
        # devices must let go of the memory before it goes: a second close is none
        stack.callback(self.destination.close)
        stack.callback(self.source.close)
        self.traffic = Traffic(self.nic)
        stack.callback(self.traffic.pause)
        self.book = _Bookkeeping()

    def _nic_options(self) -> NicOptions:
        return NicOptions(
            pairs=self.options.pairs,
            ring_size=self.options.ring_size,
            frame_size=self.options.frame_size,
            features=self.source.features,
            control_index=self.source.groups.control_index,
        )

    def _allocated(self, step: int) -> None:
        self._memory_done += step
        now = time.monotonic()
        if now - self._memory_told > _TELL_SECONDS:
            self._memory_told = now
            self.observe(f"allocated {self._memory_done >> 20} of {self.options.memory >> 20} MiB of guest memory")

    def _check_devices(self) -> None:
        if BackendFeature.SUSPEND not in self.source.backend_features:
            raise MigrationRefused(
                f"{self.source.path} lacks SUSPEND: its rings cannot be taken over without loss (it has "
                f"{names(self.source.backend_features)})"
            )
        missing = self.source.features & ~self.destination.features
        if missing:
            raise MigrationRefused(
                f"{self.destination.path} lacks features that the guest uses on the source: {names(missing)}",
                hint="create it with the same device_features: vdpa dev add",
            )
        for device in (self.source, self.destination):
            if self.options.pairs > device.groups.max_pairs:
                raise MigrationRefused(
                    f"{device.path} has {device.groups.max_pairs} queue pairs that can be used, "
                    f"{self.options.pairs} were asked for",
                    hint="vdpa dev add … max_vqp N makes one with more, where the driver can",
                )
        if self.source.groups.control_index != self.destination.groups.control_index:
            raise MigrationRefused(
                f"{self.destination.path} has its control queue elsewhere "
                f"({self.destination.groups.max_pairs} queue pairs, the source {self.source.groups.max_pairs})",
                hint="create both with the same max_vqp: vdpa dev add",
            )

    def run(self) -> Report:
        self.source.attach(self.memory)
        with self.destination.trace.in_phase("dest.premap"):
            self.destination.attach(self.memory)
        self.source.start_passthrough(self.nic.queues, self.control)
        self._use_pairs()
        self.book.drops_before["source"] = self._drops(self.source)
        self.observe("passthrough")
        self.traffic.run()
        self._let_run("passthrough", self.source)
        try:
            self._switch()
            self._let_run("shadow", self.source)
            self.book.drops["source"] = self._drops(self.source)
            self._move()
        except VhostVdpaError as e:
            raise self._stay(e) from e
        self._let_run("destination", self.destination)
        return self._finish("migrated", self.destination, "destination")

    def _use_pairs(self) -> None:
        """What a guest's driver does once it runs: take all its queues into use."""
        driver = self.nic.control
        if driver is not None and self.options.pairs > 1:
            answer = driver.send(command(Class.MQ, VQ_PAIRS_SET, self.options.pairs.to_bytes(2, "little")))
            if answer != OK:
                raise MigrationFailed(f"{self.source.path} refused to use {self.options.pairs} queue pairs")

    def _announce(self) -> None:
        """What a guest's driver does that is asked to announce itself; there is no network to tell here."""
        driver = self.nic.control
        if driver is not None and self.nic.config.asks_to_announce:
            driver.send(command(Class.ANNOUNCE, ANNOUNCE_ACK))

    # -- the two phases ---------------------------------------------------------

    def _switch(self) -> None:
        self.observe("switch")
        with self.source.trace.in_phase("dt1.stop"):
            self.source.stop()
        with self.source.trace.in_phase("dt1.start"):
            self.source.start_shadow(self.nic.queues, self.control)
        self.observe("shadow")

    def _move(self) -> None:
        self.observe("move")
        self.traffic.pause()
        with self.source.trace.in_phase("dt2.stop"):
            self.source.stop()
        self.observe("start destination")
        with self.destination.trace.in_phase("dest.start"):
            self.destination.start_passthrough(self.nic.queues, self.control)
        self.traffic.run()
        self._announce()
        self.observe("destination")
        self.book.drops_before["destination"] = self._drops(self.destination)

    def _stay(self, error: VhostVdpaError) -> MigrationFailed:
        """Bring the guest back to passthrough on the source and let it run there."""
        self.observe("back to source")
        self.traffic.pause()
        try:
            with self.source.trace.in_phase("cancel.start"):
                if self.source.state is State.SHADOW:
                    self.source.stop()
                if self.source.state is State.RESET:
                    self.source.start_passthrough(self.nic.queues, self.control)
        except VhostVdpaError as worse:
            return MigrationFailed(
                f"{error}; and the source could not be started again: {worse}. "
                "The guest is stopped, its memory holds all frames that were delivered",
                hint=error.hint,
            )
        self.traffic.run()
        self._let_run("source again", self.source)
        failed = MigrationFailed(f"{error}; the guest goes on in passthrough on {self.source.path}", hint=error.hint)
        failed.report = self._finish("stayed on source", self.source, "source")
        return failed

    # -- observation ------------------------------------------------------------

    def _let_run(self, part: str, device: VdpaNetDevice) -> None:
        before, begin = self.nic.counts().received, time.monotonic()
        end = begin + self.options.seconds / 3
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _CHECK_SECONDS))
            device.check()
        self.book.parts[part] = Part(self.nic.counts().received - before, time.monotonic() - begin)

    def _drops(self, device: VdpaNetDevice) -> dict[str, int]:
        """Counters of frames that a device lost, as far as the parent has any."""
        found: dict[str, int] = {}
        told = mgmt.vendor_statistics(device.path, [queue.index for queue in self.nic.queues])
        for name, value in (each for counters in told.values() for each in counters.items()):
            if any(word in name for word in ("drop", "overrun", "error")):
                found[name] = found.get(name, 0) + value
        return found

    def _finish(self, outcome: str, device: VdpaNetDevice, role: str) -> Report:
        self.observe("drain")
        self.traffic.stop_sending(_DRAIN_SECONDS)
        self.book.drops[role] = self._drops(device)
        self.traffic.pause()
        source = self.source.path
        drops = {
            name: {key: value - self.book.drops_before.get(name, {}).get(key, 0) for key, value in after.items()}
            for name, after in self.book.drops.items()
        }
        return Report(
            outcome=outcome,
            frames=self.nic.counts(),
            parts=self.book.parts,
            dt1_ms={source: milliseconds(self.trace, source, DT1)},
            dt2_ms={source: milliseconds(self.trace, source, DT2)},
            gap_switch_ms=self._gap(source, DT1),
            gap_move_ms=self._gap(source, DT2),
            phases=self._phases(),
            drops=drops,
            environment=environment({"source": self.source, "destination": self.destination}, self.options.memory),
        )

    def _gap(self, device: str, phases: tuple[str, ...]) -> float:
        span = interval(self.trace, device, phases)
        return self.traffic.longest_gap(*span) if span else 0.0

    def _phases(self) -> dict[str, PhaseCost]:
        costs = {phase: cost(self.trace, phase) for phase in PHASES}
        return {phase: measured for phase, measured in costs.items() if measured is not None}
