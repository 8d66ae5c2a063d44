# SPDX-License-Identifier: MIT
"""The exchange while the guest is paused, made by C in one go: state, READY and GO, on either side.

Each side looks at what has arrived before it takes it. What is not exactly
what belongs there, a cancel, a full or a broken socket end the exchange in
front of that; the side then continues step by step, as it does without this
module, from where the exchange came to. So every failure is handled in
``source.py`` and ``destination.py``, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import StreamBroken, VhostVdpaError
from ..device.work import ConfigLook
from ..guest.protocol import Sections
from ..trace import gap
from ..trace.recorder import DeviceTrace
from .fence import Fence
from .stream import HEADER, Channel, Frame, encoded

_READY = encoded(Frame.READY, b"", 0)
_ROOM = 1 << 16
"""Bytes of a state that is passed in this way; a socket holds it whole."""


def _new(kind: str, channel: Channel, sections: Sections) -> tuple[Any, Any]:
    """Return the C side's structure and its buffer."""
    room = min(_ROOM, sections.room + HEADER.size * (int(sections.c.count) + 2))
    frames = ffi.new("uint8_t[]", room)
    values = {"fd": channel.fileno(), "cancel": channel.cancel, "guest": sections.c, "frames": frames, "room": room}
    return ffi.new(f"struct {kind} *", values), frames


class Leaving:
    """The source's part, for a guest that is paused and stopped; ``channel`` has to be raw."""

    def __init__(self, channel: Channel, sections: Sections, trace: DeviceTrace) -> None:
        self._channel, self._sections, self._trace = channel, sections, trace
        self._c, self._frames = _new("leaving", channel, sections)

    def send(self) -> bool:
        """Send the state as far as the socket takes it at once; whether anything was sent."""
        lib.leave(self._c)
        return bool(self._c.result != lib.LEAVE_NOTHING)

    def await_ready(self) -> bool:
        """Wait a moment for READY without a hash; whether it was taken."""
        lib.leave_await(self._c)
        return bool(self._c.result == lib.LEAVE_READY)

    def complete(self) -> None:
        """Send what of the state a full socket has not taken; raises what :meth:`Channel.send` raises."""
        if self._c.result == lib.LEAVE_SENDING:
            self._channel.send_rest(bytes(ffi.buffer(self._frames, self._c.length)), int(self._c.sent))

    def give(self) -> None:
        """Send GO; raises what :meth:`Channel.send` raises."""
        sent: int = lib.leave_give(self._c)
        go = bytes(self._c.go)
        if sent < len(go):
            self._channel.send_rest(go, sent)

    def record(self) -> None:
        """Record the step, if it was made; nothing waits for it."""
        if self._c.end:
            self._trace.record(int(self._c.begin), int(self._c.end), gap.STATE, {}, None, gap.STATE)


class Arriving:
    """The destination's part, for a guest whose outline is here.

    ``looks`` are what is asked of the devices before READY. ``trace`` gets the steps.
    """

    def __init__(self, channel: Channel, sections: Sections, looks: Sequence[ConfigLook], trace: DeviceTrace) -> None:
        self._channel, self._sections, self._looks, self._trace = channel, sections, list(looks), trace
        self._c, self._frames = _new("arriving", channel, sections)
        self._answers = ffi.new("struct expected_answer[]", len(self._looks))
        for answer, look in zip(self._answers, self._looks, strict=True):
            look.fill(answer)
        self._c.answers, self._c.answer_count = self._answers, len(self._looks)
        self._c.ready = list(_READY)

    def look(self) -> bool:
        """Wait a moment for the next frame; whether it is GUEST, and all of the state is there and fits."""
        return bool(lib.arrive_look(self._c))

    def run(self) -> None:
        """Take what :meth:`look` has found; if the devices are as expected send READY, and wait a moment for GO."""
        lib.arrive(self._c)
        if not self.taken:
            raise StreamBroken("the stream has not what it was seen to have")

    @property
    def taken(self) -> bool:
        """Whether the state was taken."""
        return bool(self._c.result != lib.ARRIVE_NOTHING)

    @property
    def went_on(self) -> bool:
        """Whether READY went, or a part of it: :meth:`go` comes next."""
        return bool(self._c.result > lib.ARRIVE_LOADED)

    def prepare(self) -> None:
        """Make what the guest needs beside C, between :meth:`look` and :meth:`run`."""
        self._sections.prepare(self.guest_section)

    def guest_section(self) -> bytes:
        """What GUEST held."""
        _, _, length, _ = HEADER.unpack(bytes(ffi.buffer(self._frames, HEADER.size)))
        return bytes(ffi.buffer(self._frames + HEADER.size, length))

    @property
    def given(self) -> bool:
        """Whether GO was taken."""
        return bool(self._c.result == lib.ARRIVE_GIVEN)

    @property
    def clock_ahead(self) -> int:
        """By how many ns this host's clock was ahead of the source's as GO came."""
        return int(self._c.go_at) - int(self._c.clock)

    @property
    def go_at(self) -> int:
        """When GO had come, CLOCK_MONOTONIC in ns."""
        return int(self._c.go_at)

    def go(self, fence: Fence) -> tuple[Frame, bytes]:
        """Return GO, or CANCEL, with its payload, by ``fence`` at the latest.

        Raises what :meth:`Channel.expect` raises.
        """
        if self.given:
            return Frame.GO, int(self._c.clock).to_bytes(8, "little", signed=True)
        if self._c.result == lib.ARRIVE_ANSWERING:
            self._channel.send_rest(_READY, int(self._c.sent))
        answer = self._channel.expect(Frame.GO, Frame.CANCEL, seconds=fence.left)
        self._c.go_at = time.monotonic_ns()
        return answer

    def record(self) -> None:
        """Record the steps; nothing waits for it."""
        c = self._c
        for look in self._looks:
            # a request that failed was made again, step by step
            with suppress(VhostVdpaError):
                look.settle()
        if c.end:
            self._trace.record(int(c.begin), int(c.end), gap.LOAD, {}, None, gap.LOAD)
        if c.go_at:
            self._trace.record(int(c.ready_begin), int(c.go_at), gap.HAND_OVER, {}, None, gap.HAND_OVER)
