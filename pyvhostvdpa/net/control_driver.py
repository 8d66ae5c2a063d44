# SPDX-License-Identifier: MIT
"""The guest's side of the control queue: sends a command, waits for its answer."""

from __future__ import annotations

import os
import time
from typing import Any

from .._cdefs import ffi, lib
from ..memory import GuestMemory
from ..virtqueue.driver import GuestArena, place_queue
from ..virtqueue.layout import map_queue
from .control import ERR
from .features import Feature, ring_bits

CONTROL_RING = 64
_BUFFER = 1 << 16
_TABLES_AT = _BUFFER - (1 << 12)
"""Where in the buffer indirect tables begin, behind the longest command that a device of ours takes."""


class ControlDriver:
    """A driver's control queue in guest memory, one command at a time."""

    def __init__(self, memory: GuestMemory, arena: GuestArena, index: int) -> None:
        self.queue = place_queue(arena, index, CONTROL_RING)
        self._command = arena.take(_BUFFER)
        self._answer = arena.take(1)
        self._bytes = ffi.buffer(ffi.cast("char *", memory.hva(self._command, _BUFFER)), _BUFFER)
        self._ack = ffi.buffer(ffi.cast("char *", memory.hva(self._answer)), 1)
        d: Any = ffi.new("struct ctrl_driver *")
        map_queue(d.ring, self.queue, memory)
        d.kick, d.call = self.queue.kick, self.queue.call
        lib.ctrl_driver_start(d)
        self._driver = d

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
