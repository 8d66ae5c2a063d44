"""A device that is switched without a reset: its queues get other rings while it is suspended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from row_rig import Rig

from pyvhostvdpa import MissingFeature, State, VdpaNetDevice
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS, LadderRow
from pyvhostvdpa.device.procedure.in_place import InPlace
from pyvhostvdpa.net.control import OK, Class, command

BEYOND = LADDER_ROWS["beyond"]
QUEUES = 4
CTRL_VLAN_ADD = 0


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(plan: LadderRow = BEYOND, pairs: int = 2, pieces: int = 4) -> Rig:
        rigs.append(Rig(plan, pairs, pieces))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.close()


def moved(index: int) -> list[str]:
    return [f"BASE{index}", f"ADDR{index}", f"KICK{index}", f"CALL{index}"]


BASES = [f"GET_VRING_BASE{index}" for index in range(QUEUES)]
GO_ON = [*(call for index in range(QUEUES) for call in moved(index)), f"ENABLE{QUEUES}", "RESUME"]


def test_a_switch_is_a_suspend_other_rings_and_a_resume(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.start(State.PASSTHROUGH)
    assert rig.calls(lambda: rig.to(State.SHADOW)) == ["SUSPEND", *BASES, *GO_ON]
    assert rig.calls(lambda: rig.to(State.PASSTHROUGH)) == ["SUSPEND", *GO_ON]
    rig.to(State.SHADOW)
    assert rig.calls(rig.device.stop) == ["SUSPEND"]


def test_a_switch_maps_nothing(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.start(State.PASSTHROUGH)
    for mode in (State.SHADOW, State.PASSTHROUGH):
        assert rig.count(lambda mode=mode: rig.to(mode))[:3] == (0, 0, 0)


def test_frames_flow_after_every_switch(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.start(State.PASSTHROUGH)
    for _ in range(5):
        for mode in (State.SHADOW, State.PASSTHROUGH):
            rig.receives(50)
            rig.to(mode)
    rig.receives(50)
    rig.settle()


def test_frames_flow_after_a_first_start_in_shadow_mode(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.start(State.SHADOW)
    rig.receives(50)
    rig.to(State.PASSTHROUGH)
    rig.receives(50)
    rig.settle()


def test_control_queue_state_survives_switches(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.start(State.PASSTHROUGH)
    assert rig.nic.control is not None
    assert rig.nic.control.send(command(Class.VLAN, CTRL_VLAN_ADD, (7).to_bytes(2, "little"))) == OK
    before = rig.sim.read("state")
    rig.to(State.SHADOW)
    after = rig.sim.read("state")
    assert {key: value for key, value in after.items() if key.startswith("vlan")} == {
        key: value for key, value in before.items() if key.startswith("vlan")
    }
    assert rig.nic.control.send(command(Class.VLAN, CTRL_VLAN_ADD, (8).to_bytes(2, "little"))) == OK


def test_guest_back_from_another_device_finds_its_state(make: Callable[..., Rig]) -> None:
    """Its control queue's state may have changed there, so the device is reset and gets all of it again."""
    rig = make()
    rig.start(State.PASSTHROUGH)
    rig.device.stop()
    rig.control.model.apply(command(Class.VLAN, CTRL_VLAN_ADD, (9).to_bytes(2, "little")))
    made = rig.calls(lambda: rig.start(State.PASSTHROUGH))
    assert "RESUME" not in made
    assert made.count("SET_FEATURES") == 1
    rig.receives(50)
    rig.settle()


def test_other_queues_are_started_by_a_reset(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.start(State.PASSTHROUGH)
    rig.device.stop()
    made = rig.calls(lambda: rig.device.start_passthrough(rig.nic.queues[:2], rig.control))
    assert "RESUME" not in made


@pytest.mark.parametrize("without", [BackendFeature.RESUME, BackendFeature.DESC_ASID])
def test_a_device_that_cannot_is_refused(make: Callable[..., Rig], without: BackendFeature) -> None:
    rig = make()
    rig.device.close()
    with pytest.raises(MissingFeature, match="cannot be switched in place"):
        VdpaNetDevice(rig.sim.chardev, use=ALL_BACKEND_FEATURES & ~without, procedure=InPlace)
