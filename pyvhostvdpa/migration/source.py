# SPDX-License-Identifier: MIT
"""The source's side of a migration: it owns the guest until the destination says that it runs there.

``vhost-vdpa help migration`` has the protocol, and who owns the guest when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..base.errors import (
    MigrationCancelled,
    MigrationFailed,
    MigrationRefused,
    OutOfOrder,
    StreamBroken,
    StreamCorrupt,
    VhostVdpaError,
)
from ..base.uapi import BackendFeature, names
from ..device.net import State, VdpaNetDevice
from ..device.together import together
from ..guest.state import ID_BYTES, GuestShape
from ..guest.synthetic import Guest
from ..memory.guest import GUEST_PAGE, GuestMemory
from ..trace import gap
from .cancel import Cancel
from .convergence import Convergence
from .dirty import DirtyTracker, PageSet
from .pages import PageSender, RoundStatistics, memory_hash
from .saved import DEFAULT_FOLDER, SavedGuest, check_room, save
from .stream import Channel, Frame, words

Observer = Callable[[str], None]
"""Called with the name of each phase as it begins."""
Tell = Callable[[str], None]
"""Called with words of progress."""

PHASES = ("handshake", "switch", "memory", "stop", "state", "ready", "go", "running")
"""Of the source, in order; "back to source" may follow each but the last."""

PATIENCE = 300.0
"""Seconds that a destination may take to prepare; it says that it is at work in between."""
_HAND_OVER_SECONDS = 60.0
_TELL_SECONDS = 1.0
_HASHED_PER_SECOND = 50 << 20


def hash_bytes(memory: GuestMemory) -> bytes:
    """Return the hash of guest memory, which must stand still, as it goes over the stream."""
    return memory_hash(memory).to_bytes(8, "big")


def patience(shape: GuestShape) -> float:
    """Return the seconds that either side may take to load or hash, while the guest stands still."""
    hashing = sum(size for _, size in shape.memory) / _HASHED_PER_SECOND if shape.hashed else 0.0
    return _HAND_OVER_SECONDS + hashing


@dataclass(frozen=True, slots=True)
class SendOptions:
    """How to send a guest.

    ``limit`` in bytes a second on the stream until the guest is stopped, None
    for none; ``downtime`` in seconds that what is left then may take;
    ``hashed`` compares a hash of all memory while the guest stands still;
    ``folder`` is where a guest is saved whose stream breaks at the hand-over.
    """

    limit: float | None = None
    downtime: float = 0.3
    hashed: bool = False
    folder: Path = DEFAULT_FOLDER


@dataclass(frozen=True, slots=True)
class LastRound:
    """The round of memory that was sent while the guest stood still.

    Of its ``pages`` the devices were seen to write ``by_device``, and the
    guest's CPU alone ``by_cpu``. ``ms`` is what sending took.
    """

    pages: int
    by_device: int
    by_cpu: int
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "pages": self.pages,
            "by_device": self.by_device,
            "by_cpu": self.by_cpu,
            "mib": round(self.pages * GUEST_PAGE / (1 << 20), 3),
            "ms": round(self.ms, 3),
        }


@dataclass(slots=True)
class Sent:
    """What sending took.

    ``hash`` is "" unless it was asked for; ``stopped`` is when the guest was
    paused, CLOCK_MONOTONIC ns; ``last`` is the round that it stood still for.
    """

    id: str = ""
    rounds: list[RoundStatistics] = field(default_factory=list)
    hash: str = ""
    stopped: int = 0
    last: LastRound | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "rounds": [
                {"pages": r.pages, "zero_pages": r.zero_pages, "bytes": r.bytes, "seconds": round(r.seconds, 6)}
                for r in self.rounds
            ],
            "last_round": None if self.last is None else self.last.to_dict(),
            "memory_hash": self.hash or None,
        }


class Source:
    """Sends a guest, which runs in passthrough on ``devices``, to the other end of ``channel``."""

    def __init__(
        self,
        guest: Guest,
        devices: Sequence[VdpaNetDevice],
        channel: Channel,
        cancel: Cancel,
        options: SendOptions | None = None,
        observer: Observer = lambda phase: None,
        tell: Tell = lambda text: None,
    ) -> None:
        self.guest, self.devices, self.channel = guest, list(devices), channel
        self.options = options or SendOptions()
        self.sent = Sent()
        self._told = self._round_began = time.monotonic()
        self._halted: set[int] = set()
        """Numbers of devices that failed to stop: whether they stand still nobody knows."""
        self._cancel = cancel
        self._observe, self._tell = observer, tell
        self._tracker = DirtyTracker(guest.memory)
        self._left = PageSet(guest.memory)
        self._left_by_devices = PageSet(guest.memory)
        self._sender = PageSender(guest.memory, channel, self.options.limit, self._progress)
        self._shape = GuestShape(
            id=os.urandom(ID_BYTES),
            source=f"{os.uname().nodename} {' '.join(device.path for device in devices)}"[:200],
            memory=tuple((region.gpa, region.size) for region in guest.memory.regions),
            devices=guest.shapes(),
            hashed=self.options.hashed,
        )
        self.sent.id = self._shape.id.hex()

    def run(self) -> Sent:
        """Send the guest; afterwards it runs at the destination and the devices here are reset.

        Raises :class:`~pyvhostvdpa.MigrationRefused`,
        :class:`~pyvhostvdpa.MigrationCancelled` or
        :class:`~pyvhostvdpa.MigrationFailed` if it does not. The
        guest then goes on in passthrough here, or the message says what state
        it is in and the hint is the command that goes on from there. Any
        other exception leaves the devices for their owner to close.
        """
        try:
            for phase, step in (
                ("handshake", self._handshake),
                ("switch", self._switch),
                ("memory", self._precopy),
                ("stop", self._stop),
                ("state", self._send_state),
                ("ready", self._await_ready),
            ):
                self._observe(phase)
                self._cancel.check()
                step()
            self._observe("go")
            self._cancel.check()
        except VhostVdpaError as e:
            raise self._stay(e) from e
        except BaseException:
            self._tracker.stop()
            raise
        try:
            self._hand_over()
        finally:
            # it takes longer the more memory there is, and nobody waits for it now
            self._tracker.stop()
        self._let_go()
        self._account()
        return self.sent

    def _account(self) -> None:
        """Count what the last round moved, now that nobody waits."""
        pages, by_devices = self._left.count, self._left_by_devices.count
        self.sent.last = LastRound(pages, by_devices, pages - by_devices, self.sent.rounds[-1].seconds * 1000)

    def _let_go(self) -> None:
        """Reset what the guest has left: a procedure may have kept it ready to go on."""
        for device in self.devices:
            with suppress(VhostVdpaError):
                device.reset()

    # -- while the guest runs here -------------------------------------------------

    def _handshake(self) -> None:
        for device in self.devices:
            if BackendFeature.SUSPEND not in device.backend_features:
                raise MigrationRefused(
                    f"{device.path} lacks SUSPEND: its rings cannot be taken over without loss (it has "
                    f"{names(device.backend_features)})"
                )
        check_room(self.options.folder, self.guest.memory.size)
        self.channel.send_frame(Frame.SHAPE, self._shape.encode())
        while True:
            kind, payload = self.channel.expect(Frame.ACCEPT, Frame.REFUSE, Frame.FAILED, Frame.ALIVE, seconds=PATIENCE)
            if kind is Frame.ACCEPT:
                return
            if kind is not Frame.ALIVE:
                raise MigrationRefused(f"the destination says: {words(payload)}")
            self._tell(f"destination: {words(payload)}")

    def _switch(self) -> None:
        for number, device in enumerate(self.devices):
            self._cancel.check()
            with device.trace.in_phase("dt1.stop"):
                self._stop_device(number, device, State.SHADOW)
            with device.trace.in_phase("dt1.start"):
                device.start_shadow(self.guest.nics[number].queues, self.guest.controls[number])

    def _stop_device(self, number: int, device: VdpaNetDevice, then: State | None = None) -> None:
        try:
            device.stop(then)
        except OutOfOrder:
            # it was resumed and goes on, or was reset
            raise
        except VhostVdpaError:
            self._halted.add(number)
            raise

    def _precopy(self) -> None:
        for number, device in enumerate(self.guest.outline()):
            self.channel.send_frame(Frame.STAND_BY, device.encode(), number)
        # all of memory goes after this, so what was written before is no matter
        self._tracker.start()
        converging = Convergence(self.options.downtime)
        pages = PageSet.all(self.guest.memory)
        short = False
        while True:
            self._send_round(pages)
            pages = self._collect()
            seconds = converging.estimate(pages, self._sender.bandwidth)
            self._tell(
                f"round {len(self.sent.rounds)}: {_speed(self.sent.rounds[-1])}; "
                f"{pages.bytes >> 10:,} KiB written since, {(seconds or 0) * 1000:.0f} ms to send"
            )
            if converging.done(pages, self._sender.bandwidth) and pages.count and not short:
                # this round is known to be short: the guest runs for it, and stands still for what it writes meanwhile
                short = True
                continue
            if converging.done(pages, self._sender.bandwidth):
                self._left = pages
                self._left_by_devices.update(self._tracker.written_by_devices)
                return
            if converging.gave_up(pages):
                raise MigrationFailed(
                    f"the guest writes memory faster than the stream moves it: after {len(self.sent.rounds)} rounds "
                    f"{pages.bytes >> 10:,} KiB are left, which take {(seconds or 0) * 1000:.0f} ms",
                    hint="a higher --downtime, or --limit, or a guest that writes less",
                )

    def _collect(self) -> PageSet:
        if self._tracker.atomic:
            return self._tracker.collect()
        self.guest.pause()
        try:
            return self._tracker.collect()
        finally:
            self.guest.run()

    def _send_round(self, pages: PageSet) -> None:
        self.channel.send_frame(Frame.ROUND, pages.bytes.to_bytes(8, "little"), len(self.sent.rounds) + 1)
        self._round_began = self._told = time.monotonic()
        self.sent.rounds.append(self._sender.send(pages))
        self._check()

    def _progress(self, moved: int, total: int) -> None:
        self._check()
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS:
            return
        self._told = now
        rate = moved / (now - self._round_began)
        left = f", {(total - moved) / rate:.1f} s left" if rate else ""
        done = f"{moved >> 20} of {total >> 20} MiB"
        self._tell(f"round {len(self.sent.rounds) + 1}: {done}, {rate / (1 << 20):,.1f} MiB/s{left}")

    def _check(self) -> None:
        """Raise if a device gave up, or the destination."""
        for device in self.devices:
            device.check()
        if self.channel.readable():
            _, payload = self.channel.expect(Frame.FAILED)
            raise MigrationFailed(f"the destination says: {words(payload)}")

    # -- while it stands still -------------------------------------------------------

    def _stop(self) -> None:
        self.sent.stopped = time.monotonic_ns()
        with self._step(gap.PAUSE):
            self.guest.pause()
        together([partial(self._stop_for_good, number, device) for number, device in enumerate(self.devices)])
        with self._step(gap.COLLECT):
            collected = self._tracker.collect()
            self._left.update(collected)
            self._left_by_devices.update(self._tracker.written_by_devices)

    def _step(self, phase: str) -> AbstractContextManager[None]:
        """Record a step of the time in which the guest stands still."""
        return gap.step(self.devices[0].trace, phase)

    def _stop_for_good(self, number: int, device: VdpaNetDevice) -> None:
        with device.trace.in_phase("dt2.stop"):
            self._stop_device(number, device)

    def _send_state(self) -> None:
        self._sender.limit = None
        with self._step(gap.LAST_ROUND):
            self._send_round(self._left)
        with self._step(gap.STATE):
            guest, devices = self.guest.state()
            self.channel.send_frame(Frame.GUEST, guest.encode())
            for number, device in enumerate(devices):
                self.channel.send_frame(Frame.DEVICE, device.encode(), number)
            self.channel.send_frame(Frame.FINAL)

    def _await_ready(self) -> None:
        ours = hash_bytes(self.guest.memory) if self.options.hashed else b""
        kind, theirs = self.channel.expect(Frame.READY, Frame.FAILED, seconds=patience(self._shape))
        if kind is Frame.FAILED:
            raise MigrationFailed(f"the destination says: {words(theirs)}")
        if theirs != ours:
            raise MigrationFailed(
                f"memory at the destination differs: its hash is {theirs.hex() or 'missing'}, here {ours.hex()}"
            )
        self.sent.hash = ours.hex()

    # -- the hand-over ------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give the guest away. From GO on only the destination knows whose it is, until it has answered."""
        self.channel.cancel = -1
        try:
            self.channel.send_frame(Frame.GO, time.monotonic_ns().to_bytes(8, "little", signed=True))
        except StreamBroken as e:
            # part of a GO is none
            raise self._stay(e) from e
        try:
            self._observe("running")
            kind, payload = self.channel.expect(Frame.RUNNING, Frame.FAILED, seconds=_HAND_OVER_SECONDS)
        except (StreamBroken, StreamCorrupt) as e:
            raise self._unknown(e) from e
        if kind is Frame.FAILED:
            error = MigrationFailed(f"the destination could not start the guest: {words(payload)}")
            raise self._stay(error) from error

    def _unknown(self, error: VhostVdpaError) -> MigrationFailed:
        happened = f"{error}, after the guest was given away and before the destination said that it runs there"
        saved, command = self._save()
        if not command:
            return MigrationFailed(f"{happened}. It is stopped here; {saved}")
        return MigrationFailed(
            f"{happened}. It is stopped here and saved in {saved}",
            hint=f"if it runs there: rm {saved}\n  if it does not: {command}",
        )

    def _save(self) -> tuple[str, str]:
        """Save the stopped guest; its file and the command that starts it, or why not and ""."""
        try:
            guest, devices = self.guest.state()
            state = SavedGuest(self._shape, guest, tuple(devices))
            path = save(self.options.folder, "source", state, self.guest.memory)
        except VhostVdpaError as e:
            return f"{e}: it ends with this process", ""
        paths = " ".join(device.path for device in self.devices)
        return str(path), f"vhost-vdpa send --resume {path} {paths}"

    # -- staying --------------------------------------------------------------------------

    def _stay(self, error: VhostVdpaError) -> VhostVdpaError:
        """Let the guest go on in passthrough here; the error that tells so, or what state is left."""
        self._observe("back to source")
        try:
            stranded = self._go_on()
        finally:
            self._tracker.stop()
        said = self._part(error)
        what = f"{error}; the destination says: {said}" if said else str(error)
        if stranded is not None:
            return self._stranded(what, stranded)
        kind = type(error) if isinstance(error, MigrationCancelled | MigrationRefused) else MigrationFailed
        where = ", ".join(device.path for device in self.devices)
        return kind(f"{what}; the guest goes on in passthrough on {where}", hint=error.hint)

    def _go_on(self) -> VhostVdpaError | None:
        """Return to passthrough; why not, if that cannot be."""
        try:
            for number, device in enumerate(self.devices):
                with device.trace.in_phase("cancel.start"):
                    self._return(number, device)
        except VhostVdpaError as e:
            self.guest.pause()
            return e
        self.guest.run()
        return None

    def _part(self, error: VhostVdpaError) -> str:
        """Tell the destination, and let the stream go; what it said if it was the first to leave."""
        channel = self.channel
        channel.cancel = -1
        said = ""
        with suppress(StreamBroken, StreamCorrupt):
            if isinstance(error, StreamBroken):
                said = channel.last_words()
            if not said and not channel.torn:
                # also to a side that was silent for too long, and reads it later
                channel.send_text(Frame.CANCEL, str(error))
        channel.close()
        return said

    def _return(self, number: int, device: VdpaNetDevice) -> None:
        if device.state is State.SHADOW:
            _stop_or_halt(device)
        elif device.state is State.PASSTHROUGH and number in self._halted:
            device.halt()
        if device.state is State.RESET:
            self.guest.start(number, device)

    def _stranded(self, what: str, worse: VhostVdpaError) -> MigrationFailed:
        for device in self.devices:
            with suppress(VhostVdpaError):
                if device.state is not State.RESET:
                    _stop_or_halt(device)
            with suppress(VhostVdpaError):
                device.reset()
        saved, command = self._save()
        told = f"{what}; and the source could not be started again: {worse}. The guest is stopped"
        if not command:
            return MigrationFailed(f"{told}; {saved}")
        return MigrationFailed(f"{told} and saved in {saved}", hint=command)


def _stop_or_halt(device: VdpaNetDevice) -> None:
    try:
        device.stop()
    except VhostVdpaError:
        if device.state is State.RESET:
            raise
        device.halt()


def _speed(round_: RoundStatistics) -> str:
    rate = round_.memory / round_.seconds / (1 << 20) if round_.seconds else 0.0
    return (
        f"{round_.memory >> 20} MiB ({round_.zero_pages:,} pages of zeros) in {round_.seconds:.2f} s, {rate:,.0f} MiB/s"
    )
