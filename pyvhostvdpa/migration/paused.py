# SPDX-License-Identifier: MIT
"""Everything that is done while the guest is paused, on both sides, in order:

====  ===========  ==================================================  ====================================
step  side         what                                                phase in the trace
====  ===========  ==================================================  ====================================
1     source       pause the guest                                     :data:`~pyvhostvdpa.trace.gap.PAUSE`
2     source       stop its devices, all at the same time              ``dt2.stop``
3     source       collect the pages written since the last round      ``COLLECT``, and during ``dt2.stop``
4     source       send these pages                                    ``LAST_ROUND``
5     source       encode and send the state of guest and devices      ``STATE``
6     destination  load the state, checked in full                     ``LOAD``
7     both         hash memory, if the source asked for it
8     both         READY, then GO: the guest is the destination's      ``HAND_OVER``
9     destination  start its devices, all at the same time             ``dest.start``
10    destination  let the guest run
====  ===========  ==================================================  ====================================

:func:`stop`, :func:`send_memory`, :func:`send_state`, :func:`load` and :func:`start` are these steps; 7 and 8 are an
exchange, with its errors, in ``source.py`` and ``destination.py``. Steps 5, 6 and 8 are done by C in one go where that
is possible (``handover.py``). Whatever else a migration does comes before or after.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from ..base.closing import Closing
from ..base.errors import VhostVdpaError
from ..device.net import VdpaNetDevice
from ..device.together import together
from ..device.work import Crew, Work
from ..guest.protocol import Guest, Window
from ..trace import gap
from ..trace.phases import DEST_START
from .precopy import Rounds
from .stream import Channel, Frame

T = TypeVar("T")


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage in the block: that takes longer the more objects a program has."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Prepared(Closing):
    """The stop, or the start, of all devices, made ready while the guest is not paused.

    ``works`` has each device's prepared work, None where it cannot prepare
    anything; ``one_by_one`` does it for a device by its number then. ``beside``
    if :meth:`do` will do something else meanwhile.
    """

    def __init__(
        self,
        devices: Sequence[VdpaNetDevice],
        phase: str,
        works: Sequence[Work | None],
        one_by_one: Callable[[int], None],
        told: Callable[[int, Callable[[], None]], None] = lambda number, finish: finish(),
        beside: bool = False,
    ) -> None:
        self._devices, self._phase, self._one_by_one, self._told = devices, phase, one_by_one, told
        ready = [work for work in works if work is not None]
        self._crew = Crew(ready, beside) if len(ready) == len(devices) else None
        for number, work in enumerate(ready):
            work.finish = partial(self._finish, number, work.finish)
        self._begun = False
        self._unfinished = False

    def _finish(self, number: int, finish: Callable[[], None]) -> None:
        with self._devices[number].trace.in_phase(self._phase):
            self._told(number, finish)

    def begin(self) -> bool:
        """Do what has to come first, and return True, if that can be done before the guest is paused.

        :meth:`do` does it otherwise. It may be done again, if something has changed since.
        """
        if self._crew is None:
            return False
        self._begun = True
        self._crew.begin()
        return True

    def do(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Stop, or start, all devices; an error of one keeps no other from its end.

        What is not needed while the guest is paused is left for :meth:`finish`, which is called at once if anything
        went wrong. ``meanwhile`` is done beside them, or behind them where they are not prepared; its error is raised
        once they are stopped, or started.
        """
        if self._crew is None:
            together([partial(self._do_one, number) for number in range(len(self._devices))])
            if meanwhile is not None:
                meanwhile()
            return
        if not self._begun:
            self._crew.begin()
        self._unfinished = True
        try:
            fine = self._crew.do(meanwhile)
        except BaseException:
            self.finish()
            raise
        if not fine:
            self.finish()

    def finish(self) -> None:
        """Do what :meth:`do` has left. Idempotent."""
        if self._unfinished and self._crew is not None:
            self._unfinished = False
            self._crew.finish()

    def _do_one(self, number: int) -> None:
        with self._devices[number].trace.in_phase(self._phase):
            self._told(number, partial(self._one_by_one, number))

    def close(self) -> None:
        """End the threads that wait for it. Idempotent."""
        if self._crew is not None:
            self._crew.close()


def stop(guest: Guest, devices: Sequence[VdpaNetDevice], rounds: Rounds, stopping: Prepared) -> None:
    """Do steps 1 to 3; ``stopping`` has begun, if that can be done before."""
    trace = devices[0].trace
    with gap.step(trace, gap.PAUSE):
        guest.pause()
    stopping.do(rounds.collect_written_by_cpu)
    with gap.step(trace, gap.COLLECT):
        rounds.collect_written_by_devices()


def send_memory(devices: Sequence[VdpaNetDevice], rounds: Rounds) -> None:
    """Do step 4."""
    with gap.step(devices[0].trace, gap.LAST_ROUND):
        rounds.last()


def send_state(
    guest: Guest, devices: Sequence[VdpaNetDevice], channel: Channel, outlined: bool, final: Callable[[], None]
) -> None:
    """Do step 5, FINAL included: ``final`` is called in front of it.

    ``outlined`` if the destination knows the guest's outline.
    """
    with gap.step(devices[0].trace, gap.STATE):
        own, sections = guest.rest() if outlined else guest.state()
        kind = Frame.REST if outlined else Frame.DEVICE
        frames = [(kind, section.encode(), number) for number, section in enumerate(sections)]
        final()
        channel.send_frames((Frame.GUEST, own.encode(), 0), *frames, (Frame.FINAL, b"", 0))


def note_last_round(devices: Sequence[VdpaNetDevice], began: int, moved: int) -> None:
    """Record the destination's part of step 4: it is over when the last pages are in place, at ``moved``."""
    if moved > began:
        devices[0].trace.record(began, moved, gap.LAST_ROUND, {}, None, gap.LAST_ROUND)


def load(devices: Sequence[VdpaNetDevice], restore: Callable[[], T]) -> T:
    """Do step 6: return what ``restore`` returns."""
    with gap.step(devices[0].trace, gap.LOAD):
        return restore()


def prepare_start(guest: Guest, devices: Sequence[VdpaNetDevice]) -> Prepared:
    """Make the start of devices ready that stand by for a guest."""
    works = [guest.prepare_start(number, device) for number, device in enumerate(devices)]
    return Prepared(devices, DEST_START, works, lambda number: guest.start(number, devices[number]))


def start(
    guest: Guest,
    devices: Sequence[VdpaNetDevice],
    starting: Prepared | None = None,
    check: Callable[[], None] = lambda: None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Do steps 9 and 10; if a step fails, or ``check``, all devices are reset.

    ``started`` is called as soon as the devices run: what the guest needs, but
    no device.
    """
    starting = starting or Prepared(
        devices, DEST_START, [None] * len(devices), lambda number: guest.start(number, devices[number])
    )
    try:
        check()
        starting.do()
        started()
        # the guest is paused all the while: its gap ends behind this
        with guest.watching(Window.START):
            starting.finish()
        check()
        guest.run()
    except BaseException:
        with suppress(VhostVdpaError):
            guest.pause()
        for device in devices:
            with suppress(VhostVdpaError):
                device.reset()
        raise
