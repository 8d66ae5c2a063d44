"""The time after which a side does not start the guest by itself, and for which the other holds its file."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import StreamBroken, StreamCorrupt
from pyvhostvdpa.migration import fence
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.fence import MARGIN, Fence, hold, needs_holding
from pyvhostvdpa.migration.stream import Channel


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(fence, "now", made)
    return made


def test_fence_ends_after_its_seconds_and_margins(clock: Clock) -> None:
    made = Fence(60.0, 2)
    clock.now += 60.0 + 2 * MARGIN - 0.5
    assert (made.left, made.passed) == (0.5, False)
    clock.now += 0.5
    assert (made.left, made.passed) == (0.0, True)
    clock.now += 100.0
    assert (made.left, made.passed) == (0.0, True)


def test_file_needs_no_holding_only_when_a_unix_socket_was_closed() -> None:
    near, far = socket.socketpair()
    with far, Channel(near) as channel:
        assert not needs_holding(channel, StreamBroken("closed"))
        assert needs_holding(channel, StreamCorrupt("nonsense"))
        assert needs_holding(channel, MemoryError())
        channel.local = False
        assert needs_holding(channel, StreamBroken("closed"))


def test_interrupt_from_before_a_file_is_held_does_not_end_the_hold() -> None:
    told: list[str] = []
    with Cancel() as cancel:
        cancel.set()
        hold(Fence(0.05, 0), Path("guest.saved"), "destination", cancel, told.append)
        assert not cancel.wanted
    assert len(told) == 1


def test_passed_fence_holds_nothing(clock: Clock) -> None:
    told: list[str] = []
    with Cancel() as cancel:
        hold(Fence(0.0, 0), Path("guest.saved"), "source", cancel, told.append)
    assert told == []
