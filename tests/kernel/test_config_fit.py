"""A destination whose configuration space differs from what the guest has read: refused before the guest leaves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import hwsim
import lab
import pytest
from hwsim import HwSim

from pyvhostvdpa import MigrationOptions, MigrationRefused, migrate
from pyvhostvdpa.base.errors import MigrationEnded, MissingFeature
from pyvhostvdpa.device.net import VdpaNetDevice
from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.net.features import SUPPORTED, Feature

HERE, THERE = "52:54:00:00:00:0a", "52:54:00:00:00:0b"
NO_CONTROL = int(SUPPORTED)
NO_ADDRESS = NO_CONTROL | int(Feature.CTRL_VQ | Feature.CTRL_VLAN | Feature.MQ)
OPTIONS = MigrationOptions(GuestOptions(lab.SMALL), lab.SLOW_STREAM, 1.5)


@contextmanager
def device(name: str, *attributes: str, mac: str = HERE, pairs: int = 1) -> Iterator[HwSim]:
    hwsim.load()
    hwsim.set_parameters()
    lab.command(
        *("vdpa", "dev", "add", "name", name, "mgmtdev", "vdpa_hwsim", "mac", mac, "max_vqp", str(pairs), *attributes)
    )
    try:
        yield HwSim(name, lab.chardev(name), bytes.fromhex(mac.replace(":", "")))
    finally:
        hwsim.remove(name)


def refused(source: HwSim, destination: HwSim) -> MigrationRefused:
    with pytest.raises(MigrationRefused) as error:
        migrate(source.chardev, destination.chardev, OPTIONS)
    # the guest continued where it was, and not a frame is missing
    assert error.value.report is not None
    assert error.value.report.outcome == "stayed on source"
    assert error.value.report.frames.lost == 0
    return error.value


@pytest.mark.parametrize("features", [NO_CONTROL, NO_ADDRESS], ids=["no control queue", "no CTRL_MAC_ADDR"])
def test_migrate_to_another_mac_that_cannot_be_set_is_refused_with_both(features: int) -> None:
    bits = ("device_features", hex(features))
    with device("hwa", *bits) as a, device("hwb", *bits, mac=THERE) as b:
        words = str(refused(a, b))
    assert f"its MAC address is {THERE}, the guest relies on {HERE}" in words
    assert f"mac {HERE}" in words


def test_migrate_to_another_mac_with_a_control_queue_replays_the_guests() -> None:
    with device("hwa") as a, device("hwb", mac=THERE) as b:
        assert migrate(a.chardev, b.chardev, OPTIONS).outcome == "migrated"


def test_migrate_to_a_smaller_mtu_is_refused_with_both() -> None:
    with device("hwa", "mtu", "9000") as a, device("hwb", "mtu", "1000") as b:
        words = str(refused(a, b))
        assert migrate(b.chardev, a.chardev, OPTIONS).outcome == "migrated", "a larger one is accepted"
    assert "its MTU is 1000, the guest relies on 9000" in words
    assert "mtu 9000" in words


def test_migrate_to_a_link_that_is_down_is_refused() -> None:
    with device("hwa") as a, device("hwb") as b:
        b.write("link", 0)
        words = str(refused(a, b))
    assert "its link is down" in words
    assert "link set PORT up" in words


def test_migrate_to_a_link_that_goes_down_meanwhile_is_refused_before_the_guest_leaves() -> None:
    with device("hwa") as a, device("hwb") as b:

        def unplug(phase: str) -> None:
            if phase == "memory":
                b.write("link", 0)

        with pytest.raises(MigrationEnded, match="its link is down") as error:
            migrate(a.chardev, b.chardev, OPTIONS, unplug)
    assert error.value.report is not None
    assert error.value.report.outcome == "stayed on source"


def test_list_doctor_and_probe_show_a_link_that_is_down() -> None:
    with device("hwa") as a:
        a.write("link", 0)
        listed = subprocess.run(["vhost-vdpa", "list"], capture_output=True, text=True, check=True).stdout
        examined = subprocess.run(["vhost-vdpa", "doctor", "hwa"], capture_output=True, text=True, check=False).stdout
        probed = subprocess.run(["vhost-vdpa", "probe", "hwa"], capture_output=True, text=True, check=False).stdout
    assert listed.splitlines()[0].split()[6] == "LINK"
    assert next(line for line in listed.splitlines() if line.startswith("hwa")).split()[6] == "down"
    assert "hwa: its link is down" in examined
    assert "down" in next(line for line in probed.splitlines() if "link" in line)


def test_open_with_an_unimplemented_feature_is_refused_by_its_name() -> None:
    bits = int(SUPPORTED | Feature.RING_RESET)
    with device("hwa", "device_features", hex(bits)) as a:
        with pytest.raises(MissingFeature, match="not implemented here were asked for: RING_RESET"):
            VdpaNetDevice(a.chardev, wanted=SUPPORTED | Feature.RING_RESET)
        with VdpaNetDevice(a.chardev) as opened:
            assert opened.features == SUPPORTED
