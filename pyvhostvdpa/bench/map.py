# SPDX-License-Identifier: MIT
"""``bench map``: what mapping memory costs, by the number of messages and of physically contiguous runs.

Timed are the messages alone, from before the first write() to after the
last, on a device that is set up to FEATURES_OK and not running, as a VMM maps
a guest's memory before it starts the device. Each map that was timed is then
tried: the device is started and frames go through its first, middle and last
page.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..base.errors import MissingFeature, NotProved
from ..base.uapi import IotlbType
from ..chardev.burst import PreparedMessages
from ..chardev.iotlb import Limits
from ..chardev.message import IotlbMessage, IotlbWriteError
from ..chardev.rejection import likely_cause
from ..device.net import VdpaNetDevice
from ..memory.guest import PAGE_SIZE
from ..migration.common import ReportCallback
from .memory import Backing, BenchMemory
from .plan import (
    MapBenchOptions,
    MapPiece,
    MessagePlace,
    Mode,
    Point,
    Refusal,
    check,
    entries_refused,
    in_words,
    messages,
    points,
    refusal,
    work,
)
from .prover import Prover
from .report import MapReport, Result, device_environment
from .stats import summarize


@dataclass
class _Task:
    """One mode at one point: its messages, and what was measured of them."""

    mode: Mode
    point: Point
    runs: int
    entries: int
    maps: PreparedMessages
    unmaps: PreparedMessages
    map_ns: list[int]
    unmap_ns: list[int]
    set_maps: int | None = None

    @property
    def work(self) -> int:
        return work(self.mode, self.entries, self.point.regions)

    def result(self, options: MapBenchOptions) -> Result:
        return Result(
            mode=self.mode,
            point=self.point,
            page=options.page,
            layout=options.layout,
            asid=options.asid,
            runs=self.runs,
            entries=self.entries,
            messages=len(self.maps),
            map_ns=summarize(self.map_ns),
            unmap_ns=summarize(self.unmap_ns),
            set_maps=self.set_maps,
        )


class _Clock:
    """Says what was done and how long the rest will take, by the work done so far and what it took."""

    def __init__(self) -> None:
        self._begin = self._told = time.monotonic()
        self._took: dict[Mode, tuple[int, float]] = {}

    def learn(self, mode: Mode, amount: int, seconds: float) -> None:
        self._took[mode] = (amount, seconds)

    def tell(self, observe: ReportCallback, words: str, todo: Sequence[tuple[Mode, int]], seldom: bool) -> None:
        """Report progress; with ``seldom`` at most once per second."""
        now = time.monotonic()
        if seldom and now - self._told < 1:
            return
        self._told = now
        left = self._left(todo)
        rest = f" (about {left:.0f} s left)" if left >= 1 else ""
        observe(f"[{now - self._begin:6.2f} s] {words}{rest}")

    def _left(self, todo: Sequence[tuple[Mode, int]]) -> float:
        """Return each mode's last time, grown as its work grows."""
        guess = 0.0
        for mode, amount in todo:
            done, seconds = self._took.get(mode, (amount, 0.0))
            guess += seconds * max(1.0, amount / done)
        return guess


def run(
    path: str | os.PathLike[str], options: MapBenchOptions | None = None, observer: ReportCallback = lambda words: None
) -> MapReport:
    """Measure and return the report. The device is reset, and reset again and closed in the end.

    Ctrl-C ends it early: what was measured so far is returned, marked
    ``partial``. Raises :class:`~pyvhostvdpa.MissingFeature` if nothing
    of what was asked can be measured, :class:`~pyvhostvdpa.probe.proofs.NotProved`
    if a map that the kernel accepted does not lead to memory, and
    :class:`~pyvhostvdpa.chardev.message.IotlbWriteError` for one it did not accept.
    """
    options = options or MapBenchOptions()
    with ExitStack() as stack:
        device = stack.enter_context(VdpaNetDevice(path))
        return _Bench(device, options, observer, stack).run()


class _Bench:
    def __init__(
        self, device: VdpaNetDevice, options: MapBenchOptions, observer: ReportCallback, stack: ExitStack
    ) -> None:
        self.device, self.options, self.observe = device, options, observer
        self._stack = stack
        self.limits: Limits = device.iotlb.limits
        self.report = MapReport(device_environment(device), options)
        self.place = MessagePlace(self.limits, options.layout)
        self._clock = _Clock()
        self._todo: list[Point] = []

    def run(self) -> MapReport:
        self._plan()
        self.prover = Prover(self.device, self.place.rings, self.options.asid)
        # the device releases the rings before they are freed
        self._stack.callback(self.prover.close)
        self._stack.callback(self.device.close)
        self.prover.map()
        self.prover.look_for_loop()
        self._renew([])
        self.report.loops = self.prover.loops
        try:
            for size in sorted({point.bytes for point in self._todo}):
                self._size(size)
        except KeyboardInterrupt:
            self.report.partial = True
            self.observe("interrupted: resetting the device, keeping what was measured")
        return self.report

    def _plan(self) -> None:
        """Raise for what cannot be measured, before anything is touched."""
        check(self.options, self.limits)
        notes: list[str] = []
        for point in points(self.options):
            refused = refusal(point, self.options, self.limits, notes)
            if refused is None:
                self._todo.append(point)
            else:
                self._refuse(refused)
        for note in notes:
            self.observe(note)
        if not self._todo:
            first = self.report.refused[0]
            raise MissingFeature(f"nothing to measure: {first.point} {first.why}", hint=first.hint)
        count = len(self._todo) * len(self.options.modes)
        self.observe(f"{count} combinations, each {self.options.repeat} times and once to warm up")

    def _refuse(self, refused: Refusal) -> None:
        self.report.refused.append(refused)
        self.observe(f"not measured: {refused.point}: {refused.why}" + (f"; next: {refused.hint}" * bool(refused.hint)))

    def _size(self, size: int) -> None:
        options = self.options
        told = time.monotonic()

        def progress(done: int) -> None:
            nonlocal told
            if time.monotonic() - told > 1:
                told = time.monotonic()
                self.observe(f"allocated {in_words(done)} of {in_words(size)}")

        with BenchMemory(size, options.page, options.layout, options.backing, progress) as memory:
            try:
                for point in [p for p in self._todo if p.bytes == size]:
                    self._point(point, memory)
            except BaseException:
                # maps must be gone before their memory is; close() does that whatever state the device is in
                self.device.close()
                raise

    def _point(self, point: Point, memory: BenchMemory) -> None:
        pieces = self.place.pieces(point)
        counted = [memory.runs(p.offset, p.size) for p in pieces]
        runs = sum(counted) if all(counted) else 0
        entries = runs or len(pieces) if self.limits.pinned else len(pieces)
        refused = entries_refused(point, entries, self.limits, self.prover.rings.runs() or 1)
        if refused:
            self._refuse(refused)
            return
        tasks = [self._task(mode, point, pieces, memory, runs, entries) for mode in self.options.modes]
        places = _places(pieces, memory.hva)
        try:
            for repetition in range(self.options.repeat + 1):
                for task in tasks:
                    self._measure(task, places, warm_up=not repetition)
                    self._tell(f"{point}, {runs} runs, {task.mode.value}, repetition {repetition}", seldom=True)
        finally:
            self.report.results += [task.result(self.options) for task in tasks if task.unmap_ns]
        self._todo.remove(point)
        for task in tasks:
            self._tell(f"{point}, {runs} runs, {task.mode.value}: {task.result(self.options).in_words()}")

    def _tell(self, words: str, seldom: bool = False) -> None:
        todo = [(mode, work(mode, p.regions, p.regions)) for p in self._todo for mode in self.options.modes]
        self._clock.tell(self.observe, words, todo, seldom)

    def _task(
        self, mode: Mode, point: Point, pieces: list[MapPiece], memory: BenchMemory, runs: int, entries: int
    ) -> _Task:
        bursts = []
        for unmap in (False, True):
            each = messages(mode, pieces, memory.hva, self.options.asid, unmap)
            burst = PreparedMessages(len(each))
            for message in each:
                burst.add(message)
            bursts.append(burst)
        return _Task(mode, point, runs, entries, bursts[0], bursts[1], [], [])

    def _measure(self, task: _Task, places: Sequence[tuple[int, int]], warm_up: bool) -> None:
        prover, began = self.prover, time.monotonic()
        prover.begin()
        before = prover.set_maps() if warm_up else None
        map_ns = self._send(task.maps)
        if before is not None:
            task.set_maps = (prover.set_maps() or 0) - before
        try:
            prover.start()
            prover.reach(places)
        except NotProved as e:
            raise self._explained(task, e) from e
        prover.reset()
        self._renew([task.maps])
        unmap_ns = self._send(task.unmaps)
        if not warm_up:
            task.map_ns.append(map_ns)
            task.unmap_ns.append(unmap_ns)
        self._clock.learn(task.mode, task.work, (time.monotonic() - began) * (self.options.repeat + 1))

    def _send(self, burst: PreparedMessages) -> int:
        try:
            return burst.send(self.device.chardev).ns
        except IotlbWriteError as e:
            limits = self.limits
            why = likely_cause(self.device.chardev, e.rejected, limits.pinned, limits.entries)
            raise IotlbWriteError(e.errno or 0, e.rejected, e.applied, why.cause, why.hint) from e

    def _renew(self, bursts: Sequence[PreparedMessages]) -> None:
        """Write all maps again for a device that forgot them at the reset."""
        if not self.prover.forgets:
            return
        self.device.iotlb.map_again()
        every = (burst.message(i) for burst in bursts for i in range(len(burst)))
        maps = [message for message in every if message.type is IotlbType.UPDATE]
        unmaps = [message._replace(type=IotlbType.INVALIDATE, uaddr=0, perm=0) for message in maps]
        edges = [IotlbMessage(kind, self.options.asid) for kind in (IotlbType.BATCH_BEGIN, IotlbType.BATCH_END)]
        if maps:
            self.device.chardev.write_iotlb([edges[0], *unmaps, *maps, edges[1]])

    def _explained(self, task: _Task, error: NotProved) -> NotProved:
        what = f"{self.device.path}: {task.point}, {task.mode.value}: every message was accepted, but {error}"
        if self.limits.pinned is False and self.options.backing is Backing.PRIVATE:
            return NotProved(
                f"{what}. The parent works on user addresses, and the kernel skips private memory for such a one "
                "without an error",
                hint="vhost-vdpa bench map --backing shared; vdpa_sim loaded with use_va=0 pins pages as hardware does",
            )
        if task.mode is Mode.UNBATCHED:
            return NotProved(what, hint="dmesg | tail; vhost-vdpa probe --verify")
        return NotProved(
            f"{what}. The kernel ignores what the parent answers at BATCH_END, so a batch fails in silence",
            hint="dmesg | tail; vhost-vdpa bench map --mode unbatched has each map's own answer",
        )


def _places(pieces: Sequence[MapPiece], hva: int) -> list[tuple[int, int]]:
    """Return IOVA and address of the first, the middle and the last page."""
    middle = pieces[len(pieces) // 2]
    inner = middle.size // 2 // PAGE_SIZE * PAGE_SIZE
    last = pieces[-1]
    end = last.size - PAGE_SIZE
    return [
        (pieces[0].iova, hva + pieces[0].offset),
        (middle.iova + inner, hva + middle.offset + inner),
        (last.iova + end, hva + last.offset + end),
    ]
