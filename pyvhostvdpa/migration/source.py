# SPDX-License-Identifier: MIT
"""The source's side of a migration: it owns the guest until the destination says that it runs there.

``vhost-vdpa help migration`` has the protocol, and which side owns the guest when.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import (
    MigrationCancelled,
    MigrationFailed,
    MigrationRefused,
    OutOfOrder,
    StreamBroken,
    VhostVdpaError,
)
from ..base.scheduling import AheadOfOthers
from ..base.uapi import BackendFeature, names
from ..device.net import State, VdpaNetDevice
from ..guest.protocol import Guest, Window
from ..guest.shape import ID_BYTES, GuestShape
from ..net.control_queue import DEFAULT_DEADLINE
from ..trace.phases import CANCEL_START, DT1_START, DT1_STOP, DT2_STOP
from . import paused
from .alive import AliveLimit
from .cancel import Cancel
from .common import PATIENCE, PhaseCallback, ReportCallback, harmless, hash_bytes, patience, words_of
from .fence import MARGIN, Fence, hold, needs_holding
from .folder import Draft
from .handover import Leaving
from .precopy import Rounds
from .rehearsal import rehearse
from .rescue import rescue
from .saved import DEFAULT_FOLDER, SavedGuest, check_room, save_held
from .sent import LastRound, SendResult
from .stream import Channel, Frame, words

SOURCE_PHASES = ("handshake", "switch", "memory", "stop", "state", "ready", "go", "running")
"""Of the source, in order; "back to source" may follow each but the last."""

_GIVEN = "after the guest was given away and before the destination said that it runs there"
_LATE = (
    "so late after the destination was ready that the guest may have been started from its file there (this process "
    "was stopped, or the stream silent, for too long)"
)


@dataclass(frozen=True, slots=True)
class SendOptions:
    """How to send a guest.

    ``limit`` in bytes per second on the stream until the guest is paused, None
    for none; ``downtime`` in seconds that sending the remaining pages may take
    then; ``hashed`` compares a hash of all memory while the guest is paused;
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


class Source:
    """Sends a guest, which runs in passthrough on ``devices``, to the other end of ``channel``.

    ``observer`` and ``tell`` may fail: that is logged, and the migration
    continues. ``shadowed`` is called once the devices run on shadow virtqueues,
    before memory is sent; what it raises ends the migration, and the guest
    stays.
    """

    def __init__(
        self,
        guest: Guest,
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
        self._halted: set[int] = set()
        """Numbers of devices that failed to stop: whether they are stopped is unknown."""
        self._resources = ExitStack()
        self._ahead = AheadOfOthers()
        self._stopping: paused.Prepared | None = None
        self._leaving: Leaving | None = None
        """Made before the pause, if the guest's state can be passed in one go."""
        self._outlined = False
        """Whether the destination knows the guest's outline."""
        self._loaded = False
        """Whether the destination may have all of the guest, and so may save it."""
        self._fence: Fence | None = None
        """While this side may resume by itself though the destination may be ready."""
        self._cancel = cancel
        self._observe, self._tell, self._shadowed = harmless(observer), harmless(tell), shadowed
        self._rounds = Rounds(guest, channel, self.options.limit, self._check, self._tell)
        self.sent.rounds = self._rounds.statistics
        self._shape = GuestShape(
            id=os.urandom(ID_BYTES),
            source=f"{os.uname().nodename} {' '.join(device.path for device in devices)}"[:200],
            memory=tuple((region.gpa, region.size) for region in guest.memory.regions),
            devices=guest.shapes(),
            hashed=self.options.hashed,
            kind=guest.kind,
        )
        self.sent.id = self._shape.id.hex()

    def run(self) -> SendResult:
        """Send the guest; afterwards it runs at the destination and the devices here are reset.

        Raises :class:`~pyvhostvdpa.MigrationRefused`,
        :class:`~pyvhostvdpa.MigrationCancelled` or
        :class:`~pyvhostvdpa.MigrationFailed` if it does not. The
        guest then continues in passthrough here, or the message says what state
        it is in and the hint is the command that continues from there.
        Whatever else fails is raised as MigrationFailed in the same way. Does
        not return while a paused guest that only this side has cannot be saved,
        see :func:`~pyvhostvdpa.migration.rescue.rescue`. KeyboardInterrupt
        before the hand-over leaves the devices for their owner to close.
        """
        with self._resources, self._ahead:
            return self._run()

    def _run(self) -> SendResult:
        try:
            steps = (self._handshake, self._switch, self._precopy, self._stop, self._send_state, self._await_ready)
            for phase, step in zip(SOURCE_PHASES[: len(steps)], steps, strict=True):
                self._observe(phase)
                self._cancel.check()
                step()
            self._observe("go")
            self._cancel.check()
        except Exception as e:
            # whatever it is, for want of descriptors or memory as well: the guest is here and can continue
            raise self._stay(e) from e
        except BaseException:
            self._rounds.stop()
            raise
        try:
            self._hand_over()
        finally:
            self._finish_stopping()
            if self._leaving is not None:
                self._leaving.record()
            # it takes longer the more memory there is, and nothing waits for it now
            self._rounds.stop()
        self._release_devices()
        self._measure_last_round()
        return self.sent

    def _finish_stopping(self) -> None:
        """Do the work that stopping the devices postponed until nothing waits for it."""
        self._ahead.close()
        if self._stopping is not None:
            self._stopping.finish()

    def _release_devices(self) -> None:
        """Reset what the guest has left: a procedure may have kept it ready to continue."""
        for device in self.devices:
            with suppress(VhostVdpaError, OSError):
                device.reset()

    def _measure_last_round(self) -> None:
        """Count what the last round moved, now that nothing waits for it."""
        pages, by_devices = self._rounds.left.count, self._rounds.left_by_devices.count
        self.sent.last = LastRound(pages, by_devices, pages - by_devices, self.sent.rounds[-1].seconds * 1000)

    # -- while the guest runs here -------------------------------------------------

    def _handshake(self) -> None:
        for device in self.devices:
            if BackendFeature.SUSPEND not in device.backend_features:
                raise MigrationRefused(
                    f"{device.path} lacks SUSPEND: its rings cannot be stopped without loss (it has "
                    f"{names(device.backend_features)})"
                )
        if not (self.guest.can_pause or self._rounds.atomic):
            raise MigrationRefused(
                "this kernel collects written pages only while the guest is paused (soft-dirty bits), and this guest "
                "cannot be paused from here between two rounds",
                hint="a kernel with CONFIG_PTE_MARKER_UFFD_WP and PAGEMAP_SCAN",
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
                    self.guest.start(number, device, State.SHADOW)
            self.sent.switched.add(device.path)
        self._shadowed()

    def _stop_device(self, number: int, device: VdpaNetDevice, then: State | None = None) -> None:
        self._note_halted(number, lambda: device.stop(then))

    def _note_halted(self, number: int, stop: Callable[[], None]) -> None:
        try:
            stop()
        except OutOfOrder:
            # it was resumed and continues, or was reset
            raise
        except Exception:
            self._halted.add(number)
            raise

    def _precopy(self) -> None:
        for number, outline in enumerate(self.guest.outline()):
            self.channel.send_frame(Frame.STAND_BY, outline.encode(), number)
            self._outlined = True
        self._rounds.until_few_are_left(self.options.downtime)

    def _check(self) -> None:
        """Raise if a device or the destination failed."""
        for device in self.devices:
            device.check()
        if self.channel.readable():
            _, payload = self.channel.expect(Frame.FAILED)
            raise MigrationFailed(f"the destination says: {words(payload)}")

    # -- while it is paused ----------------------------------------------------------

    def _stop(self) -> None:
        works = [device.prepare_stop() for device in self.devices]
        stopping = paused.Prepared(self.devices, DT2_STOP, works, self._stop_one, self._stopped, beside=True)
        self._stopping = self._resources.enter_context(stopping)
        self._resources.enter_context(paused.no_collection())
        if self._outlined:
            rehearse(self.guest, arriving=False)
        if stopping.begin() and self._outlined and not self.options.hashed:
            # control queues are held from here on
            sections = self.guest.sections()
            if sections is not None:
                self._leaving = Leaving(self.channel, sections, self.devices[0].trace)
        self._ahead.begin()
        self.sent.stopped = time.monotonic_ns()
        paused.stop(self.guest, self.devices, self._rounds, stopping)

    def _stop_one(self, number: int) -> None:
        self.devices[number].stop()

    def _stopped(self, number: int, stop: Callable[[], None]) -> None:
        self._note_halted(number, stop)
        self.sent.halted.add(self.devices[number].path)

    def _send_state(self) -> None:
        paused.send_memory(self.devices, self._rounds)
        leaving = self._leaving
        if leaving is None or not self.channel.raw:
            self._leaving = None
            paused.send_state(self.guest, self.devices, self.channel, self._outlined, self._finally)
            return
        self._finally()
        if leaving.send():
            leaving.complete()
            return
        self._leaving, self._loaded, self._fence = None, False, None
        paused.send_state(self.guest, self.devices, self.channel, self._outlined, self._finally)

    def _finally(self) -> None:
        """Know that the destination may have all of the guest from now on."""
        self._loaded = True
        self._fence = Fence(patience(self._shape), 1)

    def _await_ready(self) -> None:
        if self._leaving is not None and self._leaving.await_ready():
            self._note_ready()
            return
        ours = hash_bytes(self.guest.memory, self._rounds.c_map) if self.options.hashed else b""
        assert self._fence is not None
        kind, theirs = self.channel.expect(Frame.READY, Frame.FAILED, seconds=max(1.0, self._fence.left - MARGIN))
        self._note_ready()
        if kind is Frame.FAILED:
            self._fence = None
            raise MigrationFailed(f"the destination says: {words(theirs)}")
        if theirs != ours:
            raise MigrationFailed(
                f"memory at the destination differs: its hash is {theirs.hex() or 'missing'}, here {ours.hex()}"
            )
        self.sent.hash = ours.hex()

    def _note_ready(self) -> None:
        # the destination's time to start the guest began before READY arrived, and its control queue may be as slow as
        # this side's may be
        self._destination_fence = Fence(patience(self._shape) + self.options.control_deadline, 3)

    # -- the hand-over ------------------------------------------------------------------

    def _give(self) -> None:
        if self._leaving is not None and self.channel.raw:
            self._leaving.give()
        else:
            self.channel.send_frame(Frame.GO, time.monotonic_ns().to_bytes(8, "little", signed=True))

    def _hand_over(self) -> None:
        """Give the guest away. After GO only the destination knows which side owns it, until it has answered."""
        self._cancel.too_late()
        self.channel.cancel = -1
        try:
            self._give()
        except StreamBroken as e:
            # a partial GO frame does not count
            raise self._stay(e) from e
        except Exception as e:
            raise self._unknown(e, _GIVEN, True) from e
        try:
            self._observe("running")
            kind, payload = self.channel.expect(Frame.RUNNING, Frame.FAILED, seconds=self._destination_fence.left)
        except Exception as e:
            # whatever it is: after it, whether the guest runs there is unknown
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

        self._ahead.close()
        # a signal that raised here would end the guest
        self._cancel.too_late()
        folder = self.options.folder
        with rescue(once, folder, self.guest.memory.size) as draft:
            path = draft.path
            if held:
                hold(self._destination_fence, path, "destination", self._cancel, self._tell)
        return path, shlex.join(["vhost-vdpa", "send", "--resume", str(path), *(d.path for d in self.devices)])

    # -- staying --------------------------------------------------------------------------

    def _stay(self, error: Exception) -> VhostVdpaError:
        """Let the guest continue in passthrough here; the error to raise, or the resulting state."""
        self._observe("back to source")
        with suppress(VhostVdpaError, OSError):
            self._finish_stopping()
        try:
            if self._too_late():
                return self._unknown(error, _LATE)
            stranded = self._start_again()
        finally:
            self._rounds.stop()
        said = self._end_stream(error)
        what = f"{words_of(error)}; the destination says: {said}" if said else words_of(error)
        if stranded is not None:
            return self._stranded(what, stranded)
        kind = type(error) if isinstance(error, MigrationCancelled | MigrationRefused) else MigrationFailed
        shadowed = any(device.state is State.SHADOW for device in self.devices)
        how = "" if shadowed else " in passthrough"
        where = ", ".join(device.path for device in self.devices)
        return kind(f"{what}; the guest continues{how} on {where}", hint=getattr(error, "hint", ""))

    def _start_again(self) -> Exception | None:
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
            return e
        return None

    def _too_late(self) -> bool:
        """Whether the destination's file may have been started: it was ready, and no word came that it has nothing."""
        if self._fence is not None and self._fence.passed and self.channel.last_words():
            self._fence = None
        return self._fence is not None and self._fence.passed

    def _end_stream(self, error: Exception) -> str:
        """Notify the destination, and close the stream; its message if it was the first to leave."""
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
            try:
                stop_or_halt(device, in_order=True)
            except OutOfOrder as e:
                if device.state is not State.SHADOW:
                    raise
                # it has not stopped, so nothing is lost; the next attempt may find it in order
                self._tell(f"{device.path} continues shadowed: {e}")
        elif device.state is State.PASSTHROUGH and number in self._halted:
            device.halt()
        if device.state is State.RESET:
            self.guest.start(number, device)

    def _stranded(self, what: str, worse: Exception) -> MigrationFailed:
        runs: VhostVdpaError | None = None
        try:
            self.guest.pause()
        except VhostVdpaError as e:
            # only its owner can pause it
            runs = e
        for device in self.devices:
            with suppress(VhostVdpaError, OSError):
                if device.state is not State.RESET:
                    stop_or_halt(device)
            with suppress(VhostVdpaError, OSError):
                device.reset()
        if runs is not None:
            return MigrationFailed(
                f"{what}; and the source could not be started again: {words_of(worse)}. "
                f"The guest still runs, without its devices, and so could not be saved: {runs}",
                hint=runs.hint,
            )
        saved, command = self._save()
        both = "; the destination may have saved it as well: it must run on one side only" if self._loaded else ""
        elsewhere = f"if it runs there: rm {shlex.quote(str(saved))}\n  if it does not: " if self._too_late() else ""
        return MigrationFailed(
            f"{what}; and the source could not be started again: {words_of(worse)}. "
            f"The guest is stopped and saved in {saved}{both}",
            hint=elsewhere + command,
        )


def stop_or_halt(device: VdpaNetDevice, in_order: bool = False) -> None:
    """Stop a device and reclaim its queues, by a reset if it cannot be suspended any more.

    With ``in_order`` one that uses descriptors out of order is not reset, which would lose what is in flight: it
    continues, and :class:`OutOfOrder` is raised.
    """
    try:
        device.stop()
    except VhostVdpaError as e:
        if device.state is State.RESET or (in_order and isinstance(e, OutOfOrder)):
            raise
        device.halt()
