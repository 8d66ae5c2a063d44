# SPDX-License-Identifier: MIT
"""The shadowed control queue: the guest's commands go through us to the device.

So the state they set is known and can be replayed after a reset. Commands
are copied before they are looked at; the device answers by a deadline or the
queue is marked failed. A few commands a minute: Python is fast enough here, the
rings are C's.
"""

from __future__ import annotations

import copy
import logging
import os
import select
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .._cdefs import ffi, lib
from ..base.errors import QueueBroken
from ..base.eventfds import close_all, open_eventfds
from ..memory.guest import PAGE_SIZE, GuestMemory
from ..trace.recorder import DeviceTrace, Trace
from ..virtqueue.layout import GuestQueue, RingLayout, fill_vring, map_queue
from ..virtqueue.shadow import reason
from .control import ERR, OK, VQ_PAIRS_SET, BadCommand, Class, ControlModel

log = logging.getLogger(__name__)

GUEST_COMMAND_MAX = 1 << 16
"""A guest's command longer than this is answered with ERR."""
BUFFER_SIZE = PAGE_SIZE
DEFAULT_DEADLINE = 10.0
"""Seconds that the device may take without an answer while there are commands.

A busy firmware answers after seconds, a dead one never. QEMU waits as long
(hw/virtio/vhost-shadow-virtqueue.c:vhost_svq_poll); a guest's own driver waits for ever
(drivers/net/virtio_net.c:virtnet_send_command).
"""
_SLOW = 1.0
"""Seconds after which a wait is logged."""
_LOOK_MS = 1000
_RING = 64
_CLOSED = "an eventfd of the control queue was closed"


class ControlFailed(QueueBroken):
    """The device refused a command that it has to accept, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class NetGuestControl:
    """A control queue and the state that commands have set so far.

    ``queue`` is the guest's, None if another process handles the guest's commands and
    the device's queue, ``index``, is driven by this process alone
    (:meth:`~pyvhostvdpa.VdpaNetDevice.command`), as below a vhost-user
    front-end.
    """

    queue: GuestQueue | None
    model: ControlModel
    index: int = -1

    def __post_init__(self) -> None:
        if self.queue is not None:
            object.__setattr__(self, "index", self.queue.index)
        elif self.index < 0:
            raise ValueError("a control queue without a guest needs its index")

    @property
    def num(self) -> int:
        """Descriptors: as many as the guest has, or for a few commands at once."""
        return _RING if self.queue is None else self.queue.num

    def remember(self) -> ControlModel:
        """Return what was set so far; the guest may keep changing it, also on another device."""
        return self.model.copy()

    def is_at(self, remembered: object) -> bool:
        """Whether a device that knows this knows what was set. A request to announce does not concern the device."""
        if not isinstance(remembered, ControlModel):
            return False
        if remembered == self.model:
            return True
        return replace(remembered, announce=False) == replace(self.model, announce=False)


@dataclass(frozen=True, slots=True)
class NetControlArea:
    """Where our side of the control queue lies: in this process and for the device.

    Ring, then one page of commands, then one page of answers.
    """

    layout: RingLayout
    hva: int
    iova: int

    @property
    def device_area(self) -> int:
        """Offset of the used ring."""
        return self.layout.driver_area

    @property
    def commands(self) -> int:
        """Offset of the command buffer."""
        return self.layout.size

    @property
    def answers(self) -> int:
        """Offset of the answers."""
        return self.layout.size + BUFFER_SIZE

    @property
    def size(self) -> int:
        """Bytes of everything."""
        return self.layout.size + 2 * BUFFER_SIZE


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """How the control queue is served.

    ``deadline`` is how many seconds the device may take without an answer,
    ``ring`` the ring features negotiated on both faces (``SVQ_F_*``),
    ``config_call`` an eventfd to raise when the queue fails, or -1.
    """

    deadline: float = DEFAULT_DEADLINE
    ring: int = 0
    config_call: int = -1


class DeviceControl:
    """The driver's side of a device's control queue, in memory of our own."""

    def __init__(self, area: NetControlArea, options: ControlOptions, trace: DeviceTrace) -> None:
        self.area = area
        self.options = options
        self.trace = trace
        self.died = False
        """Whether the device did not answer by its deadline."""
        self.kick, self.call = open_eventfds(2)
        d: Any = ffi.new("struct ctrl_driver *")
        num = area.layout.num
        fill_vring(d.ring, num, area.hva, area.hva + area.layout.avail_offset, area.hva + area.device_area)
        d.kick, d.call = self.kick, self.call
        d.features = options.ring & lib.SVQ_F_EVENT_IDX
        self._driver = d
        self._commands = ffi.buffer(ffi.cast("char *", area.hva + area.commands), BUFFER_SIZE)
        self._answers = ffi.buffer(ffi.cast("char *", area.hva + area.answers), BUFFER_SIZE)
        lib.ctrl_driver_start(d)

    def load(self, commands: list[bytes]) -> None:
        """Send commands that the device has to accept; several in flight, as many as its ring holds.

        Raises :class:`ControlFailed` if it refuses one or does not answer.
        Each command and each answer is noted, as QEMU traces its own (patches
        39 and 40 of the series).
        """
        for some in self._fitting(commands):
            self._exchange(some)

    def _fitting(self, commands: Sequence[bytes]) -> Iterator[list[bytes]]:
        """Yield the commands in groups that the ring and the buffer hold."""
        waiting = list(commands)
        while waiting:
            count, used = 0, 0
            while count < len(waiting) and used + len(waiting[count]) <= BUFFER_SIZE:
                if count >= min(self.area.layout.num // 2, BUFFER_SIZE):
                    break
                used += len(waiting[count])
                count += 1
            if not count:
                # a state from another process, or a ring of one descriptor
                raise ControlFailed(
                    f"control command class {waiting[0][0]} number {waiting[0][1]} of {len(waiting[0])} bytes "
                    f"does not fit a queue of {self.area.layout.num} with {BUFFER_SIZE} bytes"
                )
            yield waiting[:count]
            del waiting[:count]

    def _exchange(self, commands: list[bytes]) -> None:
        for data in commands:
            self._note_command(data)
        answers = self._send(commands)
        for data, answer in zip(commands, answers, strict=True):
            self.trace.note("vhost_vdpa_net_load_cmd_retval", **{"class": data[0], "cmd": data[1], "r": answer})
        for data, answer in zip(commands, answers, strict=True):
            if answer != OK:
                raise ControlFailed(f"the device answered {answer} to control command class {data[0]} number {data[1]}")

    def _note_command(self, data: bytes) -> None:
        payload = data[2:]
        if (data[0], data[1]) == (Class.MQ, VQ_PAIRS_SET):
            self.trace.note("vhost_vdpa_net_load_mq", ncurqps=int.from_bytes(payload, "little"))
        fields = {"class": data[0], "cmd": data[1], "data_num": int(bool(payload)), "data_size": len(payload)}
        self.trace.note("vhost_vdpa_net_load_cmd", **fields)

    def _send(self, commands: list[bytes]) -> bytes:
        at = 0
        for data in commands:
            self._commands[at : at + len(data)] = data
            slot = lib.ctrl_driver_add(
                self._driver,
                self.area.iova + self.area.commands + at,
                len(data),
                self.area.iova + self.area.answers + (self._driver.avail_idx % BUFFER_SIZE),
            )
            if slot < 0:
                raise ControlFailed("the control queue is full of unanswered commands")
            at += len(data)
        first = (self._driver.avail_idx - len(commands)) & 0xFFFF
        places = [(first + k) % BUFFER_SIZE for k in range(len(commands))]
        for place in places:
            self._answers[place : place + 1] = b"\xff"
        lib.ctrl_driver_kick(self._driver)
        self._wait(len(commands))
        return b"".join(self._answers[place : place + 1] for place in places)

    def _wait(self, left: int) -> None:
        """Wait until every command is answered, the deadline restarted at each sign of life.

        So a slow device is not taken for a dead one. A wait that takes long is logged.
        """
        deadline, who = self.options.deadline, f"{self.trace.name}: " if self.trace.name else ""
        while left:
            before = left
            left = self._answered(min(_SLOW, deadline))
            if left == before and deadline > _SLOW:
                log.warning(
                    "%sthe device has not answered %d control commands for %g s; waiting up to %g s",
                    who,
                    left,
                    _SLOW,
                    deadline,
                )
                left = self._answered(deadline - _SLOW)
            if left == before:
                self.died = True
                raise ControlFailed(
                    f"{who}the device did not answer {left} control commands within {deadline} s",
                    hint="for a device that is only slow: vhost-vdpa migrate, send and receive take --control-deadline",
                )

    def _answered(self, seconds: float) -> int:
        """Return how many commands are still open once one is answered, or ``seconds`` have passed."""
        left: int = lib.ctrl_driver_wait(self._driver, time.monotonic_ns() + int(seconds * 1e9))
        if left == -1:
            raise ControlFailed("the device used a control descriptor that it was not given")
        if left < 0:
            raise ControlFailed(_CLOSED)
        return left

    def close(self) -> None:
        """Close the eventfds."""
        fds, self.kick, self.call = (self.kick, self.call), -1, -1
        close_all(fds)


class ControlQueue(DeviceControl):
    """Serves a guest's control queue, if there is one, and drives the device's."""

    def __init__(
        self,
        guest: NetGuestControl,
        memory: GuestMemory,
        area: NetControlArea,
        options: ControlOptions = ControlOptions(),
        trace: DeviceTrace | None = None,
    ) -> None:
        [self._wake] = open_eventfds(1)
        try:
            super().__init__(area, options, trace or Trace().device(""))
        except OSError:
            os.close(self._wake)
            raise
        self.queue = guest.queue
        self.index = guest.index
        self.model = guest.model
        self.failed = ""
        self._memory = memory
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._handling = threading.Lock()
        self._at_work = threading.Lock()
        """Held from popping a command of the guest to answering it."""
        g: Any = ffi.new("struct ctrl_guest *")
        self._guest = g
        if guest.queue is not None:
            map_queue(g.ring, guest.queue, memory)
            g.memory, g.used_gpa, g.call = memory.c_map, guest.queue.used, guest.queue.call
            g.features = options.ring
            lib.ctrl_guest_start(g)

    def replay(self) -> None:
        """Bring the device, just started, to the guest's state; see :meth:`load`."""
        self.load(self.model.replay())

    # -- the guest's side --------------------------------------------------------

    def take_up(self) -> None:
        """Read the guest's ring on from its used index, which has changed if the guest ran on another device."""
        if self.queue is not None:
            lib.ctrl_guest_start(self._guest)

    def fill(self, job: Any) -> None:
        """Have a ``struct device_job`` do what :meth:`take_up` does."""
        job.control = ffi.NULL if self.queue is None else self._guest

    def notify_by(self, kick: int, call: int) -> None:
        """Have the guest notify, and be notified, by these eventfds; it must not be served. ``call`` may be -1."""
        if self.queue is not None:
            self.queue = replace(self.queue, kick=kick, call=call)
            self._guest.call = call

    @property
    def serving(self) -> bool:
        """Whether the guest is served."""
        return self._thread is not None

    def start(self) -> None:
        """Serve the guest in a thread of its own."""
        if self._thread is not None:
            self.stop()
        self._stopping = False
        if self.queue is None:
            return
        self._thread = threading.Thread(target=self._serve, name="control-queue", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Take no command any more; one that is being carried out is answered first. :meth:`stop` ends the thread."""
        self._stopping = True
        with self._at_work:
            return

    def stop(self) -> None:
        """End the thread behind the command that it is at; others stay in the guest's ring."""
        self._stopping = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        self._thread = None

    def close(self) -> None:
        """Stop, and close the eventfds."""
        self.stop()
        wake, self._wake = self._wake, -1
        close_all([wake])
        super().close()

    def _serve(self) -> None:
        assert self.queue is not None
        poll = select.poll()
        for fd in (self.queue.kick, self._wake):
            poll.register(fd, select.POLLIN)
        while not self._stopping:
            self._serve_pending()
            # a descriptor that is closed while it is waited for is seen at the next look only
            for fd, event in poll.poll(_LOOK_MS):
                if self._stopping:
                    # the thread that serves the guest now waits for the same notification
                    return
                if event & (select.POLLNVAL | select.POLLERR):
                    self._fail(_CLOSED)
                    return
                _clear(fd)

    def _serve_pending(self) -> None:
        buffer = ffi.new("uint8_t[]", GUEST_COMMAND_MAX)
        while self._serve_one(buffer):
            pass

    def _serve_one(self, buffer: Any) -> bool:
        """Carry out a command, if there is one and it may be popped."""
        with self._at_work:
            if self._stopping:
                return False
            length: int = lib.ctrl_guest_pop(self._guest, buffer, GUEST_COMMAND_MAX)
            if self._guest.broken:
                self._fail(reason(self._guest.broken))
            if not length:
                return False
            answer = ERR if length > GUEST_COMMAND_MAX else self.handle(bytes(ffi.buffer(buffer, length)))
            lib.ctrl_guest_answer(self._guest, answer)
            return True

    def handle(self, data: bytes) -> int:
        """Carry out one command, of the guest or of the device's owner; its answer."""
        with self._handling:
            return self._handle(data)

    def _handle(self, data: bytes) -> int:
        if self.failed:
            return ERR
        wanted = copy.deepcopy(self.model)
        try:
            wanted.apply(data)
            done = self._carry_out(data, wanted)
        except BadCommand as e:
            log.debug("guest's control command refused: %s", e)
            return ERR
        except ControlFailed as e:
            self._fail(str(e))
            return ERR
        if not done:
            return ERR
        vars(self.model).update(vars(wanted))
        return OK

    def _carry_out(self, data: bytes, wanted: ControlModel) -> bool:
        """Bring the device to a new state; whether it accepts that. If not, it keeps the old one."""
        # announcing is done here: the device knows nothing of a migration
        if data[0] == Class.ANNOUNCE:
            return True
        commands = self.model.for_device(data, wanted)
        if sum(map(len, commands)) > BUFFER_SIZE:
            raise BadCommand(f"command of {len(data)} bytes")
        accepted = all(answer == OK for some in self._fitting(commands) for answer in self._send(some))
        if not accepted and len(commands) > 1:
            for some in self._fitting(wanted.for_device(data, self.model)):
                self._send(some)
        return accepted

    def _fail(self, why: str) -> None:
        """Mark the queue failed and notify the guest."""
        if self.failed:
            return
        self.failed = why
        log.warning("control queue failed: %s", why)
        if self.options.config_call >= 0:
            os.eventfd_write(self.options.config_call, 1)


def _clear(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        # another reader came first: nothing is lost, the ring is looked at
        return


_RENAMED = {"GuestControl": NetGuestControl, "ControlArea": NetControlArea}

if not TYPE_CHECKING:

    def __getattr__(name):
        """Return what had another name in an earlier release (PEP 562)."""
        if name not in _RENAMED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        new = _RENAMED[name]
        warnings.warn(f"{name} is called {new.__name__} now", DeprecationWarning, stacklevel=2)
        return new
