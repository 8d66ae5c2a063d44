"""`vhost-vdpa compat` says of pairs of devices that differ in one thing what a migration between them does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hwsim
import lab
import pytest
from hwsim import HwSim

from pyvhostvdpa import MigrationOptions, VhostVdpaError, migrate
from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.net.features import SUPPORTED, Feature

HERE, THERE = "52:54:00:00:00:0a", "52:54:00:00:00:0b"
ALL = SUPPORTED | Feature.CTRL_VQ | Feature.CTRL_VLAN | Feature.CTRL_MAC_ADDR | Feature.MQ
OPTIONS = MigrationOptions(GuestOptions(lab.SMALL), seconds=0.3)


@dataclass(frozen=True)
class Make:
    """One device: what differs from the others."""

    mac: str = HERE
    pairs: int | None = 1
    mtu: int | None = None
    features: Feature = ALL
    link: int = 1
    parameters: dict[str, Any] = field(default_factory=dict)


SAME = Make()


def without(feature: Feature) -> Make:
    """A device that lacks features; pairs can be asked for with MQ only."""
    return Make(features=ALL & ~feature, pairs=1 if Feature.MQ in ALL & ~feature else None)


PAIRS = {
    "the same": (SAME, SAME, True),
    "another MAC": (SAME, Make(mac=THERE), True),
    "another MAC, no CTRL_MAC_ADDR": (
        without(Feature.CTRL_MAC_ADDR),
        Make(THERE, features=ALL & ~Feature.CTRL_MAC_ADDR),
        False,
    ),
    "smaller MTU": (Make(mtu=9000), Make(mtu=1000), False),
    "larger MTU": (Make(mtu=1000), Make(mtu=9000), True),
    "link down there": (SAME, Make(link=0), False),
    "link down here": (Make(link=0), SAME, True),
    "more pairs there": (SAME, Make(pairs=2), False),
    "fewer pairs there": (Make(pairs=2), SAME, False),
    "no control queue there": (
        SAME,
        without(Feature.CTRL_VQ | Feature.CTRL_VLAN | Feature.CTRL_MAC_ADDR | Feature.MQ),
        False,
    ),
    "no control queue here": (
        without(Feature.CTRL_VQ | Feature.CTRL_VLAN | Feature.CTRL_MAC_ADDR | Feature.MQ),
        SAME,
        True,
    ),
    "no CTRL_VLAN there": (SAME, without(Feature.CTRL_VLAN), False),
    "no CTRL_VLAN here": (without(Feature.CTRL_VLAN), SAME, True),
    "no CTRL_MAC_ADDR there": (SAME, without(Feature.CTRL_MAC_ADDR), False),
    "no STATUS there": (SAME, without(Feature.STATUS), False),
    "no STATUS here": (without(Feature.STATUS), SAME, True),
    "no MTU there": (SAME, without(Feature.MTU), False),
    "no MTU here": (without(Feature.MTU), SAME, True),
    "an offload more there": (SAME, Make(features=ALL | Feature.CSUM), True),
    "an offload more here": (Make(features=ALL | Feature.CSUM), SAME, True),
    "smaller rings there": (SAME, Make(parameters={"ring_max": 64}), False),
    "smaller rings here": (Make(parameters={"ring_max": 64}), SAME, True),
    "no DESC_ASID there": (SAME, Make(parameters={"desc_asid": "N"}), True),
    "no IOTLB_PERSIST there": (SAME, Make(parameters={"persist": "N"}), True),
    "no RESUME there": (SAME, Make(parameters={"resume": "N"}), True),
    "no SUSPEND here": (Make(parameters={"suspend": "N"}), SAME, False),
    "no SUSPEND there": (SAME, Make(parameters={"suspend": "N"}), True),
}
assert len(PAIRS) >= 20
EVERY_DAY = [
    "another MAC",
    "smaller MTU",
    "more pairs there",
    "no control queue here",
    "smaller rings there",
    "no SUSPEND here",
]
# each takes some ten seconds in software emulation:
# tools/lab test --env PYVHOSTVDPA_EVERY_PAIR=1 tests/kernel/test_compat.py
CHOSEN = list(PAIRS) if os.environ.get("PYVHOSTVDPA_EVERY_PAIR") else EVERY_DAY


@contextmanager
def made(name: str, make: Make) -> Iterator[HwSim]:
    hwsim.load()
    hwsim.set_parameters(**make.parameters)
    words = ["mac", make.mac, "device_features", hex(make.features)]
    words += [] if make.pairs is None else ["max_vqp", str(make.pairs)]
    words += [] if make.mtu is None else ["mtu", str(make.mtu)]
    lab.command("vdpa", "dev", "add", "name", name, "mgmtdev", "vdpa_hwsim", *words)
    try:
        device = HwSim(name, lab.chardev(name), b"")
        if not make.link:
            device.write("link", 0)
        yield device
    finally:
        hwsim.remove(name)


def probed(device: HwSim, path: Path) -> str:
    file = path / f"{device.name}.json"
    with file.open("w") as out:
        subprocess.run(["vhost-vdpa", "probe", device.chardev, "--json"], stdout=out, check=True)
    return str(file)


def compared(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(["vhost-vdpa", "compat", *arguments, "--json"], capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["fits"] else 1)
    return found


def moves(source: HwSim, destination: HwSim) -> tuple[bool, str]:
    try:
        return migrate(source.chardev, destination.chardev, OPTIONS).outcome == "migrated", ""
    except VhostVdpaError as e:
        return False, str(e)


@pytest.mark.parametrize("name", CHOSEN)
def test_compat_predicts_what_a_migration_does(name: str, tmp_path: Path) -> None:
    here, there, expected = PAIRS[name]
    with ExitStack() as stack:
        a, b = stack.enter_context(made("cpa", here)), stack.enter_context(made("cpb", there))
        said = compared(probed(a, tmp_path), probed(b, tmp_path), "--guest", "migrate")
        did, why = moves(a, b)
    assert (said["fits"], did) == (expected, expected), f"{said['obstacles']} / {why}"


@pytest.mark.parametrize("name", ["more pairs there", "no CTRL_VLAN there"])
def test_command_of_compat_makes_the_destination_fit(name: str, tmp_path: Path) -> None:
    here, there, _ = PAIRS[name]
    with ExitStack() as stack:
        a, b = stack.enter_context(made("cpa", here)), stack.enter_context(made("cpb", there))
        first = probed(a, tmp_path)
        said = compared(first, probed(b, tmp_path))
        subprocess.run(["sh", "-ec", said["command"]], check=True)
        lab.chardev("cpb")
        assert compared(first, probed(b, tmp_path))["fits"]
