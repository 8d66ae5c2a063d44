# SPDX-License-Identifier: MIT
"""The guest that moves: memory, a NIC on each device with traffic, a CPU that writes memory.

It does not know which device it is on, and of a migration it only sees that
it was paused for a moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..base.errors import MigrationFailed, MigrationRefused, MissingFeature, StreamCorrupt
from ..device.net import State, VdpaNetDevice
from ..memory.guest import DEFAULT_GPA, PAGE_SIZE, GuestMemory
from ..memory.mapped import ProgressCallback
from ..net.config import MAX_CONFIG
from ..net.control import ANNOUNCE_ACK, OK, VQ_PAIRS_SET, Class, ControlModel, command
from ..net.control_queue import NetGuestControl
from ..net.guest_config import GuestConfig
from ..virtqueue.layout import GuestQueue
from .arena import GuestArena
from .coherence import check_guest, check_writer, queue_state
from .control_driver import ANSWER_SECONDS, ControlDriver
from .nic import MAX_FRAME, MIN_FRAME, GuestNic, NicOptions
from .nic_state import Extent, check_disjoint_from
from .protocol import DeviceSection, FrameCounts, GuestKind, Section, TrafficGuest, Window
from .rest import DeviceRest, NicRest, RestSections
from .shape import SYNTHETIC, BadState, DeviceShape
from .state import DeviceState, GuestState, QueueState
from .traffic import Traffic
from .writer import MAX_RATE, GuestWriter

_WRITER_SHARE = 4
"""The guest's CPU writes the last quarter of memory; NICs have the rest."""


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What guest to start.

    ``memory`` is its RAM in bytes, ``pairs`` the queue pairs of the NIC on
    each device, ``ring_size`` the descriptors of each data queue at most (a
    driver takes what its device's queues can have), ``frame_size`` the bytes
    of each frame that it sends to itself, 60 to 2028. ``write_rate`` in bytes
    per second is what its CPU writes, in whole pages; 0 for no CPU.
    """

    memory: int = 1 << 30
    pairs: int = 1
    ring_size: int = 256
    frame_size: int = 256
    write_rate: int = 0

    def check(self) -> None:
        """Check the options against what a NIC can do; opens and allocates nothing.

        Raises :class:`~pyvhostvdpa.MigrationRefused` if it cannot send frames
        of that size.
        """
        if not MIN_FRAME <= self.frame_size <= MAX_FRAME:
            raise MigrationRefused(f"frames of {self.frame_size} bytes: {MIN_FRAME} to {MAX_FRAME}")

    def create(
        self, devices: Sequence[VdpaNetDevice], progress: ProgressCallback = lambda done: None
    ) -> SyntheticGuest:
        """Return the guest for ``devices``, in that order, not running; its memory is allocated.

        ``progress`` is called with the bytes allocated since its last call.
        Raises :class:`~pyvhostvdpa.MissingFeature` if the machine lacks the
        memory, or if the memory is too small for the rings and buffers.
        """
        return SyntheticGuest.create(devices, self, progress)


class SyntheticGuest(TrafficGuest):
    """A guest with one NIC per device, in the order of the devices."""

    kind = SYNTHETIC
    can_pause = True

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.nics: list[GuestNic] = []
        self.controls: list[NetGuestControl | None] = []
        self.traffic: list[Traffic] = []
        self.writer: GuestWriter | None = None
        self._rests: list[NicRest] = []
        """Of each NIC, since its outline is known."""
        self._extents: list[Extent] = []
        """What its NICs use of its memory, by address, if that was an outline's."""
        self._answer_seconds = ANSWER_SECONDS

    @classmethod
    def create(
        cls, devices: Sequence[VdpaNetDevice], options: GuestOptions, progress: ProgressCallback = lambda done: None
    ) -> SyntheticGuest:
        """Start a guest for these devices, its memory new, its drivers ready to be started."""
        private = all(device.iotlb.limits.private for device in devices)
        guest = cls(GuestMemory([(DEFAULT_GPA, options.memory)], progress, private))
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
            rate = min(max(1, options.write_rate // PAGE_SIZE), MAX_RATE)
            self.writer = GuestWriter(self.memory, region.end - share, share // PAGE_SIZE, rate)

    def add(self, nic: GuestNic, model: ControlModel | None) -> None:
        """Give the guest a NIC for its next device, and what its control queue has set."""
        self.nics.append(nic)
        self.traffic.append(Traffic(nic))
        with_control = nic.control is not None and model is not None
        self.controls.append(NetGuestControl(nic.control.queue, model) if with_control else None)  # type: ignore[union-attr,arg-type]

    @classmethod
    def decode_guest(cls, data: bytes) -> GuestState:
        """Return the state of the guest in a section; see :class:`~pyvhostvdpa.guest.protocol.GuestKind`."""
        return GuestState.decode(data)

    @classmethod
    def decode_device(cls, data: bytes) -> DeviceState:
        """Return the state of a device in a section; see :class:`~pyvhostvdpa.guest.protocol.GuestKind`."""
        return DeviceState.decode(data)

    @classmethod
    def decode_rest(cls, data: bytes) -> DeviceRest:
        """Return the rest of a device's state; see :class:`~pyvhostvdpa.guest.protocol.GuestKind`."""
        return DeviceRest.decode(data)

    @classmethod
    def restore(
        cls,
        memory: GuestMemory,
        guest: Section,
        devices: Sequence[DeviceSection],
        shapes: Sequence[DeviceShape] | None = None,
    ) -> SyntheticGuest:
        """Return the guest of this memory, which it then owns.

        Raises :class:`~pyvhostvdpa.StreamCorrupt` naming the field if memory
        and state are not of one guest, if a driver would reach beyond its
        memory, or if the devices are not those of ``shapes``;
        :class:`~pyvhostvdpa.MissingFeature` if this process may open no more
        descriptors. The memory stays its owner's then. Everything is checked
        here, so that nothing is left to be refused when the guest starts.
        """
        state, states = _own(guest, devices)
        extents = check_guest(memory, state, states, shapes)
        restored = cls(memory)
        try:
            for device in states:
                restored.add(GuestNic.restore(memory, device.nic), device.nic.model)
            restored._load_writer(state)
        except OSError as e:
            restored.detach()
            raise _no_eventfds(e) from e
        except BaseException:
            restored.detach()
            raise
        restored._extents = sorted(extents, key=_address)
        return restored

    @classmethod
    def expect(
        cls, memory: GuestMemory, outline: Sequence[DeviceSection], shapes: Sequence[DeviceShape] | None = None
    ) -> SyntheticGuest:
        """Return the guest that will come into this memory, which it then owns, from its :meth:`outline`.

        It cannot run before it was given its state (:meth:`load`). Raises
        what :meth:`restore` raises; memory must be as it was allocated, all zeros.
        """
        expected = cls.restore(memory, _NO_STATE, outline, shapes)
        expected._make_rests()
        for traffic in expected.traffic:
            traffic.make_ready()
        return expected

    def _make_rests(self) -> None:
        self._rests = [
            NicRest(nic, None if control is None else control.model)
            for nic, control in zip(self.nics, self.controls, strict=True)
        ]

    def load(self, guest: Section, devices: Sequence[Section], shapes: Sequence[DeviceShape] | None = None) -> None:
        """Give a guest that was expected its state; its memory must be there. Checks and raises as :meth:`restore`."""
        rests = [device for device in devices if isinstance(device, DeviceRest)]
        if rests and len(rests) == len(devices):
            self._load_rests(guest, rests)
            return
        state, states = _own(guest, devices)
        check_guest(self.memory, state, states, shapes)
        try:
            if len(states) != len(self.nics):
                raise BadState(f"{len(states)} devices, its outline had {len(self.nics)}")
            for number, device in enumerate(states):
                self._load_device(number, device)
        except BadState as e:
            raise StreamCorrupt(f"state of the guest: {e}") from e
        self._load_writer(state)

    def _load_rests(self, guest: Section, rests: Sequence[DeviceRest]) -> None:
        assert isinstance(guest, GuestState), guest
        what = "state of the guest"
        try:
            if len(rests) != len(self._rests):
                raise BadState(f"{len(rests)} devices, its outline had {len(self._rests)}")
            for number, (nic, rest) in enumerate(zip(self._rests, rests, strict=True)):
                what = f"state of device {number}"
                nic.check(self.memory, rest)
            what = "state of the guest"
            if guest.writer_pages:
                check_disjoint_from(self._extents, check_writer(self.memory, guest))
        except BadState as e:
            raise StreamCorrupt(f"{what}: {e}") from e
        for nic, rest in zip(self._rests, rests, strict=True):
            nic.apply(rest)
        self._load_writer(guest)

    def _load_device(self, number: int, device: DeviceState) -> None:
        nic, control = self.nics[number], self.controls[number]
        nic.load(device.nic)
        if control is not None and device.nic.model is not None:
            # the same object: a device that stands by knows it
            vars(control.model).update(vars(device.nic.model))

    def _load_writer(self, state: GuestState) -> None:
        if not state.writer_pages:
            return
        # a state may be loaded again
        before, self.writer = self.writer, None
        if before is not None:
            before.close()
        try:
            self.writer = GuestWriter(
                self.memory, state.writer_gpa, state.writer_pages, state.writer_rate, state.writer_written
            )
        except OSError as e:
            raise _no_eventfds(e) from e

    # -- running ---------------------------------------------------------------

    def queues(self, number: int) -> Sequence[GuestQueue]:
        """Return the data queues of the NIC of that number, by index."""
        return self.nics[number].queues

    def control(self, number: int) -> NetGuestControl | None:
        """Return the control queue of the NIC of that number, None without one."""
        return self.controls[number]

    def config(self, number: int) -> GuestConfig:
        """Return what the driver of the NIC of that number sees beside its queues."""
        return self.nics[number].config

    def stand_by(self, number: int, device: VdpaNetDevice) -> str:
        """Put a device on standby for this guest's NIC of that number; how far it got, in words."""
        self._be_patient(device)
        return super().stand_by(number, device)

    def start(self, number: int, device: VdpaNetDevice, mode: State = State.PASSTHROUGH) -> None:
        """Start a device with this guest's NIC of that number."""
        self._be_patient(device)
        super().start(number, device, mode)

    def _be_patient(self, device: VdpaNetDevice) -> None:
        # a driver must not time out before the device's own deadline has passed
        self._answer_seconds = max(self._answer_seconds, 3 * device.control_deadline)

    def use_pairs(self, number: int, path: str) -> None:
        """Do what a driver does once its device runs: take all its queues into use."""
        nic = self.nics[number]
        if nic.control is not None and len(nic.pairs) > 1:
            pairs = len(nic.pairs).to_bytes(2, "little")
            if self._answer(nic.control, command(Class.MQ, VQ_PAIRS_SET, pairs)) != OK:
                raise MigrationFailed(f"{path} refused to use {len(nic.pairs)} queue pairs")

    def announce(self) -> None:
        """Ask the guest to announce itself on its networks, and do what its driver does then: none exists here."""
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

    @property
    def running(self) -> bool:
        """Whether its NICs have traffic."""
        return all(traffic.running for traffic in self.traffic)

    def run(self) -> None:
        """Let the guest's CPUs run."""
        for traffic in self.traffic:
            traffic.run()
        if self.writer is not None:
            self.writer.run()

    def pause(self) -> None:
        """Stop the guest where it is. Idempotent."""
        # all CPUs get the request before the first is waited for
        for traffic in self.traffic:
            traffic.request_pause()
        for traffic in self.traffic:
            traffic.wait_until_paused()
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
        """Return the counts of all frames."""
        return FrameCounts.total(nic.counts() for nic in self.nics)

    def bad_pages(self) -> int:
        """Count the pages that do not hold what the guest's CPU wrote there last; it must be paused."""
        return self.writer.bad_pages() if self.writer is not None else 0

    @contextmanager
    def watching(self, window: Window, number: int | None = None) -> Iterator[None]:
        """Take the block's time as a window of one device's NIC, or of all; see :meth:`window_gap`."""
        chosen = self.traffic if number is None else [self.traffic[number]]
        for traffic in chosen:
            traffic.begin_window(window)
        try:
            yield
        finally:
            for traffic in chosen:
                traffic.end_window(window)

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
        devices = [
            DeviceState(
                tuple(queue_state(queue, self.memory) for queue in nic.queues),
                nic.state(control.model if control is not None else None),
            )
            for nic, control in zip(self.nics, self.controls, strict=True)
        ]
        return self._own_state(), devices

    def rest(self) -> tuple[GuestState, Sequence[Section]]:
        """Return what its outline lacked; see :meth:`~pyvhostvdpa.guest.protocol.Guest.rest`."""
        return self._own_state(), [nic.get() for nic in self._rests]

    def sections(self) -> RestSections | None:
        """Return its rest for C; see :meth:`~pyvhostvdpa.guest.protocol.Guest.sections`."""
        if not self._rests or any(rest.changed for rest in self._rests):
            return None
        used = [(gpa, size) for _, gpa, size in self._extents]
        return RestSections(self.memory, self._rests, self.writer, used, self._load_writer)

    def rehearse(self, arriving: bool) -> None:
        """Go through :meth:`rest`, or :meth:`load`; see :meth:`~pyvhostvdpa.guest.protocol.Guest.rehearse`."""
        own, rests = self.rest()
        state = GuestState.decode(own.encode())
        decoded = [DeviceRest.decode(rest.encode()) for rest in rests]
        if arriving:
            # its own rest: it is afterwards as it was
            self.load(state, decoded)
            self.shift_clock(0)

    def _own_state(self) -> GuestState:
        writer = self.writer
        return GuestState(
            clock=time.monotonic_ns(),
            writer_gpa=writer.gpa if writer else 0,
            writer_pages=int(writer.c.pages) if writer else 0,
            writer_rate=int(writer.c.rate) if writer else 0,
            writer_written=int(writer.c.written) if writer else 0,
        )

    def outline(self) -> list[DeviceState]:
        """Return what can be known of each device's NIC before the guest is stopped: it may run.

        Where its rings and buffers are, and what its control queue has set
        so far; of its rings nothing.
        """
        self._make_rests()
        return [
            DeviceState(
                tuple(QueueState(queue.index, 0, 0, ()) for queue in nic.queues),
                # the guest may set something meanwhile: only the part that was sent counts as known
                nic.outline(rest.known),
            )
            for nic, rest in zip(self.nics, self._rests, strict=True)
        ]

    def shift_clock(self, ns: int) -> None:
        """Move the times that the guest remembers to another host's clock, by any ``ns``; raises nothing."""
        for traffic in self.traffic:
            traffic.shift_clock(ns)

    def forget_clock(self) -> None:
        """Count no gap for the time that the guest stood in a file."""
        for nic in self.nics:
            for pair in nic.pairs:
                pair.c.last_rx = 0

    def detach(self) -> None:
        """End the guest, but not its memory. Idempotent."""
        self.pause()
        self._rests.clear()
        for traffic in self.traffic:
            traffic.end()
        for nic in self.nics:
            nic.close()
        self.nics.clear()
        self.traffic.clear()
        self.controls.clear()
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def close(self) -> None:
        """End the guest and its memory; its devices must have released it. Idempotent."""
        self.detach()
        self.memory.close()


KINDS: Mapping[str, GuestKind[SyntheticGuest]] = {SYNTHETIC: SyntheticGuest}
"""What a side knows that runs synthetic guests only."""

_NO_STATE = GuestState(clock=0, writer_gpa=0, writer_pages=0, writer_rate=0, writer_written=0)
"""Of a guest of which only the outline is known."""


def _own(guest: Section, devices: Sequence[Section]) -> tuple[GuestState, list[DeviceState]]:
    """Return what :meth:`SyntheticGuest.decode_guest` and ``decode_device`` returned, as what it is."""
    assert isinstance(guest, GuestState), guest
    assert all(isinstance(device, DeviceState) for device in devices), devices
    return guest, [device for device in devices if isinstance(device, DeviceState)]


def _no_eventfds(error: OSError) -> MissingFeature:
    return MissingFeature(
        f"cannot open the guest's eventfds: {error.strerror}", hint="allow more open files: ulimit -n"
    )


def _bounded(config: bytes | None) -> bytes | None:
    return None if config is None else config[:MAX_CONFIG]


def _address(extent: Extent) -> int:
    return extent[1]
