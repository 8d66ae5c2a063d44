"""A destination that is prepared before its guest comes, and devices that are stopped and started at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hwsim
import pytest
from peers import Failed
from row_rig import Rig
from world import OPTIONS, World

from pyvhostvdpa import KernelError, State
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS, LadderRow
from pyvhostvdpa.migration.pages import memory_hash
from pyvhostvdpa.net.control import Class, command

BEYOND, OURS = LADDER_ROWS["beyond"], LADDER_ROWS["ours"]
QUEUES = 4
CTRL_VLAN_ADD = 0


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(plan: LadderRow = BEYOND) -> Rig:
        rigs.append(Rig(plan, 2, 4))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.close()


def stand_by(rig: Rig) -> str:
    return rig.device.stand_by(rig.nic.queues, rig.control)


def test_a_device_in_place_is_suspended_with_its_rings_and_is_given_bases_and_resumed(make: Callable[..., Rig]) -> None:
    rig = make()
    assert "stands suspended" in stand_by(rig)
    made = rig.calls(lambda: rig.device.start_passthrough(rig.nic.queues, rig.control))
    assert made == [*(f"BASE{index}" for index in range(QUEUES)), f"ENABLE{QUEUES}", "RESUME"]
    rig.use_all_pairs()
    rig.receives(50)
    rig.to(State.SHADOW)
    rig.receives(50)
    rig.settle()


def test_a_device_that_is_started_directly_is_set_up_to_just_before_driver_ok(make: Callable[..., Rig]) -> None:
    rig = make(OURS)
    assert "DRIVER_OK" in stand_by(rig)
    made = rig.calls(lambda: rig.device.start_passthrough(rig.nic.queues, rig.control))
    assert made[:QUEUES] == [f"BASE{index}" for index in range(QUEUES)]
    assert not any(call.startswith(("U", "B0", "B1", "E0", "E1", "NUM", "ADDR", "KICK", "CALL")) for call in made)
    rig.use_all_pairs()
    rig.receives(50)
    rig.settle()


@pytest.mark.parametrize("plan", [BEYOND, OURS], ids=lambda plan: plan.row)
def test_standing_ready_changes_nothing_of_the_guest(make: Callable[..., Rig], plan: LadderRow) -> None:
    rig = make(plan)
    before = memory_hash(rig.memory)
    stand_by(rig)
    assert memory_hash(rig.memory) == before
    assert rig.nic.counts().received == 0


@pytest.mark.parametrize("plan", [BEYOND, OURS], ids=lambda plan: plan.row)
def test_ready_device_knows_control_commands_sent_meanwhile(make: Callable[..., Rig], plan: LadderRow) -> None:
    rig = make(plan)
    stand_by(rig)
    rig.control.model.apply(command(Class.VLAN, CTRL_VLAN_ADD, (9).to_bytes(2, "little")))
    rig.device.start_passthrough(rig.nic.queues, rig.control)
    assert "9" in {word for key, value in rig.sim.read("state").items() if key.startswith("vlan") for word in
                   value.replace(",", " ").split()}  # fmt: skip
    rig.use_all_pairs()
    rig.receives(50)
    rig.settle()


def test_stand_by_does_not_depend_on_the_announce_request(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.control.model.announce = True
    stand_by(rig)
    rig.control.model.announce = False
    assert "RESUME" in rig.calls(lambda: rig.device.start_passthrough(rig.nic.queues, rig.control))


@pytest.mark.parametrize("plan", [BEYOND, OURS], ids=lambda plan: plan.row)
def test_other_queues_than_those_it_is_ready_for_are_started_by_a_reset(
    make: Callable[..., Rig], plan: LadderRow
) -> None:
    rig = make(plan)
    stand_by(rig)
    made = rig.calls(lambda: rig.device.start_passthrough(rig.nic.queues[:2], rig.control))
    assert made.count("SET_FEATURES") == 1
    assert "RESUME" not in made


def test_a_device_that_cannot_be_made_ready_is_left_reset(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.sim.write("fault/fail_suspend", 1)
    with pytest.raises(KernelError, match="SUSPEND"):
        stand_by(rig)
    assert rig.device.state is State.RESET
    assert int(rig.device.chardev.get_status()) == 0
    rig.start(State.PASSTHROUGH)
    rig.receives(50)
    rig.settle()


def test_a_switch_opens_nothing_while_the_device_is_paused(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    rig.start(State.PASSTHROUGH)
    opened: list[int] = []
    eventfd = os.eventfd

    def noted(*arguments: int) -> int:
        opened.append(time.monotonic_ns())
        return eventfd(*arguments)

    monkeypatch.setattr(os, "eventfd", noted)
    rig.to(State.SHADOW)
    suspended = next(e.t_begin for e in reversed(rig.trace.events) if e.event == "VHOST_VDPA_SUSPEND")
    resumed = next(e.t_end for e in reversed(rig.trace.events) if e.event == "VHOST_VDPA_RESUME")
    assert len(opened) >= 2 * QUEUES
    assert not [at for at in opened if suspended < at < resumed]
    rig.receives(50)
    rig.settle()


# -- several devices ------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[World, list[hwsim.HwSim]]]:
    sims = [hwsim.add(f"two{number}") for number in range(4)]
    paths = [sim.chardev for sim in sims]
    world = World(paths[:2], paths[2:], tmp_path, OPTIONS)
    yield world, sims
    world.close()
    for sim in sims:
        hwsim.remove(sim.name)


@pytest.mark.parametrize("broken", [0, 1])
def test_guest_continues_on_both_devices_if_one_fails_to_stop(
    two: tuple[World, list[hwsim.HwSim]], broken: int
) -> None:
    world, sims = two
    with world.migration(hold=("source", "stop")) as stream:
        stream.close()
        world.here.until("stop")
        sims[broken].write("fault/fail_suspend", 1)
        world.here.go_on()
        with pytest.raises(Failed, match="the guest continues in passthrough"):
            world.here.result()
        with pytest.raises(Failed):
            world.there.result()
    world.lives()
    world.migrates()
    world.lives()
    world.is_sound()


def test_guest_continues_at_the_source_if_one_of_two_devices_fails_to_start(
    two: tuple[World, list[hwsim.HwSim]],
) -> None:
    world, sims = two
    with world.migration(hold=("destination", "start"), procedure="in-place") as stream:
        stream.close()
        world.there.until("start")
        sims[3].write("fault/fail_resume", 1)
        world.there.go_on()
        with pytest.raises(Failed, match="RESUME"):
            world.there.result()
        with pytest.raises(Failed, match="the guest continues in passthrough"):
            world.here.result()
    world.lives()
    world.migrates()
    world.lives()
    world.is_sound()
