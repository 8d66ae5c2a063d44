# SPDX-License-Identifier: MIT
"""Which clock a recording's times are of, and how two recordings are put on one.

CLOCK_MONOTONIC begins when a machine boots. Recordings of one boot have the same clock. Those of two hosts are joined
by the hosts' real time, so as exactly as these agree: the kernel's own estimate of that is reported (adjtimex,
``maxerror``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import VhostVdpaError
from .recorder import Trace

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UNSYNCHRONISED = 0x40
"""STA_UNSYNC (linux/timex.h)."""


class _Timex(ctypes.Structure):
    """The begin of ``struct timex``; the rest is room."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("room", ctypes.c_long * 32),
    ]


def _max_error_ms() -> float | None:
    """Return how far this machine's real time may be off; None if it is not synchronised."""
    timex = _Timex()
    with contextlib.suppress(AttributeError, OSError):
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) >= 0:
            return None if timex.status & _UNSYNCHRONISED else float(timex.maxerror) / 1000
    return None


def now() -> dict[str, Any]:
    """Return what a recording has to say of its clock."""
    boot_id = ""
    with contextlib.suppress(OSError):
        boot_id = _BOOT_ID.read_text().strip()
    return {
        "host": os.uname().nodename,
        "boot_id": boot_id,
        "realtime_minus_monotonic_ns": time.time_ns() - time.monotonic_ns(),
        "max_error_ms": _max_error_ms(),
    }


@dataclass(frozen=True, slots=True)
class Joined:
    """Several recordings as one. ``clocks`` says for each how its times were moved."""

    trace: Trace
    clocks: list[dict[str, Any]]


def join(recordings: Sequence[tuple[str, Trace, Mapping[str, Any]]]) -> Joined:
    """Put recordings (name, trace, what it says of itself) on the first one's clock.

    Devices of different boots get the recording's name in front, since each host has its own /dev/vhost-vdpa-0.
    VhostVdpaError if a recording of another host does not say what its clock was.
    """
    first = _clock(recordings[0])
    joined = Trace(max(1, sum(len(trace.events) for _, trace, _ in recordings)))
    clocks = []
    for name, trace, about in recordings:
        clock = _clock((name, trace, about))
        # of two that do not say it nothing is known
        same = trace is recordings[0][1] or (bool(clock.get("boot_id")) and clock["boot_id"] == first.get("boot_id"))
        offset = 0 if same else _offset(name, clock, first)
        prefix = f"{name}:" if not same or _several(recordings, first) else ""
        joined.events += [
            event._replace(t_begin=event.t_begin + offset, t_end=event.t_end + offset, device=prefix + event.device)
            for event in trace.events
        ]
        joined.dropped += trace.dropped
        errors = [each.get("max_error_ms") for each in (clock, first)]
        unknown = any(error is None for error in errors)
        clocks.append(
            {
                "recording": name,
                "host": clock.get("host"),
                "offset_ns": offset,
                "uncertain_ms": 0.0 if same else None if unknown else sum(float(error or 0) for error in errors),
            }
        )
    joined.events.sort(key=lambda event: event.t_end)
    return Joined(joined, clocks)


def _clock(recording: tuple[str, Trace, Mapping[str, Any]]) -> dict[str, Any]:
    return dict(recording[2].get("clock") or {})


def _several(recordings: Sequence[tuple[str, Trace, Mapping[str, Any]]], first: Mapping[str, Any]) -> bool:
    return any(_clock(each).get("boot_id") != first.get("boot_id") for each in recordings)


def _offset(name: str, clock: Mapping[str, Any], first: Mapping[str, Any]) -> int:
    key = "realtime_minus_monotonic_ns"
    if key not in clock or key not in first:
        raise VhostVdpaError(
            f"{name} does not say what its clock was, so it cannot be joined with another host's recording",
            hint="vhost-vdpa watch --trace FILE.jsonl on both hosts",
        )
    return int(clock[key]) - int(first[key])
