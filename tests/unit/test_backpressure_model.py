"""How many frames a guest may have in flight so that a device never lacks a receive buffer, in every interleaving.

A model of a NIC whose frames come back to it: counts only. The guest posts as many buffers as it likes, has at
most ``window`` frames in flight, and posts a buffer again before it sends for it (``cdefs/nic.c``). The relay returns
what was received, then forwards buffers, then frames to send, each by one look at an index (``cdefs/svq_thread.c``).
The device takes a frame if there is one; without a buffer for it it drops it, as NICs do.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import pytest

from pyvhostvdpa.guest.nic import window_of


class Way(Enum):
    """What goes through a relay."""

    NOTHING, RECEIVE, BOTH = range(3)


class World(NamedTuple):
    """Frames and buffers so far, less the frames that the guest has taken."""

    sent: int = 0
    seen: int = 0  # of those, what the device may see
    done: int = 0  # by the device
    returned: int = 0  # to the guest
    posted: int = 0  # buffers that the device may see, less the first ones
    step: int = 0  # of the relay


def following(way: Way, window: int, world: World) -> Iterator[World]:
    sent, _, done, returned, _, step = world
    if sent < window:
        yield world._replace(sent=sent + 1)
    # it takes what was returned, and posts as many buffers: whatever else is counted from there
    for taken in range(1, returned + 1):
        yield World(sent - taken, world.seen - taken, done - taken, returned - taken, world.posted - taken, step)
    if done < world.seen:
        yield world._replace(done=done + 1)
    if way is Way.NOTHING:
        return
    if step == 0:
        yield world._replace(returned=done, step=1)
    elif step == 1:
        yield world._replace(posted=0, step=2 if way is Way.BOTH else 0)
    else:
        yield world._replace(seen=sent, step=0)


def passed(way: Way, world: World) -> World:
    """What needs no step of a relay."""
    if way is not Way.BOTH:
        world = world._replace(seen=world.sent)
    if way is Way.NOTHING:
        world = world._replace(posted=0, returned=world.done)
    return world


def most_buffers_needed(way: Way, window: int) -> int:
    """Explore all that can happen with plenty of buffers; return how many there have to be."""
    start = World()
    known, left, needed = {start}, [start], 0
    while left:
        world = left.pop()
        needed = max(needed, world.done - world.posted)
        reached = {passed(way, each) for each in following(way, window, world)} - known
        known |= reached
        left += reached
    return needed


@pytest.mark.parametrize(("way", "times"), [(Way.NOTHING, 1), (Way.BOTH, 2), (Way.RECEIVE, 3)])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_device_never_lacks_a_buffer_if_there_are_so_many_for_each_frame(way: Way, times: int, window: int) -> None:
    """Fewer are too few: what is dropped then is no relay's fault, and the device counts it."""
    assert most_buffers_needed(way, window) == times * window


@pytest.mark.parametrize("ring", [3, 4, 64, 256, 32768])
@pytest.mark.parametrize(("rx_relayed", "times"), [(False, 2), (True, 3)])
def test_a_synthetic_guest_has_fewer_in_flight(ring: int, rx_relayed: bool, times: int) -> None:
    assert times * window_of(ring, rx_relayed) <= ring < times * (window_of(ring, rx_relayed) + 1)
