# SPDX-License-Identifier: MIT
"""The destination's side of a migration: it owns the guest after GO, and never before.

What comes over the stream is checked before anything follows from it; a
stream that ends, or is malformed, leaves no trace here. Only between READY
and GO this side cannot know which side owns the guest: it then saves it, stopped.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic

from ..base.closing import Closing
from ..base.errors import (
    MigrationCancelled,
    MigrationFailed,
    MigrationRefused,
    StreamBroken,
    StreamCorrupt,
    VhostVdpaError,
)
from ..base.scheduling import AheadOfOthers
from ..device.net import VdpaNetDevice
from ..device.together import together
from ..guest.protocol import DeviceSection, G, GuestKind, Kinds, Section, kind_of
from ..guest.shape import GuestShape
from ..memory.guest import GuestMemory
from ..net.control_queue import DEFAULT_DEADLINE
from ..net.features import Feature
from ..trace import gap
from ..trace.phases import DEST_STAND_BY
from ..trace.recorder import Trace
from . import paused
from .admission import check_changed, check_fit, map_memory
from .alive import AliveLimit
from .cancel import Cancel
from .common import PATIENCE, PhaseCallback, ReportCallback, harmless, hash_bytes, patience, words_of
from .fence import Fence, hold, needs_holding
from .handover import Arriving
from .pages import PAGES, ZERO, FrameHeader, PageReceiver
from .rehearsal import rehearse
from .rescue import rescue
from .saved import DEFAULT_FOLDER, SavedGuest, check_room, save_held
from .stream import Channel, Frame, words

log = logging.getLogger(__name__)

DESTINATION_PHASES = ("handshake", "map", "memory", "load", "ready", "start", "running")
"""Of the destination, in order."""

_TELL_SECONDS = 2.0


@dataclass(slots=True)
class Arrived(Closing, Generic[G]):
    """A guest that runs here, with its devices. ``hash`` is "" unless the source asked for it."""

    shape: GuestShape
    guest: G
    devices: list[VdpaNetDevice]
    hash: str = ""
    note: str = ""
    """What its owner should know, such as that the source was not notified."""
    resources: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """End the guest, reset and close its devices. Idempotent."""
        with suppress(VhostVdpaError):
            self.guest.pause()
        self.resources.close()


class Destination(Generic[G]):
    """Receives a guest from the other end of ``channel`` for the devices at ``paths``, in the source's order.

    ``kinds`` are those that can run here; a guest of another is refused.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        channel: Channel,
        cancel: Cancel,
        kinds: Kinds[G],
        trace: Trace | None = None,
        folder: Path = DEFAULT_FOLDER,
        observer: PhaseCallback = lambda phase: None,
        tell: ReportCallback = lambda text: None,
        control_deadline: float = DEFAULT_DEADLINE,
        shape: GuestShape | None = None,
        procedure: str | None = None,
    ) -> None:
        """``control_deadline`` in seconds for each device; ``shape`` if it was received already.

        ``procedure`` forces one on the devices.
        """
        self._control_deadline, self._procedure = control_deadline, procedure
        self.paths = [os.fspath(path) for path in paths]
        self._shape = shape
        self._kinds = kinds
        self.channel = channel
        self.trace = trace or Trace()
        self._folder, self._cancel = folder, cancel
        self._observe, self._tell = harmless(observer), harmless(tell)
        self._stack, self._until_it_runs = ExitStack(), ExitStack()
        self._ahead = AheadOfOthers()
        self._devices: list[VdpaNetDevice] = []
        self._told = 0.0
        self._alive_frames = AliveLimit()
        self._hash = b""
        self._began = 0  # the last round, CLOCK_MONOTONIC ns
        self._clock_ahead = 0  # ns that the guest's times are behind this host's clock, from GO on
        self._guest_state: Section | None = None
        self._device_states: list[DeviceSection] = []
        self._rests: list[Section] = []
        self._outline: list[DeviceSection] = []
        self._expected: G | None = None
        self._starting: paused.Prepared | None = None
        self._arriving: Arriving | None = None
        """Made once the outline is known, if the guest's state can be taken in one go."""
        self._arrived: Arriving | None = None
        """What has sent READY, or a part of it, already."""
        self._receiver: PageReceiver | None = None

    def run(self) -> Arrived[G]:
        """Receive a guest and return it running.

        Raises :class:`~pyvhostvdpa.MigrationRefused` if the guest
        does not fit these devices, :class:`Stray` if none came, :class:`~pyvhostvdpa.MigrationFailed`
        or :class:`~pyvhostvdpa.MigrationCancelled`; the message says where the guest is. The devices
        are reset and closed then, nothing is left of the guest but a file, if the
        message names one.
        """
        with self._until_it_runs, self._ahead, self._stack:
            self._observe("handshake")
            shape = self._shape or receive_shape(self.channel)
            self._tell(f"{shape.source}: {len(shape.devices)} devices, {sum(s for _, s in shape.memory) >> 20} MiB")
            try:
                self._cancel.check()
                self._check_shape(shape)
                self._prepare(shape)
            except (VhostVdpaError, OSError, MemoryError) as e:
                self._say(Frame.REFUSE, e)
                raise _kept_by_source(e, MigrationRefused) from e
            try:
                self.channel.send_frame(Frame.ACCEPT)
                guest = self._receive(shape)
            except (VhostVdpaError, OSError, MemoryError) as e:
                self._say(Frame.FAILED, e)
                raise _kept_by_source(e) from e
            self._await_go(shape, guest)
            return self._start(shape, guest)

    def _say(self, kind: Frame, error: Exception) -> None:
        say(self.channel, kind, error)

    # -- before anything is touched --------------------------------------------------

    def _check_shape(self, shape: GuestShape) -> None:
        if len(shape.devices) != len(self.paths):
            raise MigrationRefused(
                f"the guest has {len(shape.devices)} devices, this side was given {len(self.paths)}: "
                f"{' '.join(self.paths)}",
                hint=f"vhost-vdpa receive with {len(shape.devices)} devices",
            )
        self._kind: GuestKind[G] = kind_of(shape, self._kinds)
        check_room(self._folder, sum(size for _, size in shape.memory))

    def _prepare(self, shape: GuestShape) -> None:
        for path, device_shape in zip(self.paths, shape.devices, strict=True):
            wanted = Feature(device_shape.features)
            device = self._stack.enter_context(
                VdpaNetDevice(
                    path,
                    self.trace,
                    wanted=wanted,
                    procedure=self._procedure,
                    control_deadline=self._control_deadline,
                )
            )
            self._devices.append(device)
            check_fit(device, device_shape)
        self._observe("map")
        private = all(device.iotlb.limits.private for device in self._devices)
        self._memory = GuestMemory(shape.memory, self._allocated, private)  # type: ignore[arg-type]
        self._stack.callback(self._memory.close)
        # devices release the memory before it is freed: closing them again has no effect
        for device in self._devices:
            self._stack.callback(device.close)
        for device in self._devices:
            map_memory(device, self._memory)
            self._alive(f"memory mapped in {device.path}")

    def _allocated(self, step: int) -> None:
        now = time.monotonic()
        if now - self._told > _TELL_SECONDS:
            self._told = now
            self._alive("allocating memory")

    def _alive(self, text: str) -> None:
        self._cancel.check()
        self._tell(text)
        self.channel.send_text(Frame.ALIVE, text)

    # -- memory and state ----------------------------------------------------------------

    def _receive(self, shape: GuestShape) -> G:
        self._observe("memory")
        self._cancel.check()
        receiver = self._receiver = PageReceiver(self._memory, self.channel, fresh=True)
        self._until_it_runs.enter_context(paused.no_collection())
        began = 0
        while True:
            header = self.channel.receive_header(PATIENCE)
            if header.type in (PAGES, ZERO):
                receiver.receive(header)
                self._alive_frames.progress()
                self._progress(receiver)
                if self._is_all_here():
                    return self._take_all(shape, began)
                continue
            if header.type == Frame.ROUND:
                began = time.monotonic_ns()
            if header.type == Frame.GUEST:
                # it comes in one piece with what follows it
                self.channel.read_ahead()
            if self._control(header, shape):
                break
            if header.type == Frame.ROUND and self._is_all_here():
                return self._take_all(shape, began)
        paused.note_last_round(self._devices, began, receiver.written_at)
        self._observe("load")
        self._cancel.check()
        guest = paused.load(self._devices, lambda: self._load(shape))
        # the source still has the guest
        check_changed(self._devices, shape.devices)
        if shape.hashed:
            self._hash = hash_bytes(self._memory)
        return guest

    def _record_arrival(self) -> None:
        """Record the steps that were made in one go, once nothing waits for it."""
        if self._arriving is not None and self._receiver is not None and self._arriving.taken:
            paused.note_last_round(self._devices, self._began, self._receiver.written_at)
            self._arriving.record()

    def _is_all_here(self) -> bool:
        """Whether all of the state comes next, in one piece that can be taken in one go."""
        return self._arriving is not None and self.channel.raw and self._arriving.look()

    def _take_all(self, shape: GuestShape, began: int) -> G:
        """Take the state, and if nothing is in the way send READY and take GO, in one go."""
        arriving, guest = self._arriving, self._expected
        assert arriving is not None
        assert guest is not None
        for phase in ("load", "ready"):
            self._observe(phase)
            self._cancel.check()
        self._began = began
        arriving.prepare()
        self._ahead.begin()
        # before READY is sent: the source's time to hold its file begins when it arrives
        self._fence = Fence(patience(shape), 2)
        arriving.run()
        if arriving.went_on:
            self._arrived = arriving
        else:
            check_changed(self._devices, shape.devices)
        return guest

    def _load(self, shape: GuestShape) -> G:
        if self._expected is not None:
            self._expected.load(self._complete(), self._rests or self._device_states, shape.devices)
            return self._expected
        return self._keep(self._kind.restore(self._memory, self._complete(), self._device_states, shape.devices))

    def _keep(self, guest: G) -> G:
        """End the guest with this side, unless it arrives; its devices first."""
        self._stack.callback(guest.close)
        for device in self._devices:
            self._stack.callback(device.close)
        return guest

    def _stand_by(self, outline: Sequence[DeviceSection], shape: GuestShape) -> None:
        """Put the devices on standby for the guest that will come, while it still runs on the source."""
        guest = self._expected = self._keep(self._kind.expect(self._memory, outline, shape.devices))
        together([partial(self._stand_ready, guest, number) for number in range(len(self._devices))])
        self._starting = self._until_it_runs.enter_context(paused.prepare_start(guest, self._devices))
        self._starting.begin()
        rehearse(guest, arriving=True)
        sections = guest.sections()
        if sections is not None and not shape.hashed:
            looks = [device.prepare_config() for device in self._devices]
            self._arriving = Arriving(self.channel, sections, looks, self._devices[0].trace)
            self._until_it_runs.callback(self._record_arrival)

    def _stand_ready(self, guest: G, number: int) -> None:
        device = self._devices[number]
        with device.trace.in_phase(DEST_STAND_BY):
            self._tell(f"{device.path}: {guest.stand_by(number, device)}")

    def _progress(self, receiver: PageReceiver) -> None:
        now = time.monotonic()
        if now - self._told > _TELL_SECONDS:
            self._told = now
            self._tell(f"{receiver.bytes >> 20} MiB of memory received")

    def _control(self, header: FrameHeader, shape: GuestShape) -> bool:
        """Take a control frame; whether it was the last."""
        payload = self.channel.receive_payload(header)
        if header.type == Frame.CANCEL:
            raise _SourceCancelled(f"the source says: {words(payload)}")
        if header.type != Frame.ALIVE:
            self._alive_frames.progress()
        if header.type == Frame.ROUND and len(payload) == 8:
            self._tell(f"round {header.count}: {int.from_bytes(payload, 'little') >> 10:,} KiB")
        elif header.type == Frame.ALIVE:
            self._alive_frames.count()
            self._tell(f"source: {words(payload)}")
        elif header.type == Frame.GUEST:
            self._guest_state = self._kind.decode_guest(payload)
        elif header.type == Frame.DEVICE and header.count == len(self._device_states) < len(shape.devices):
            self._device_states.append(self._kind.decode_device(payload))
        elif header.type == Frame.STAND_BY and header.count == len(self._outline) < len(shape.devices):
            self._outline.append(self._kind.decode_device(payload))
            if len(self._outline) == len(shape.devices):
                self._stand_by(self._outline, shape)
        elif header.type == Frame.REST and header.count == len(self._rests) < len(self._outline):
            self._rests.append(self._kind.decode_rest(payload))
        elif header.type == Frame.FINAL:
            return True
        else:
            raise StreamCorrupt(f"a {Frame(header.type).name} frame in the middle of memory and state")
        return False

    def _complete(self) -> Section:
        if self._arriving is not None and self._arriving.taken:
            # the guest has this one; an earlier one may have come step by step
            return self._kind.decode_guest(self._arriving.guest_section())
        if self._guest_state is None:
            raise StreamCorrupt("the state of the guest is missing")
        return self._guest_state

    # -- the hand-over -------------------------------------------------------------------

    def _await_go(self, shape: GuestShape, guest: G) -> None:
        """From READY on the source may give the guest away at any time; until GO is here, it may also keep it."""
        try:
            if self._arrived is None:
                kind, payload = self._answer(shape)
            elif self._arrived.given:
                return
            else:
                kind, payload = self._arrived.go(self._fence)
        except (StreamBroken, StreamCorrupt) as e:
            said = self.channel.last_words()
            if said:
                raise _kept_by_source(_SourceCancelled(f"the source says: {said}")) from e
            raise self._unknown(shape, guest, e, "before the source gave the guest away") from e
        except (VhostVdpaError, OSError, MemoryError) as e:
            # the source learns from this that the guest is not here
            self._say(Frame.FAILED, e)
            raise _kept_by_source(e) from e
        if kind is Frame.CANCEL:
            raise _kept_by_source(_SourceCancelled(f"the source says: {words(payload)}"))
        here = time.monotonic_ns() if self._arrived is None else self._arrived.go_at
        self._clock_ahead = here - int.from_bytes(payload[:8], "little", signed=True)

    def _take_clock_over(self, guest: G) -> None:
        """Move the guest's times to this host's clock, once."""
        given, self._arrived = self._arrived, None
        guest.shift_clock(given.clock_ahead if given is not None and given.given else self._clock_ahead)
        self._clock_ahead = 0

    def _answer(self, shape: GuestShape) -> tuple[Frame, bytes]:
        """Send READY, and return what the source answers."""
        if self._arriving is None or not self._arriving.taken:
            self._observe("ready")
        self._cancel.check()
        # before READY is sent: the source's time to hold its file begins when it arrives
        self._fence = Fence(patience(shape), 2)
        with gap.step(self._devices[0].trace, gap.HAND_OVER):
            self.channel.send_frame(Frame.READY, self._hash)
            # while the source is at work; no device is touched
            if self._starting is not None:
                self._starting.begin()
            return self.channel.expect(Frame.GO, Frame.CANCEL, seconds=self._fence.left)

    def _unknown(self, shape: GuestShape, guest: G, error: VhostVdpaError, when: str) -> MigrationFailed:
        """Save the guest; hold the file until the source can no longer resume by itself. Returns the error to raise."""
        happened = f"{words_of(error)}, after this side was ready and {when}"
        state = SavedGuest(shape, self._complete(), tuple(guest.state()[1]))
        self._ahead.close()
        # the source learns at once that nothing follows from here
        self.channel.close()
        # a signal that raised here would end the guest
        self._cancel.too_late()
        size = guest.memory.size
        with rescue(lambda: save_held(self._folder, "destination", state, guest.memory), self._folder, size) as held:
            if needs_holding(self.channel, error):
                hold(self._fence, held.path, "source", self._cancel, self._tell)
            path = held.path
        quoted = shlex.quote(str(path))
        return MigrationFailed(
            f"{happened}. It is stopped here and saved in {path}; the source may have resumed it: it must run on one "
            "side only",
            hint=f"if it runs on the source: rm {quoted}\n"
            f"  if it does not: {shlex.join(['vhost-vdpa', 'receive', '--take', str(path), *self.paths])}",
        )

    def _start(self, shape: GuestShape, guest: G) -> Arrived[G]:
        self._cancel.too_late()
        self.channel.cancel = -1
        self._observe("start")
        try:
            started = partial(self._take_clock_over, guest)
            paused.start(guest, self._devices, self._starting, self._check_fence, started)
        except _TooLate as e:
            self._take_clock_over(guest)
            raise self._unknown(shape, guest, e, "so late that the source may have been started again") from e
        except Exception as e:
            # whatever it is, the source learns of it and has the guest
            failed = MigrationFailed(
                f"the guest could not be started: {words_of(e)}; it does not run here, the source has it",
                hint=getattr(e, "hint", ""),
            )
            self._say(Frame.FAILED, e if isinstance(e, VhostVdpaError) else failed)
            raise failed from e
        self._observe("running")
        note = ""
        try:
            self.channel.send_frame(Frame.RUNNING)
        except Exception as e:
            # whatever it is, the guest runs
            note = f"the guest runs here, but the source could not be notified ({words_of(e)}): it stays stopped there"
        if self._receiver is not None:
            self._tell(f"{self._receiver.pages:,} pages and {self._receiver.zero_pages:,} of zeros arrived")
        resources = self._stack.pop_all()
        return Arrived(shape, guest, self._devices, self._hash.hex(), note, resources)

    def _check_fence(self) -> None:
        if self._fence.passed:
            raise _TooLate("this process was stopped for too long")


class _TooLate(VhostVdpaError):
    """The time in which this side may start the guest by itself is over."""


def receive_shape(channel: Channel) -> GuestShape:
    """Return what the guest at the other end needs; :class:`Stray`, also sent there, if that is malformed."""
    try:
        kind, payload = channel.expect(Frame.SHAPE, Frame.CANCEL)
        if kind is Frame.CANCEL:
            raise _SourceCancelled(f"the source says: {words(payload)}")
        return GuestShape.decode(payload)
    except (StreamBroken, StreamCorrupt, _SourceCancelled) as e:
        say(channel, Frame.REFUSE, e)
        raise _kept_by_source(e, Stray) from e
    except VhostVdpaError as e:
        say(channel, Frame.REFUSE, e)
        raise _kept_by_source(e) from e


def say(channel: Channel, kind: Frame, error: Exception) -> None:
    """Send the source the reason for this side's failure, if it is still there."""
    channel.cancel = -1
    if isinstance(error, StreamBroken | _SourceCancelled):
        return
    with suppress(StreamBroken):
        hint = _hint(error)
        channel.send_text(kind, words_of(error) + (f" (next: {hint})" if hint else ""))
        channel.finish()


class Stray(MigrationRefused):
    """What connected brought no guest; the next may be waited for."""


class _SourceCancelled(MigrationFailed):
    """The source has cancelled, and sent a message."""


def _hint(error: Exception) -> str:
    if isinstance(error, VhostVdpaError):
        return error.hint
    limited = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return "allow more open files: ulimit -n" if limited else ""


def _kept_by_source(error: Exception, kind: type[VhostVdpaError] = MigrationFailed) -> VhostVdpaError:
    """Say where the guest is, to an error from before it could be here."""
    if isinstance(error, MigrationCancelled):
        kind = MigrationCancelled
    return kind(f"{words_of(error)}; nothing of the guest is left here, the source has it", hint=_hint(error))
