# SPDX-License-Identifier: MIT
"""The source's side of a migration: it owns the guest until the destination says that it runs there.

``vhost-vdpa help migration`` has the protocol, and who owns the guest when.
"""

from __future__ import annotations

import os
import shlex
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
    VhostVdpaError,
)
from ..base.uapi import BackendFeature, names
from ..device.net import State, VdpaNetDevice
from ..device.together import together
from ..guest.nic import Window
from ..guest.state import ID_BYTES, GuestShape
from ..guest.synthetic import SyntheticGuest
from ..memory.guest import GUEST_PAGE
from ..net.control_queue import DEFAULT_DEADLINE
from ..trace import gap
from ..trace.phases import CANCEL_START, DT1_START, DT1_STOP, DT2_STOP
from .alive import AliveLimit
from .cancel import Cancel
from .common import PATIENCE, PhaseCallback, ReportCallback, harmless, hash_bytes, patience, words_of
from .convergence import Convergence, duration
from .dirty import DirtyTracker, PageSet
from .fence import MARGIN, Fence, hold, needs_holding
from .folder import Draft
from .pages import PageSender, RoundStatistics
from .rescue import rescue
from .saved import DEFAULT_FOLDER, SavedGuest, check_room, save_held
from .stream import Channel, Frame, words

PHASES = ("handshake", "switch", "memory", "stop", "state", "ready", "go", "running")
"""Of the source, in order; "back to source" may follow each but the last."""

_TELL_SECONDS = 1.0
_GIVEN = "after the guest was given away and before the destination said that it runs there"
_LATE = (
    "so late after the destination was ready that the guest may have been started from its file there (this process "
    "was stopped, or the stream silent, for too long)"
)


@dataclass(frozen=True, slots=True)
class SendOptions:
    """How to send a guest.

    ``limit`` in bytes a second on the stream until the guest is stopped, None
    for none; ``downtime`` in seconds that what is left then may take;
    ``hashed`` compares a hash of all memory while the guest stands still;
    ``folder`` is where a guest is saved whose stream breaks at the hand-over;
    ``control_deadline`` is how many seconds a device may take to answer a
    control command before it counts as dead; ``drain`` how many seconds the
    last frames of a guest that stayed may take.
    """

    limit: float | None = None
    downtime: float = 0.3
    hashed: bool = False
    folder: Path = DEFAULT_FOLDER
    control_deadline: float = DEFAULT_DEADLINE
    drain: float = 10.0


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
class SendResult:
    """What sending took. ``hash`` is "" unless it was asked for; ``stopped`` is when, CLOCK_MONOTONIC ns.

    ``switched`` are the paths of the devices that run, or ran, on shadow
    virtqueues, ``halted`` of those that were stopped for good: of them DT1
    and DT2 are known. ``last`` is the round that the guest stood still for,
    None if it stayed.
    """

    id: str = ""
    rounds: list[RoundStatistics] = field(default_factory=list)
    hash: str = ""
    stopped: int = 0
    switched: set[str] = field(default_factory=set)
    halted: set[str] = field(default_factory=set)
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
    """Sends a guest, which runs in passthrough on ``devices``, to the other end of ``channel``.

    ``observer`` and ``tell`` may fail: that is logged, and the migration goes
    on. ``shadowed`` is called once the devices run on shadow virtqueues,
    before memory is sent; what it raises ends the migration, and the guest
    stays.
    """

    def __init__(
        self,
        guest: SyntheticGuest,
        devices: Sequence[VdpaNetDevice],
        channel: Channel,
        cancel: Cancel,
        options: SendOptions | None = None,
        observer: PhaseCallback = lambda phase: None,
        tell: ReportCallback = lambda text: None,
        shadowed: Callable[[], None] = lambda: None,
    ) -> None:
        self.guest, self.devices, self.channel = guest, list(devices), channel
        self.options = options or SendOptions()
        self.sent = SendResult()
        self._told = self._round_began = time.monotonic()
        self._halted: set[int] = set()
        """Numbers of devices that failed to stop: whether they stand still nobody knows."""
        self._loaded = False
        """Whether the destination may have all of the guest, and so may save it."""
        self._fence: Fence | None = None
        """While this side may go on by itself though the destination may be ready."""
        self._cancel = cancel
        self._observe, self._tell, self._shadowed = harmless(observer), harmless(tell), shadowed
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

    def run(self) -> SendResult:
        """Send the guest; afterwards it runs at the destination and the devices here are reset.

        Raises :class:`~pyvhostvdpa.MigrationRefused`,
        :class:`~pyvhostvdpa.MigrationCancelled` or
        :class:`~pyvhostvdpa.MigrationFailed` if it does not. The
        guest then goes on in passthrough here, or the message says what state
        it is in and the hint is the command that goes on from there.
        Whatever else fails is raised as MigrationFailed in the same way. Does
        not return while a paused guest that is nobody else's cannot be saved,
        see :func:`~pyvhostvdpa.migration.rescue.rescue`. KeyboardInterrupt
        before the hand-over leaves the devices for their owner to close.
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
        except Exception as e:
            # whatever it is, for want of descriptors or memory as well: the guest is here and can go on
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

    def _let_go(self) -> None:
        """Reset what the guest has left: a procedure may have kept it ready to go on."""
        for device in self.devices:
            with suppress(VhostVdpaError, OSError):
                device.reset()

    def _account(self) -> None:
        """Count what the last round moved, now that nobody waits."""
        pages, by_devices = self._left.count, self._left_by_devices.count
        self.sent.last = LastRound(pages, by_devices, pages - by_devices, self.sent.rounds[-1].seconds * 1000)

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
        alive = AliveLimit()
        while True:
            kind, payload = self.channel.expect(Frame.ACCEPT, Frame.REFUSE, Frame.FAILED, Frame.ALIVE, seconds=PATIENCE)
            if kind is Frame.ACCEPT:
                return
            if kind is not Frame.ALIVE:
                raise MigrationRefused(f"the destination says: {words(payload)}")
            alive.count()
            self._tell(f"destination: {words(payload)}")

    def _switch(self) -> None:
        for number, device in enumerate(self.devices):
            self._cancel.check()
            with self.guest.watching(Window.SWITCH, number):
                with device.trace.in_phase(DT1_STOP):
                    self._stop_device(number, device, State.SHADOW)
                with device.trace.in_phase(DT1_START):
                    device.start_shadow(self.guest.nics[number].queues, self.guest.controls[number])
            self.sent.switched.add(device.path)
        self._shadowed()

    def _stop_device(self, number: int, device: VdpaNetDevice, then: State | None = None) -> None:
        try:
            device.stop(then)
        except OutOfOrder:
            # it was resumed and goes on, or was reset
            raise
        except Exception:
            self._halted.add(number)
            raise

    def _precopy(self) -> None:
        for number, outline in enumerate(self.guest.outline()):
            self.channel.send_frame(Frame.STAND_BY, outline.encode(), number)
        # all of memory goes after this, so what was written before is no matter
        self._tracker.start()
        converging = Convergence(self.options.downtime)
        pages = PageSet.all(self.guest.memory)
        short = False
        while True:
            self._send_round(pages)
            pages = self._collect()
            takes = converging.words(pages, self._sender.bandwidth, self._sender.measured)
            self._tell(
                f"round {len(self.sent.rounds)}: {_speed(self.sent.rounds[-1])}; "
                f"{pages.bytes >> 10:,} KiB written since, {takes}"
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
                    f"{pages.bytes >> 10:,} KiB are left, {takes}",
                    hint="allow a longer downtime, or a faster stream, or let the guest write less",
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
        left = f", {duration((total - moved) / rate)} left" if rate else ""
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
            self._left.update(self._tracker.collect())
            self._left_by_devices.update(self._tracker.written_by_devices)

    def _step(self, phase: str) -> AbstractContextManager[None]:
        """Record a step of the time in which the guest stands still."""
        return gap.step(self.devices[0].trace, phase)

    def _stop_for_good(self, number: int, device: VdpaNetDevice) -> None:
        with device.trace.in_phase(DT2_STOP):
            self._stop_device(number, device)
        self.sent.halted.add(device.path)

    def _send_state(self) -> None:
        self._sender.limit = None
        with self._step(gap.LAST_ROUND):
            self._send_round(self._left)
        with self._step(gap.STATE):
            guest, devices = self.guest.state()
            self.channel.send_frame(Frame.GUEST, guest.encode())
            for number, device in enumerate(devices):
                self.channel.send_frame(Frame.DEVICE, device.encode(), number)
        self._loaded = True
        self._fence = Fence(patience(self._shape), 1)
        self.channel.send_frame(Frame.FINAL)

    def _await_ready(self) -> None:
        ours = hash_bytes(self.guest.memory) if self.options.hashed else b""
        assert self._fence is not None
        kind, theirs = self.channel.expect(Frame.READY, Frame.FAILED, seconds=max(1.0, self._fence.left - MARGIN))
        # the destination's time to start the guest began before READY arrived, and its control queue may be as slow as
        # this side's may be
        self._theirs = Fence(patience(self._shape) + self.options.control_deadline, 3)
        if kind is Frame.FAILED:
            self._fence = None
            raise MigrationFailed(f"the destination says: {words(theirs)}")
        if theirs != ours:
            raise MigrationFailed(
                f"memory at the destination differs: its hash is {theirs.hex() or 'missing'}, here {ours.hex()}"
            )
        self.sent.hash = ours.hex()

    # -- the hand-over ------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give the guest away. From GO on only the destination knows whose it is, until it has answered."""
        self._cancel.too_late()
        self.channel.cancel = -1
        try:
            self.channel.send_frame(Frame.GO, time.monotonic_ns().to_bytes(8, "little", signed=True))
        except StreamBroken as e:
            # a partial GO frame does not count
            raise self._stay(e) from e
        except Exception as e:
            raise self._unknown(e, _GIVEN, True) from e
        try:
            self._observe("running")
            kind, payload = self.channel.expect(Frame.RUNNING, Frame.FAILED, seconds=self._theirs.left)
        except Exception as e:
            # whatever it is: what follows from it is that nobody knows whether the guest runs there
            raise self._unknown(e, _GIVEN, needs_holding(self.channel, e)) from e
        if kind is Frame.FAILED:
            self._fence = None
            error = MigrationFailed(f"the destination could not start the guest: {words(payload)}")
            raise self._stay(error) from error

    def _unknown(self, error: Exception, when: str, held: bool = False) -> MigrationFailed:
        saved, command = self._save(held)
        return MigrationFailed(
            f"{words_of(error)}, {when}. "
            f"It is stopped here and saved in {saved}; it may run at the destination, or be saved there as well: it "
            "must run on one side only",
            hint=f"if it runs there: rm {shlex.quote(str(saved))}\n  if it does not, on one side only: {command}",
        )

    def _save(self, held: bool = False) -> tuple[Path, str]:
        """Save the stopped guest, however long that takes; its file and the command that starts it.

        A file that is ``held`` cannot be used before the destination's time to start the guest is over.
        """

        def once() -> Draft:
            guest, devices = self.guest.state()
            return save_held(folder, "source", SavedGuest(self._shape, guest, tuple(devices)), self.guest.memory)

        # a signal that raised here would end the guest
        self._cancel.too_late()
        folder = self.options.folder
        with rescue(once, folder, self.guest.memory.size) as draft:
            path = draft.path
            if held:
                hold(self._theirs, path, "destination", self._cancel, self._tell)
        return path, shlex.join(["vhost-vdpa", "send", "--resume", str(path), *(d.path for d in self.devices)])

    # -- staying --------------------------------------------------------------------------

    def _stay(self, error: Exception) -> VhostVdpaError:
        """Let the guest go on in passthrough here; the error that tells so, or what state is left."""
        self._observe("back to source")
        try:
            if self._too_late():
                return self._unknown(error, _LATE)
            stranded = self._go_on()
        finally:
            self._tracker.stop()
        said = self._part(error)
        what = f"{words_of(error)}; the destination says: {said}" if said else words_of(error)
        if stranded is not None:
            return self._stranded(what, stranded)
        kind = type(error) if isinstance(error, MigrationCancelled | MigrationRefused) else MigrationFailed
        where = ", ".join(device.path for device in self.devices)
        return kind(f"{what}; the guest goes on in passthrough on {where}", hint=getattr(error, "hint", ""))

    def _go_on(self) -> Exception | None:
        """Return to passthrough; why not, if that cannot be."""
        try:
            with self.guest.watching(Window.START):
                for number, device in enumerate(self.devices):
                    with device.trace.in_phase(CANCEL_START):
                        self._return(number, device)
            if self._too_late():
                raise MigrationFailed(f"that would be {_LATE}")
            self.guest.run()
        except Exception as e:
            self.guest.pause()
            return e
        return None

    def _too_late(self) -> bool:
        """Whether the destination's file may have been started: it was ready, and no word came that it has nothing."""
        if self._fence is not None and self._fence.passed and self.channel.last_words():
            self._fence = None
        return self._fence is not None and self._fence.passed

    def _part(self, error: Exception) -> str:
        """Tell the destination, and let the stream go; what it said if it was the first to leave."""
        channel = self.channel
        channel.cancel = -1
        said = ""
        with suppress(VhostVdpaError, OSError):
            if isinstance(error, StreamBroken):
                said = channel.last_words()
            if not said and not channel.torn:
                # also to a side that was silent for too long, and reads it later
                channel.send_text(Frame.CANCEL, words_of(error))
        with suppress(OSError):
            channel.close()
        return said

    def _return(self, number: int, device: VdpaNetDevice) -> None:
        if device.state is State.SHADOW:
            _stop_or_halt(device)
        elif device.state is State.PASSTHROUGH and number in self._halted:
            device.halt()
        if device.state is State.RESET:
            self.guest.start(number, device)

    def _stranded(self, what: str, worse: Exception) -> MigrationFailed:
        for device in self.devices:
            with suppress(VhostVdpaError, OSError):
                if device.state is not State.RESET:
                    _stop_or_halt(device)
            with suppress(VhostVdpaError, OSError):
                device.reset()
        saved, command = self._save()
        both = "; the destination may have saved it as well: it must run on one side only" if self._loaded else ""
        elsewhere = f"if it runs there: rm {shlex.quote(str(saved))}\n  if it does not: " if self._too_late() else ""
        return MigrationFailed(
            f"{what}; and the source could not be started again: {words_of(worse)}. "
            f"The guest is stopped and saved in {saved}{both}",
            hint=elsewhere + command,
        )


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
