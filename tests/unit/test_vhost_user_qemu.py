"""Stock QEMU in front of a server whose device is a double: its orders of messages, and what they lead to.

tests/kernel/test_serve_qemu.py does the same with frames on real devices.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from door_double import OFFERED, DoorDouble
from qtest import (
    MEMORY,
    MULTIQUEUE,
    WANTED,
    MiB,
    Qemu,
    QemuRig,
    QtestError,
    begin_migration,
    ended,
    migrate,
    versions,
    wait_for,
)

from pyvhostvdpa import GuestMemory, State, VdpaNetDevice
from pyvhostvdpa.migration.endpoint import Address, Listener
from pyvhostvdpa.net.control import (
    MAC_ADDR_SET,
    MAC_TABLE_SET,
    OK,
    VQ_PAIRS_SET,
    Class,
    ControlModel,
    Rx,
    command,
    mac_table,
)
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.vhost_user.backend import Backend
from pyvhostvdpa.vhost_user.doors import Door, listen
from pyvhostvdpa.vhost_user.mapped import DeviceMemory
from pyvhostvdpa.vhost_user.options import BackendOptions
from pyvhostvdpa.vhost_user.server import Filters, Peering, Policy, Server

PROGRAMS = versions()


class Served:
    """A server with a device double."""

    def __init__(self, folder: Path, name: str, doors: list[DoorDouble], **options: Any) -> None:
        doors.append(DoorDouble(OFFERED))
        self.door = doors[-1]
        self._closed = False
        self.path = str(folder / f"{name}.sock")
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.device = VdpaNetDevice("/dev/vhost-vdpa-double", wanted=None)
        self.memory = GuestMemory.empty()
        self.backend = Backend(
            self.device, self.memory, Trace(), BackendOptions(control="filters" in options), self._report
        )
        door = Door(connect_to=self.path) if options.pop("client", False) else Door(listen(self.path))
        self.server = Server(self.backend, door, Policy(), None, **options)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def _report(self, event: str, fields: Any) -> None:
        self.events.append((event, dict(fields)))

    def names(self) -> list[str]:
        return [name for name, _ in self.events if name != "message"]

    def requests(self) -> list[str]:
        return [fields["request"] for name, fields in self.events if name == "message"]

    def is_in(self, state: State) -> None:
        wait_for(lambda: self.device.state is state, 8)
        if state is not State.RESET:
            wait_for(lambda: self.door.running and not self.door.unreachable_rings())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.server.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.server.close()
        self.backend.close()
        self.device.close()
        self.memory.close()


class Rig(QemuRig):
    def __init__(self, folder: Path, doors: list[DoorDouble], program: str) -> None:
        super().__init__(folder, program)
        self._doors = doors

    def serve(self, name: str = "first", **options: Any) -> Served:
        made = Served(self.folder, name, self._doors, **options)
        self.stack.callback(made.close)
        return made

    def started(self, served: Served, pairs: int = 1, options: tuple[str, ...] = ()) -> Qemu:
        machine = self.driven(served, pairs, options)
        served.is_in(State.PASSTHROUGH)
        return machine


@pytest.fixture(params=PROGRAMS or [pytest.param("", marks=pytest.mark.skip(reason="there is no QEMU"))])
def rig(request: pytest.FixtureRequest, doors: list[DoorDouble]) -> Iterator[Rig]:
    # guest memory has to be in memory, and paths of sockets short
    folder = Path(tempfile.mkdtemp(prefix="serve-", dir="/dev/shm"))
    made = Rig(folder, doors, request.param)
    try:
        with made.stack:
            yield made
    finally:
        shutil.rmtree(folder)


def test_start_stop_cont_link_reset_and_unload(rig: Rig) -> None:
    served = rig.serve()
    machine = rig.started(served)
    negotiations = served.names().count("negotiated")
    for _ in range(2):
        machine.qmp("stop")
        served.is_in(State.RESET)
        machine.qmp("cont")
        served.is_in(State.PASSTHROUGH)
    machine.qmp("set_link", name="nic", up=False)
    served.is_in(State.RESET)
    machine.qmp("set_link", name="nic", up=True)
    served.is_in(State.PASSTHROUGH)
    assert served.names().count("negotiated") == negotiations
    assert served.requests().count("ADD_MEM_REG") == len(served.backend.memory.regions)
    machine.reset_driver()
    served.is_in(State.RESET)
    offered = machine.probe()
    machine.start(offered & WANTED)
    served.is_in(State.PASSTHROUGH)
    machine.qmp("system_reset")
    served.is_in(State.RESET)
    assert "refused" not in served.names()
    assert machine.said() == ""


def test_a_migration_is_cancelled_and_the_next_one_moves(rig: Rig) -> None:
    first, second = rig.serve(), rig.serve("second")
    machine = rig.started(first)
    with rig.migrating(machine):
        first.is_in(State.SHADOW)
        # a busy machine may take that long
        time.sleep(3)
    first.is_in(State.PASSTHROUGH)
    there = rig.qemu("destination", second, options=("-incoming", "defer"))
    assert migrate(machine, there, rig.folder)["status"] == "completed"
    second.is_in(State.PASSTHROUGH)
    assert first.device.state is State.RESET
    assert {"switched", "stopped"} <= set(first.names())
    if "SET_DEVICE_STATE_FD" in first.requests():
        assert "state-loaded" in second.names()


def test_migration_that_fails_at_its_end_leaves_the_guest_running_at_the_source(rig: Rig) -> None:
    first = rig.serve()
    machine = rig.started(first)
    begin_migration(machine, None, "exec:cat >/dev/null; exit 1")
    wait_for(lambda: ended(machine))
    machine.qmp("cont")
    first.is_in(State.PASSTHROUGH)
    assert not first.backend.dirty_log.wanted


def test_qemu_continues_with_another_server_in_place_of_one_that_ended(rig: Rig) -> None:
    served = rig.serve(client=True)
    machine = rig.qemu("source", served, listens=True)
    offered = machine.probe()
    machine.make_driver()
    machine.start(offered & WANTED)
    served.is_in(State.PASSTHROUGH)
    served.close()
    another = rig.serve(client=True)
    another.is_in(State.PASSTHROUGH)
    assert machine.status() == 15


def test_queue_pairs_follow_the_guests_control_queue(rig: Rig) -> None:
    served = rig.serve()
    machine = rig.started(served, 2)
    machine.run_control()
    assert machine.nic is not None
    assert machine.nic.control is not None
    for pairs in (2, 1, 2):
        assert machine.nic.control.send(command(Class.MQ, VQ_PAIRS_SET, bytes([pairs, 0]))) == OK
        wait_for(lambda pairs=pairs: served.backend.pairs == pairs)
    machine.qmp("stop")
    served.is_in(State.RESET)
    machine.qmp("cont")
    served.is_in(State.PASSTHROUGH)
    assert served.backend.pairs == 2


def test_memory_is_plugged_while_the_guest_runs(rig: Rig) -> None:
    served = rig.serve()
    machine = rig.started(served, options=("-m", f"{MEMORY // MiB},slots=4,maxmem=1G"))
    regions = len(served.backend.memory.regions)
    machine.qmp("object-add", **{"qom-type": "memory-backend-memfd", "id": "more", "size": 128 * MiB, "share": True})
    machine.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")
    wait_for(lambda: len(served.backend.memory.regions) == regions + 1)
    served.is_in(State.PASSTHROUGH)
    assert "refused" not in served.names()


def test_a_balloon_is_refused_and_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceMemory, "pins", True)
    served = rig.serve()
    # it connects to its back-end again and again, and does not come to its monitor
    with suppress(QtestError):
        rig.qemu("source", served, options=("-device", "virtio-balloon-pci"), seconds=15)
    wait_for(lambda: "refused-front-end" in served.names())
    refused = [fields for name, fields in served.events if name == "refused-front-end"]
    assert "virtio-balloon-pci" in json.dumps(refused)
    assert len(refused) == 1


def test_destination_is_ready_when_the_guest_comes(rig: Rig) -> None:
    address = Address.parse(f"unix:{rig.folder / 'peer'}")
    second = rig.serve("second", peering=Peering(listener=Listener(address)))
    first = rig.serve("first", peering=Peering(to=address))
    machine = rig.started(first)
    there = rig.qemu("destination", second, options=("-incoming", "defer"))
    machine.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 12})
    hold = rig.folder / "hold"
    begin_migration(machine, there, f"unix:{hold}")
    wait_for(lambda: "peer-ready" in first.names())
    assert "prepared" in second.names()
    calls = len(second.door.calls)
    machine.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 30})
    wait_for(lambda: ended(machine))
    second.is_in(State.PASSTHROUGH)
    left = [call.name for call in second.door.calls[calls:]]
    assert "RESUME" in left
    assert not [name for name in left if name.startswith("IOTLB") or name == "SET_FEATURES"]


def test_receive_filters_of_the_guest_reach_the_device(rig: Rig) -> None:
    monitor = str(rig.folder / "filters.qmp")
    served = rig.serve(filters=Filters(monitor))
    machine = rig.qemu("source", served, 2, ("-qmp", f"unix:{monitor},server=on,wait=off"))
    offered = machine.probe()
    machine.make_driver()
    machine.start(offered & (MULTIQUEUE | int(Feature.CTRL_RX | Feature.CTRL_MAC_ADDR)))
    served.is_in(State.PASSTHROUGH)
    machine.run_control()
    assert machine.nic is not None
    control = machine.nic.control
    assert control is not None
    wait_for(lambda: "filter" in served.names())
    answered = len(served.door.answered)
    mac = bytes.fromhex("525400aabbcc")
    assert control.send(command(Class.MAC, MAC_ADDR_SET, mac)) == OK
    wait_for(lambda: set_by(served).mac == mac)
    assert control.send(command(Class.RX, Rx.ALLMULTI, b"\1")) == OK
    wait_for(lambda: set_by(served).rx[Rx.ALLMULTI])
    assert control.send(command(Class.MAC, MAC_TABLE_SET, mac_table([mac], [b"\1\0\x5e\0\0\1"]))) == OK
    wait_for(lambda: set_by(served).multicast == [b"\1\0\x5e\0\0\1"])
    assert len(served.door.answered) > answered
    # it is restored by the next start
    machine.qmp("stop")
    served.is_in(State.RESET)
    machine.qmp("cont")
    served.is_in(State.PASSTHROUGH)
    assert set_by(served).mac == mac


def set_by(served: Served) -> ControlModel:
    """What the device was set to."""
    found = served.backend.control_model
    assert found is not None
    return found
