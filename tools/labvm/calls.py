"""What the preloaded library (calls.c) wrote down: every ioctl and IOTLB message of a program, and figures from them.

It is a second witness beside `vhost-vdpa watch` and the package's own trace, so it computes by itself.
"""

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x31534C4C41434456
HEADER = 128
RECORD = struct.Struct("<QQ3I2HiiQ40s40s")
DRIVER_OK = 4
WORK = "WORK"
"""Not a call: a time in which the program did not wait for anything, if that was asked for."""
MESSAGES = {1: "IOTLB_MISS", 2: "IOTLB_UPDATE", 3: "IOTLB_INVALIDATE", 4: "IOTLB_ACCESS_FAIL"}
MESSAGES |= {5: "IOTLB_BATCH_BEGIN", 6: "IOTLB_BATCH_END"}
# Number in linux/vhost.h: names by direction, of _IO, _IOW, _IOR and _IOWR.
NAMES = {
    0x00: ("", "SET_FEATURES", "GET_FEATURES", ""),
    0x01: ("SET_OWNER", "", "", ""),
    0x02: ("RESET_OWNER", "", "", ""),
    0x03: ("", "SET_MEM_TABLE", "", ""),
    0x10: ("", "SET_VRING_NUM", "", ""),
    0x11: ("", "SET_VRING_ADDR", "", ""),
    0x12: ("", "SET_VRING_BASE", "", "GET_VRING_BASE"),
    0x20: ("", "SET_VRING_KICK", "", ""),
    0x21: ("", "SET_VRING_CALL", "", ""),
    0x22: ("", "SET_VRING_ERR", "", ""),
    0x25: ("", "SET_BACKEND_FEATURES", "", ""),
    0x26: ("", "", "GET_BACKEND_FEATURES", ""),
    0x70: ("", "", "GET_DEVICE_ID", ""),
    0x71: ("", "", "GET_STATUS", ""),
    0x72: ("", "SET_STATUS", "", ""),
    0x73: ("", "", "GET_CONFIG", ""),
    0x74: ("", "SET_CONFIG", "", ""),
    0x75: ("", "SET_VRING_ENABLE", "", ""),
    0x76: ("", "", "GET_VRING_NUM", ""),
    0x77: ("", "SET_CONFIG_CALL", "", ""),
    0x78: ("", "", "GET_IOVA_RANGE", ""),
    0x79: ("", "", "GET_CONFIG_SIZE", ""),
    0x7A: ("", "", "GET_AS_NUM", ""),
    0x7B: ("", "", "", "GET_VRING_GROUP"),
    0x7C: ("", "SET_GROUP_ASID", "", ""),
    0x7D: ("SUSPEND", "", "", ""),
    0x7E: ("RESUME", "", "", ""),
    0x7F: ("", "", "", "GET_VRING_DESC_GROUP"),
    0x80: ("", "", "GET_VQS_COUNT", ""),
    0x81: ("", "", "GET_GROUP_NUM", ""),
    0x82: ("", "", "", "GET_VRING_SIZE"),
}


@dataclass(frozen=True)
class Call:
    """One call. Times are CLOCK_MONOTONIC, ns; `end_ns` is 0 if it never returned."""

    begin_ns: int
    end_ns: int
    device: int
    """N of /dev/vhost-vdpa-N"""
    name: str
    """`SET_STATUS`, `IOTLB_UPDATE`, …"""
    request: int
    """The ioctl's number; 0 for an IOTLB message, 1 for WORK."""
    argument: int
    sent: bytes
    received: bytes
    result: int
    error: int
    pid: int
    tid: int
    lost_cpu: int = 0
    """How often the thread had to give up the CPU meanwhile. If it did, `begin_ns` may be before the call was made, and
    `end_ns` behind its return."""

    def word(self, index: int = 0) -> int:
        """Return one of the 32-bit words that were passed."""
        return int(struct.unpack_from("<I", self.sent, 4 * index)[0])

    def message(self) -> dict[str, int]:
        """Return the fields of an IOTLB message."""
        asid, iova, size, uaddr, perm, kind = struct.unpack_from("<4xIQQQBB", self.sent)
        return {"asid": asid, "iova": iova, "size": size, "uaddr": uaddr, "perm": perm, "type": kind}


def read(path: Path) -> list[Call]:
    """Return the calls in a log, in the order of their begin."""
    data = path.read_bytes()
    magic, capacity, count = struct.unpack_from("<QQQ", data)
    if magic != MAGIC:
        raise ValueError(f"{path} is not a log of calls.so")
    if count > capacity:
        raise ValueError(f"{path} is full: {count - capacity} calls are missing")
    return [_call(*RECORD.unpack_from(data, HEADER + number * RECORD.size)) for number in range(count)]


def on_device(path: Path) -> list[Call]:
    """Return the calls on devices in a log."""
    return [call for call in read(path) if call.name != WORK]


def _call(
    begin: int,
    end: int,
    pid: int,
    tid: int,
    request: int,
    minor: int,
    lost_cpu: int,
    result: int,
    error: int,
    argument: int,
    sent: bytes,
    received: bytes,
) -> Call:
    named = name(request, sent)
    return Call(begin, end, minor, named, request, argument, sent, received, result, error, pid, tid, lost_cpu)


def name(request: int, sent: bytes) -> str:
    """Return the name of a request, or of a message."""
    if request == 0:
        return MESSAGES.get(sent[33], f"IOTLB_{sent[33]}")
    if request == 1:
        return WORK
    known = NAMES.get(request & 0xFF, ("",) * 4)[request >> 30]
    return known or f"{request:#x}"


def shorten(path: Path) -> None:
    """Cut the unused rest off a log whose program has ended."""
    with path.open("r+b") as file:
        _, capacity, count = struct.unpack_from("<QQQ", file.read(HEADER))
        file.truncate(HEADER + min(capacity, count) * RECORD.size)


def now_ns() -> int:
    """Return the time by the clock of the log."""
    return time.monotonic_ns()


def first(calls: Iterable[Call], wanted: Callable[[Call], bool]) -> Call | None:
    """Return the first call that is wanted."""
    return next((call for call in calls if wanted(call)), None)


def busy_ns(calls: Sequence[Call], begin: int, end: int) -> int:
    """Return how much of a time span at least one of the calls was under way."""
    total, reached = 0, begin
    for call in sorted(calls, key=lambda call: call.begin_ns):
        start, stop = max(call.begin_ns, reached), min(call.end_ns, end)
        if stop > start:
            total += stop - start
            reached = stop
    return total


def starts(call: Call) -> bool:
    """Return whether a call lets a queue run: SET_VRING_ENABLE with 1, RESUME, or SET_STATUS with DRIVER_OK."""
    if call.name == "SET_STATUS":
        return bool(call.sent[0] & DRIVER_OK)
    return call.name == "RESUME" or (call.name == "SET_VRING_ENABLE" and call.word(1) == 1)


@dataclass(frozen=True)
class Move:
    """What the calls on two devices say of a move; spans are (begin, end) in ns."""

    switch: tuple[int, int] | None
    """DT1: from the first SUSPEND on the source to the last call that lets a queue run again."""
    stop: tuple[int, int] | None
    """DT2: from the SUSPEND on the source with which it stops for good to the last call of the stop."""
    start: tuple[int, int] | None
    """On the destination: from the first call since the source's stop to the last one that lets a queue run."""

    @property
    def dt1_ms(self) -> float | None:
        """Return downtime #1."""
        return _ms(self.switch)

    @property
    def dt2_ms(self) -> float | None:
        """Return downtime #2."""
        return _ms(self.stop)

    @property
    def start_ms(self) -> float | None:
        """Return the destination start."""
        return _ms(self.start)


def _ms(span: tuple[int, int] | None) -> float | None:
    return (span[1] - span[0]) / 1e6 if span else None


def move(
    source: Sequence[Call], destination: Sequence[Call], migrating_ns: int, paused_ns: int, resumed_ns: int
) -> Move:
    """Read a move from the calls on both devices, and from what QEMU says of itself.

    `paused_ns` is its event STOP on the source, which it sends once its devices have stopped; `resumed_ns` its event
    RESUME on the destination, which it sends before it starts them there.
    """
    suspends = [call for call in source if call.name == "SUSPEND" and migrating_ns <= call.begin_ns < paused_ns]
    if not suspends:
        return Move(None, None, None)
    one, last = suspends[0], suspends[-1]
    running = [call for call in source if one.begin_ns <= call.begin_ns < last.begin_ns and starts(call)]
    stopping = [call for call in source if last.begin_ns <= call.begin_ns <= resumed_ns]
    begun = [call for call in destination if call.begin_ns >= last.begin_ns]
    started = [call for call in begun if starts(call)]
    return Move(
        (one.begin_ns, running[-1].end_ns) if running else None,
        (last.begin_ns, max(call.end_ns for call in stopping)),
        (begun[0].begin_ns, started[-1].end_ns) if started else None,
    )
