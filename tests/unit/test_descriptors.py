"""A limit on open files, met at any descriptor that something opens: what was opened before is closed again."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator

import pytest
from hostile_world import World, cohere, full

from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.guest.arena import GuestArena, place_queue
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.net.control import ControlModel
from pyvhostvdpa.net.control_queue import ControlQueue, NetControlArea, NetGuestControl
from pyvhostvdpa.net.features import CONTROL, SUPPORTED
from pyvhostvdpa.virtqueue.layout import SplitLayout, ring_layout
from pyvhostvdpa.virtqueue.serving import ServingOptions
from pyvhostvdpa.virtqueue.shadow import ShadowThreads, ShadowVirtqueue

MOST = 64
"""Descriptors that nothing here needs as many of."""

Make = Callable[[], Callable[[], None]]
"""Makes something, and returns how to close it."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(full)
    yield made
    made.memory.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(DEFAULT_GPA, 4 << 20)]) as made:
        yield made


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def fails_at_each(make: Make) -> int:
    """Make it with ever more descriptors until it succeeds; how often it failed, leaving none open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    before = descriptors()
    for room in range(MOST):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, hard))
        try:
            close = make()
        except (OSError, MissingFeature) as e:
            if "Too many open files" not in str(e):
                raise
        else:
            close()
            return room
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert descriptors() == before, f"with room for {room}"
    raise AssertionError("it takes more")


def test_restored_guest(world: World) -> None:
    def make() -> Callable[[], None]:
        world.reset()
        cohere(world.memory, world.device)
        return SyntheticGuest.restore(world.memory, world.guest, [world.device], world.shapes).detach

    assert fails_at_each(make) > 10


def test_nic_of_a_new_guest(memory: GuestMemory) -> None:
    options = NicOptions(pairs=2, ring_size=16, features=SUPPORTED | CONTROL, control_index=4)
    assert fails_at_each(lambda: GuestNic(memory, options).close) > 10


def test_nic_that_does_not_fit_its_memory_leaves_nothing_open() -> None:
    with GuestMemory([(DEFAULT_GPA, 1 << 16)]) as memory:
        before = descriptors()
        for pairs in (1, 2, 4):
            with pytest.raises(MissingFeature, match="guest memory is too small"):
                GuestNic(memory, NicOptions(pairs=pairs, ring_size=16))
        with pytest.raises(MissingFeature, match="guest memory is too small"):
            GuestNic(memory, NicOptions(features=SUPPORTED | CONTROL, control_index=2))
        assert descriptors() == before


def test_shadow_virtqueues_and_their_threads(memory: GuestMemory) -> None:
    arena = GuestArena(memory)
    queues = [place_queue(arena, index, 16) for index in range(8)]
    size = ring_layout(16, 0).size
    own = SharedMemory("shadow", 8 * size)

    def make() -> Callable[[], None]:
        made: list[ShadowVirtqueue] = []
        try:
            for queue in queues:
                made.append(ShadowVirtqueue(queue, memory, own.hva + queue.index * size))
            threads = ShadowThreads(made, ServingOptions(threads=4))
        except OSError:
            for shadow in made:
                shadow.close()
            raise

        def close() -> None:
            threads.stop()
            for shadow in made:
                shadow.close()

        return close

    with own:
        assert fails_at_each(make) > 10


def test_control_queue(memory: GuestMemory) -> None:
    control = NetGuestControl(place_queue(GuestArena(memory), 2, 16), ControlModel(SUPPORTED | CONTROL))
    with SharedMemory("control", 1 << 16) as own:
        area = NetControlArea(SplitLayout(64), own.hva, 1 << 20)
        assert fails_at_each(lambda: ControlQueue(control, memory, area).close) == 3
