"""What a paused guest would wait for is rehearsed: nothing follows from it, whatever goes wrong in it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from test_rest import World

from pyvhostvdpa.base.errors import MissingFeature, StreamBroken
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.migration import stream
from pyvhostvdpa.migration.pages import stream_sum
from pyvhostvdpa.migration.rehearsal import rehearse
from pyvhostvdpa.migration.stream import HEADER, Channel, Frame


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_rehearsal_leaves_both_guests_as_they_were(world: World) -> None:
    world.load(world.rests[0].encode())
    guests = world.guest, world.expected
    before = [guest.state()[1] for guest in guests]
    rehearse(world.guest, arriving=False)
    rehearse(world.expected, arriving=True)
    assert [guest.state()[1] for guest in guests] == before


def test_state_that_arrives_after_a_rehearsal_is_used(world: World) -> None:
    rehearse(world.expected, arriving=True)
    world.load(world.rests[0].encode())
    assert world.expected.state()[1] == world.guest.state()[1]


@pytest.mark.parametrize("error", [MissingFeature("a ring apart"), OSError(24, "too many open files")])
def test_a_rehearsal_that_fails_means_nothing(world: World, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(self: SyntheticGuest, arriving: bool) -> None:
        raise error

    monkeypatch.setattr(SyntheticGuest, "rehearse", fail)
    rehearse(world.guest, arriving=False)


def test_a_rehearsal_leaves_no_descriptor_open(world: World) -> None:
    rehearse(world.guest, arriving=False)
    before = sorted(os.listdir("/proc/self/fd"))
    rehearse(world.guest, arriving=False)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_bytes_read_ahead_come_before_later_ones() -> None:
    near, far = socket.socketpair()
    with Channel(near) as here, Channel(far) as there:
        here.send_frames((Frame.GUEST, b"one", 0), (Frame.REST, b"two", 1))
        first = there.receive_header(1.0)
        there.read_ahead()
        assert there.readable()
        assert not there.raw
        assert there.receive_payload(first) == b"one"
        here.send_frame(Frame.FINAL)
        assert there.expect(Frame.REST) == (Frame.REST, b"two")
        assert there.raw
        assert there.expect(Frame.FINAL) == (Frame.FINAL, b"")
        there.read_ahead()
        here.close()
        there.read_ahead()
        with pytest.raises(StreamBroken, match="closed the stream"):
            there.expect(Frame.GO, seconds=1.0)


def test_a_frame_may_begin_in_what_was_read_ahead_and_end_behind_it() -> None:
    near, far = socket.socketpair()
    with Channel(near) as here, Channel(far) as there:
        here.send_frame(Frame.ALIVE, b"0123456789")
        frame = far.recv(100)
        near.send(frame[:30])
        header = there.receive_header(1.0)
        there.read_ahead()
        near.send(frame[30:])
        assert there.receive_payload(header) == b"0123456789"


def test_a_peer_that_sends_on_and_on_is_not_read_ahead_without_end() -> None:
    near, far = socket.socketpair()
    with Channel(near), Channel(far) as there:
        piece = HEADER.pack(Frame.GUEST, 0, 0, stream_sum(b"")) * 1000
        for _ in range(100):
            with suppress(BlockingIOError):
                near.send(piece)
            header = there.receive_header(1.0)
            there.read_ahead()
            assert there.receive_payload(header) == b""
            assert len(there._ahead) <= stream._AHEAD
