"""vdpa_hwsim devices for the tests: made with the parameters that a test needs, read out by debugfs."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import lab

PARAMETERS = Path("/sys/module/vdpa_hwsim/parameters")
DEBUGFS = Path("/sys/kernel/debug/vdpa_hwsim")
DEFAULTS: dict[str, str] = {}


def load() -> None:
    """Load the module and remember its defaults."""
    if not PARAMETERS.is_dir():
        lab.command("modprobe", "vdpa_hwsim")
    if not DEBUGFS.is_dir():
        lab.command("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug")
    if not DEFAULTS:
        DEFAULTS.update({p.name: p.read_text().strip() for p in PARAMETERS.iterdir() if os.access(p, os.W_OK)})


def set_parameters(**parameters: object) -> None:
    """Parameters apply to devices made afterwards; all others are at their defaults."""
    for name, value in {**DEFAULTS, **{k: str(v) for k, v in parameters.items()}}.items():
        (PARAMETERS / name).write_text(value)


@dataclass
class HwSim:
    """One device."""

    name: str
    chardev: str
    mac: bytes

    def read(self, file: str) -> dict[str, str]:
        """A debugfs file of key=value lines."""
        lines = (DEBUGFS / self.name / file).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def write(self, file: str, value: object) -> None:
        """Turn a knob."""
        (DEBUGFS / self.name / file).write_text(f"{value}\n")


MakeSim = Callable[..., HwSim]
"""Takes what :func:`add` does, but for the name."""


def add(name: str, pairs: int = 1, mac: bytes | None = None, **parameters: object) -> HwSim:
    """Make a device."""
    sim = _add(name, pairs, mac, parameters)
    node = f"/sys/bus/vdpa/devices/{name}"
    lab.wait_for(lambda: list(Path(node).glob("vhost-vdpa-*")), f"the chardev of {name}")
    [entry] = Path(node).glob("vhost-vdpa-*")
    lab.wait_for(Path(f"/dev/{entry.name}").exists, f"/dev/{entry.name}")
    sim.chardev = f"/dev/{entry.name}"
    return sim


def _add(name: str, pairs: int, mac: bytes | None, parameters: Mapping[str, object]) -> HwSim:
    load()
    set_parameters(**parameters)
    mac = mac or bytes([0x52, 0x54, 0x91, *random.choices(range(1, 256), k=3)])
    lab.command(
        *("vdpa", "dev", "add", "name", name, "mgmtdev", "vdpa_hwsim", "mac", mac.hex(":"), "max_vqp", str(pairs))
    )
    return HwSim(name, "", mac)


def remove(name: str) -> None:
    """Delete a device that no process has open."""
    lab.command("vdpa", "dev", "del", name)


BUS = Path("/sys/bus/vdpa")


@contextlib.contextmanager
def kernel_driver() -> Iterator[None]:
    """The kernel's own driver is there; vhost_vdpa, which takes every other device, stays."""
    lab.command("modprobe", "-a", "virtio_net", "virtio_vdpa")
    try:
        yield
    finally:
        lab.command("modprobe", "-r", "virtio_vdpa")


@dataclass
class Interface:
    """A device's network interface, in a network namespace of its own."""

    sim: HwSim
    namespace: str
    name: str

    def argv(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def run(self, *arguments: str) -> str:
        """Run a command in the namespace; `DEV` is the interface's name."""
        words = [self.name if word == "DEV" else word for word in arguments]
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout


@contextlib.contextmanager
def interface(name: str, address: str, pairs: int = 1, **parameters: object) -> Iterator[Interface]:
    """Make a device, give it to the kernel's own virtio_net, and set an address; within `kernel_driver()`."""
    (BUS / "drivers_autoprobe").write_text("0")
    try:
        sim = _add(name, pairs, None, {"identity": "Y", **parameters})
    finally:
        (BUS / "drivers_autoprobe").write_text("1")
    try:
        node = BUS / "devices" / name
        (node / "driver_override").write_text("virtio_vdpa")
        (BUS / "drivers/virtio_vdpa/bind").write_text(name)
        lab.wait_for(lambda: list(node.glob("virtio*/net/*")), f"the network interface of {name}")
        [entry] = node.glob("virtio*/net/*")
        end = Interface(sim, f"ns-{name}", entry.name)
        lab.command("ip", "netns", "add", end.namespace)
        try:
            lab.command("ip", "link", "set", end.name, "netns", end.namespace)
            end.run("ip", "address", "add", f"{address}/24", "dev", "DEV")
            end.run("ip", "link", "set", "lo", "up")
            end.run("ip", "link", "set", "DEV", "up")
            yield end
        finally:
            lab.command("ip", "netns", "del", end.namespace)
    finally:
        remove(name)
