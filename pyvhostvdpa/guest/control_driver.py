# SPDX-License-Identifier: MIT
"""The guest's side of the control queue: sends a command, waits for its answer."""

from __future__ import annotations

import os
import time
from typing import Any, Self

from .._cdefs import ffi, lib
from ..memory.guest import GuestMemory
from ..net.control import ERR
from ..net.features import Feature, ring_bits
from ..virtqueue.layout import GuestQueue, map_queue
from .arena import GuestArena, place_queue
from .nic_state import MAX_INDEX, BadState, ControlDriverState, check_memory, check_place, place_of, queue_of

CONTROL_RING = 64
_BUFFER = 1 << 16
_TABLES_AT = _BUFFER - (1 << 12)
"""Where in the buffer indirect tables begin, behind the longest command that a device of ours takes."""


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
    def place(cls, memory: GuestMemory, arena: GuestArena, index: int) -> Self:
        """Set a control queue up as a driver does that starts."""
        driver = cls(memory, place_queue(arena, index, CONTROL_RING), arena.take(_BUFFER), arena.take(1))
        lib.ctrl_driver_start(driver._driver)
        return driver

    @classmethod
    def restore(cls, memory: GuestMemory, state: ControlDriverState) -> Self:
        """Go on where a driver was whose rings are in ``memory``; :class:`BadState` if they cannot be."""
        check_place(memory, state.ring)
        _check_indices(state)
        check_memory(memory, state.command, _BUFFER)
        check_memory(memory, state.answer, 1)
        driver = cls(memory, queue_of(state.ring), state.command, state.answer)
        driver._load(state)
        return driver

    def load(self, state: ControlDriverState) -> None:
        """Take over what a driver knows whose places are these; :class:`BadState` if they are not."""
        if (state.ring, state.command, state.answer) != (place_of(self.queue), self._command, self._answer):
            raise BadState("control queue: it is not where it was said to be")
        _check_indices(state)
        self._load(state)

    def _load(self, state: ControlDriverState) -> None:
        d = self._driver
        d.avail_idx, d.used_idx, d.open = state.avail_idx, state.used_idx, state.open

    def state(self) -> ControlDriverState:
        """Return what this driver knows; nobody may be sending."""
        d = self._driver
        return ControlDriverState(
            place_of(self.queue), self._command, self._answer, int(d.avail_idx), int(d.used_idx), int(d.open)
        )

    def use_ring_features(self, memory: GuestMemory, features: Feature) -> None:
        """Use the ring as negotiated: indirect tables, notifications by index."""
        self._driver.features = ring_bits(features)
        if Feature.INDIRECT_DESC in features:
            at = self._command + _TABLES_AT
            self._driver.tables_gpa = at
            self._driver.tables = ffi.cast("struct vring_desc *", memory.hva(at, _BUFFER - _TABLES_AT))

    def send(self, data: bytes, seconds: float = 10.0) -> int:
        """Send a command and return its answer; TimeoutError if there is none within ``seconds``."""
        self._bytes[: len(data)] = data
        self._ack[:] = bytes([ERR + 1])
        lib.ctrl_driver_add(self._driver, self._command, len(data), self._answer)
        lib.ctrl_driver_kick(self._driver)
        if lib.ctrl_driver_wait(self._driver, time.monotonic_ns() + int(seconds * 1e9)):
            raise TimeoutError(f"no answer to a control command within {seconds} s")
        return int(self._ack[0][0])

    def close(self) -> None:
        """Close the eventfds."""
        os.close(self.queue.kick)
        os.close(self.queue.call)


def _check_indices(state: ControlDriverState) -> None:
    if max(state.avail_idx, state.used_idx) > MAX_INDEX or 2 * state.open > state.ring.num:
        raise BadState(f"control queue: indices {state.avail_idx} and {state.used_idx}, {state.open} commands open")
