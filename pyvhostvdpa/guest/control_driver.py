# SPDX-License-Identifier: MIT
"""The guest's side of the control queue: sends a command, waits for its answer."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, Self

from .._cdefs import ffi, lib
from ..memory.guest import GuestMemory
from ..net.control import ERR
from ..net.control_queue import DEFAULT_DEADLINE
from ..net.features import Feature, ring_bits
from ..virtqueue.layout import GuestQueue, indices, map_queue
from .arena import GuestArena, close_queue, place_queue
from .nic_state import (
    DESCRIPTOR,
    MAX_INDEX,
    ControlDriverState,
    Extent,
    check_memory,
    check_place,
    extents_of,
    place_of,
    queue_at_rest,
    queue_of,
)
from .shape import BadState

CONTROL_RING = 64
"""Descriptors of the control queue where the device takes as many."""
ANSWER_SECONDS = 3 * DEFAULT_DEADLINE
"""Seconds that a driver waits for an answer: one command may be several for the device, each with its deadline."""
_BUFFER = 1 << 16
_TABLES = 1 << 12
TABLES_AT = _BUFFER - _TABLES
"""Where in the buffer indirect tables begin, behind the longest command that this package's device takes."""
_MIN_RING = 2
"""Descriptors that a command takes."""


class ControlDriver:
    """A driver's control queue in guest memory, one command at a time."""

    def __init__(self, memory: GuestMemory, queue: GuestQueue, command_at: int, answer_at: int) -> None:
        self.queue = queue
        self._command, self._answer = command_at, answer_at
        self._bytes = ffi.buffer(ffi.cast("char *", memory.hva(command_at, _BUFFER)), _BUFFER)
        self._ack = ffi.buffer(ffi.cast("char *", memory.hva(answer_at)), 1)
        d: Any = ffi.new("struct ctrl_driver *")
        map_queue(d.ring, queue, memory)
        d.kick, d.call = queue.kick, queue.call
        self._driver = d

    @classmethod
    def place(cls, memory: GuestMemory, arena: GuestArena, index: int, num: int = CONTROL_RING) -> Self:
        """Set a control queue of ``num`` descriptors, at least 2, up as a driver does that starts."""
        with ExitStack() as unless_made:
            queue = place_queue(arena, index, num)
            unless_made.callback(close_queue, queue)
            driver = cls(memory, queue, arena.allocate(_BUFFER), arena.allocate(1))
            lib.ctrl_driver_start(driver._driver)
            unless_made.pop_all()
        return driver

    @classmethod
    def restore(cls, memory: GuestMemory, state: ControlDriverState, features: Feature) -> Self:
        """Resume a driver whose rings are in ``memory``; :class:`BadState` if they cannot be there."""
        check_driver(memory, state, features)
        driver = cls(memory, queue_of(state.ring), state.command, state.answer)
        driver._load(state)
        driver.use_ring_features(memory, features)
        return driver

    def load(self, state: ControlDriverState) -> None:
        """Load a driver's state that :func:`check_driver` accepted; :class:`BadState` if at another place."""
        if (state.ring, state.command, state.answer) != (place_of(self.queue), self._command, self._answer):
            raise BadState("control queue: it is not at its announced address")
        self._load(state)

    def _load(self, state: ControlDriverState) -> None:
        d = self._driver
        d.avail_idx, d.used_idx, d.open = state.avail_idx, state.used_idx, state.open

    def state(self) -> ControlDriverState:
        """Return what this driver knows; no thread may be sending."""
        d = self._driver
        return ControlDriverState(
            place_of(self.queue), self._command, self._answer, int(d.avail_idx), int(d.used_idx), int(d.open)
        )

    def indices(self) -> tuple[int, int, int]:
        """Return what changes of :meth:`state`: avail and used index, commands that are open."""
        d = self._driver
        return d.avail_idx, d.used_idx, d.open

    @property
    def c(self) -> Any:
        """Its ``struct ctrl_driver``."""
        return self._driver

    def use_ring_features(self, memory: GuestMemory, features: Feature) -> None:
        """Use the ring as negotiated: indirect tables, notifications by index."""
        self._driver.features = ring_bits(features)
        if Feature.INDIRECT_DESC in features:
            at = self._command + TABLES_AT
            self._driver.tables_gpa = at
            self._driver.tables = ffi.cast("struct vring_desc *", memory.hva(at, _TABLES))

    def send(self, data: bytes, seconds: float = ANSWER_SECONDS) -> int:
        """Send a command and return its answer; TimeoutError without one within ``seconds``.

        A driver must not time out before the device's own deadline has passed: a
        slow device answers late. TimeoutError too if the ring is full of
        commands without an answer, ValueError for a command longer than the
        buffer.
        """
        if len(data) > TABLES_AT:
            raise ValueError(f"a control command of {len(data)} bytes; the buffer takes {TABLES_AT}")
        self._bytes[: len(data)] = data
        self._ack[:] = bytes([ERR + 1])
        if lib.ctrl_driver_add(self._driver, self._command, len(data), self._answer) < 0:
            raise TimeoutError("no room in the control queue: earlier commands have no answer yet")
        lib.ctrl_driver_kick(self._driver)
        if lib.ctrl_driver_wait(self._driver, time.monotonic_ns() + int(seconds * 1e9)):
            raise TimeoutError(f"no answer to a control command within {seconds} s")
        return int(self._ack[0][0])

    def close(self) -> None:
        """Close the eventfds."""
        close_queue(self.queue)


def check_driver(memory: GuestMemory, state: ControlDriverState, features: Feature) -> None:
    """Raise :class:`BadState` unless a driver with these ring features can resume from this state."""
    ring, name = state.ring, "control queue:"
    if Feature.CTRL_VQ not in features:
        raise BadState(f"{name} its driver has state, but {Feature.CTRL_VQ.name} was not negotiated")
    check_place(memory, ring)
    if ring.num < _MIN_RING:
        raise BadState(f"{name} num {ring.num}: a command takes {_MIN_RING} descriptors")
    if Feature.INDIRECT_DESC in features and DESCRIPTOR * ring.num > _TABLES:
        raise BadState(f"{name} num {ring.num}: its indirect tables have room for {_TABLES // DESCRIPTOR} descriptors")
    if state.command % DESCRIPTOR:
        raise BadState(f"{name} command {state.command:#x} is not aligned to {DESCRIPTOR} bytes")
    for field, gpa, size in driver_extents(state):
        check_memory(memory, field, gpa, size)
    check_indices(memory, state)


def check_indices(memory: GuestMemory, state: ControlDriverState) -> None:
    """Raise :class:`BadState` unless the indices of a driver that is right otherwise fit each other and its ring."""
    ring, name = state.ring, "control queue:"
    between = (state.avail_idx - state.used_idx) & MAX_INDEX
    if max(state.avail_idx, state.used_idx) > MAX_INDEX or between != state.open or 2 * state.open > ring.num:
        raise BadState(f"{name} avail_idx {state.avail_idx}, used_idx {state.used_idx}, open {state.open}")
    avail, used = indices(queue_at_rest(ring), memory)
    if avail != state.avail_idx or (used - state.used_idx) & MAX_INDEX > state.open:
        raise BadState(
            f"{name} avail_idx {state.avail_idx}, used_idx {state.used_idx}, open {state.open}; "
            f"its ring in memory has avail {avail}, used {used}"
        )


def driver_extents(state: ControlDriverState) -> list[Extent]:
    """Return the memory that a control queue's driver uses."""
    return [
        *extents_of(state.ring),
        ("control queue: command", state.command, _BUFFER),
        ("control queue: answer", state.answer, 1),
    ]
