# lab: --vmm --devices vdpa_hwsim:0 --memory 3G
"""A Linux guest on serve moves while one of both servers and both QEMUs is killed, at each phase of a move.

The guest has to go on where QEMU says that it is, once whatever was killed is back; if no QEMU has it, the one that had
it was killed. Nothing is left over: a server whose front-end has left has no memory, no pinned page and no descriptor
more than before. PYVHOSTVDPA_DEATHS (`source-serve:log,destination-qemu:stopped`) chooses cases.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import pytest

from labvm import network
from labvm.backends import SERVE, Attachment, attached
from labvm.machine import GuestMachine, Machine, ring_entries, started, vmms
from labvm.move import BANDWIDTH, HELD, Plan, flows, peer, wait_until
from labvm.qmp import QmpError

PHASES = (
    *("before", "log", "switched", "prepared", "precopy"),
    *("cancelled", "stopped", "switching", "running", "completed"),
)
"""When a process is killed: before the migration; once the source has a log; once its device is in shadow mode; once
the destination is ready; a second later; right after the migration is cancelled; once the guest is paused; when its
last pages move; once the destination's device runs; once the migration is completed."""
VICTIMS = ("source-serve", "destination-serve", "source-qemu", "destination-qemu")
CASES = [(victim, phase) for phase in PHASES for victim in VICTIMS]
CHOSEN = [tuple(word.split(":")) for word in os.environ.get("PYVHOSTVDPA_DEATHS", "").split(",") if word]
LIMIT = 240.0
MEMORY = 64 << 20


class Server:
    """`vhost-vdpa serve` on one device, started again when it has been killed."""

    def __init__(self, number: int, sim: network.Sim, folder: Path) -> None:
        self.name, self._onward, self._sim, self._folder = f"vm{number}", f"vm{1 - number}", sim, folder
        self._stack = ExitStack()
        self.attachment: Attachment
        self.start()

    def start(self) -> None:
        self._stack.close()
        self.attachment = self._stack.enter_context(
            attached(SERVE, self._sim, self._folder, self.name, onward=self._onward)
        )
        wait((self._folder / f"{self.name}.sock.status").exists, "its status")
        self._idle = self._descriptors()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self.attachment.process is not None
        return self.attachment.process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def revive(self) -> None:
        if self.process.poll() is not None:
            assert self.process.returncode == -9, self.attachment.log.read_text() if self.attachment.log else ""
            self.start()

    def events(self, name: str) -> int:
        return sum(event["event"] == name for _, event in self.attachment.events())

    def status(self) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(30)
            asking.connect(str(self._folder / f"{self.name}.sock.status"))
            data = b""
            while piece := asking.recv(1 << 16):
                data += piece
        found: dict[str, Any] = json.loads(data)
        return found

    def _descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def _pinned_kib(self) -> int:
        found = re.search(r"^VmPin:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text(), re.M)
        return int(found[1]) if found else 0

    def left_over(self) -> list[str]:
        """Return what a server has though no front-end is connected."""
        found = self.status()
        wrong = [f"{key} {found[key]}" for key, value in (("front_end", None), ("failed", None)) if found[key] != value]
        wrong += [f"memory {found['memory']}"] if found["memory"]["bytes"] or found["memory"]["early"] else []
        wrong += [f"{self._pinned_kib()} kB pinned"] if self._pinned_kib() else []
        wrong += [f"{self._descriptors()} descriptors for {self._idle}"] if self._descriptors() > self._idle else []
        status = self._sim.read("state")["status"]
        return [*wrong, *([f"device status {status}"] if status != "0x00" else [])]

    def gave_back(self) -> bool:
        return not self.left_over()

    def close(self) -> None:
        self._stack.close()


def wait(what: Callable[[], Any], words: str, seconds: float = 60.0) -> None:
    network.wait_for(what, words, seconds)


class Rig:
    """Two servers, and the guest wherever it is."""

    def __init__(self, folder: Path, there: network.Wires) -> None:
        self.folder = folder
        self.plan = Plan(vmms()[-1], SERVE, guest=GuestMachine(memory=MEMORY), limit=LIMIT)
        self.servers = [Server(number, sim, folder) for number, sim in enumerate(there.devices)]
        self.at = 0
        self.machine: Machine | None = None
        self._stack = ExitStack()
        self._number = 0

    def qemu(self, stack: ExitStack, side: int, incoming: bool) -> Machine:
        self._number += 1
        netdev = self.servers[side].attachment.netdev
        return stack.enter_context(
            started(self.plan.vmm, self.folder, f"qemu{self._number}", netdev, self.plan.guest, incoming)
        )

    def have_guest(self) -> Machine:
        if self.machine is None:
            machine = self.machine = self.qemu(self._stack, self.at, incoming=False)
            wait_until(machine, lambda: machine.reports, "the guest's first report", LIMIT)
            flows(machine, LIMIT)
        return self.machine

    def keep(self, machine: Machine | None, side: int, stack: ExitStack) -> None:
        """Go on with this machine, None for neither; the others end."""
        if machine is None or machine is self.machine:
            stack.close()
        if machine is not self.machine:
            self._stack.close()
            self._stack, self.machine, self.at = stack.pop_all(), machine, side

    def check_flows(self) -> None:
        """Wait for frames; a link that is down since its server died is switched on."""
        assert self.machine is not None
        received = self.machine.reports[-1]["udp"]["received"] if self.machine.reports else 0
        try:
            flows(self.machine, 40.0, received)
        except network.NotReady:
            # QEMU moves the link's state as well: the source's link was down when the guest moved
            print("    set_link", flush=True)
            tell(self.machine, "set_link", name="net", up=True)
            flows(self.machine, LIMIT, received)

    def account(self) -> None:
        """Have the guest check all of its memory."""
        if self.machine is None:
            return
        machine, seen = self.machine, len(self.machine.reports)
        machine.console.send("stop")
        wait_until(machine, lambda: machine.reports[-1].get("guest") == "stopped", "the guest's account", LIMIT)
        told = machine.reports[-1]
        assert len(machine.reports) > seen
        assert told["memory"]["wrong"] == 0, told
        assert told["memory"]["verified"] > 0, told
        machine.console.send("go")

    def close(self) -> None:
        self._stack.close()
        for server in self.servers:
            server.close()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    costs = network.Costs(memory=MEMORY)
    with network.wires(costs, ring_entries(vmms()[-1])) as there, peer():
        made = Rig(tmp_path_factory.mktemp("d"), there)
        try:
            yield made
        finally:
            made.close()


def status_of(machine: Machine) -> str:
    """Return what QEMU says of itself."""
    with suppress(QmpError, OSError, TimeoutError):
        return str(machine.qmp.command("query_status")["status"])
    return "gone"


def tell(machine: Machine, command: str, **arguments: Any) -> None:
    """Tell a QEMU that may be gone."""
    with suppress(QmpError, OSError):
        machine.qmp.command(command, 120.0, **arguments)


class Death:
    """One migration in which a process is killed."""

    def __init__(self, rig: Rig, there: Machine, victim: str, phase: str) -> None:
        self.rig, self.phase = rig, phase
        self.here, self.there = rig.have_guest(), there
        self.near, self.far = rig.servers[rig.at], rig.servers[1 - rig.at]
        self.seen = {name: server.events(name) for name, server in self._marks().values()}
        ends: dict[str, Callable[[], None]] = {
            "source-serve": self.near.kill,
            "destination-serve": self.far.kill,
            "source-qemu": lambda: self._kill(self.here),
            "destination-qemu": lambda: self._kill(self.there),
        }
        self.kill = ends[victim]

    def _marks(self) -> dict[str, tuple[str, Server]]:
        return {
            "log": ("log", self.near),
            "switched": ("switched", self.near),
            "prepared": ("prepared", self.far),
            "precopy": ("prepared", self.far),
            "running": ("running", self.far),
        }

    @staticmethod
    def _kill(machine: Machine) -> None:
        machine.process.kill()
        machine.process.wait()

    def _until(self, mark: str) -> None:
        name, server = self._marks()[mark]
        wait(lambda: server.events(name) > self.seen[name], f"{name} of {server.name}", 120.0)

    def begin(self, uri: str) -> None:
        """Begin the migration, and kill."""
        if self.phase == "before":
            self.kill()
        wanted = [("events", True), ("pause-before-switchover", self.phase in ("stopped", "switching"))]
        capabilities = [{"capability": name, "state": state} for name, state in wanted]
        for machine in (self.here, self.there):
            tell(machine, "migrate_set_capabilities", capabilities=capabilities)
        tell(self.here, "migrate_set_parameters", max_bandwidth=HELD, downtime_limit=2000)
        tell(self.there, "migrate_incoming", uri=uri)
        tell(self.here, "migrate", uri=uri)
        if self.phase in ("log", "switched", "prepared", "precopy"):
            self._until(self.phase)
            time.sleep(1.0 if self.phase == "precopy" else 0.0)
            self.kill()
        elif self.phase != "before":
            self._until("prepared")
        if self.phase == "cancelled":
            tell(self.here, "migrate_cancel")
            self.kill()
        tell(self.here, "migrate_set_parameters", max_bandwidth=BANDWIDTH)
        if self.phase == "running":
            self._until("running")
            self.kill()
        if self.phase in ("stopped", "switching"):
            self._paused()
        if self.phase == "completed":
            wait_until(self.here, lambda: self._migration() == "completed", "the end of the migration", LIMIT)
            self.kill()

    def _paused(self) -> None:
        wait_until(
            self.here, lambda: self._migration() == "pre-switchover", "the guest to be paused", LIMIT, (self.there,)
        )
        if self.phase == "stopped":
            self.kill()
        tell(self.here, "migrate_continue", state="pre-switchover")
        if self.phase == "switching":
            time.sleep(0.03)
            self.kill()

    def _migration(self) -> str:
        with suppress(QmpError, OSError, TimeoutError):
            return str(self.here.qmp.command("query_migrate").get("status", "none"))
        return "gone"

    def outcome(self) -> tuple[str, str, str]:
        """Return what the migration came to, and what both QEMUs say once nothing more changes."""
        until = time.monotonic() + LIMIT
        last, since = ("", "", ""), time.monotonic()
        while time.monotonic() < until:
            now = (self._migration(), status_of(self.here), status_of(self.there))
            if now != last:
                last, since = now, time.monotonic()
                print(f"    migration {now[0]}, source {now[1]}, destination {now[2]}", flush=True)
            calm = 8.0 if now[0] in ("completed", "failed", "cancelled", "none", "gone") else 60.0
            if time.monotonic() - since > calm:
                break
            time.sleep(0.3)
        return last


@pytest.mark.parametrize("case", CHOSEN or CASES, ids=":".join)
def test_guest_goes_on_where_qemu_says(rig: Rig, case: tuple[str, str]) -> None:
    victim, phase = case
    rig.have_guest()
    with ExitStack() as stack:
        there = rig.qemu(stack, 1 - rig.at, incoming=True)
        death = Death(rig, there, victim, phase)
        death.begin(f"unix:{rig.folder}/m{rig._number}")
        said, here_is, there_is = death.outcome()
        assert (here_is, there_is).count("running") < 2, "both run the guest"
        for server in rig.servers:
            server.revive()
        if there_is == "running":
            rig.keep(there, 1 - rig.at, stack)
        elif here_is == "running":
            rig.keep(death.here, rig.at, stack)
        else:
            # the guest runs nowhere: its process was killed, or reports why it does not run it
            errors = f"{death.here.errors()}; {there.errors()}"
            assert victim.endswith("qemu") or errors, (said, here_is, there_is)
            print(f"    the guest is gone: {errors}", flush=True)
            rig.keep(None, rig.at, stack)
    if rig.machine is not None:
        rig.check_flows()
        rig.account()
    for server in rig.servers if rig.machine is None else [rig.servers[1 - rig.at]]:
        with suppress(network.NotReady):
            wait(server.gave_back, f"{server.name} to give everything back", 30.0)
        assert server.left_over() == []
    where = f"on {rig.servers[rig.at].name}" if rig.machine else "gone"
    print(f"{victim} killed at {phase}: migration {said}; the guest is {where}", flush=True)
