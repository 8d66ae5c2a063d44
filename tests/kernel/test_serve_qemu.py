"""Stock QEMU in front of ``vhost-vdpa serve`` on real devices; its guest is a driver in this process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hwsim import MakeSim
from machine import Serve
from qtest import MEMORY, WANTED, MiB, Qemu, QemuRig, begin_migration, ended, migrate, versions, wait_for

from pyvhostvdpa.net.control import OK, VQ_PAIRS_SET, Class, command


class Rig(QemuRig):
    """Servers and machines of one test, in one folder."""

    def __init__(self, folder: Path, make_sim: MakeSim, program: str) -> None:
        super().__init__(folder, program)
        self._make_sim = make_sim

    def serve(self, pairs: int = 1, options: tuple[str, ...] = ()) -> Serve:
        made = Serve(self._make_sim(pairs).chardev, self.folder, *options)
        self.stack.callback(made.close)
        return made

    def started(self, server: Serve, pairs: int = 1, options: tuple[str, ...] = ()) -> Qemu:
        """A machine whose driver runs."""
        machine = self.driven(server, pairs, options)
        assert machine.status() == 15
        wait_for(lambda: server.status()["state"] == "passthrough")
        machine.run()
        machine.receives()
        return machine


CASES = versions() if os.environ.get("SERVE_EVERY_QEMU") else versions()[-1:]
"""Every version: `tools/lab test --vmm --env SERVE_EVERY_QEMU=1 tests/kernel/test_serve_qemu.py`."""


@pytest.fixture(params=CASES, ids=os.path.basename)
def rig(request: pytest.FixtureRequest, make_sim: MakeSim) -> Iterator[Rig]:
    # guest memory and sockets have to be in memory, and paths of sockets short; a device takes 2,048 runs of pages, and
    # small pages of a machine that has been up for long are more
    folder = Path("/dev/shm/qemu")
    folder.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always,mode=700", "qemu", str(folder)], check=True)
    Path("/proc/sys/vm/compact_memory").write_text("1")
    made = Rig(folder, make_sim, request.param)
    try:
        with made.stack:
            yield made
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_stop_and_cont_and_link_flaps_and_resets(rig: Rig) -> None:
    server = rig.serve()
    machine = rig.started(server)
    for _ in range(3):
        # the driver stops with the machine's CPU
        machine.pause()
        machine.qmp("stop")
        assert server.status()["state"] == "reset"
        machine.qmp("cont")
        assert server.status()["state"] == "passthrough"
        machine.run()
        machine.receives()
    # a frame that waits when the link goes down is dropped by QEMU itself (hw/net/virtio-net.c), and the driver would
    # wait for it
    machine.settle()
    machine.pause()
    machine.qmp("set_link", name="nic", up=False)
    assert server.status()["state"] == "reset"
    machine.qmp("set_link", name="nic", up=True)
    wait_for(lambda: server.status()["state"] == "passthrough")
    machine.send_again()
    machine.run()
    machine.receives()
    machine.settle()
    machine.reset_driver()
    wait_for(lambda: server.status()["state"] == "reset")
    machine.qmp("system_reset")
    assert server.status()["failed"] is None
    assert machine.said() == ""


def test_a_migration_that_is_cancelled_and_two_that_are_not(rig: Rig) -> None:
    first, second = rig.serve(), rig.serve()
    machine = rig.started(first)
    with rig.migrating(machine):
        wait_for(lambda: first.status()["state"] == "shadow")
        machine.receives()
    wait_for(lambda: first.status()["state"] == "passthrough")
    machine.receives()
    there = rig.qemu("destination", second, options=("-incoming", "defer"))
    assert migrate(machine, there, rig.folder)["status"] == "completed"
    assert second.status()["state"] == "passthrough"
    there.run()
    there.receives()
    machine.close()
    # back to the first device, which has been waiting
    back = rig.qemu("back", first, options=("-incoming", "defer"))
    (rig.folder / "migration.sock").unlink(missing_ok=True)
    assert migrate(there, back, rig.folder)["status"] == "completed"
    back.run()
    back.receives()
    back.settle()
    for server in (first, second):
        assert server.status()["failed"] is None


def test_queue_pairs_follow_the_guests_control_queue(rig: Rig) -> None:
    server = rig.serve(2)
    machine = rig.started(server, 2)
    assert machine.nic is not None
    assert machine.nic.control is not None
    for pairs in (2, 1, 2):
        assert machine.nic.control.send(command(Class.MQ, VQ_PAIRS_SET, bytes([pairs, 0]))) == OK
        assert server.status()["pairs"] == pairs
    machine.receives()
    machine.settle()


def test_memory_is_plugged_while_the_guest_runs(rig: Rig) -> None:
    server = rig.serve()
    machine = rig.started(server, options=("-m", f"{MEMORY // MiB},slots=4,maxmem=1G"))
    regions = server.status()["memory"]["regions"]
    machine.qmp("object-add", **{"qom-type": "memory-backend-memfd", "id": "more", "size": 128 * MiB, "share": True})
    machine.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")
    found = server.status()["memory"]
    assert found["regions"] == regions + 1
    assert found["bytes"] >= MEMORY - MiB + 128 * MiB
    machine.receives()
    machine.settle()
    assert server.status()["failed"] is None


def test_qemu_continues_with_another_server_in_place_of_one_that_was_killed(rig: Rig) -> None:
    server = rig.serve(1, options=("--client",))
    machine = rig.qemu("source", server, listens=True)
    offered = machine.probe()
    machine.make_driver()
    machine.start(offered & WANTED)
    wait_for(lambda: server.status()["state"] == "passthrough")
    machine.run()
    machine.receives()
    # what is on its way is lost with the server, and the driver would wait for it
    machine.settle()
    machine.pause()
    server.process.kill()
    server.process.wait()
    another = server.again()
    rig.stack.callback(another.close)
    wait_for(lambda: another.status()["state"] == "passthrough")
    machine.send_again()
    machine.run()
    machine.receives()
    assert another.status()["failed"] is None


def test_destination_is_ready_when_the_guest_comes(rig: Rig) -> None:
    peer = f"unix:{rig.folder / 'peer'}"
    second = rig.serve(options=("--peer-listen", peer))
    first = rig.serve(options=("--peer", peer))
    machine = rig.started(first)
    there = rig.qemu("destination", second, options=("-incoming", "defer"))
    machine.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 12})
    begin_migration(machine, there, f"unix:{rig.folder / 'migration.sock'}")
    wait_for(lambda: second.status()["memory"]["early"] > 0, 60)
    machine.receives()
    wait_for(lambda: ended(machine), 60)
    wait_for(lambda: second.status()["state"] == "passthrough")
    there.take_driver(machine)
    there.run()
    there.receives()
    there.settle()
    found = second.status()
    assert found["memory"]["early"] == 0
    assert found["failed"] is None
