"""vdpa_hwsim devices for the tests: made with the parameters that a test needs, read out by debugfs."""

from __future__ import annotations

import os
import random
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


def add(name: str, pairs: int = 1, mac: bytes | None = None, **parameters: object) -> HwSim:
    """Make a device."""
    load()
    set_parameters(**parameters)
    mac = mac or bytes([0x52, 0x54, 0x91, *random.choices(range(1, 256), k=3)])
    lab.command(
        *("vdpa", "dev", "add", "name", name, "mgmtdev", "vdpa_hwsim", "mac", mac.hex(":"), "max_vqp", str(pairs))
    )
    node = f"/sys/bus/vdpa/devices/{name}"
    lab.wait_for(lambda: list(Path(node).glob("vhost-vdpa-*")), f"the chardev of {name}")
    [entry] = Path(node).glob("vhost-vdpa-*")
    lab.wait_for(Path(f"/dev/{entry.name}").exists, f"/dev/{entry.name}")
    return HwSim(name, f"/dev/{entry.name}", mac)


def remove(name: str) -> None:
    """Delete a device that nobody has open."""
    lab.command("vdpa", "dev", "del", name)
