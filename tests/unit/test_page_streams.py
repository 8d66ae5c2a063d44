"""Guest pages on a stream that is cancelled, stalls, ends, or brings what no sender makes."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_pair import HIGH, LOW, OTHER, SIZE, Channel, Pair, fill, pair, raw, receiving, table

from pyvhostvdpa._cdefs import lib
from pyvhostvdpa.base.errors import MigrationCancelled, StreamBroken
from pyvhostvdpa.memory.guest import GUEST_PAGE
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import (
    PAGES,
    ZERO,
    FrameHeader,
    PageReceiver,
    PageSender,
    stream_sum,
)

LENGTH, RUN, ADDRESS = (
    "its length is not what its runs need",
    "a run is empty",
    "a run is not one piece of guest memory",
)

__all__ = ["pair", "raw"]
"""Fixtures of tests with two guests."""


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
    # which would take ten seconds
    sender = PageSender(raw.source, raw.near, limit=2e5)
    with receiving(raw):
        with pytest.raises(MigrationCancelled):
            sender.send(PageSet.all(raw.source))
        assert not raw.near.torn
        raw.near.send(struct.pack("<IIQQ", OTHER, 0, 0, 0))


def blocked(channel: Channel) -> bool:
    """Whether a sender can go no further until the receiver reads."""
    return not select.select([], [channel.socket], [], 0)[1]


def small_buffer(pair: Pair) -> None:
    """A sender that is blocked before anything was read is within its first frame."""
    pair.near.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    assert pair.near.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < lib.SENDER_PAGES * GUEST_PAGE / 2


def drain(channel: Channel) -> bytes:
    """What has arrived."""
    read = bytearray()
    with suppress(BlockingIOError):
        while more := channel.socket.recv(1 << 16, socket.MSG_DONTWAIT):
            read += more
    return bytes(read)


def whole_frame(data: bytes | bytearray) -> bool:
    """Whether these bytes are one frame, to its last byte."""
    return len(data) == 24 + FrameHeader(*struct.unpack("<IIQQ", data[:24])).length


def test_cancelling_within_a_frame_ends_behind_it(raw: Pair) -> None:
    fill(raw.source)
    small_buffer(raw)
    read = bytearray()
    done = threading.Event()

    def cancel_then_read() -> None:
        while not blocked(raw.near):
            time.sleep(0.001)
        os.eventfd_write(raw.near.cancel, 1)
        while not done.is_set():
            select.select([raw.far], [], [], 0.01)
            read.extend(drain(raw.far))

    thread = threading.Thread(target=cancel_then_read)
    thread.start()
    try:
        with pytest.raises(MigrationCancelled):
            PageSender(raw.source, raw.near).send(PageSet.all(raw.source))
    finally:
        done.set()
        thread.join()
    assert not raw.near.torn
    assert whole_frame(read + drain(raw.far))


def test_cancelling_is_remembered_when_the_frame_ends_in_another_slice(raw: Pair) -> None:
    """A slice that begins with the rest of the frame does not wait, so nothing tells it again."""
    fill(raw.source)
    small_buffer(raw)
    read = bytearray()
    cancelled = False

    def between_slices(done: int, total: int) -> None:
        nonlocal cancelled
        if cancelled:
            read.extend(drain(raw.far))
        elif blocked(raw.near):
            os.eventfd_write(raw.near.cancel, 1)
            cancelled = True

    with pytest.raises(MigrationCancelled):
        PageSender(raw.source, raw.near, None, between_slices).send(PageSet.all(raw.source))
    assert not raw.near.torn
    assert whole_frame(read + drain(raw.far))


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
        pair.receiver.receive(FrameHeader(PAGES, 1, len(payload), stream_sum(payload)))


def test_cancelling_ends_a_receiver_that_waits(raw: Pair) -> None:
    threading.Timer(0.3, lambda: os.eventfd_write(raw.far.cancel, 1)).start()
    with pytest.raises(MigrationCancelled):
        raw.receiver.receive(FrameHeader(PAGES, 1, 16 + GUEST_PAGE, 0))


def test_receiver_that_stalls_breaks_the_stream(raw: Pair) -> None:
    fill(raw.source)
    raw.near.stall = 0.5
    with pytest.raises(StreamBroken, match=r"nothing moved on the stream for 0\.5 s"):
        PageSender(raw.source, raw.near).send(PageSet.all(raw.source))


def test_sender_that_stalls_breaks_the_stream(raw: Pair) -> None:
    raw.far.stall = 0.5
    with pytest.raises(StreamBroken, match=r"nothing moved on the stream for 0\.5 s"):
        PageReceiver(raw.destination, raw.far).receive(FrameHeader(PAGES, 1, 16 + GUEST_PAGE, 0))


def test_a_stream_that_trickles_is_no_stall(raw: Pair) -> None:
    raw.far.stall = 2.5
    payload = table((LOW, GUEST_PAGE)) + b"x" * GUEST_PAGE

    def trickle() -> None:
        for at in range(0, len(payload), 1028):
            time.sleep(0.7)
            raw.near.send(payload[at : at + 1028])

    thread = threading.Thread(target=trickle)
    thread.start()
    PageReceiver(raw.destination, raw.far).receive(FrameHeader(PAGES, 1, len(payload), stream_sum(payload)))
    thread.join()
    assert raw.destination.regions[0].memory.buffer[0] == ord("x")


def test_a_peer_that_is_gone_is_reported(pair: Pair) -> None:
    fill(pair.source)
    pair.near.socket.send(b"part of a payload")
    pair.near.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(StreamBroken, match="closed"):
        pair.receiver.receive(FrameHeader(PAGES, 1, 16 + GUEST_PAGE, 0))


def test_a_receiver_that_is_gone_is_reported_to_the_sender(raw: Pair) -> None:
    fill(raw.source)
    raw.far.socket.close()
    with pytest.raises(StreamBroken, match=os.strerror(errno.EPIPE)):
        PageSender(raw.source, raw.near).send(PageSet.all(raw.source))


def test_error_raised_by_progress_ends_the_round(raw: Pair) -> None:
    fill(raw.source)

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("the device broke")

    with pytest.raises(RuntimeError, match="the device broke"):
        PageSender(raw.source, raw.near, None, refuse).send(PageSet.all(raw.source))


PAGE = b"p" * GUEST_PAGE


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
    with pytest.raises(ValueError, match="not a frame of pages"):
        raw.receiver.receive(FrameHeader(OTHER, 1, 16, 0))
