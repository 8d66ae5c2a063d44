"""Guest pages on a stream: two guests' memory in this process, a socket between them."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvhostvdpa.base.errors import MigrationCancelled, StreamBroken, StreamCorrupt
from pyvhostvdpa.memory.guest import GUEST_PAGE, Gpa, GuestMemory
from pyvhostvdpa.migration.cancel import check_cancelled
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import (
    PAGES,
    ZERO,
    Buffer,
    PageReceiver,
    PageSender,
    RoundStatistics,
    memory_hash,
    stream_sum,
)

LOW, HIGH = Gpa(1 << 30), Gpa((1 << 30) + (1 << 20))
"""The regions touch: a run must not go across."""
SIZE = 1 << 20
OTHER = 77


class Header(NamedTuple):
    type: int
    count: int
    length: int
    sum: int


@dataclass
class Channel:
    """A plain socket, or with ``raw`` false one that only Python moves."""

    socket: socket.socket
    raw: bool = True
    stall: float = 30.0
    torn: bool = False
    cancel: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))

    def __post_init__(self) -> None:
        self.socket.setblocking(not self.raw)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, buffer: Buffer) -> None:
        self.socket.setblocking(True)
        self.socket.sendall(buffer)
        self.socket.setblocking(not self.raw)

    def check(self) -> None:
        check_cancelled(self.cancel)

    def receive_into(self, buffer: Buffer) -> None:
        view = memoryview(buffer)
        while view:
            got = self.socket.recv_into(view)
            if not got:
                raise StreamBroken("closed")
            view = view[got:]

    def header(self) -> Header:
        self.socket.setblocking(True)
        data = self.socket.recv(24, socket.MSG_WAITALL)
        self.socket.setblocking(not self.raw)
        if len(data) < 24:
            raise StreamBroken("no more frames")
        return Header(*struct.unpack("<IIQQ", data))

    def close(self) -> None:
        self.socket.close()
        os.close(self.cancel)


class Pair:
    """A source and a destination."""

    def __init__(self, raw: bool = True) -> None:
        self.source = GuestMemory([(LOW, SIZE), (HIGH, SIZE)])
        self.destination = GuestMemory([(LOW, SIZE), (HIGH, SIZE)])
        self.near, self.far = (Channel(end, raw) for end in socket.socketpair())
        self.receiver = PageReceiver(self.destination, self.far)

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.source.close()
        self.destination.close()

    def send(self, pages: PageSet, limit: float | None = None) -> RoundStatistics:
        """Send a set while the other side receives; both have ended then."""
        with receiving(self):
            statistics = PageSender(self.source, self.near, limit).send(pages)
            self.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))
        return statistics

    def receive(self) -> None:
        while (header := self.far.header()).type != OTHER:
            self.receiver.receive(header)

    def refuses(self, type: int, count: int, payload: bytes, sum: int | None = None, length: int | None = None) -> str:
        """Let a frame be received that is not to be; the reason that is given."""
        before = memory_hash(self.destination)
        self.near.send(payload[: self.near.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4])
        with pytest.raises(StreamCorrupt) as e:
            self.receiver.receive(
                Header(
                    type,
                    count,
                    len(payload) if length is None else length,
                    stream_sum(payload) if sum is None else sum,
                )
            )
        assert memory_hash(self.destination) == before
        return str(e.value)


class receiving:  # noqa: N801
    """The destination receives in a thread until the frame OTHER; what it raises is raised at the end."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._raised: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._pair.receive()
        except BaseException as e:
            self._raised.append(e)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        for each in self._raised:
            raise each


@pytest.fixture(params=[True, False], ids=["raw", "python"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


@pytest.fixture
def raw() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def fill(memory: GuestMemory, seed: int = 1) -> None:
    for region in memory.regions:
        part = Random(seed + region.gpa).randbytes(SIZE // 16)
        for at in range(0, region.size, len(part)):
            region.memory.buffer[at : at + len(part)] = at.to_bytes(8, "little") + part[8:]


def table(*runs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", *run) for run in runs)


# -- moving ------------------------------------------------------------------------


def test_all_pages_arrive_as_they_are(pair: Pair) -> None:
    fill(pair.source)
    pair.source.regions[1].memory.buffer[: 7 * GUEST_PAGE] = bytes(7 * GUEST_PAGE)
    pages = PageSet.all(pair.source)
    assert pages.bytes == pair.source.size
    statistics = pair.send(pages)
    assert memory_hash(pair.destination) == memory_hash(pair.source)
    assert statistics.zero_pages == pair.receiver.zero_pages == 7
    assert statistics.pages == pair.receiver.pages == pages.count - 7
    assert statistics.bytes == pair.receiver.bytes
    assert statistics.memory == pair.source.size


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(
    chosen=st.lists(st.tuples(st.integers(0, 511), st.integers(1, 90), st.booleans()), max_size=12),
    seed=st.integers(0, 1 << 30),
)
def test_exactly_the_pages_of_a_set_arrive(raw: Pair, chosen: list[tuple[int, int, bool]], seed: int) -> None:
    fill(raw.source, seed)
    fill(raw.destination, seed + 1)
    pages = PageSet(raw.source)
    expected = [bytearray(region.memory.buffer) for region in raw.destination.regions]
    for first, count, zero in chosen:
        for number in range(first, min(first + count, 512)):
            region, at = divmod(number * GUEST_PAGE, SIZE)
            if zero:
                raw.source.regions[region].memory.buffer[at : at + GUEST_PAGE] = bytes(GUEST_PAGE)
            pages.add(LOW + number * GUEST_PAGE)
    for gpa in pages:
        region, at = divmod(gpa - LOW, SIZE)
        expected[region][at : at + GUEST_PAGE] = raw.source.regions[region].memory.buffer[at : at + GUEST_PAGE]
    statistics = raw.send(pages)
    assert statistics.pages + statistics.zero_pages == pages.count
    assert [bytearray(region.memory.buffer) for region in raw.destination.regions] == expected


def test_a_page_that_became_zero_is_zero_at_the_other_side(pair: Pair) -> None:
    fill(pair.source)
    pair.send(PageSet.all(pair.source))
    pages = PageSet(pair.source)
    for gpa in (LOW, LOW + GUEST_PAGE, HIGH - GUEST_PAGE, HIGH):
        region, at = divmod(gpa - LOW, SIZE)
        pair.source.regions[region].memory.buffer[at : at + GUEST_PAGE] = bytes(GUEST_PAGE)
        pages.add(gpa)
    assert pair.send(pages).zero_pages == 4
    assert memory_hash(pair.destination) == memory_hash(pair.source)


def test_a_page_that_is_not_zero_only_at_its_end_is_sent(raw: Pair) -> None:
    raw.source.regions[0].memory.buffer[GUEST_PAGE - 1] = 1
    assert raw.send(PageSet.all(raw.source)).pages == 1
    assert memory_hash(raw.destination) == memory_hash(raw.source)


def test_zero_pages_cost_next_to_nothing_on_the_stream(raw: Pair) -> None:
    statistics = raw.send(PageSet.all(raw.source))
    assert statistics.zero_pages == raw.source.size // GUEST_PAGE
    assert statistics.bytes < 200


def test_an_empty_set_sends_nothing(pair: Pair) -> None:
    assert pair.send(PageSet(pair.source))[:3] == (0, 0, 0)


def test_single_pages_with_holes_between_them_fit_into_many_frames(pair: Pair) -> None:
    fill(pair.source)
    pages = PageSet(pair.source)
    for gpa in range(LOW, LOW + 2 * SIZE, 2 * GUEST_PAGE):
        pages.add(gpa)
        if gpa % (8 * GUEST_PAGE) == 0:
            pair.source.regions[(gpa - LOW) // SIZE].memory.buffer[(gpa - LOW) % SIZE :][:GUEST_PAGE] = bytes(
                GUEST_PAGE
            )
    statistics = pair.send(pages)
    assert statistics.pages == pair.receiver.pages == 192
    assert statistics.zero_pages == pair.receiver.zero_pages == 64
    for gpa in pages:
        region, at = divmod(gpa - LOW, SIZE)
        assert (
            pair.destination.regions[region].memory.buffer[at : at + GUEST_PAGE]
            == pair.source.regions[region].memory.buffer[at : at + GUEST_PAGE]
        )


def test_a_guest_that_writes_meanwhile_never_makes_a_checksum_wrong(raw: Pair) -> None:
    fill(raw.source)
    stop = threading.Event()

    def write() -> None:
        value = 0
        buffer = raw.source.regions[0].memory.buffer
        while not stop.is_set():
            value = (value + 1) % 256
            buffer[: 256 << 10] = bytes([value]) * (256 << 10)

    guest = threading.Thread(target=write)
    guest.start()
    try:
        for _ in range(50):
            raw.send(PageSet.all(raw.source))
    finally:
        stop.set()
        guest.join()
    raw.send(PageSet.all(raw.source))
    assert memory_hash(raw.destination) == memory_hash(raw.source)


def test_progress_is_told_up_to_the_end(pair: Pair) -> None:
    fill(pair.source)
    told: list[tuple[int, int]] = []
    with receiving(pair):
        sender = PageSender(pair.source, pair.near, None, lambda done, total: told.append((done, total)))
        sender.send(PageSet.all(pair.source))
        pair.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))
    assert told[-1] == (pair.source.size, pair.source.size)
    assert sorted(told) == told


def test_a_limit_is_kept_within_a_tenth(pair: Pair) -> None:
    fill(pair.source)
    statistics = pair.send(PageSet.all(pair.source), limit=2e6)
    assert statistics.bytes / statistics.seconds <= 2e6 * 1.1
    assert memory_hash(pair.destination) == memory_hash(pair.source)


def measured(pair: Pair, *sets: PageSet) -> tuple[float | None, list[RoundStatistics]]:
    """The bandwidth after rounds of these sets, and what each took."""
    sender = PageSender(pair.source, pair.near)
    with receiving(pair):
        rounds = [sender.send(pages) for pages in sets]
        pair.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))
    return sender.bandwidth, rounds


def some(pair: Pair, gpa: int, pages: int) -> PageSet:
    chosen = PageSet(pair.source)
    chosen.add(gpa, pages * GUEST_PAGE)
    return chosen


def test_the_bandwidth_is_not_known_before_a_page_with_content_went(pair: Pair) -> None:
    assert measured(pair)[0] is None
    assert measured(pair, PageSet.all(pair.source), PageSet(pair.source))[0] is None


def test_the_bandwidth_is_that_of_pages_with_content(pair: Pair) -> None:
    fill(pair.source)
    bandwidth, [sent] = measured(pair, PageSet.all(pair.source))
    assert bandwidth == pytest.approx(pair.source.size / sent.seconds)


def test_pages_of_zeros_do_not_add_to_the_bandwidth(pair: Pair) -> None:
    pair.source.regions[0].memory.buffer[: 9 * GUEST_PAGE] = b"x" * 9 * GUEST_PAGE
    bandwidth, [sent] = measured(pair, PageSet.all(pair.source))
    assert (sent.pages, sent.zero_pages) == (9, pair.source.size // GUEST_PAGE - 9)
    assert bandwidth == pytest.approx(9 * GUEST_PAGE / sent.seconds)


def test_a_round_of_mostly_zeros_counts_until_another_tells_better(pair: Pair) -> None:
    fill(pair.source)
    pair.source.regions[1].memory.buffer[:] = bytes(SIZE)
    full, zeros = some(pair, LOW, 90), some(pair, HIGH - GUEST_PAGE, 1) | some(pair, HIGH, 90)
    bandwidth, rounds = measured(pair, zeros, full, zeros)
    assert [each.pages for each in rounds] == [1, 90, 1]
    assert bandwidth == pytest.approx(90 * GUEST_PAGE / rounds[1].seconds)


def test_the_bandwidth_is_that_of_the_last_three_rounds(pair: Pair) -> None:
    fill(pair.source)
    bandwidth, rounds = measured(pair, *(some(pair, LOW, pages) for pages in (200, 20, 30, 40)))
    assert bandwidth == pytest.approx(90 * GUEST_PAGE / sum(each.seconds for each in rounds[1:]))


def test_a_frame_of_something_else_stays_in_the_stream(raw: Pair) -> None:
    fill(raw.source)
    pages = PageSet(raw.source)
    pages.add(LOW, 100 * GUEST_PAGE)
    with receiving(raw):
        PageSender(raw.source, raw.near).send(pages)
        raw.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0) + b"what follows")
    assert raw.far.socket.recv(100) == b"what follows"


# -- trouble -----------------------------------------------------------------------


def test_cancelling_ends_a_sender_that_waits(raw: Pair) -> None:
    fill(raw.source)
    threading.Timer(0.3, lambda: os.eventfd_write(raw.near.cancel, 1)).start()
    begin = time.monotonic()
    with pytest.raises(MigrationCancelled):
        PageSender(raw.source, raw.near).send(PageSet.all(raw.source))
    assert time.monotonic() - begin < 20
    assert raw.near.torn


def test_cancelling_while_the_stream_moves_leaves_no_half_frame(raw: Pair) -> None:
    fill(raw.source)
    threading.Timer(0.3, lambda: os.eventfd_write(raw.near.cancel, 1)).start()
    sender = PageSender(raw.source, raw.near, limit=3e6)
    with receiving(raw):
        with pytest.raises(MigrationCancelled):
            sender.send(PageSet.all(raw.source))
        assert not raw.near.torn
        raw.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))


def test_cancelling_within_a_frame_ends_behind_it(raw: Pair) -> None:
    fill(raw.source)
    done = threading.Event()

    def cancel_then_read() -> None:
        time.sleep(0.1)
        os.eventfd_write(raw.near.cancel, 1)
        time.sleep(0.1)
        with socket.socket(fileno=os.dup(raw.far.fileno())) as sock:
            sock.settimeout(0.01)
            while not done.is_set():
                with suppress(TimeoutError):
                    sock.recv(1 << 12)

    thread = threading.Thread(target=cancel_then_read)
    thread.start()
    try:
        with pytest.raises(MigrationCancelled):
            PageSender(raw.source, raw.near).send(PageSet.all(raw.source))
    finally:
        done.set()
        thread.join()
    assert not raw.near.torn


def test_cancelling_ends_a_sender_with_a_limit(pair: Pair) -> None:
    fill(pair.source)
    threading.Timer(0.3, lambda: os.eventfd_write(pair.near.cancel, 1)).start()
    with pytest.raises(MigrationCancelled):
        PageSender(pair.source, pair.near, limit=50_000).send(PageSet.all(pair.source))


def test_cancelling_is_noticed_by_who_has_nothing_to_wait_for(pair: Pair) -> None:
    one = PageSet(pair.source)
    one.add(LOW)
    fill(pair.source)
    os.eventfd_write(pair.near.cancel, 1)
    with pytest.raises(MigrationCancelled):
        PageSender(pair.source, pair.near).send(one)
    assert not pair.near.torn
    payload = table((LOW, GUEST_PAGE)) + b"x" * GUEST_PAGE
    pair.near.send(payload)
    os.eventfd_write(pair.far.cancel, 1)
    with pytest.raises(MigrationCancelled):
        pair.receiver.receive(Header(PAGES, 1, len(payload), stream_sum(payload)))


def test_cancelling_ends_a_receiver_that_waits(raw: Pair) -> None:
    threading.Timer(0.3, lambda: os.eventfd_write(raw.far.cancel, 1)).start()
    with pytest.raises(MigrationCancelled):
        raw.receiver.receive(Header(PAGES, 1, 16 + GUEST_PAGE, 0))


def test_a_receiver_that_stalls_is_given_up(raw: Pair) -> None:
    fill(raw.source)
    raw.near.stall = 0.5
    with pytest.raises(StreamBroken, match=r"nothing moved on the stream for 0\.5 s"):
        PageSender(raw.source, raw.near).send(PageSet.all(raw.source))


def test_a_sender_that_stalls_is_given_up(raw: Pair) -> None:
    raw.far.stall = 0.5
    with pytest.raises(StreamBroken, match=r"nothing moved on the stream for 0\.5 s"):
        PageReceiver(raw.destination, raw.far).receive(Header(PAGES, 1, 16 + GUEST_PAGE, 0))


def test_a_stream_that_trickles_is_no_stall(raw: Pair) -> None:
    raw.far.stall = 1.0
    payload = table((LOW, GUEST_PAGE)) + b"x" * GUEST_PAGE

    def trickle() -> None:
        for at in range(0, len(payload), 1028):
            time.sleep(0.5)
            raw.near.send(payload[at : at + 1028])

    thread = threading.Thread(target=trickle)
    thread.start()
    PageReceiver(raw.destination, raw.far).receive(Header(PAGES, 1, len(payload), stream_sum(payload)))
    thread.join()
    assert raw.destination.regions[0].memory.buffer[0] == ord("x")


def test_a_peer_that_is_gone_is_told(pair: Pair) -> None:
    fill(pair.source)
    pair.near.socket.send(b"part of a payload")
    pair.near.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(StreamBroken, match="closed"):
        pair.receiver.receive(Header(PAGES, 1, 16 + GUEST_PAGE, 0))


def test_a_receiver_that_is_gone_is_told_to_the_sender(raw: Pair) -> None:
    fill(raw.source)
    raw.far.socket.close()
    with pytest.raises(StreamBroken, match=os.strerror(errno.EPIPE)):
        PageSender(raw.source, raw.near).send(PageSet.all(raw.source))


def test_what_progress_raises_ends_the_round(raw: Pair) -> None:
    fill(raw.source)

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("the device broke")

    with pytest.raises(RuntimeError, match="the device broke"):
        PageSender(raw.source, raw.near, None, refuse).send(PageSet.all(raw.source))


# -- hostile frames ----------------------------------------------------------------

PAGE = b"p" * GUEST_PAGE
LENGTH, RUN, ADDRESS = (
    "its length is not what its runs need",
    "a run is empty",
    "a run is not one piece of guest memory",
)
REFUSED: dict[str, tuple[int, int, bytes, str]] = {
    "no runs": (PAGES, 0, b"", "its number of runs is not between"),
    "too many runs": (ZERO, 1025, table((LOW, GUEST_PAGE)) * 1025, "its number of runs is not between"),
    "runs without data": (PAGES, 1, table((LOW, GUEST_PAGE)), LENGTH),
    "less data than runs": (PAGES, 2, table((LOW, GUEST_PAGE), (HIGH, GUEST_PAGE)) + PAGE, LENGTH),
    "more data than runs": (PAGES, 1, table((LOW, GUEST_PAGE)) + 2 * PAGE, LENGTH),
    "a table cut short": (ZERO, 2, table((LOW, GUEST_PAGE)), LENGTH),
    "zeros with data": (ZERO, 1, table((LOW, GUEST_PAGE)) + PAGE, LENGTH),
    "part of a page": (PAGES, 1, table((LOW, GUEST_PAGE - 8)) + PAGE[8:], LENGTH),
    "a run of part of a page": (PAGES, 2, table((LOW, 2048), (LOW, 2048)) + PAGE, RUN),
    "an empty run": (PAGES, 2, table((LOW, 0), (LOW, GUEST_PAGE)) + PAGE, RUN),
    "an unaligned run": (ZERO, 1, table((LOW + 8, GUEST_PAGE)), RUN),
    "an address below": (PAGES, 1, table((LOW - GUEST_PAGE, GUEST_PAGE)) + PAGE, ADDRESS),
    "an address behind": (ZERO, 1, table((HIGH + SIZE, GUEST_PAGE)), ADDRESS),
    "a run over the end": (ZERO, 1, table((HIGH + SIZE - GUEST_PAGE, 2 * GUEST_PAGE)), ADDRESS),
    "a run across regions": (ZERO, 1, table((HIGH - GUEST_PAGE, 2 * GUEST_PAGE)), ADDRESS),
    "a run that wraps": (ZERO, 1, table((HIGH, (1 << 64) - GUEST_PAGE)), ADDRESS),
    "lengths that wrap": (PAGES, 2, table((LOW, 1 << 63), (LOW, (1 << 63) + GUEST_PAGE)) + PAGE, ADDRESS),
    "a good run before a bad one": (PAGES, 2, table((LOW, GUEST_PAGE), (0, GUEST_PAGE)) + 2 * PAGE, ADDRESS),
    "the same zeros again and again": (ZERO, 100, table((LOW, SIZE)) * 100, LENGTH),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_frame_that_no_sender_makes_is_refused_and_nothing_is_written(pair: Pair, case: str) -> None:
    kind, count, payload, why = REFUSED[case]
    fill(pair.destination)
    assert why in pair.refuses(kind, count, payload)


@pytest.mark.parametrize("length", [5 << 20, 1 << 40, (1 << 64) - 1, (1 << 64) - GUEST_PAGE + 16])
def test_a_payload_that_is_too_long_is_refused_before_it_is_read(raw: Pair, length: int) -> None:
    assert LENGTH in raw.refuses(PAGES, 1, table((LOW, GUEST_PAGE)) + PAGE, length=length)
    assert raw.far.socket.recv(16) == table((LOW, GUEST_PAGE))


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(at=st.integers(0, 2 * 16 + 2 * GUEST_PAGE - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(raw: Pair, at: int, bit: int) -> None:
    payload = table((LOW, GUEST_PAGE), (HIGH, GUEST_PAGE)) + PAGE * 2
    damaged = bytearray(payload)
    damaged[at] ^= 1 << bit
    assert "checksum" in raw.refuses(PAGES, 2, bytes(damaged), sum=stream_sum(payload))


def test_a_header_of_something_else_is_the_callers_mistake(raw: Pair) -> None:
    with pytest.raises(ValueError, match="no frame of pages"):
        raw.receiver.receive(Header(OTHER, 1, 16, 0))


# -- proof -------------------------------------------------------------------------


def test_the_hash_tells_content_and_place_apart() -> None:
    layouts: list[list[tuple[Gpa, int]]] = [[(LOW, SIZE)], [(HIGH, SIZE)], [(LOW, SIZE), (HIGH, SIZE)]]
    hashes = set()
    for layout in layouts:
        with GuestMemory(layout) as memory:
            hashes.add(memory_hash(memory))
            memory.regions[0].memory.buffer[SIZE - 1] = 1
            hashes.add(memory_hash(memory))
    assert len(hashes) == 2 * len(layouts)


def test_hashing_tells_its_progress() -> None:
    told: list[tuple[int, int]] = []
    with GuestMemory([(LOW, 72 << 20)]) as memory:
        memory_hash(memory, lambda done, total: told.append((done, total)))
    assert told == [(64 << 20, 72 << 20), (72 << 20, 72 << 20)]
