# SPDX-License-Identifier: MIT
"""The destination's side of a migration: the guest is its own from GO on, and never before.

What comes over the stream is checked before anything follows from it; a
stream that ends, or makes no sense, leaves no trace here. Only between READY
and GO this side cannot know who owns the guest: it then saves it, stopped.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..base.closing import Closing
from ..base.errors import (
    MigrationCancelled,
    MigrationFailed,
    MigrationRefused,
    StreamBroken,
    StreamCorrupt,
    VhostVdpaError,
)
from ..base.uapi import names
from ..device.net import VdpaNetDevice
from ..device.procedure.base import GUEST_ASID
from ..device.together import together
from ..guest.nic import Window
from ..guest.state import DeviceShape, DeviceState, GuestShape, GuestState
from ..guest.synthetic import SyntheticGuest
from ..memory.guest import PAGE_SIZE, GuestMemory, IovaAllocator, SharedMemory
from ..net.control_queue import DEFAULT_DEADLINE
from ..net.features import Feature
from ..net.fit import misfits, unknown_fields
from ..trace import gap
from ..trace.phases import DEST_PREMAP, DEST_STAND_BY, DEST_START
from ..trace.recorder import Trace
from .alive import AliveLimit
from .cancel import Cancel
from .common import PATIENCE, PhaseCallback, ReportCallback, harmless, hash_bytes, patience, words_of
from .fence import Fence, hold, needs_holding
from .folder import Claim
from .pages import PAGES, ZERO, PageReceiver
from .rescue import rescue
from .saved import DEFAULT_FOLDER, SavedGuest, check_room, load_claimed, save_held
from .stream import Channel, Frame, FrameHeader, words

log = logging.getLogger(__name__)

PHASES = ("handshake", "map", "memory", "load", "ready", "start", "running")
"""Of the destination, in order."""

_TELL_SECONDS = 2.0


@dataclass(slots=True)
class Arrived(Closing):
    """A guest that runs here, with its devices. ``hash`` is "" unless the source asked for it."""

    id: str
    source: str
    guest: SyntheticGuest
    devices: list[VdpaNetDevice]
    hash: str = ""
    note: str = ""
    """What its owner should know, such as that the source was not told."""
    resources: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """End the guest, reset and close its devices. Twice is no error."""
        self.guest.pause()
        self.resources.close()


class Destination:
    """Receives a guest from the other end of ``channel`` for the devices at ``paths``, in the source's order."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        channel: Channel,
        cancel: Cancel,
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
        self.channel = channel
        self.trace = trace or Trace()
        self._folder, self._cancel = folder, cancel
        self._observe, self._tell = harmless(observer), harmless(tell)
        self._stack = ExitStack()
        self._devices: list[VdpaNetDevice] = []
        self._told = 0.0
        self._alive_frames = AliveLimit()
        self._hash = b""
        self._guest_state: GuestState | None = None
        self._device_states: list[DeviceState] = []
        self._outline: list[DeviceState] = []
        self._expected: SyntheticGuest | None = None
        self._arrival = ""

    def run(self) -> Arrived:
        """Receive a guest and return it running.

        Raises :class:`~pyvhostvdpa.MigrationRefused` if the guest
        does not fit these devices, :class:`Stray` if none came, :class:`~pyvhostvdpa.MigrationFailed`
        or :class:`~pyvhostvdpa.MigrationCancelled`; the message says where the guest is. The devices
        are reset and closed then, nothing is left of the guest but, where the
        message says so, a file.
        """
        with self._stack:
            self._observe("handshake")
            shape = self._shape or receive_shape(self.channel)
            self._tell(f"{shape.source}: {len(shape.devices)} devices, {sum(s for _, s in shape.memory) >> 20} MiB")
            try:
                self._cancel.check()
                self._check_shape(shape)
                self._prepare(shape)
            except VhostVdpaError as e:
                self._say(Frame.REFUSE, e)
                raise _elsewhere(e, MigrationRefused) from e
            try:
                self.channel.send_frame(Frame.ACCEPT)
                guest = self._receive(shape)
            except VhostVdpaError as e:
                self._say(Frame.FAILED, e)
                raise _elsewhere(e) from e
            self._await_go(shape, guest)
            return self._start(shape, guest)

    def _say(self, kind: Frame, error: VhostVdpaError) -> None:
        say(self.channel, kind, error)

    # -- before anything is touched --------------------------------------------------

    def _check_shape(self, shape: GuestShape) -> None:
        if len(shape.devices) != len(self.paths):
            raise MigrationRefused(
                f"the guest has {len(shape.devices)} devices, this side was given {len(self.paths)}: "
                f"{' '.join(self.paths)}",
                hint=f"vhost-vdpa receive with {len(shape.devices)} devices",
            )
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
            _check_fit(device, device_shape)
        self._observe("map")
        self._memory = GuestMemory(shape.memory, self._allocated)  # type: ignore[arg-type]
        self._stack.callback(self._memory.close)
        # devices let go of the memory before it goes: a second close is none
        for device in self._devices:
            self._stack.callback(device.close)
        for device in self._devices:
            _map(device, self._memory)
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

    def _receive(self, shape: GuestShape) -> SyntheticGuest:
        self._observe("memory")
        self._cancel.check()
        receiver = PageReceiver(self._memory, self.channel)
        while True:
            header = self.channel.receive_header(PATIENCE)
            if header.type in (PAGES, ZERO):
                receiver.receive(header)
                self._alive_frames.progress()
                self._progress(receiver)
            elif self._control(header, shape):
                break
        # told once the guest runs: it stands still now
        self._arrival = f"{receiver.pages:,} pages and {receiver.zero_pages:,} of zeros arrived"
        self._observe("load")
        self._cancel.check()
        with gap.step(self._devices[0].trace, gap.LOAD):
            guest = self._load(shape)
        for device, device_shape in zip(self._devices, shape.devices, strict=True):
            # a link may have gone down since; the source still has the guest
            _check_config(device, device_shape, device.config())
        if shape.hashed:
            self._hash = hash_bytes(self._memory)
        return guest

    def _load(self, shape: GuestShape) -> SyntheticGuest:
        if self._expected is not None:
            self._expected.load(self._complete(), self._device_states, shape.devices)
            return self._expected
        return self._keep(SyntheticGuest.restore(self._memory, self._complete(), self._device_states, shape.devices))

    def _keep(self, guest: SyntheticGuest) -> SyntheticGuest:
        """End the guest with this side, unless it arrives; its devices first."""
        self._stack.callback(guest.close)
        for device in self._devices:
            self._stack.callback(device.close)
        return guest

    def _stand_by(self, outline: Sequence[DeviceState], shape: GuestShape) -> None:
        """Let the devices stand ready for the guest that is to come, while it still runs on the source."""
        guest = self._expected = self._keep(SyntheticGuest.expect(self._memory, outline, shape.devices))
        together([partial(self._stand_ready, guest, number) for number in range(len(self._devices))])

    def _stand_ready(self, guest: SyntheticGuest, number: int) -> None:
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
            self._guest_state = GuestState.decode(payload)
        elif header.type == Frame.DEVICE and header.count == len(self._device_states) < len(shape.devices):
            self._device_states.append(DeviceState.decode(payload))
        elif header.type == Frame.STAND_BY and header.count == len(self._outline) < len(shape.devices):
            self._outline.append(DeviceState.decode(payload))
            if len(self._outline) == len(shape.devices):
                self._stand_by(self._outline, shape)
        elif header.type == Frame.FINAL:
            return True
        else:
            raise StreamCorrupt(f"a {Frame(header.type).name} frame in the middle of memory and state")
        return False

    def _complete(self) -> GuestState:
        if self._guest_state is None:
            raise StreamCorrupt("the state of the guest is missing")
        return self._guest_state

    # -- the hand-over -------------------------------------------------------------------

    def _await_go(self, shape: GuestShape, guest: SyntheticGuest) -> None:
        """From READY on the source may give the guest away at any time; until GO is here, it may also keep it."""
        try:
            self._observe("ready")
            self._cancel.check()
            # before READY is sent: the source's time to hold its file begins when it arrives
            self._fence = Fence(patience(shape), 2)
            with gap.step(self._devices[0].trace, gap.HAND_OVER):
                self.channel.send_frame(Frame.READY, self._hash)
                kind, payload = self.channel.expect(Frame.GO, Frame.CANCEL, seconds=self._fence.left)
        except (StreamBroken, StreamCorrupt) as e:
            said = self.channel.last_words()
            if said:
                raise _elsewhere(_SourceCancelled(f"the source says: {said}")) from e
            raise self._unknown(shape, guest, e, "before the source gave the guest away") from e
        except VhostVdpaError as e:
            # the source learns from this that the guest is not here
            self._say(Frame.FAILED, e)
            raise _elsewhere(e) from e
        if kind is Frame.CANCEL:
            raise _elsewhere(_SourceCancelled(f"the source says: {words(payload)}"))
        clock = int.from_bytes(payload[:8], "little", signed=True)
        guest.shift_clock(time.monotonic_ns() - clock)

    def _unknown(self, shape: GuestShape, guest: SyntheticGuest, error: VhostVdpaError, when: str) -> MigrationFailed:
        """Save the guest; hold the file until the source cannot go on by itself any more. The error that tells so."""
        happened = f"{words_of(error)}, after this side was ready and {when}"
        state = SavedGuest(shape, self._complete(), tuple(self._device_states))
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
            f"{happened}. It is stopped here and saved in {path}; the source may have let it go on: it must run on one "
            "side only",
            hint=f"if it runs on the source: rm {quoted}\n"
            f"  if it does not: {shlex.join(['vhost-vdpa', 'receive', '--take', str(path), *self.paths])}",
        )

    def _start(self, shape: GuestShape, guest: SyntheticGuest) -> Arrived:
        self._cancel.too_late()
        self.channel.cancel = -1
        self._observe("start")
        try:
            _start_devices(guest, self._devices, self._check_fence)
        except _TooLate as e:
            raise self._unknown(shape, guest, e, "so late that the source may have been started again") from e
        except Exception as e:
            # whatever it is, the source is told and has the guest
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
            note = f"the guest runs here, but the source could not be told ({words_of(e)}): it stays stopped there"
        self._tell(self._arrival)
        resources = self._stack.pop_all()
        return Arrived(shape.id.hex(), shape.source, guest, self._devices, self._hash.hex(), note, resources)

    def _check_fence(self) -> None:
        if self._fence.passed:
            raise _TooLate("this process was stopped for too long")


class _TooLate(VhostVdpaError):
    """The time in which this side may start the guest by itself is over."""


def receive_shape(channel: Channel) -> GuestShape:
    """Return what the guest at the other end needs; :class:`Stray`, told there too, if that makes no sense."""
    try:
        kind, payload = channel.expect(Frame.SHAPE, Frame.CANCEL)
        if kind is Frame.CANCEL:
            raise _SourceCancelled(f"the source says: {words(payload)}")
        return GuestShape.decode(payload)
    except (StreamBroken, StreamCorrupt, _SourceCancelled) as e:
        say(channel, Frame.REFUSE, e)
        raise _elsewhere(e, Stray) from e
    except VhostVdpaError as e:
        say(channel, Frame.REFUSE, e)
        raise _elsewhere(e) from e


def say(channel: Channel, kind: Frame, error: VhostVdpaError) -> None:
    """Tell the source why this side gives up, as far as there still is one."""
    channel.cancel = -1
    if isinstance(error, StreamBroken | _SourceCancelled):
        return
    with suppress(StreamBroken):
        channel.send_text(kind, str(error) + (f" (next: {error.hint})" if error.hint else ""))
        channel.finish()


class Stray(MigrationRefused):
    """What connected brought no guest; the next may be waited for."""


class _SourceCancelled(MigrationFailed):
    """The source has given up, and said so."""


def _elsewhere(error: VhostVdpaError, kind: type[VhostVdpaError] = MigrationFailed) -> VhostVdpaError:
    """Say where the guest is, to an error from before it could be here."""
    if isinstance(error, MigrationCancelled):
        kind = MigrationCancelled
    return kind(f"{error}; nothing of the guest is left here, the source has it", hint=error.hint)


def _check_fit(device: VdpaNetDevice, shape: DeviceShape) -> None:
    missing = Feature(shape.features) & ~device.features
    if missing:
        raise MigrationRefused(
            f"{device.path} lacks features that the guest uses on the source: {names(missing)}",
            hint="create it with the same device_features: vdpa dev add",
        )
    largest = device.largest_ring(range(2 * shape.pairs))
    if shape.pairs > device.groups.max_pairs or shape.ring_size > largest:
        raise MigrationRefused(
            f"{device.path} has {device.groups.max_pairs} queue pairs of at most {largest}, "
            f"the guest uses {shape.pairs} of {shape.ring_size}",
            hint="vdpa dev add … max_vqp N makes one with more, where the driver can",
        )
    if shape.control_index != device.groups.control_index:
        raise MigrationRefused(
            f"{device.path} has its control queue at {device.groups.control_index}, "
            f"the source at {shape.control_index}",
            hint="create both with the same max_vqp: vdpa dev add",
        )
    _check_config(device, shape, device.groups.config)


def _check_config(device: VdpaNetDevice, shape: DeviceShape, config: bytes) -> None:
    """Raise if the guest has read something in configuration space that this device does not honour."""
    if shape.config is None:
        log.warning(
            "%s: the source did not send the guest's configuration space (an older version): MAC, MTU and link are "
            "not compared",
            device.path,
        )
        return
    features = Feature(shape.features)
    found = list(misfits(features, shape.config, config))
    if found:
        raise MigrationRefused(
            f"{device.path} does not fit the guest: {'; '.join(map(str, found))}",
            hint=" ".join(dict.fromkeys(each.hint for each in found)),
        )
    if unknown := unknown_fields(features, shape.config, config):
        log.warning("%s: not compared with the source, unknown on one side: %s", device.path, ", ".join(unknown))


def _map(device: VdpaNetDevice, memory: GuestMemory) -> None:
    """Map guest memory; raise if the device did not take its maps.

    The kernel says nothing of a batch that failed
    (drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_msg), but a map outside one
    has an answer, and a set_map parent installs the whole table with it.
    """
    with device.trace.in_phase(DEST_PREMAP), SharedMemory("proof", PAGE_SIZE) as page:
        device.attach(memory)
        limits, space = device.iotlb.limits, device.iotlb.space(GUEST_ASID)
        holes = IovaAllocator(limits.first, limits.last, [(m.iova, m.size) for m in space.mappings])
        iova = holes.allocate(PAGE_SIZE)
        space.map(iova, page.hva, PAGE_SIZE)
        space.unmap(iova, PAGE_SIZE)


def _start_devices(
    guest: SyntheticGuest, devices: Sequence[VdpaNetDevice], check: Callable[[], None] = lambda: None
) -> None:
    """Start every device and let the guest run; on a failure, also of ``check``, all are reset."""
    try:
        check()
        with guest.watching(Window.START):
            together([partial(_start_device, guest, number, device) for number, device in enumerate(devices)])
        check()
        guest.run()
    except BaseException:
        guest.pause()
        for device in devices:
            with suppress(VhostVdpaError):
                device.reset()
        raise


def _start_device(guest: SyntheticGuest, number: int, device: VdpaNetDevice) -> None:
    with device.trace.in_phase(DEST_START):
        guest.start(number, device)


def take(
    path: Path,
    paths: Sequence[str | os.PathLike[str]],
    trace: Trace | None = None,
    tell: ReportCallback = lambda text: None,
    control_deadline: float = DEFAULT_DEADLINE,
    procedure: str | None = None,
) -> Arrived:
    """Start the guest saved in a file on the devices at ``paths``, and remove the file once it runs.

    The file is claimed (:class:`~pyvhostvdpa.migration.folder.Claim`) before it is read, and until it is removed.
    Raises what claiming, loading, opening, mapping and starting raise; the
    file stays then, and can be taken again.
    """
    trace = trace or Trace()
    with ExitStack() as stack:
        tell(f"loading {path}")
        claim = stack.enter_context(Claim(path))
        saved, memory = load_claimed(claim)
        stack.callback(memory.close)
        if len(paths) != len(saved.devices):
            raise MigrationRefused(f"the guest in {path} has {len(saved.devices)} devices, {len(paths)} were given")
        devices = []
        for name, shape in zip(paths, saved.shape.devices, strict=True):
            wanted = Feature(shape.features)
            device = stack.enter_context(
                VdpaNetDevice(name, trace, wanted=wanted, procedure=procedure, control_deadline=control_deadline)
            )
            devices.append(device)
            _check_fit(device, shape)
        for device in devices:
            tell(f"mapping memory in {device.path}")
            _map(device, memory)
        guest = SyntheticGuest.restore(memory, saved.guest, saved.devices, saved.shape.devices)
        stack.callback(guest.close)
        for device in devices:
            stack.callback(device.close)
        # how long it stood is no gap of a device's making
        guest.forget_clock()
        _start_devices(guest, devices)
        note = _removed(claim)
        return Arrived(saved.shape.id.hex(), saved.shape.source, guest, devices, note=note, resources=stack.pop_all())


def _removed(claim: Claim) -> str:
    """Remove the file of a guest that runs; if that fails, what its owner has to do."""
    try:
        claim.remove()
    except OSError as e:
        # the claim is held as long as the guest runs: nobody starts it a second time
        return (
            f"the guest runs here, but its file could not be removed ({e.strerror}), and must not be started again: "
            f"rm {shlex.quote(str(claim.path))}"
        )
    claim.close()
    return ""
