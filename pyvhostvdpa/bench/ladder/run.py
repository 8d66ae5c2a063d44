# SPDX-License-Identifier: MIT
"""The ladder: every row of the series, measured one after the other on fresh devices.

In each run a guest with traffic moves from D sources to D destinations. The
devices are switched and stopped one after the other, as QEMU does under its
lock, with the guest's traffic paused, so that a downtime is the procedure's
and nothing else's; before, between and after the guest's frames flow, and
each is accounted for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ...base.errors import MigrationFailed, MigrationRefused
from ...base.scheduling import AheadOfOthers
from ...device.net import State, VdpaNetDevice
from ...device.shadowing import USED
from ...guest.arena import GuestArena
from ...guest.nic import GuestNic, NicOptions
from ...guest.protocol import FrameCounts
from ...guest.synthetic import SyntheticGuest
from ...host import mgmt
from ...memory.guest import DEFAULT_GPA, HUGE_PAGE, Gpa, GuestMemory, check_available
from ...migration.common import ReportCallback
from ...migration.paused import Prepared, no_collection
from ...migration.report import environment
from ...net.control import ControlModel
from ...net.features import CONTROL, SUPPORTED
from ...trace import gap
from ...trace.downtime import milliseconds
from ...trace.phases import DEST, DEST_PREMAP, DEST_STAND_BY, DEST_START, DT1, DT1_START, DT1_STOP, DT2, DT2_STOP
from ...trace.recorder import Trace
from .. import hwsim
from .report import Counts, Floor, LadderReport, RowResult, Run
from .rows import LADDER_ROWS, LadderRow
from .stage import Stage, Supply

DOWNTIMES = {"dt1": DT1, "dt2": DT2, "dest": DEST}
_FRAMES_SECONDS = 120.0
_DRAIN_SECONDS = 30.0
_POLL = 0.005


@dataclass(frozen=True, slots=True)
class LadderOptions:
    """What to run. ``memory`` in bytes, in ``regions`` pieces; ``frames`` on each pair in each part of a run.

    ``shadow`` is one of :data:`pyvhostvdpa.device.shadowing.NAMES`, None for the default, in rows of the package's own
    procedures: QEMU's copies descriptors.
    """

    pairs: int = 2
    memory: int = 1 << 30
    regions: int = 4
    rows: Sequence[LadderRow] = tuple(LADDER_ROWS.values())
    repeat: int = 1
    frames: int = 200
    shadow: str | None = None


def regions(memory: int, count: int) -> list[tuple[Gpa, int]]:
    """Divide guest memory: half of it in the first region, the rest in equal ones, with holes between them."""
    small = memory // 2 // max(count - 1, 1) // HUGE_PAGE * HUGE_PAGE
    if small == 0:
        raise MigrationRefused(
            f"{memory} bytes are too few for {count} regions",
            hint="vhost-vdpa ladder with more --memory, or fewer --regions",
        )
    sizes = [memory - (count - 1) * small] + [small] * (count - 1)
    starts = [DEFAULT_GPA + sum(sizes[:k]) + k * HUGE_PAGE for k in range(count)]
    return [(Gpa(start), size) for start, size in zip(starts, sizes, strict=True)]


def ladder(
    supply: Supply, options: LadderOptions, observer: ReportCallback = lambda words: None
) -> tuple[LadderReport, dict[str, Trace]]:
    """Run the rows; the report, and the trace of each row's last run.

    Raises :class:`~pyvhostvdpa.MigrationRefused` before anything is
    touched, and whatever the first step raises that fails.
    """
    if not options.rows:
        raise MigrationRefused("no rows to run", hint=f"rows are {', '.join(LADDER_ROWS)}")
    check_available(options.memory)
    layout = regions(options.memory, options.regions)
    traces: dict[str, Trace] = {}
    results: list[RowResult] = []
    where: dict[str, object] = {}
    observer(f"allocating {options.memory >> 20:,} MiB of guest memory")
    with GuestMemory(layout) as memory:
        for plan in options.rows:
            result = RowResult(plan)
            for number in range(options.repeat):
                observer(f"{plan.row}" + (f", run {number + 1} of {options.repeat}" if options.repeat > 1 else ""))
                with supply.stage(plan) as stage, ExitStack() as stack:
                    row = _Row(plan, stage, memory, options, observer, stack)
                    where = row.environment()
                    result = row.run(result)
                traces[plan.row] = row.trace
                if result.impossible:
                    break
            results.append(result)
    report = LadderReport(
        regions=options.regions,
        devices=len(stage.sources),
        pairs=options.pairs,
        memory=options.memory,
        charged=supply.charged,
        profile=supply.profile,
        clock="virtual" if os.environ.get("PYVHOSTVDPA_LAB_ACCEL") == "icount" else "wall",
        rows=results,
        environment=where,
    )
    return report, traces


class _Guest:
    """One NIC of the guest, and the two devices that it is on in turn."""

    def __init__(
        self,
        devices: tuple[VdpaNetDevice, VdpaNetDevice],
        memory: GuestMemory,
        arena: GuestArena,
        options: LadderOptions,
        stack: ExitStack,
    ) -> None:
        self.source, self.destination = devices
        self._frames = options.frames
        nic_options = NicOptions(
            pairs=options.pairs,
            features=self.source.features,
            control_index=self.source.groups.control_index,
            rx_relayed=self.source.shadow == USED,
        )
        guest = self._guest = SyntheticGuest(memory)
        # the memory is that of all guests; the devices release the rings before the NIC does
        stack.callback(guest.detach)
        guest.add(GuestNic(memory, nic_options, arena), ControlModel(self.source.features, mac=self.source.mac))
        for device in devices:
            stack.callback(device.close)
        stack.callback(guest.pause)
        self.queues, self.control = guest.queues(0), guest.control(0)
        self.pause, self.counts = guest.pause, guest.counts

    def use_pairs(self) -> None:
        """Do what a guest's driver does once it runs: take all its queues into use."""
        self._guest.use_pairs(0, self.source.path)

    def exchange(self, device: VdpaNetDevice) -> None:
        """Let the guest run until each pair received some more frames."""
        [nic] = self._guest.nics
        goals = [pair.counts().received + self._frames for pair in nic.pairs]
        deadline = time.monotonic() + _FRAMES_SECONDS
        self._guest.run()
        while not all(pair.counts().received >= goal for pair, goal in zip(nic.pairs, goals, strict=True)):
            device.check()
            if time.monotonic() > deadline:
                raise MigrationFailed(
                    f"{device.path}: not {self._frames} frames on each pair within {_FRAMES_SECONDS:g} s"
                )
            time.sleep(_POLL)
        self.pause()

    def stand_by(self) -> None:
        """Put the destination on standby, if it can."""
        with self.destination.trace.in_phase(DEST_STAND_BY):
            self.destination.stand_by(self.queues, self.control)

    def stop(self) -> None:
        """Stop the source."""
        with self.source.trace.in_phase(DT2_STOP):
            self.source.stop()

    def start(self) -> None:
        """Start the destination."""
        with self.destination.trace.in_phase(DEST_START):
            self.destination.start_passthrough(self.queues, self.control)

    def settle(self) -> None:
        """Wait for what is under way."""
        self._guest.run()
        self._guest.drain(_DRAIN_SECONDS)
        self.pause()


class _Row:
    def __init__(
        self,
        plan: LadderRow,
        stage: Stage,
        memory: GuestMemory,
        options: LadderOptions,
        observer: ReportCallback,
        stack: ExitStack,
    ) -> None:
        self.plan, self.options, self.memory, self.observe = plan, options, memory, observer
        self.trace = Trace()
        self._keeps_maps = stage.keeps_maps
        self._stack = stack
        self.sources = [self._open(path) for path in stage.sources]
        self.destinations = [self._open(path) for path in stage.destinations]
        self.resolutions = [plan.resolve(device.target, stage.keeps_maps) for device in self._devices]

    def _open(self, path: str) -> VdpaNetDevice:
        device = VdpaNetDevice(
            path,
            self.trace,
            self.plan.use,
            SUPPORTED | CONTROL,
            lambda target: self.plan.resolve(target, self._keeps_maps).make(target),
            shadow=self.options.shadow,
        )
        return self._stack.enter_context(device)

    @property
    def _devices(self) -> list[VdpaNetDevice]:
        return [*self.sources, *self.destinations]

    def environment(self) -> dict[str, object]:
        """Return what a reader needs to place the figures."""
        return environment({"source": self.sources[0], "destination": self.destinations[0]}, self.options.memory)

    def run(self, result: RowResult) -> RowResult:
        """Run the row once and add that to its result."""
        left_out = {str(switch.name).lower(): why for each in self.resolutions for switch, why in each.left_out.items()}
        impossible = next((each.impossible for each in self.resolutions if each.impossible), "")
        if impossible:
            return RowResult(self.plan, (), left_out, impossible)
        self._check_pairs()
        run = self._migrate()
        return RowResult(self.plan, [*result.runs, run], left_out)

    def _check_pairs(self) -> None:
        for device in self._devices:
            if device.groups.max_pairs < self.options.pairs:
                raise MigrationRefused(
                    f"{device.path} has {device.groups.max_pairs} queue pairs that can be used, "
                    f"{self.options.pairs} were asked for",
                    hint="vhost-vdpa ladder --pairs with fewer, or vdpa dev add … max_vqp N where the driver can",
                )

    def _guests(self) -> list[_Guest]:
        """Give each NIC its own part of guest memory, in another region where there are enough."""
        regions, found = self.memory.regions, []
        for number, pair in enumerate(zip(self.sources, self.destinations, strict=True)):
            region = regions[number % len(regions)]
            share = region.size // -(-len(self.sources) // len(regions)) // HUGE_PAGE * HUGE_PAGE
            arena = GuestArena(self.memory, region.gpa + number // len(regions) * share, share)
            found.append(_Guest(pair, self.memory, arena, self.options, self._stack))
        return found

    def _migrate(self) -> Run:
        guests = self._guests()
        for number, guest in enumerate(guests):
            self._say("mapping guest memory on the source", number)
            guest.source.attach(self.memory)
            self._say("passthrough on the source", number)
            guest.source.start_passthrough(guest.queues, guest.control)
            guest.use_pairs()
            guest.exchange(guest.source)
        for number, guest in enumerate(guests):
            self._say("mapping guest memory on the destination", number)
            with guest.destination.trace.in_phase(DEST_PREMAP):
                guest.destination.attach(self.memory)
            if self._own_procedure:
                guest.stand_by()
        counted = {"dt1": self._counted(self.sources, lambda: self._switch(guests))}
        for number, guest in enumerate(guests):
            self._say("through shadow virtqueues", number)
            guest.exchange(guest.source)
        self.observe(f"{self.plan.row}: stop (DT2) and destination start, all devices")
        counted["dt2"], counted["dest"] = self._moved(guests)
        for number, guest in enumerate(guests):
            self._say("passthrough on the destination", number)
            guest.exchange(guest.destination)
            guest.settle()
        return self._finish(guests, counted)

    def _switch(self, guests: list[_Guest]) -> None:
        for number, guest in enumerate(guests):
            self._say("switch (DT1)", number)
            with guest.source.trace.in_phase(DT1_STOP):
                guest.source.stop(then=State.SHADOW)
            with guest.source.trace.in_phase(DT1_START):
                guest.source.start_shadow(guest.queues, guest.control)

    @property
    def _own_procedure(self) -> bool:
        """Whether the row is the package's own: all devices at once then, where QEMU takes one after the other."""
        return self.plan.procedure is not None

    def _prepared(self, guests: list[_Guest]) -> tuple[Prepared, Prepared]:
        """Return the stop of all sources and the start of all destinations, ready."""
        stops = [guest.source.prepare_stop() for guest in guests]
        starts = [guest.destination.prepare_start(guest.queues, guest.control) for guest in guests]
        return (
            Prepared(self.sources, DT2_STOP, stops, lambda number: guests[number].stop()),
            Prepared(self.destinations, DEST_START, starts, lambda number: guests[number].start()),
        )

    def _stop_and_start(self, guests: list[_Guest]) -> None:
        with ExitStack() as stack:
            if self._own_procedure:
                stop, start = (stack.enter_context(each) for each in self._prepared(guests))
                stack.enter_context(no_collection())
                stop.begin()
                # the control queues are held, so nothing is set any more that a destination would have to know
                start.begin()
                stack.enter_context(AheadOfOthers()).begin()
            for guest in guests:
                guest.pause()
            # the guest's traffic was paused already: its gap begins here
            with gap.step(self.sources[0].trace, gap.PAUSE):
                pass
            if self._own_procedure:
                stop.do()
                start.do()
                start.finish()
                stop.finish()
                return
            for guest in guests:
                guest.stop()
            for guest in guests:
                guest.start()

    def _say(self, words: str, number: int) -> None:
        """Report what begins, and on which device: one alone may take half a minute."""
        self.observe(f"{self.plan.row}: {words}, device {number + 1} of {len(self.sources)}")

    def _moved(self, guests: list[_Guest]) -> tuple[_Counted, _Counted]:
        """Stop the sources and start the destinations, and nothing else in between."""
        devices = self._devices
        before = self._counters(devices)
        self._stop_and_start(guests)
        counted = _difference(before, self._counters(devices))
        return counted[: len(self.sources)], counted[len(self.sources) :]

    def _counted(self, devices: Sequence[VdpaNetDevice], act: Callable[[], None]) -> _Counted:
        """Return each device's set_maps and heavy ones during ``act``, None where the device does not count."""
        before = self._counters(devices)
        act()
        return _difference(before, self._counters(devices))

    def _counters(self, devices: Sequence[VdpaNetDevice]) -> list[dict[str, int] | None]:
        return [hwsim.counters(mgmt.name_of(device.path)) for device in devices]

    def _finish(self, guests: list[_Guest], counted: dict[str, _Counted]) -> Run:
        ms, counts = {}, {}
        for downtime, phases in DOWNTIMES.items():
            devices = self.destinations if downtime == "dest" else self.sources
            ms[downtime] = [milliseconds(self.trace, device.path, phases) for device in devices]
            counts[downtime] = [
                self._calls(device, phases, *each) for device, each in zip(devices, counted[downtime], strict=True)
            ]
        total = FrameCounts.total(guest.counts() for guest in guests)
        gaps = gap.stop_to_run(gap.steps(self.trace.events))
        return Run(ms, counts, total, gaps, self._floor(), self.sources[0].procedure.name, self.sources[0].shadow)

    def _floor(self) -> Floor:
        """What the device takes for itself: by its own account where it has one, else what its calls took."""
        costs = [hwsim.stop_and_go_ms(mgmt.name_of(device.path), self.options.pairs) for device in self._devices]
        known = [each for each in costs if each is not None]
        if len(known) == len(costs):
            # devices stand side by side, each on a source and on a destination that are alike
            most = max(known)
            return Floor(most, most)
        switch = gap.taken(self.trace, DT1, lambda e: gap.suspends(e) or gap.sets_running(e))
        stop = gap.taken(self.trace, DT2, gap.suspends)
        return Floor(switch, stop + gap.taken(self.trace, (gap.START,), gap.sets_running))

    def _calls(self, device: VdpaNetDevice, phases: Sequence[str], set_maps: int | None, heavy: int | None) -> Counts:
        events = [event.event for phase in phases for event in self.trace.select(device.path, phase)]
        return Counts(
            ioctls=sum(event.startswith("VHOST_") for event in events),
            messages=sum(event.startswith("IOTLB_") for event in events),
            set_maps=set_maps,
            heavy=heavy,
        )


_Counted = list[tuple[int | None, int | None]]
"""Of each device: set_maps and heavy ones, None where it does not count."""


def _difference(before: list[dict[str, int] | None], after: list[dict[str, int] | None]) -> _Counted:
    return [
        (None, None) if old is None or new is None else (_more(old, new, "set_map"), _more(old, new, "set_map_heavy"))
        for old, new in zip(before, after, strict=True)
    ]


def _more(before: dict[str, int], after: dict[str, int], key: str) -> int:
    return after[key] - before[key]
