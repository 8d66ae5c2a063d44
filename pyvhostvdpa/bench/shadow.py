# SPDX-License-Identifier: MIT
"""``bench svq``: frames per second and latency, in passthrough and through shadow virtqueues.

The guest is the same, and so are its rings. Both modes take turns, so that
what disturbs the machine disturbs both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import NotProved
from ..device.net import State
from ..guest.arena import GuestArena, place_queue
from ..guest.traffic import Traffic
from ..memory.guest import PAGE_SIZE
from ..virtqueue.layout import map_queue
from .guest import BenchGuest
from .report import device_environment
from .stats import percentile, summarize

SCHEMA = "pyvhostvdpa/bench-svq/1"
MAX_FRAME: int = lib.TOUCH_MAX
MODES = (State.PASSTHROUGH, State.SHADOW)
_SETTLE = 10.0
_FRAME_NS = 5_000_000_000
_TRIES = 50
"""How often the first frame is sent within as much time as any other has."""
_APART = 2048
"""Bytes from one receive buffer to the next."""
_AHEAD = 64
"""Receive buffers that the device has beside that of the frame: a driver never has just one."""


@dataclass(slots=True)
class ModeCost:
    """One mode: frames per second of each round, and how long single frames took to come back, in ns."""

    mode: State
    rates: list[float] = field(default_factory=list)
    latencies: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        rate = summarize([round(r) for r in self.rates])
        return {
            "mode": self.mode.value,
            "frames_per_second": {"median": round(rate.median), "spread": round(rate.spread)},
            "latency_ns": {f"p{p}": round(percentile(self.latencies, p)) for p in (50, 90, 99)}
            | {"max": max(self.latencies), "frames": len(self.latencies)},
        }


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """Both modes."""

    environment: dict[str, Any]
    pairs: int
    frame_size: int
    costs: list[ModeCost]
    shadow: str

    @property
    def ratio(self) -> float:
        """Frames per second through shadow virtqueues for one in passthrough."""
        direct, shadow = (percentile(cost.rates, 50) for cost in self.costs)
        return shadow / direct if direct else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its schema has it."""
        return {
            "schema": SCHEMA,
            "pairs": self.pairs,
            "frame_size": self.frame_size,
            "shadow": self.shadow,
            "modes": [cost.to_dict() for cost in self.costs],
            "ratio": round(self.ratio, 4),
            "environment": self.environment,
        }


def run(
    path: str | os.PathLike[str],
    pairs: int = 1,
    frame_size: int = 256,
    seconds: float = 2.0,
    rounds: int = 3,
    frames: int = 1000,
    observer: Callable[[str], None] = lambda words: None,
    shadow: str | None = None,
) -> ShadowReport:
    """Measure ``rounds`` times ``seconds`` of traffic in each mode, and ``frames`` single frames. The device is reset.

    ``shadow`` is one of :data:`pyvhostvdpa.device.shadowing.NAMES`, None for
    the default.
    Raises :class:`~pyvhostvdpa.probe.proofs.NotProved` if frames do not come back,
    or not all of them, :class:`~pyvhostvdpa.MissingFeature` if the
    device cannot be suspended.
    """
    costs = [ModeCost(mode) for mode in MODES]
    with BenchGuest(path, pairs, frame_size, shadow=shadow) as guest:
        how = guest.device.shadow
        where = device_environment(guest.device)
        for number in range(rounds):
            for cost in costs:
                cost.rates.append(_rate(guest, cost.mode, seconds, first=not number))
                observer(f"round {number + 1} of {rounds}: {cost.mode.value} {cost.rates[-1]:,.0f} frames/s")
    with BenchGuest(path, 1, frame_size, shadow=shadow) as guest:
        for cost in costs:
            cost.latencies = _latencies(guest, cost.mode, frames, frame_size)
            observer(f"{cost.mode.value}: median latency {percentile(cost.latencies, 50) / 1e3:.1f} us")
    return ShadowReport(where, pairs, frame_size, costs, how)


def _rate(guest: BenchGuest, mode: State, seconds: float, first: bool) -> float:
    guest.start(mode)
    if first and mode is MODES[0]:
        guest.use_pairs()
    traffic = Traffic(guest.nic)
    for pair in guest.nic.pairs:
        pair.c.sending = 1
    traffic.run()
    try:
        # the first frames pay for what is cold
        time.sleep(min(0.2, seconds / 4))
        before, begin = guest.nic.counts().received, time.monotonic_ns()
        time.sleep(seconds)
        after, end = guest.nic.counts().received, time.monotonic_ns()
        guest.device.check()
        arrived = traffic.stop_sending(_SETTLE)
    finally:
        traffic.end()
    counts = guest.nic.counts()
    if not arrived or counts.corrupted or counts.duplicated:
        raise NotProved(
            f"{guest.device.path}, {mode.value}: {counts.lost} frames did not come back within {_SETTLE:g} s, "
            f"{counts.corrupted} were corrupted, {counts.duplicated} duplicated",
            hint="a device that does not loop back needs a peer that reflects its frames",
        )
    guest.device.stop()
    return (after - before) / ((end - begin) / 1e9)


def _latencies(guest: BenchGuest, mode: State, frames: int, size: int) -> list[int]:
    """Send one frame after the other, each when the one before has come back."""
    arena = GuestArena(guest.memory)
    # behind the NIC's own rings and buffers, which rest meanwhile
    arena.allocate(guest.memory.regions[0].size * 3 // 4)
    queues = [place_queue(arena, index, min(256, guest.device.largest_ring([index]))) for index in (0, 1)]
    c: Any = ffi.new("struct touch *")
    for ring, queue in zip((c.rx, c.tx), queues, strict=True):
        map_queue(ring, queue, guest.memory)
    (c.rx_kick, c.rx_call), (c.tx_kick, c.tx_call) = ((queue.kick, queue.call) for queue in queues)
    places = [_place(guest, arena.allocate(length)) for length in (PAGE_SIZE, queues[0].num * _APART)]
    lib.touch_start(c)
    c.ahead, c.apart = min(_AHEAD, queues[0].num // 2), _APART

    def send(within: int) -> int:
        return int(lib.touch_frame(c, *places, size, time.monotonic_ns() + within, within))

    try:
        guest.device.start(mode, queues, guest.control)
        took = []
        # where what is sent does not go through the relay, the first frame may be faster than the first receive buffers
        next((state for state in map(send, [_FRAME_NS // _TRIES] * _TRIES) if state != lib.TOUCH_SENT), None)
        for _ in range(frames):
            if send(_FRAME_NS) != lib.TOUCH_SENT | lib.TOUCH_BACK:
                raise NotProved(
                    f"{guest.device.path}, {mode.value}: a frame did not come back",
                    hint="a device that does not loop back needs a peer that reflects its frames",
                )
            took.append(int(c.took))
    finally:
        guest.device.reset()
        for queue in queues:
            os.close(queue.kick)
            os.close(queue.call)
    return took


def _place(guest: BenchGuest, gpa: int) -> Any:
    hva = guest.memory.hva(gpa, PAGE_SIZE)
    return ffi.new("struct touch_place *", {"iova": gpa, "hva": ffi.cast("uint8_t *", hva)})
