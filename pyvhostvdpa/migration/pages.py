# SPDX-License-Identifier: MIT
"""Guest pages on a migration's stream.

A frame is a header of 24 bytes, little-endian: u32 type, u32 count, u64
length, u64 sum; then ``length`` bytes whose :func:`stream_sum` is ``sum``.
PAGES carries ``count`` runs of (u64 gpa, u64 length) and then what they hold,
ZERO the runs alone. Runs are whole pages of
:data:`~pyvhostvdpa.memory.guest.GUEST_PAGE` bytes and lie in one region each; a
frame has at most 1,024 of them, 4 MiB of data, or 64 MiB of zeros.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .._cdefs import ffi, lib
from ..base.errors import MigrationCancelled, StreamBroken, StreamCorrupt
from ..memory.guest import GUEST_PAGE, GuestMemory
from .dirty import PageSet

Buffer = bytes | bytearray | memoryview

PAGES: int = lib.FRAME_PAGES
ZERO: int = lib.FRAME_ZERO

Moved = Callable[[int, int], None]
"""Called a few times per second with bytes of guest memory moved so far, and in all."""

_SLICE_NS = 200_000_000
_HASH_STEP = 64 << 20
_RATE_ROUNDS = 3

_MOVES = frozenset((lib.MOVE_AGAIN, lib.MOVE_DONE))
"""What a C loop returns as long as nothing is wrong."""

_FAULTS = {
    lib.FAULT_COUNT: f"its number of runs is not between 1 and {lib.FRAME_RUNS}",
    lib.FAULT_LENGTH: "its length is not what its runs need",
    lib.FAULT_SUM: "its checksum is wrong",
    lib.FAULT_RUN: "a run is empty, or no whole pages",
    lib.FAULT_ADDRESS: "a run is not one piece of guest memory",
}


class PageChannel(Protocol):
    """A stream to the other side, as the page movers need it."""

    torn: bool
    """Set when sending ended in the middle of a frame: no other may follow."""

    @property
    def raw(self) -> bool:
        """Whether it is a plain non-blocking socket that C may read and write; otherwise send() and receive_into()."""

    @property
    def cancel(self) -> int:
        """An eventfd that is readable once the user cancelled, or -1."""

    @property
    def stall(self) -> float:
        """Seconds without a byte after which the other side counts as lost."""

    def fileno(self) -> int:
        """Return the socket's descriptor."""

    def check(self) -> None:
        """Raise if the user cancelled."""

    def send(self, buffer: Buffer) -> None:
        """Send all of a buffer."""

    def receive_into(self, buffer: bytearray | memoryview) -> None:
        """Fill a buffer."""


@dataclass(slots=True)
class FrameHeader:
    """The head of a frame."""

    type: int
    count: int
    length: int
    sum: int


class RoundStatistics(NamedTuple):
    """What sending a set took: ``pages`` with content, ``zero_pages`` named only, ``bytes`` on the stream."""

    pages: int
    zero_pages: int
    bytes: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes of guest memory."""
        return (self.pages + self.zero_pages) * GUEST_PAGE

    @property
    def content(self) -> int:
        """Bytes of guest memory that were more than named."""
        return self.pages * GUEST_PAGE


def stream_sum(data: Buffer) -> int:
    """Return the checksum of a frame's payload (64 bits; finds corruption, not forgery)."""
    if isinstance(data, bytes):
        # without a view of it, which takes longer than a short frame's sum
        return int(lib.stream_sum(data, len(data)))
    view = ffi.from_buffer("uint8_t[]", data)
    return int(lib.stream_sum(view, len(view)))


def memory_hash(memory: GuestMemory, progress: Moved = lambda done, total: None, c_map: Any = None) -> int:
    """Return a 64-bit hash of where guest memory is and what it holds; only a paused guest has one.

    ``c_map`` is where C reads it, if that is not in its own place.
    """
    done, parts = 0, []
    c_map = memory.c_map if c_map is None else c_map
    for number, region in enumerate(memory.regions):
        for at in range(0, region.size, _HASH_STEP):
            size = min(_HASH_STEP, region.size - at)
            part = lib.stream_sum(c_map.regions[number].hva + at, size)
            parts += [region.gpa + at, size, part]
            done += size
            progress(done, memory.size)
    return stream_sum(b"".join(int(part).to_bytes(8, "little") for part in parts))


def _slice_end() -> int:
    """Return when a C loop is to return, so that Python's signals and callbacks have their turn."""
    return time.monotonic_ns() + _SLICE_NS


def _failed(channel: PageChannel, result: int, error: int) -> Exception:
    """Return what a result of a C loop means that is neither MOVE_AGAIN nor MOVE_DONE."""
    if result == lib.MOVE_CANCELLED:
        return MigrationCancelled("cancelled while guest memory was moving")
    if result == lib.MOVE_STALLED:
        return StreamBroken(f"nothing moved on the stream for {channel.stall:g} s")
    why = os.strerror(error) if error else "it was closed by the other side"
    return StreamBroken(f"the stream broke while guest memory was moving: {why}")


class PageSender:
    """Sends sets of pages of ``memory``, not faster than ``limit`` bytes per second (None: as fast as it goes)."""

    def __init__(
        self,
        memory: GuestMemory,
        channel: PageChannel,
        limit: float | None = None,
        progress: Moved = lambda done, total: None,
    ) -> None:
        self._memory = memory
        self._channel = channel
        self._progress = progress
        self._frame = mmap.mmap(-1, lib.SENDER_DATA_AT + lib.SENDER_PAGES * GUEST_PAGE)
        self._zeros = ffi.new("struct page_run[]", lib.FRAME_RUNS)
        self._rounds: list[RoundStatistics] = []
        self._c: Any = ffi.new("struct page_sender *")
        self.read_through(memory.c_map)
        self._c.frame = ffi.from_buffer("uint8_t[]", self._frame)
        self._c.zeros = self._zeros
        self._c.cancel = channel.cancel
        self._c.stall = int(channel.stall * 1e9)
        self.limit = limit

    def read_through(self, c_map: Any) -> None:
        """Read memory from now on where ``c_map`` says that it is."""
        self._c_map = self._c.memory = c_map

    @property
    def limit(self) -> float | None:
        """Bytes per second on the stream, None without a limit. It may be changed at any time."""
        return int(self._c.limit) or None

    @limit.setter
    def limit(self, limit: float | None) -> None:
        self._c.limit = int(limit or 0)
        # a frame is what a twentieth of a second allows: a slow stream goes evenly
        pages = int(limit / 20 / GUEST_PAGE) if limit else lib.SENDER_PAGES
        self._c.frame_pages = min(max(pages, 1), lib.SENDER_PAGES)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of pages with content, over the last rounds; None before any went.

        A page of zeros costs next to nothing, one that the guest has written
        most likely has content. So the former are not counted, and what it took
        to find them only makes the figure too low: rounds that were mostly
        zeros stand in until there are others. What the socket's buffers
        still hold counts as sent.
        """
        last = (self._telling() or self._rounds)[-_RATE_ROUNDS:]
        seconds = sum(each.seconds for each in last)
        return sum(each.content for each in last) / seconds if seconds else None

    @property
    def measured(self) -> bool:
        """Whether a round of mostly pages with content has shown the bandwidth; without one it is a lower limit."""
        return bool(self._telling())

    def _telling(self) -> list[RoundStatistics]:
        return [each for each in self._rounds if each.pages >= each.zero_pages]

    def send(self, pages: PageSet) -> RoundStatistics:
        """Send a set of pages as they are now.

        Raises :class:`MigrationCancelled`, :class:`StreamBroken`, or what
        ``progress`` raises; the channel's ``torn`` is then set if its stream is.
        Cancelling waits for the end of a frame unless the stream stalls.
        """
        bits = ffi.new("uint64_t *[]", pages.bits)
        self._c.bits = ffi.cast("uint64_t const **", bits)
        total = pages.bytes
        begin = time.monotonic()
        lib.pages_begin(self._c)
        step = self._send_raw if self._channel.raw else self._send_through_python
        try:
            while not step():
                self._progress(int(self._c.pages + self._c.zero_pages) * GUEST_PAGE, total)
        except BaseException:
            if self._channel.raw:
                self._channel.torn = bool(self._c.first < self._c.begin < self._c.end)
            raise
        statistics = RoundStatistics(
            int(self._c.pages), int(self._c.zero_pages), int(self._c.bytes), time.monotonic() - begin
        )
        self._progress(statistics.memory, total)
        if statistics.pages:
            self._rounds.append(statistics)
        return statistics

    def _send_raw(self) -> bool:
        result = lib.pages_send(self._c, self._channel.fileno(), _slice_end())
        if result not in _MOVES:
            raise _failed(self._channel, result, self._c.error)
        return bool(result == lib.MOVE_DONE)

    def _send_through_python(self) -> bool:
        deadline = _slice_end()
        with memoryview(self._frame) as frame:
            while time.monotonic_ns() < deadline:
                self._channel.check()
                result = lib.pages_pause(self._c, deadline)
                if result not in _MOVES:
                    raise _failed(self._channel, result, 0)
                if result == lib.MOVE_AGAIN:
                    return False
                if not lib.pages_next(self._c):
                    return True
                with frame[self._c.begin : self._c.end] as part:
                    self._channel.send(part)
                self._c.begin = self._c.end
        return False


class PageReceiver:
    """Writes the page frames of a stream to guest memory, each when it was read whole and found right.

    ``fresh`` if memory is all zeros, and has no other writer: of pages that the stream says are zeros only those
    are looked at that have had content.
    """

    def __init__(self, memory: GuestMemory, channel: PageChannel, fresh: bool = False) -> None:
        self._memory = memory
        self._channel = channel
        self._frame = mmap.mmap(-1, lib.RECEIVER_DATA_AT + lib.FRAME_DATA)
        self._c: Any = ffi.new("struct page_receiver *")
        self._c.memory = memory.c_map
        self._c.frame = ffi.from_buffer("uint8_t[]", self._frame)
        self._c.cancel = channel.cancel
        self._c.stall = int(channel.stall * 1e9)
        self._filled = PageSet(memory)
        self._each_filled = ffi.new("uint64_t *[]", self._filled.bits)
        if fresh:
            self._c.filled = self._each_filled

    @property
    def pages(self) -> int:
        """Pages with content written so far."""
        return int(self._c.pages)

    @property
    def zero_pages(self) -> int:
        """Pages of zeros so far."""
        return int(self._c.zero_pages)

    @property
    def bytes(self) -> int:
        """Bytes of page frames so far, headers included."""
        return int(self._c.bytes)

    @property
    def written_at(self) -> int:
        """When the pages of the last frame were in place, CLOCK_MONOTONIC in ns; 0 before."""
        return int(self._c.written_at)

    def receive(self, header: FrameHeader) -> None:
        """Read the payload behind a PAGES or ZERO header and write it to guest memory.

        On a raw channel further page frames that follow without a pause are
        taken too; the header of any other frame is left in the socket. Raises
        :class:`StreamCorrupt` (guest memory is as the frames before left it),
        :class:`StreamBroken` or :class:`MigrationCancelled`.
        """
        if header.type not in (PAGES, ZERO):
            raise ValueError(f"{header.type:#x} is not a frame of pages")
        self._c.type, self._c.count = header.type, header.count
        self._c.length, self._c.sum = header.length, header.sum
        self._c.got = lib.FRAME_HEADER
        self._c.moved_at = time.monotonic_ns()
        if (result := lib.pages_expect(self._c)) not in _MOVES:
            raise self._refused(result)
        if self._channel.raw:
            result = lib.MOVE_AGAIN
            while result == lib.MOVE_AGAIN:
                result = lib.pages_receive(self._c, self._channel.fileno(), _slice_end())
                if result not in _MOVES:
                    raise self._refused(result)
        else:
            self._channel.check()
            begin = self._c.at + lib.FRAME_HEADER
            with memoryview(self._frame) as frame, frame[begin : begin + header.length] as part:
                self._channel.receive_into(part)
            if (result := lib.pages_apply(self._c)) not in _MOVES:
                raise self._refused(result)

    def _refused(self, result: int) -> Exception:
        if result != lib.MOVE_CORRUPT:
            return _failed(self._channel, result, self._c.error)
        fault = int(self._c.fault)
        which = "PAGES" if self._c.type == PAGES else "ZERO"
        where = ""
        if fault in (lib.FAULT_RUN, lib.FAULT_ADDRESS):
            where = f": {int(self._c.wrong.gpa):#x}+{int(self._c.wrong.length):#x}"
        return StreamCorrupt(
            f"a frame of guest memory ({which}, {int(self._c.count)} runs, {int(self._c.length)} bytes) was refused: "
            f"{_FAULTS[fault]}{where}"
        )
