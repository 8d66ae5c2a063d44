"""One guest, several processes that could start it, some of them stopped or killed: never two of them run it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hwsim
import pytest
from peers import Failed, Peer
from takers import Takers
from world import OPTIONS, World

from pyvhostvdpa.guest.synthetic import GuestOptions

PATIENCE, MARGIN = 4.0, 1.5
"""Seconds, in place of a minute."""


@pytest.fixture(autouse=True)
def nothing_leaks() -> None:
    """The processes look after themselves; this one has their control sockets."""


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes forked from here on wait for less long."""
    monkeypatch.setattr("pyvhostvdpa.migration.common.HAND_OVER_SECONDS", PATIENCE)
    monkeypatch.setattr("pyvhostvdpa.migration.fence.MARGIN", MARGIN)
    monkeypatch.setattr("pyvhostvdpa.migration.source.MARGIN", MARGIN, raising=False)


@pytest.fixture
def world(hurried: None, devices: tuple[str, str], tmp_path: Path) -> Iterator[World]:
    world = World([devices[0]], [devices[1]], tmp_path, OPTIONS)
    yield world
    world.close()


def ended(peer: Peer) -> Failed:
    with pytest.raises(Failed) as failed:
        peer.result()
    return failed.value


def is_the_only_one(owner: Peer, other: Peer) -> None:
    assert not other.call("runs")
    owner.call("receives", 100)


@contextmanager
def frozen(world: World, side: str, phase: str) -> Iterator[None]:
    """A migration of which one side comes to a phase and is stopped there, the source or the destination."""
    with world.migration(hold=(side, phase)) as stream:
        stream.close()
        peer = world.here if side == "source" else world.there
        peer.until(phase)
        peer.freeze()
        yield


def test_source_stopped_before_go_stays_stopped_when_its_guest_was_taken(world: World) -> None:
    with frozen(world, "source", "go"):
        assert "did nothing for" in ended(world.there).message
        [path] = world.files()
        world.there.call("take", path, world.paths[world.there.name])
        world.here.thaw()
        world.here.go_on()
        failed = ended(world.here)
    is_the_only_one(world.there, world.here)
    [path] = world.files()
    assert path.name.endswith("-source.saved")
    assert f"It is stopped here and saved in {path}" in failed.message
    assert failed.hint.startswith(f"if it runs there: rm {path}")


def test_source_stopped_for_a_moment_before_go_gives_the_guest_away(world: World) -> None:
    with frozen(world, "source", "go"):
        world.here.thaw()
        world.here.go_on()
        world.here.result()
        world.there.result()
    is_the_only_one(world.there, world.here)
    assert not world.files()


def test_source_stopped_after_go_stays_stopped_when_the_guest_died_at_the_destination(world: World) -> None:
    with frozen(world, "source", "running"):
        world.there.result()
        world.there.kill()
        world.here.go_on()
        world.here.thaw()
        # RUNNING had arrived: the guest was the destination's, and died with it
        world.here.result()
    assert not world.here.call("runs")
    assert not world.files()


def test_source_stopped_after_go_saves_the_guest_when_the_destination_died_first(world: World) -> None:
    with world.migration(hold=("destination", "start")) as stream:
        stream.close()
        world.there.until("start")
        world.here.freeze()
        world.there.kill()
        world.here.thaw()
        failed = ended(world.here)
    assert not world.here.call("runs")
    [path] = world.files()
    assert f"saved in {path}" in failed.message
    world.here.call("drop_stopped")
    third = world.fork("right")
    third.call("take", path, world.paths["right"])
    is_the_only_one(third, world.here)
    third.kill()


def test_destination_stopped_after_go_stays_stopped_when_the_guest_was_resumed(world: World) -> None:
    with frozen(world, "destination", "start"):
        failed = ended(world.here)
        [path] = world.files()
        assert f"saved in {path}" in failed.message
        world.here.call("drop_stopped")
        world.here.call("take", path, world.paths[world.here.name])
        world.there.thaw()
        world.there.go_on()
        late = ended(world.there)
    is_the_only_one(world.here, world.there)
    [path] = world.files()
    assert path.name.endswith("-destination.saved")
    assert "this process was stopped for too long" in late.message
    assert f"saved in {path}" in late.message


# -- several takers -----------------------------------------------------------------------------


@pytest.fixture
def four() -> Iterator[list[str]]:
    sims = [hwsim.add(f"take{number}") for number in range(4)]
    yield [sim.chardev for sim in sims]
    for sim in sims:
        hwsim.remove(sim.name)


def test_four_takers_killed_at_random_start_a_guest_once(four: list[str], tmp_path: Path) -> None:
    seed = int(os.environ.get("PYVHOSTVDPA_SEED", "12"))
    print(f"PYVHOSTVDPA_SEED={seed}")
    takers = Takers(four, tmp_path, GuestOptions(8 << 20, ring_size=64, frame_size=128), random.Random(seed))
    try:
        # kills fall at random times of a take, and how many guests they end depends on the machine: the rounds go
        # on until enough guests were started and enough processes were killed
        for number in range(60):
            if number >= 12 and takers.tally.started >= 8 and takers.tally.killed >= 8:
                break
            takers.round()
        takers.is_sound()
    finally:
        takers.close()
    print(takers.tally)
    assert takers.tally.started >= 8
    assert takers.tally.killed >= 8
