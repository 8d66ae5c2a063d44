# SPDX-License-Identifier: MIT
"""Doing what a paused guest would wait for, before it is paused.

What a program does for the first time takes it several times as long: names are looked up, functions of C bound,
pages of code and data touched, caches filled. So each side goes through its part of the paused phase beforehand, on a
stream of its own, and nothing follows from it.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from ..base.errors import StreamBroken, VhostVdpaError
from ..guest.protocol import Guest
from ..trace import gap
from ..trace.recorder import Trace
from .cancel import Cancel
from .fence import Fence
from .stream import Channel, Frame

_TIMES = 10
"""The interpreter adapts a function to what it works on when it was called some times (PEP 659)."""


def rehearse(guest: Guest, arriving: bool) -> None:
    """Go through one side's part of the paused phase, the ``arriving`` guest's or the other's; it fails silently.

    The guest may run, unless it is the arriving one.
    """
    with suppress(VhostVdpaError, OSError):
        for _ in range(_TIMES):
            guest.rehearse(arriving)
    with suppress(VhostVdpaError, OSError):
        near, far = socket.socketpair()
        with Cancel() as cancel, Channel(near, cancel.fileno()) as here, Channel(far, cancel.fileno()) as there:
            for _ in range(_TIMES):
                _hand_over(here, there, cancel)


def _hand_over(here: Channel, there: Channel, cancel: Cancel) -> None:
    """Pass all frames of a hand-over from one end to the other, and wait in vain as well."""
    trace = Trace().device("")
    with suppress(StreamBroken):
        here.receive_header(0.0)
    with gap.step(trace, gap.STATE):
        here.send_frames((Frame.GUEST, os.urandom(64), 0), (Frame.REST, os.urandom(64), 0), (Frame.FINAL, b"", 0))
    header = there.receive_header()
    there.read_ahead()
    while there.receive_payload(header):
        header = there.receive_header()
    cancel.check()
    there.send_frame(Frame.READY)
    here.expect(Frame.READY, Frame.FAILED, seconds=Fence(1.0, 1).left)
    here.send_frame(Frame.GO, bytes(8))
    there.expect(Frame.GO, Frame.CANCEL, seconds=1.0)
