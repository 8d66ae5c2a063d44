"""``vhost-vdpa serve`` on real devices, with a scripted front-end and a driver that moves frames."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest
from hwsim import MakeSim
from machine import LAYOUT, MEMORY, Machine, MiB, Serve, logged
from qtest import wait_for
from vhost_front_end import FrontEnd

from pyvhostvdpa.guest.nic import FRAME_BUFFER
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.vhost_user.messages import ProtocolFeature, Request
from pyvhostvdpa.vhost_user.notices import reports_memfds
from pyvhostvdpa.vhost_user.server import TICK

P = ProtocolFeature
USES = {
    "modern": ProtocolFeature(0xFFFFFFFF),
    "old": P.MQ | P.LOG_SHMFD | P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS | P.DEVICE_STATE,
    "minimal": P.LOG_SHMFD,
}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    with ExitStack() as stack:

        def start(device: str, *options: str) -> Serve:
            made = Serve(device, tmp_path, *options)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def machine() -> Iterator[Callable[..., Machine]]:
    with ExitStack() as stack:

        def build(pairs: int = 1) -> Machine:
            made = Machine(pairs)
            stack.callback(made.close)
            return made

        yield build


MakeServe = Callable[..., Serve]
MakeMachine = Callable[..., Machine]


@pytest.fixture(params=["vdpa_hwsim", "vdpa_sim_net"])
def device(request: pytest.FixtureRequest) -> str:
    """One device of each kind."""
    if request.param == "vdpa_sim_net":
        path: str = request.getfixturevalue("pinned")[0]
        return path
    sim = request.getfixturevalue("make_sim")(1)
    return str(sim.chardev)


@pytest.mark.parametrize("use", list(USES))
def test_frames_flow_through_start_stop_and_start(
    device: str, use: str, serve: MakeServe, machine: MakeMachine
) -> None:
    server, vm = serve(device), machine()
    vm.plug(server.connect(USES[use]))
    vm.cont()
    vm.receives()
    for _ in range(3):
        vm.stop()
        vm.cont()
        vm.receives()
    vm.settle()
    assert not server.status()["failed"]
    vm.unplug()
    events = server.end()
    assert [each["event"] for each in events].count("running") == 4


def test_a_migration_that_is_cancelled_twice_and_one_that_moves(
    make_sim: MakeSim, serve: MakeServe, machine: MakeMachine
) -> None:
    source = serve(make_sim(1).chardev)
    destination = serve(make_sim(1).chardev)
    vm = machine()
    vm.plug(source.connect())
    vm.cont()
    vm.receives()
    front = vm.front
    assert front is not None
    for _ in range(2):
        os.close(front.start_logging())
        assert source.status()["state"] == "shadow"
        vm.receives()
        front.stop_logging()
        assert source.status()["state"] == "passthrough"
        vm.receives()
    log = front.start_logging()
    vm.receives()
    vm.stop()
    vm.unplug()
    # memory is the same file: what is tested here is that rings and device continue
    vm.plug(destination.connect())
    vm.cont()
    vm.receives()
    vm.settle()
    os.close(log)
    assert destination.status()["migration"]["start_ms"] > 0
    assert source.status()["migration"].keys() >= {"switch_ms", "stop_ms"}


def test_a_front_end_whose_memory_becomes_shorter_loses_its_own_guest_only(
    device: str, serve: MakeServe, machine: MakeMachine
) -> None:
    server, vm = serve(device), machine()
    vm.plug(server.connect())
    vm.cont()
    vm.receives()
    assert vm.front is not None
    # the rings are read by the server from here on
    os.close(vm.front.start_logging())
    vm.receives()
    os.ftruncate(vm.fd, 0)
    wait_for(lambda: server.status()["failed"])
    vm.traffic.pause()
    vm.unplug()
    wait_for(lambda: server.status()["front_end"] is None)
    another = machine()
    another.plug(server.connect())
    another.cont()
    another.receives()
    another.settle()
    another.unplug()
    assert "memory-not-sealed" in [each["event"] for each in server.end()]


def test_every_page_that_the_device_wrote_is_in_the_log(device: str, serve: MakeServe, machine: MakeMachine) -> None:
    """RX buffers are written by the device alone, and so are used rings."""
    server, vm = serve(device), machine()
    vm.plug(server.connect())
    vm.cont()
    vm.receives()
    front = vm.front
    assert front is not None
    log = front.start_logging()
    copy = {gpa: vm.page(gpa) for gpa in vm.pages()}
    vm.receives(600)
    vm.stop()
    dirty = logged(log)
    os.close(log)
    pair = vm.nic.pairs[0]
    buffers = range(int(pair.c.rx_gpa) & ~4095, int(pair.c.rx_gpa) + pair.rx.num * FRAME_BUFFER, 4096)
    used = {queue.used & ~4095 for queue in vm.nic.queues}
    changed = {gpa for gpa in [*buffers, *used] if vm.page(gpa) != copy[gpa]}
    assert changed, "nothing was received while pages were logged"
    assert not changed - dirty
    vm.cont()
    vm.receives()
    vm.settle()


def test_a_machine_moves_with_its_memory(make_sim: MakeSim, serve: MakeServe, machine: MakeMachine) -> None:
    source, destination = serve(make_sim(1).chardev), serve(make_sim(1).chardev)
    vm = machine()
    vm.plug(source.connect())
    vm.cont()
    vm.receives()
    other = Machine.copy_of(vm)
    assert vm.front is not None
    log = vm.front.start_logging()
    before = {gpa: vm.page(gpa) for gpa in vm.pages()}
    for gpa, content in before.items():
        other.put(gpa, content)
    vm.receives()
    vm.stop()
    # what its CPU wrote the VMM knows itself: the driver's rings and TX buffers
    pair = vm.nic.pairs[0]
    by_device = range(int(pair.c.rx_gpa) & ~4095, int(pair.c.rx_gpa) + pair.rx.num * FRAME_BUFFER, 4096)
    by_cpu = {gpa for gpa in before if gpa not in by_device and vm.page(gpa) != before[gpa]}
    for gpa in logged(log) | by_cpu:
        other.put(gpa, vm.page(gpa))
    os.close(log)
    other.take_driver(vm)
    other.plug(destination.connect())
    other.cont()
    other.receives()
    other.settle()
    other.close()


def test_queue_pairs_follow_the_guest(make_sim: MakeSim, serve: MakeServe, machine: MakeMachine) -> None:
    sim = make_sim(2)
    server, vm = serve(sim.chardev), machine(2)
    vm.plug(server.connect())
    vm.cont()
    assert server.status()["pairs"] == 2
    vm.receives()
    front = vm.front
    assert front is not None
    for index in (2, 3):
        front.enable(index, False)
    assert server.status()["pairs"] == 1
    for index in (2, 3):
        front.enable(index, True)
    assert server.status()["pairs"] == 2
    vm.receives()
    vm.stop()
    os.close(front.start_logging(4))
    vm.cont(log=True)
    vm.receives()
    vm.settle()


def receiving(make_sim: MakeSim, serve: MakeServe, machine: MakeMachine) -> tuple[Serve, Machine]:
    """A server and a machine on it that has frames."""
    server, vm = serve(make_sim(1).chardev), machine()
    vm.plug(server.connect())
    vm.cont()
    vm.receives()
    return server, vm


def test_serve_does_not_run_while_frames_pass(make_sim: MakeSim, serve: MakeServe, machine: MakeMachine) -> None:
    server, vm = receiving(make_sim, serve, machine)
    # it looks once after a start
    time.sleep(2 * TICK)
    begin, before = time.monotonic(), server.cpu_ns()
    vm.receives(10_000)
    used, seconds = server.cpu_ns() - before, time.monotonic() - begin
    print(f"10,000 frames in {seconds:.1f} s, {used / 1e6:.3f} ms of CPU in serve")
    # where the kernel does not report discarded memory, it looks at intervals, however many frames pass
    assert used == 0 or (not reports_memfds() and used < (0.02 + 0.02 * seconds) * 1e9)
    vm.settle()


def test_a_device_that_fails_wakes_serve(make_sim: MakeSim, serve: MakeServe, machine: MakeMachine) -> None:
    server, vm = receiving(make_sim, serve, machine)
    vm.settle()
    vm.traffic.pause()
    time.sleep(2 * TICK)
    begin = time.time()
    vm.break_ring()
    time.sleep(1.0)
    found = [event for event in server.end() if event["event"] == "device-failed"]
    assert [(event["what"], "NEEDS_RESET" in event["error"]) for event in found[:1]] == [("check", True)]
    assert datetime.fromisoformat(found[0]["time"]).timestamp() - begin < 1.0


def test_memory_is_plugged_and_unplugged_while_frames_pass(device: str, serve: MakeServe, machine: MakeMachine) -> None:
    server, vm = serve(device), machine()
    vm.plug(server.connect())
    vm.cont()
    front = vm.front
    assert front is not None
    more = os.memfd_create("dimm")
    os.ftruncate(more, 8 * MiB)
    region = bytes(8) + front.region(1 << 32, 8 * MiB, 0)
    for _ in range(3):
        front.set(Request.ADD_MEM_REG, region, [more])
        vm.receives()
        front.set(Request.REM_MEM_REG, region)
        vm.receives()
    os.close(more)
    vm.settle()


def test_a_front_end_that_vanishes_leaves_the_device_usable(
    device: str, serve: MakeServe, machine: MakeMachine
) -> None:
    server, vm = serve(device), machine()
    for _ in range(3):
        vm.plug(server.connect())
        vm.cont()
        vm.receives()
        assert vm.front is not None
        vm.front.connection.close()
        wait_for(lambda: server.status()["front_end"] is None)
        assert server.status()["state"] == "reset"
        vm.traffic.pause()
        # as QEMU does then: the base is the used index
        vm.bases = [0] * 2
        vm.unplug()
        vm.close()
        vm = machine()


def test_memory_that_is_discarded_is_mapped_again_and_frames_flow(
    pinned: tuple[str, str], tmp_path: Path, machine: MakeMachine
) -> None:
    from test_vhost_user_server import punch  # noqa: PLC0415

    server, vm = Serve(pinned[0], tmp_path), machine()
    try:
        vm.plug(server.connect())
        vm.cont()
        vm.receives()
        punch(vm.fd, MEMORY - 8 * MiB, 4 * MiB)
        wait_for(lambda: server.status()["memory"]["discarded"] >= 4 * MiB, 5)
        vm.receives()
        vm.settle()
    finally:
        vm.unplug()
        server.close()


def test_features_that_were_not_offered_are_refused(device: str, serve: MakeServe) -> None:
    server = serve(device)
    front: FrontEnd = server.connect()
    front.connect()
    assert not front.offered & int(Feature.ACCESS_PLATFORM)
    front.close()
    assert LAYOUT
