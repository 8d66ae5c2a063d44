"""A device for a virtual machine in another process: all its state comes late, from outside, and some of it again."""

from __future__ import annotations

from collections.abc import Iterator

import front_end
import hwsim
import pytest
from front_end import LOG_BYTES, FrontEnd

from pyvhostvdpa import GuestMemory, MissingFeature, SharedLog, State, Trace, VdpaNetDevice
from pyvhostvdpa.memory.guest import GUEST_PAGE

MODES = [State.PASSTHROUGH, State.SHADOW]
KINDS = ["vdpa_hwsim", "vdpa_sim_net"]


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "vdpa_hwsim":
        sim = hwsim.add("hw0", filter="N")
        yield sim.chardev
        hwsim.remove(sim.name)
    else:
        yield request.getfixturevalue("devices")[0]


@pytest.fixture
def machine() -> Iterator[FrontEnd]:
    made = FrontEnd()
    yield made
    made.close()


@pytest.fixture
def trace() -> Trace:
    return Trace()


@pytest.fixture
def device(path: str, machine: FrontEnd, trace: Trace) -> Iterator[VdpaNetDevice]:
    """The device as a back-end has it before its front-end has started a ring: nothing negotiated, memory collected."""
    with GuestMemory.empty() as memory, VdpaNetDevice(path, trace, wanted=None) as opened:
        opened.attach(memory)
        for region in machine.regions():
            opened.add_memory([region])
        yield opened


def start(device: VdpaNetDevice, machine: FrontEnd, mode: State, region: int = 0) -> None:
    """A driver starts, with its rings in one region of its memory."""
    features = machine.value("driver", region, int(device.offered))
    assert device.negotiate(features) == features
    device.start(mode, machine.queues(), bases={0: 0, 1: 0})
    machine.value("run")
    machine.received(300)


def switch(device: VdpaNetDevice, machine: FrontEnd, mode: State) -> None:
    """Stop and start, with the eventfds sent again as a front-end does at each start."""
    device.stop(mode)
    device.start(mode, machine.queues(), bases=device.bases())


def end(device: VdpaNetDevice, machine: FrontEnd) -> None:
    assert machine.value("drain")
    device.check()
    _, lost, duplicated, corrupted = machine.value("counts")
    assert (lost, duplicated, corrupted) == (0, 0, 0)
    device.stop()
    assert device.bases() == machine.value("used")
    machine.value("close_driver")


@pytest.mark.parametrize("path", KINDS, indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_traffic_of_a_machine_of_another_process(device: VdpaNetDevice, machine: FrontEnd, mode: State) -> None:
    # a guest that resets its device and starts it again has its rings at other addresses, also above a hole
    for region in (0, 2):
        start(device, machine, mode, region)
        for other in (*MODES, mode):
            switch(device, machine, other)
            machine.received(100)
        end(device, machine)


@pytest.mark.parametrize("path", KINDS, indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_eventfds_are_replaced_while_traffic_runs(device: VdpaNetDevice, machine: FrontEnd, mode: State) -> None:
    start(device, machine, mode)
    for index in (0, 1):
        _, [kick, call] = machine.ask("renew", index)
        device.set_eventfds(index, kick=kick, call=call)
        machine.received(100)
    end(device, machine)


@pytest.mark.parametrize("path", KINDS, indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_memory_comes_and_goes_while_traffic_runs(device: VdpaNetDevice, machine: FrontEnd, mode: State) -> None:
    start(device, machine, mode, 2)
    new = machine.plugged()
    for _ in range(3):
        device.add_memory([new])
        machine.received(100)
        device.remove_memory([(new.gpa, new.size)])
        machine.received(100)
    with pytest.raises(MissingFeature, match="with their rings in that memory"):
        device.remove_memory([(front_end.LAYOUT[2][0], front_end.LAYOUT[2][1])])
    device.remove_memory([front_end.LAYOUT[0][:2]])
    machine.received(100)
    end(device, machine)


@pytest.mark.parametrize("path", KINDS, indirect=True)
def test_machine_reads_what_its_device_wrote_in_its_own_log(device: VdpaNetDevice, machine: FrontEnd) -> None:
    start(device, machine, State.PASSTHROUGH)
    memory = device.memory
    assert memory is not None
    logs = []
    for _ in range(2):
        _, [fd] = machine.ask("new_log", LOG_BYTES)
        logs.append(SharedLog(memory, fd, LOG_BYTES))
        device.set_log(logs[-1])
        if device.state is State.PASSTHROUGH:
            switch(device, machine, State.SHADOW)
        else:
            logs[0].close()
        machine.received(300)
    device.stop()
    expected = set(machine.value("receive_pages"))
    dirty = set(machine.value("dirty"))
    assert expected <= dirty
    assert all(any(r.gpa <= page * GUEST_PAGE < r.end for r in memory.regions) for page in dirty)
    # nothing is written once the stop has returned
    assert set(machine.value("dirty")) == dirty
    # a migration that is cancelled: back to passthrough, nothing logged any more
    device.set_log(None)
    logs[1].close()
    device.start(State.PASSTHROUGH, machine.queues(), bases=device.bases())
    machine.received(300)
    assert set(machine.value("dirty")) == dirty
    # and a second one, which is stopped before it was ever shadowed
    _, [fd] = machine.ask("new_log", LOG_BYTES)
    with SharedLog(memory, fd, LOG_BYTES) as log:
        device.set_log(log)
        device.stop()
        assert set(machine.value("used_pages")) == set(machine.value("dirty"))
        device.set_log(None)
    device.start(State.SHADOW, machine.queues(), bases=device.bases())
    end(device, machine)


@pytest.mark.parametrize("path", ["vdpa_hwsim"], indirect=True)
def test_device_continues_after_a_stop_without_a_reset(device: VdpaNetDevice, machine: FrontEnd, trace: Trace) -> None:
    start(device, machine, State.PASSTHROUGH)
    before = len(trace.events)
    for _ in range(3):
        switch(device, machine, State.PASSTHROUGH)
        machine.received(50)
    assert "VHOST_VDPA_SET_STATUS" not in {event.event for event in trace.events[before:]}
    end(device, machine)
