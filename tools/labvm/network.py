"""The devices of a move and what is at the other end of their wires: a switch, and a host behind it.

    guest - QEMU - vm0 ===wire=== end0 - bridge (10.9.0.1, vm-peer)
            QEMU - vm1 ===wire=== end1 - the same bridge

The ends are vdpa_hwsim devices as well, driven by the kernel's own virtio_net. As on a real network the switch learns
where the guest is from the guest's frames.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PARAMETERS = Path("/sys/module/vdpa_hwsim/parameters")
DEBUGFS = Path("/sys/kernel/debug/vdpa_hwsim")
BUS = Path("/sys/bus/vdpa")
RESERVED = Path("/proc/sys/vm/nr_hugepages")
HUGE = 2 << 20
COMPACT = Path("/proc/sys/vm/compact_memory")
BRIDGE = "switch"
ADDRESS, GUEST_ADDRESS = "10.9.0.1", "10.9.0.2"
GUEST_MAC = "52:54:91:0d:00:02"


class NotReady(Exception):
    """Something of the machine that was expected did not come."""


AS_PROGRAMS_RUN = ("chrt", "--other", "0")
"""Before a command: it is scheduled as any other, whatever this program is."""


def give_way() -> None:
    """Run only when nothing else wants to: on one CPU this program would hold up what it measures, 4 ms at a time.

    What it starts does so too, unless its command line begins with :data:`AS_PROGRAMS_RUN`.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run(*words: str) -> str:
    """Run a command and return its output; NotReady with what it said if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotReady(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise NotReady(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)


@contextmanager
def parameters(values: dict[str, object]) -> Iterator[None]:
    """Set parameters for devices made within the block."""
    before = {name: (PARAMETERS / name).read_text().strip() for name in values}
    try:
        for name, value in values.items():
            (PARAMETERS / name).write_text(str(value))
        yield
    finally:
        for name, value in before.items():
            (PARAMETERS / name).write_text(value)


def has_huge_pages() -> bool:
    """Return whether the kernel can set huge pages aside at all; User Mode Linux cannot."""
    return RESERVED.exists()


@contextmanager
def huge_pages(memory: int) -> Iterator[None]:
    """Set so many bytes of huge pages aside within the block, if this kernel can.

    A device takes 2,048 runs of pages (`max_iotlb_entries` of vhost_vdpa), and the small pages of 128 MiB may be more.
    """
    if not has_huge_pages():
        yield
        return
    before, wanted = int(RESERVED.read_text()), -(-memory // HUGE)
    COMPACT.write_text("1")
    RESERVED.write_text(str(before + wanted))
    try:
        if int(RESERVED.read_text()) < before + wanted:
            raise NotReady(f"there are not {wanted} huge pages")
        yield
    finally:
        RESERVED.write_text(str(before))


@dataclass
class Sim:
    """A vdpa_hwsim device; `chardev` if vhost_vdpa has it, `interface` if virtio_net does."""

    name: str
    chardev: str = ""
    interface: str = ""

    def read(self, file: str) -> dict[str, str]:
        """Return a debugfs file of key=value lines; nothing for a device of another kind."""
        if not (DEBUGFS / self.name).is_dir():
            return {}
        lines = (DEBUGFS / self.name / file).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def counters(self) -> dict[str, int]:
        """Return its counters; nothing for a device of another kind."""
        return {key: int(value) for key, value in self.read("stats").items()}


@dataclass(frozen=True)
class Costs:
    """How slow the devices are: a profile of vdpa_hwsim, and how many bytes guest memory is charged as."""

    profile: str = "none"
    memory: int = 128 << 20
    charged: int = 0

    def parameters(self) -> dict[str, object]:
        """Return the module's parameters."""
        scale = max(1, self.charged // self.memory) if self.profile != "none" else 1
        return {"cost_profile": self.profile, "mem_scale": scale, "heavy_min": self.memory // 2}


@dataclass(frozen=True)
class Wires:
    """The devices for virtual machines, and the ends that lead to the switch."""

    devices: list[Sim] = field(default_factory=list)
    ends: list[Sim] = field(default_factory=list)


@contextmanager
def loops(memory: int, count: int = 2) -> Iterator[Wires]:
    """Make vdpa_sim_net devices, which send a guest's frames back to it; they have no other peer.

    Huge pages for guests with so much memory are there as well.
    """
    run("modprobe", "vdpa_sim_net")
    with ExitStack() as stack:
        stack.enter_context(huge_pages((count + 1) * memory))
        result = Wires()
        for number in range(count):
            device = stack.enter_context(_device(f"vm{number}", 1, GUEST_MAC, "vdpasim_net"))
            device.chardev = _chardev(device.name)
            result.devices.append(device)
        yield result


@contextmanager
def wires(costs: Costs, ring_max: int, pairs: int = 1, count: int = 2, huge: bool = True) -> Iterator[Wires]:
    """Make the devices and the switch, and ``huge`` pages for guests; everything is gone afterwards."""
    with ExitStack() as stack:
        if huge:
            stack.enter_context(huge_pages((count + 1) * costs.memory))
        run("modprobe", "-a", "virtio_net", "virtio_vdpa", "bridge")
        stack.callback(run, "modprobe", "-r", "virtio_vdpa")
        run("ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0")
        stack.callback(run, "ip", "link", "del", BRIDGE)
        result = Wires()
        for number in range(count):
            with parameters({"identity": "Y", "wire": "Y", "filter": "N"}):
                end = stack.enter_context(_device(f"end{number}", pairs, f"52:54:91:0d:01:{number:02x}"))
            _give_to_kernel(end)
            run("ip", "link", "set", end.interface, "master", BRIDGE, "up")
            result.ends.append(end)
            with parameters({"wire": "Y", "ring_max": ring_max, **costs.parameters()}):
                device = stack.enter_context(_device(f"vm{number}", pairs, GUEST_MAC))
            device.chardev = _chardev(device.name)
            result.devices.append(device)
        run("ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        yield result


@contextmanager
def _device(name: str, pairs: int, mac: str, parent: str = "vdpa_hwsim") -> Iterator[Sim]:
    # vhost_vdpa takes every device that comes; one for the kernel's own driver is bound by hand
    probe = "0" if name.startswith("end") else "1"
    (BUS / "drivers_autoprobe").write_text(probe)
    try:
        queues = ["max_vqp", str(pairs)] if parent == "vdpa_hwsim" else []
        run("vdpa", "dev", "add", "name", name, "mgmtdev", parent, "mac", mac, *queues)
    finally:
        (BUS / "drivers_autoprobe").write_text("1")
    try:
        yield Sim(name)
    finally:
        run("vdpa", "dev", "del", name)


def _chardev(name: str) -> str:
    node = BUS / "devices" / name
    wait_for(lambda: list(node.glob("vhost-vdpa-*")), f"the chardev of {name}")
    path = Path("/dev") / next(node.glob("vhost-vdpa-*")).name
    wait_for(path.exists, str(path))
    return str(path)


def _give_to_kernel(sim: Sim) -> None:
    node = BUS / "devices" / sim.name
    (node / "driver_override").write_text("virtio_vdpa")
    (BUS / "drivers/virtio_vdpa/bind").write_text(sim.name)
    wait_for(lambda: list(node.glob("virtio*/net/*")), f"the network interface of {sim.name}")
    sim.interface = next(node.glob("virtio*/net/*")).name
