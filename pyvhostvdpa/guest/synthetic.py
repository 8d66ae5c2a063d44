# SPDX-License-Identifier: MIT
"""The guest that moves: memory, a NIC on each device with traffic, a CPU that writes memory.

It does not know which device it is on, and of a migration it only sees that
it stood still for a moment.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import MigrationFailed, MissingFeature, StreamCorrupt
from ..device.net import VdpaNetDevice
from ..memory.guest import DEFAULT_GPA, PAGE_SIZE, GuestMemory, ProgressCallback
from ..net.config import MAX_CONFIG
from ..net.control import ANNOUNCE_ACK, OK, VQ_PAIRS_SET, Class, ControlModel, command
from ..net.control_queue import GuestControl
from ..virtqueue.layout import GuestQueue, map_queue
from .arena import GuestArena
from .control_driver import ANSWER_SECONDS, ControlDriver
from .nic import FrameCounts, GuestNic, NicOptions, Window, check_nic
from .nic_state import MAX_INDEX, BadState, Extent, check_apart, check_memory, queue_at_rest
from .state import DeviceShape, DeviceState, GuestState, QueueState, check_shapes
from .traffic import Traffic

_SLICE_NS = 200_000_000
_WRITER_SHARE = 4
"""The guest's CPU writes the last quarter of memory; NICs have the rest."""
MAX_WRITER_RATE = 1 << 32
"""Pages a second: more than memory takes, and what is owed of them in a slice still fits 64 bits."""


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What guest to start. ``memory`` in bytes, ``write_rate`` in bytes a second that its CPU writes, whole pages.

    ``ring_size`` is the most: a driver takes what its device's queues can have.
    """

    memory: int = 1 << 30
    pairs: int = 1
    ring_size: int = 256
    frame_size: int = 256
    write_rate: int = 0


class GuestWriter:
    """A CPU that writes ``pages`` pages from ``gpa`` on in turn, ``rate`` of them a second.

    What a page holds follows from the number of the write, so
    :meth:`bad_pages` can tell at any time whether memory is what it should be.
    """

    def __init__(self, memory: GuestMemory, gpa: int, pages: int, rate: int, written: int = 0) -> None:
        self.gpa = gpa
        c: Any = ffi.new("struct guest_writer *")
        c.area = ffi.cast("uint8_t *", memory.hva(gpa, pages * PAGE_SIZE))
        c.pages, c.rate, c.written = pages, rate, written
        c.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.c = c
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Let it write."""
        if self._thread is None:
            self.c.stop = 0
            self._thread = threading.Thread(target=self._serve, name="guest-cpu", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while not self.c.stop:
            lib.guest_writer_run(self.c, time.monotonic_ns() + _SLICE_NS)

    def pause(self) -> None:
        """Stop it between two pages. Twice is no error."""
        self.c.stop = 1
        os.eventfd_write(self.c.wake, 1)
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        self._thread = None

    def bad_pages(self) -> int:
        """Count the pages that do not hold what was written there last; it must be paused."""
        return int(lib.guest_writer_check(self.c))

    def close(self) -> None:
        """Close what it opened."""
        self.pause()
        os.close(self.c.wake)


class SyntheticGuest:
    """A guest with one NIC a device, in the order of the devices."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.nics: list[GuestNic] = []
        self.controls: list[GuestControl | None] = []
        self.traffic: list[Traffic] = []
        self.writer: GuestWriter | None = None
        self._answer_seconds = ANSWER_SECONDS

    @classmethod
    def create(
        cls, devices: Sequence[VdpaNetDevice], options: GuestOptions, progress: ProgressCallback = lambda done: None
    ) -> SyntheticGuest:
        """Start a guest for these devices, its memory new, its drivers ready to be started."""
        guest = cls(GuestMemory([(DEFAULT_GPA, options.memory)], progress))
        try:
            guest._set_up(devices, options)
        except BaseException:
            guest.close()
            raise
        return guest

    def _set_up(self, devices: Sequence[VdpaNetDevice], options: GuestOptions) -> None:
        [region] = self.memory.regions
        share = region.size // _WRITER_SHARE // PAGE_SIZE * PAGE_SIZE if options.write_rate else 0
        slice_size = (region.size - share) // len(devices) // PAGE_SIZE * PAGE_SIZE
        for number, device in enumerate(devices):
            arena = GuestArena(self.memory, region.gpa + number * slice_size, slice_size)
            nic = NicOptions.fitting(device, options.pairs, options.ring_size, options.frame_size)
            self.add(GuestNic(self.memory, nic, arena), ControlModel(device.features, mac=device.mac))
        if share:
            rate = min(max(1, options.write_rate // PAGE_SIZE), MAX_WRITER_RATE)
            self.writer = GuestWriter(self.memory, region.end - share, share // PAGE_SIZE, rate)

    def add(self, nic: GuestNic, model: ControlModel | None) -> None:
        """Give the guest a NIC for its next device, and what its control queue has set."""
        self.nics.append(nic)
        self.traffic.append(Traffic(nic))
        with_control = nic.control is not None and model is not None
        self.controls.append(GuestControl(nic.control.queue, model) if with_control else None)  # type: ignore[union-attr,arg-type]

    @classmethod
    def restore(
        cls,
        memory: GuestMemory,
        state: GuestState,
        devices: Sequence[DeviceState],
        shapes: Sequence[DeviceShape] | None = None,
    ) -> SyntheticGuest:
        """Return the guest whose memory this is, which it takes over.

        Raises :class:`~pyvhostvdpa.StreamCorrupt` naming the field if memory
        and state are not of one guest, if a driver would reach beyond its
        memory, or if the devices are not those of ``shapes``;
        :class:`~pyvhostvdpa.MissingFeature` if this process may open no more
        descriptors. The memory stays its owner's then. Everything is checked
        here, so that nothing is left to be refused when the guest starts.
        """
        _check(memory, state, devices, shapes)
        guest = cls(memory)
        try:
            for device in devices:
                guest.add(GuestNic.restore(memory, device.nic), device.nic.model)
            guest._load_writer(state)
        except OSError as e:
            guest.let_go()
            raise _no_eventfds(e) from e
        except BaseException:
            guest.let_go()
            raise
        return guest

    @classmethod
    def expect(
        cls, memory: GuestMemory, devices: Sequence[DeviceState], shapes: Sequence[DeviceShape] | None = None
    ) -> SyntheticGuest:
        """Return the guest that is to come into this memory, which it takes over, from its :meth:`outline`.

        It cannot run before it was given its state (:meth:`load`). Raises
        what :meth:`restore` raises; memory must be as it was allocated, all zeros.
        """
        return cls.restore(memory, _NO_STATE, devices, shapes)

    def load(
        self, state: GuestState, devices: Sequence[DeviceState], shapes: Sequence[DeviceShape] | None = None
    ) -> None:
        """Give a guest that was expected its state; its memory must be there. Checks and raises as :meth:`restore`."""
        _check(self.memory, state, devices, shapes)
        try:
            if len(devices) != len(self.nics):
                raise BadState(f"{len(devices)} devices, {len(self.nics)} were told of before")
            for number, device in enumerate(devices):
                self._load_device(number, device)
        except BadState as e:
            raise StreamCorrupt(f"state of the guest: {e}") from e
        self._load_writer(state)

    def _load_device(self, number: int, device: DeviceState) -> None:
        nic, control = self.nics[number], self.controls[number]
        nic.load(device.nic)
        if control is not None and device.nic.model is not None:
            # the same object: a device that stands by knows it
            vars(control.model).update(vars(device.nic.model))

    def _load_writer(self, state: GuestState) -> None:
        if not state.writer_pages:
            return
        try:
            self.writer = GuestWriter(
                self.memory, state.writer_gpa, state.writer_pages, state.writer_rate, state.writer_written
            )
        except OSError as e:
            raise _no_eventfds(e) from e

    # -- running ---------------------------------------------------------------

    def stand_by(self, number: int, device: VdpaNetDevice) -> str:
        """Let a device stand ready for this guest's NIC of that number; how far it got, in words."""
        device.guest_config = self.nics[number].config
        return device.stand_by(self.nics[number].queues, self.controls[number])

    def start(self, number: int, device: VdpaNetDevice) -> None:
        """Start a device in passthrough with this guest's NIC of that number."""
        # a driver must not give up before the device's own deadline has passed
        self._answer_seconds = max(self._answer_seconds, 3 * device.control_deadline)
        device.guest_config = self.nics[number].config
        device.start_passthrough(self.nics[number].queues, self.controls[number])

    def use_pairs(self, number: int, path: str) -> None:
        """Do what a driver does once its device runs: take all its queues into use."""
        nic = self.nics[number]
        if nic.control is not None and len(nic.pairs) > 1:
            pairs = len(nic.pairs).to_bytes(2, "little")
            if self._answer(nic.control, command(Class.MQ, VQ_PAIRS_SET, pairs)) != OK:
                raise MigrationFailed(f"{path} refused to use {len(nic.pairs)} queue pairs")

    def announce(self) -> None:
        """Ask the guest to tell its networks where it is, and do what its driver does then: here is none to tell."""
        for nic in self.nics:
            nic.config.announce()
            if nic.control is not None and nic.config.asks_to_announce:
                self._answer(nic.control, command(Class.ANNOUNCE, ANNOUNCE_ACK))

    def _answer(self, driver: ControlDriver, data: bytes) -> int:
        try:
            return driver.send(data, self._answer_seconds)
        except TimeoutError as e:
            raise MigrationFailed(
                f"the guest's control queue: {e}",
                hint="for a device that is only slow: vhost-vdpa migrate, send and receive take --control-deadline",
            ) from e

    def run(self) -> None:
        """Let the guest's CPUs run."""
        for traffic in self.traffic:
            traffic.run()
        if self.writer is not None:
            self.writer.run()

    def pause(self) -> None:
        """Stop the guest where it is. Twice is no error."""
        # all CPUs are told before the first is waited for
        for traffic in self.traffic:
            traffic.tell_to_pause()
        for traffic in self.traffic:
            traffic.pause()
        if self.writer is not None:
            self.writer.pause()

    def drain(self, seconds: float) -> bool:
        """Send no more; whether everything sent arrived within ``seconds``."""
        end = time.monotonic() + seconds
        arrived = True
        for traffic in self.traffic:
            arrived &= traffic.stop_sending(max(0.0, end - time.monotonic()))
        return arrived

    def counts(self) -> FrameCounts:
        """Return the account of all frames."""
        each = [nic.counts() for nic in self.nics]
        return FrameCounts(*(sum(getattr(c, field) for c in each) for field in FrameCounts.__slots__))

    @contextmanager
    def watching(self, window: Window, number: int | None = None) -> Iterator[None]:
        """Take the block's time as a window of one device's NIC, or of all; see :meth:`window_gap`."""
        chosen = self.traffic if number is None else [self.traffic[number]]
        with ExitStack() as stack:
            for traffic in chosen:
                stack.enter_context(traffic.watching(window))
            yield

    def window_gap(self, window: Window) -> float | None:
        """Return the longest time without a frame that touches a window, in ms, of the worst NIC.

        None if that is not known of every NIC: it was not watched, or no
        frame has ended the gap yet.
        """
        gaps = [traffic.window_gap(window) for traffic in self.traffic]
        known = [gap for gap in gaps if gap is not None]
        return max(known) if known and len(known) == len(gaps) else None

    def longest_gap(self, begin: int, end: int) -> float | None:
        """Return the longest time without a frame, in ms, of those that touch begin..end (CLOCK_MONOTONIC ns).

        None if that is not known: each queue pair keeps only its longest of
        all; :meth:`watching` is for a time that matters.
        """
        known = [gap for traffic in self.traffic if (gap := traffic.longest_gap(begin, end)) is not None]
        return max(known, default=None)

    # -- as data -----------------------------------------------------------------

    def shapes(self) -> tuple[DeviceShape, ...]:
        """Return what a destination's devices must be like."""
        return tuple(
            DeviceShape(
                features=int(nic.features),
                pairs=len(nic.pairs),
                ring_size=max(queue.num for queue in nic.queues),
                control_index=nic.control.queue.index if nic.control is not None else None,
                config=_bounded(nic.config.known()),
            )
            for nic in self.nics
        )

    def state(self) -> tuple[GuestState, list[DeviceState]]:
        """Return everything but memory; the guest must be paused and its devices stopped."""
        writer = self.writer
        own = GuestState(
            clock=time.monotonic_ns(),
            writer_gpa=writer.gpa if writer else 0,
            writer_pages=int(writer.c.pages) if writer else 0,
            writer_rate=int(writer.c.rate) if writer else 0,
            writer_written=int(writer.c.written) if writer else 0,
        )
        devices = [
            DeviceState(
                tuple(_queue_state(queue, self.memory) for queue in nic.queues),
                nic.state(control.model if control is not None else None),
            )
            for nic, control in zip(self.nics, self.controls, strict=True)
        ]
        return own, devices

    def outline(self) -> list[DeviceState]:
        """Return what can be known of each device's NIC before the guest is stopped: it may run.

        Where its rings and buffers are, and what its control queue has set
        so far; of its rings nothing.
        """
        return [
            DeviceState(
                tuple(QueueState(queue.index, 0, 0, ()) for queue in nic.queues),
                nic.outline(copy.deepcopy(control.model) if control is not None else None),
            )
            for nic, control in zip(self.nics, self.controls, strict=True)
        ]

    def shift_clock(self, ns: int) -> None:
        """Move the times that the guest remembers to another host's clock, by any ``ns``; raises nothing."""
        for nic in self.nics:
            for pair in nic.pairs:
                pair.shift_clock(ns)

    def forget_clock(self) -> None:
        """Count no gap for the time that the guest stood in a file."""
        for nic in self.nics:
            for pair in nic.pairs:
                pair.c.last_rx = 0

    def let_go(self) -> None:
        """End the guest, but not its memory. Twice is no error."""
        self.pause()
        for nic in self.nics:
            nic.close()
        self.nics.clear()
        self.traffic.clear()
        self.controls.clear()
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def close(self) -> None:
        """End the guest and its memory; its devices must have let go. Twice is no error."""
        self.let_go()
        self.memory.close()


_NO_STATE = GuestState(clock=0, writer_gpa=0, writer_pages=0, writer_rate=0, writer_written=0)
"""Of a guest of which only the outline is known."""


def _no_eventfds(error: OSError) -> MissingFeature:
    return MissingFeature(
        f"cannot open the guest's eventfds: {error.strerror}", hint="allow more open files: ulimit -n"
    )


def _bounded(config: bytes | None) -> bytes | None:
    return None if config is None else config[:MAX_CONFIG]


def _queue_state(queue: GuestQueue, memory: GuestMemory) -> QueueState:
    ring, heads = ffi.new("struct vring *"), ffi.new("uint16_t[]", queue.num)
    map_queue(ring, queue, memory)
    avail, used = ffi.new("uint16_t *"), ffi.new("uint16_t *")
    lib.vring_indices(ring, avail, used)
    count: int = lib.vring_open_heads(ring, heads)
    if count < 0:
        raise MissingFeature(f"virtqueue {queue.index}: avail {avail[0]} and used {used[0]} are more than a ring apart")
    return QueueState(queue.index, int(used[0]), int(avail[0]), tuple(ffi.unpack(heads, count)))


def _check(
    memory: GuestMemory, state: GuestState, devices: Sequence[DeviceState], shapes: Sequence[DeviceShape] | None
) -> None:
    """Raise :class:`~pyvhostvdpa.StreamCorrupt` unless this is the state of a guest in ``memory``."""
    what = "state of the guest"
    extents: list[Extent] = []
    try:
        if shapes is not None:
            check_shapes([device.shape for device in devices], shapes)
        for number, device in enumerate(devices):
            what = f"state of device {number}"
            extents += check_nic(memory, device.nic)
            _compare(device, memory)
        what = "state of the guest"
        if state.writer_pages:
            extents.append(_check_writer(memory, state))
        check_apart(extents)
    except BadState as e:
        raise StreamCorrupt(f"{what}: {e}") from e


def _check_writer(memory: GuestMemory, state: GuestState) -> Extent:
    area = ("writer_gpa", state.writer_gpa, state.writer_pages * PAGE_SIZE)
    check_memory(memory, *area)
    if state.writer_gpa % PAGE_SIZE:
        raise BadState(f"writer_gpa {state.writer_gpa:#x} is not the start of a page")
    if state.writer_rate > MAX_WRITER_RATE:
        raise BadState(f"writer_rate {state.writer_rate} pages per second, at most {MAX_WRITER_RATE} are possible")
    return area


def _compare(device: DeviceState, memory: GuestMemory) -> None:
    """Raise if rings in memory and what was said of them differ."""
    places = [place for pair in device.nic.pairs for place in (pair.rx, pair.tx)]
    if [queue.index for queue in device.queues] != [place.index for place in places]:
        raise BadState("queues: they are not those of its NIC")
    for told, place in zip(device.queues, places, strict=True):
        try:
            found = _queue_state(queue_at_rest(place), memory)
        except MissingFeature as e:
            raise BadState(str(e)) from e
        if found != told:
            differs = "" if found.heads == told.heads else " and other heads"
            raise BadState(
                f"virtqueue {place.index} has used {found.used}, avail {found.avail} in memory; "
                f"the source left used {told.used}, avail {told.avail}{differs}"
            )
    for pair, rx, tx in zip(device.nic.pairs, device.queues[::2], device.queues[1::2], strict=True):
        _compare_driver("rx", rx, pair.rx_avail, pair.rx_used)
        _compare_driver("tx", tx, pair.tx_avail, pair.tx_used)


def _compare_driver(side: str, ring: QueueState, avail: int, used: int) -> None:
    """Raise unless a driver with these indices has published what it has added, and its device used no more."""
    done, added = (ring.used - used) & MAX_INDEX, (avail - used) & MAX_INDEX
    if avail != ring.avail or done > added:
        raise BadState(
            f"virtqueue {ring.index} has used {ring.used}, avail {ring.avail}; "
            f"its driver has {side}_used {used}, {side}_avail {avail}"
        )
