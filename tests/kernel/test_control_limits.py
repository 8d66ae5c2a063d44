"""Control queues that are slow, devices whose rings are small, and the MAC address that a guest leaves behind."""

from __future__ import annotations

import subprocess
import time

import lab
import pytest
from hw_guest import HwGuest, Make
from hwsim import MakeSim

from pyvhostvdpa import MigrationOptions, State, VdpaNetDevice, migrate
from pyvhostvdpa.base.uapi import BackendFeature, Status
from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.net import control
from pyvhostvdpa.net.control import Class
from pyvhostvdpa.net.features import CONTROL, SUPPORTED
from pyvhostvdpa.probe.probe import probe

SLOW_NS = 1_200_000_000
MINE = bytes.fromhex("020000000042")


# -- slow and dead -----------------------------------------------------------------------


def test_a_command_that_takes_longer_than_a_second_does_not_cost_the_guest_its_nic(make: Make) -> None:
    guest = make(2)
    guest.start()
    guest.sim.write("cost/cvq_ns", SLOW_NS)
    began = time.monotonic()
    assert guest.send(Class.MQ, control.VQ_PAIRS_SET, b"\2\0") == control.OK
    assert time.monotonic() - began > 1.0
    assert not guest.nic.config.status & Status.NEEDS_RESET
    guest.device.check()


def test_control_command_beyond_its_deadline_fails_and_reports_how_long_it_waited(make: Make) -> None:
    guest = make(1)
    guest.device.control_deadline = 1.5
    guest.start()
    guest.sim.write("cost/cvq_ns", 4 * SLOW_NS)
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, MINE) == control.ERR
    assert guest.nic.config.status & Status.NEEDS_RESET
    assert "did not answer 1 control commands within 1.5 s" in guest.nic.config.failed
    guest.sim.write("cost/cvq_ns", 0)


def test_migrate_on_devices_with_a_slow_control_queue_takes_a_deadline(make_sim: MakeSim) -> None:
    one, other = make_sim(2), make_sim(2)
    for sim in (one, other):
        sim.write("cost/cvq_ns", SLOW_NS)
    argv = ["vhost-vdpa", "migrate", one.chardev, other.chardev, "--memory", "32M", "--pairs", "2", "--seconds", "1.5"]
    argv += ["--downtime", "20000"]
    refused = subprocess.run([*argv, "--control-deadline", "0.5"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "within 0.5 s" in refused.stderr
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- rings that are small ------------------------------------------------------------------


@pytest.mark.parametrize("size", [128, 32, 16, 2])
def test_migrate_on_devices_with_small_rings_takes_rings_that_fit(make_sim: MakeSim, size: int) -> None:
    one, other = make_sim(2, ring_max=size), make_sim(2, ring_max=size)
    options = MigrationOptions(GuestOptions(lab.SMALL, pairs=2), lab.SLOW_STREAM, 1.5)
    report = migrate(one.chardev, other.chardev, options)
    assert report.outcome == "migrated"
    assert report.frames.sent == report.frames.received > 0


def test_migrate_to_a_device_with_smaller_rings_is_refused_with_both_sizes(make_sim: MakeSim) -> None:
    one, other = make_sim(), make_sim(ring_max=64)
    with pytest.raises(Exception, match="1 queue pairs of at most 64, the guest uses 1 of 256"):
        migrate(one.chardev, other.chardev, MigrationOptions(GuestOptions(lab.SMALL), lab.SLOW_STREAM, 1.5))


@pytest.mark.parametrize("vq_size", ["Y", "N"])
def test_ring_sizes_are_the_devices_whether_the_parent_reports_them_per_queue_or_not(
    make_sim: MakeSim, vq_size: str
) -> None:
    with VdpaNetDevice(make_sim(ring_max=32, vq_size=vq_size).chardev) as device:
        assert set(device.ring_sizes) == {32}
        assert len(device.ring_sizes) == device.vqs_count


@pytest.mark.parametrize("mode", [State.PASSTHROUGH, State.SHADOW])
def test_a_guests_control_queue_may_be_longer_than_the_devices(make_sim: MakeSim, mode: State) -> None:
    """The guest of the fixture has one of 64."""
    guest = HwGuest(make_sim(2, ring_max=16), 2, SUPPORTED | CONTROL, BackendFeature(0), ring_size=16)
    try:
        guest.start(mode)
        guest.use_all_pairs()
        assert guest.send(Class.MAC, control.MAC_ADDR_SET, MINE) == control.OK
        assert guest.sim.read("state")["mac"] == MINE.hex(":")
    finally:
        guest.close()


def test_verify_on_a_device_with_rings_of_two_proves_its_features(make_sim: MakeSim) -> None:
    assert probe(make_sim(ring_max=2).chardev, verify=True).lies() == []


# -- the address that a guest set -------------------------------------------------------------


@pytest.mark.parametrize("left", ["moved away", "closed while it runs"])
def test_a_device_that_the_guest_left_has_the_address_that_it_was_made_with(make: Make, left: str) -> None:
    guest = make(1)
    guest.start()
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, MINE) == control.OK
    source, before = guest.device, guest.sim
    if left == "moved away":
        with guest.destination() as destination:
            guest.traffic.run()
            guest.move(destination)
            source.close()
            assert destination.read("state")["mac"] == MINE.hex(":")
            assert before.read("state")["mac"] == before.mac.hex(":")
            # what the first device did when it was closed did the guest no harm
            guest.receives(100)
            assert guest.send(Class.RX, control.Rx.PROMISC, b"\1") in (control.OK, control.ERR)
            guest.device.close()
            assert destination.read("state")["mac"] == destination.mac.hex(":")
    else:
        guest.device.close()
    assert before.read("state")["mac"] == before.mac.hex(":")
    with VdpaNetDevice(before.chardev) as following:
        assert following.mac == before.mac


def test_migrate_leaves_both_devices_with_their_own_addresses(make_sim: MakeSim) -> None:
    one, other = make_sim(), make_sim()
    migrate(one.chardev, other.chardev, MigrationOptions(GuestOptions(lab.SMALL), lab.SLOW_STREAM, 1.5))
    assert [sim.read("state")["mac"] for sim in (one, other)] == [sim.mac.hex(":") for sim in (one, other)]


def test_closing_a_device_whose_control_queue_died_does_not_wait_again(make: Make) -> None:
    guest = make(1)
    guest.device.control_deadline = 1.0
    guest.start()
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, MINE) == control.OK
    guest.sim.write("cost/cvq_ns", 3 * SLOW_NS)
    assert guest.send(Class.MAC, control.MAC_ADDR_SET, bytes(6)[:5] + b"\2") == control.ERR
    time.sleep(4)
    began = time.monotonic()
    guest.device.close()
    assert time.monotonic() - began < 2.5
