"""Everything that can go wrong, at every phase boundary: which side has the guest afterwards, and how it continues.

One guest lives through all of it, with traffic and a CPU that writes memory;
each case ends with a migration that works. Here is one case in four; all of
them are `tools/lab soak migration_failures`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hwsim
import pytest
from peers import Failed
from world import OPTIONS, World

SOURCE = ("handshake", "switch", "memory", "stop", "state", "ready", "go")
"""Where the source is held. At "go" everything is at the destination, and the guest not yet given away."""
DESTINATION = ("map", "memory", "load", "ready", "start", "running")
"""Where the destination is held. At "start" the guest is its own."""

HERE, THERE = "continues at the source", "runs at the destination"
TAKE, RESUME, LOST = "is taken from the file", "is resumed from the file", "died with its process"


@dataclass(frozen=True)
class Case:
    side: str
    phase: str
    fault: str
    end: str

    def __str__(self) -> str:
        return f"{self.fault} at {self.side}'s {self.phase}: the guest {self.end}"


def cases() -> Iterator[Case]:
    for phase in SOURCE:
        yield Case("source", phase, "source cancels", HERE)
        yield Case("source", phase, "destination cancels", HERE)
        yield Case("source", phase, "stream breaks", HERE)
        yield Case("source", phase, "source is killed", TAKE if phase in ("ready", "go") else LOST)
        yield Case("source", phase, "destination is killed", HERE)
    for phase in DESTINATION:
        given = phase in ("start", "running")
        yield Case("destination", phase, "source cancels", THERE if given else HERE)
        yield Case("destination", phase, "destination cancels", THERE if given else HERE)
        yield Case("destination", phase, "stream breaks", THERE if given else HERE)
        whole = TAKE if phase in ("load", "ready") else LOST
        yield Case("destination", phase, "source is killed", THERE if given else whole)
        yield Case("destination", phase, "destination is killed", RESUME if given else HERE)


CASES = list(cases())
# no multiple of the number of faults: every phase and every fault is met
CHOSEN = CASES if os.environ.get("PYVHOSTVDPA_EVERY_FAULT") else CASES[::4]


def test_chosen_cases_cover_every_phase_and_fault() -> None:
    assert len(CASES) >= 60
    assert {(case.side, case.phase) for case in CHOSEN} == {(case.side, case.phase) for case in CASES}
    assert {case.fault for case in CHOSEN} == {case.fault for case in CASES}


@pytest.fixture(scope="module")
def sims() -> Iterator[list[hwsim.HwSim]]:
    made = [hwsim.add(f"fail{number}") for number in range(2)]
    yield made
    for sim in made:
        hwsim.remove(sim.name)


class Lives:
    """The world, made again after a test that left it in pieces."""

    def __init__(self, sims: list[hwsim.HwSim], folder: Path) -> None:
        self.sims, self.folder = sims, folder
        self.world: World | None = None

    def get(self) -> World:
        if self.world is None:
            self.world = World([self.sims[0].chardev], [self.sims[1].chardev], self.folder, OPTIONS)
        return self.world

    def sim(self, path: str) -> hwsim.HwSim:
        return next(sim for sim in self.sims if sim.chardev == path)

    def end(self) -> None:
        if self.world is not None:
            self.world.close()
            self.world = None
        for path in self.folder.iterdir():
            path.unlink()


@pytest.fixture(scope="module")
def lives(sims: list[hwsim.HwSim], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    it = Lives(sims, tmp_path_factory.mktemp("saved"))
    yield it
    it.end()


@pytest.fixture(autouse=True)
def nothing_leaks() -> None:
    """The processes look after themselves (World.lives); this one has their control sockets."""


@pytest.fixture
def world(lives: Lives, request: pytest.FixtureRequest) -> Iterator[World]:
    world = lives.get()
    yield world
    if request.session.testsfailed:
        lives.end()


def harm(world: World, stream: socket.socket, fault: str) -> None:
    actions: dict[str, Callable[[], object]] = {
        "source cancels": world.here.interrupt,
        "destination cancels": world.there.interrupt,
        "stream breaks": lambda: stream.shutdown(socket.SHUT_RDWR),
        "source is killed": world.here.kill,
        "destination is killed": world.there.kill,
    }
    actions[fault]()


def end_of(world: World, name: str) -> Failed | None:
    """How a side ended: None if well."""
    peer = world.here if name == "source" else world.there
    try:
        peer.result()
    except Failed as e:
        return e
    return None


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_guest_survives_fault_at_phase_boundary(world: World, case: Case) -> None:
    killed = case.fault.partition(" ")[0] if case.fault.endswith("killed") else ""
    with world.migration(hold=(case.side, case.phase)) as stream:
        held = world.here if case.side == "source" else world.there
        held.until(case.phase)
        harm(world, stream, case.fault)
        # a stream that this test has open would not end with the process
        stream.close()
        first = case.fault.partition(" ")[0]
        ends: dict[str, Failed | None] = {}
        if case.fault.endswith("cancels") and first != case.side and case.end == HERE:
            # the side that waits for the stream notices at once
            ends[first] = end_of(world, first)
        if killed != case.side:
            held.go_on()
        ends |= {name: end_of(world, name) for name in ("source", "destination") if name not in (killed, *ends)}
    check_words(world, case, ends)
    {HERE: stays, THERE: arrives, TAKE: is_taken, RESUME: is_resumed, LOST: is_lost}[case.end](world, killed)
    world.lives()
    assert world.migrates()["rounds"] >= 2
    world.lives()
    world.is_sound()


def check_words(world: World, case: Case, ends: dict[str, Failed | None]) -> None:
    """Each side that is still alive reports where the guest is."""
    source, destination = ends.get("source"), ends.get("destination")
    if case.end == HERE:
        assert source is not None
        assert f"the guest continues in passthrough on {world.paths[world.here.name][0]}" in source.message
        if destination is not None and not world.files():
            assert "nothing of the guest is left here, the source has it" in destination.message
        elif destination is not None:
            [path] = world.files()
            assert f"saved in {path}; the source may have resumed it" in destination.message
            assert f"rm {path}" in destination.hint
    if case.end == LOST:
        assert destination is not None
        assert "nothing of the guest is left here" in destination.message
    if case.end == TAKE:
        assert destination is not None
        assert f"vhost-vdpa receive --take {world.files()[0]}" in destination.hint
    if case.end == RESUME:
        assert source is not None
        assert f"vhost-vdpa send --resume {world.files()[0]}" in source.hint
    if case.end == THERE:
        assert "destination" in ends
        assert destination is None


def stays(world: World, killed: str) -> None:
    if killed:
        world.there = world.fork(world.there.name)
    for path in world.files():
        # the destination was ready and never knew: the source says that it has the guest
        assert path.name.endswith("-destination.saved")
        path.unlink()


def arrives(world: World, killed: str) -> None:
    if killed:
        world.here = world.fork(world.here.name)
    elif world.files():
        # the source could not know: it is stopped, and its file goes as its hint says
        [path] = world.files()
        assert path.name.endswith("-source.saved")
        path.unlink()
        world.here.call("drop_stopped")
    world.here, world.there = world.there, world.here


def is_taken(world: World, killed: str) -> None:
    [path] = world.files()
    assert path.name.endswith("-destination.saved")
    world.there.call("take", path, world.paths[world.there.name])
    assert not path.exists()
    world.here = world.fork(world.here.name)
    world.here, world.there = world.there, world.here


def is_resumed(world: World, killed: str) -> None:
    [path] = world.files()
    assert path.name.endswith("-source.saved")
    world.here.call("drop_stopped")
    world.here.call("take", path, world.paths[world.here.name])
    assert not path.exists()
    if killed:
        world.there = world.fork(world.there.name)


def is_lost(world: World, killed: str) -> None:
    assert not world.files()
    world.here = world.fork(world.here.name)
    world.start_again()


# -- the device fails -----------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """``knob`` of the device of one side is turned to ``value`` while that side is held at ``phase``.

    That device is driven by ``procedure``, since not each makes the call that fails.
    """

    side: str
    phase: str
    knob: str
    value: int
    words: str
    procedure: str

    def __str__(self) -> str:
        return f"{self.knob}={self.value} at {self.side}'s {self.phase}, {self.procedure}"


STAYS = (
    Broken("source", "switch", "fail_suspend", 1, "VHOST_VDPA_SUSPEND", "direct"),
    Broken("source", "switch", "fail_suspend", 1, "VHOST_VDPA_SUSPEND", "in-place"),
    Broken("source", "switch", "fail_resume", 1, "VHOST_VDPA_RESUME", "in-place"),
    Broken("source", "stop", "fail_suspend", 1, "VHOST_VDPA_SUSPEND", "direct"),
    Broken("source", "stop", "fail_suspend", 1, "VHOST_VDPA_SUSPEND", "in-place"),
    Broken("source", "switch", "fail_set_map", 2, "IOTLB", "direct"),
    Broken("source", "switch", "fail_set_map", 3, "NEEDS_RESET", "direct"),
    Broken("source", "switch", "fail_vq_create", 1, "DRIVER_OK", "direct"),
    Broken("destination", "map", "fail_set_map", 2, "IOTLB", "direct"),
    Broken("destination", "memory", "fail_set_map", 1, "IOTLB", "direct"),
    Broken("destination", "memory", "fail_set_map", 2, "IOTLB", "in-place"),
    Broken("destination", "memory", "fail_vq_create", 1, "DRIVER_OK", "in-place"),
    Broken("destination", "memory", "cvq_mute", 1, "did not answer", "in-place"),
    Broken("destination", "memory", "fail_suspend", 1, "VHOST_VDPA_SUSPEND", "in-place"),
    Broken("destination", "start", "fail_vq_create", 1, "DRIVER_OK", "direct"),
    Broken("destination", "start", "cvq_mute", 1, "did not answer", "direct"),
    Broken("destination", "start", "fail_resume", 1, "VHOST_VDPA_RESUME", "in-place"),
)


@pytest.mark.parametrize("broken", STAYS, ids=str)
def test_a_device_fails_and_the_guest_stays(world: World, lives: Lives, broken: Broken) -> None:
    if broken.side == "source":
        world.move_to(broken.procedure)
    with world.migration(hold=(broken.side, broken.phase), procedure=broken.procedure) as stream:
        stream.close()
        held = world.here if broken.side == "source" else world.there
        sim = lives.sim(world.paths[held.name][0])
        held.until(broken.phase)
        sim.write(f"fault/{broken.knob}", broken.value)
        held.go_on()
        source, destination = end_of(world, "source"), end_of(world, "destination")
    sim.write(f"fault/{broken.knob}", 0)
    assert source is not None
    assert destination is not None
    assert broken.words in source.message
    assert "the guest continues in passthrough" in source.message
    assert not world.files()
    world.lives()
    world.migrates()
    world.lives()
    world.is_sound()


def test_a_device_that_is_not_suspended_for_the_way_back_either_is_reset(world: World, lives: Lives) -> None:
    world.move_to("direct")
    sim = lives.sim(world.paths[world.here.name][0])
    # the first is for the switch
    sim.write("fault/fail_suspend", 2)
    with world.migration(hold=("source", "back to source")) as stream:
        stream.close()
        world.here.until("back to source")
        sim.write("fault/fail_suspend", 1)
        world.here.go_on()
        source = end_of(world, "source")
        assert end_of(world, "destination") is not None
    assert int((hwsim.DEBUGFS / sim.name / "fault/fail_suspend").read_text(), 0) == 0
    assert source is not None
    assert "the guest continues in passthrough" in source.message
    world.lives()
    world.migrates()
    world.lives()
    world.is_sound()


def test_a_map_that_fails_in_the_batch_is_made_good(world: World, lives: Lives) -> None:
    """The kernel says nothing of it; the next map installs everything."""
    with world.migration(hold=("destination", "map")) as stream:
        stream.close()
        world.there.until("map")
        lives.sim(world.paths[world.there.name][0]).write("fault/fail_set_map", 1)
        world.there.go_on()
        assert end_of(world, "source") is None
        assert end_of(world, "destination") is None
    world.here, world.there = world.there, world.here
    world.lives()
    world.is_sound()


def test_a_source_that_cannot_be_started_again_saves_its_guest(world: World, lives: Lives) -> None:
    """Its control queue never answers again: neither a switch with a reset nor the way back can be done."""
    world.move_to("direct")
    sim = lives.sim(world.paths[world.here.name][0])
    with world.migration(hold=("source", "switch")) as stream:
        stream.close()
        world.here.until("switch")
        sim.write("fault/cvq_mute", 1)
        world.here.go_on()
        source = end_of(world, "source")
        assert end_of(world, "destination") is not None
    sim.write("fault/cvq_mute", 0)
    assert source is not None
    [path] = world.files()
    assert f"The guest is stopped and saved in {path}" in source.message
    assert source.hint == f"vhost-vdpa send --resume {path} {sim.chardev}"
    world.here.call("drop_stopped")
    sim.write("fault/fail_set_map", 2)
    with pytest.raises(Failed, match="IOTLB"):
        world.here.call("take", path, world.paths[world.here.name])
    assert world.files() == [path]
    is_resumed(world, "")
    world.lives()
    world.is_sound()
