"""A guest of memory and rings only, on two real devices; its driver is this test's, which alone can pause it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import lab
import pytest
from raw_guest import KINDS, RawGuest

from pyvhostvdpa.base.errors import MigrationFailed, MigrationRefused
from pyvhostvdpa.device.net import State, VdpaNetDevice
from pyvhostvdpa.guest.nic import GuestNic, NicOptions, NicPair
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.destination import Arrived, Destination
from pyvhostvdpa.migration.source import Source
from pyvhostvdpa.migration.stream import Channel

LAYOUT = [(DEFAULT_GPA, 8 << 20), (DEFAULT_GPA + (32 << 20), 4 << 20)]
"""Two regions with a hole."""
FRAMES = 500


class Owner:
    """Has the driver of a raw guest, which knows nothing of it."""

    def __init__(self, path: str, folder: Path) -> None:
        self.folder = folder
        self.memory = GuestMemory(LAYOUT)
        self.device = VdpaNetDevice(path)
        options = NicOptions(ring_size=64, features=self.device.features)
        self.nic = GuestNic(self.memory, options)
        self.guest = RawGuest(self.memory, self.device.features, [self.nic.queues])
        self.traffic = Traffic(self.nic)
        self.arrived: Arrived[RawGuest] | None = None
        self.failed: MigrationFailed | None = None
        """Why the destination did not get the guest."""

    def start(self) -> None:
        self.device.attach(self.memory)
        self.guest.start(0, self.device)
        self.run()

    def run(self) -> None:
        self.traffic.run()
        self.guest.running = True

    def pause(self) -> None:
        self.traffic.pause()
        self.guest.running = False

    def send(self, to: str, pauses: bool) -> None:
        """Migrate the guest; its owner pauses it in time, or does not."""
        near, far = socket.socketpair()
        thread = threading.Thread(target=self._receive, args=(to, far))

        def observe(phase: str) -> None:
            if phase == "stop" and pauses:
                self.pause()

        with Cancel() as cancel, Channel(near, cancel.fileno(), stall=60.0) as channel:
            thread.start()
            try:
                Source(self.guest, [self.device], channel, cancel, lab.SLOW_STREAM, observe).run()
            finally:
                channel.close()
                thread.join()

    def _receive(self, path: str, far: socket.socket) -> None:
        with Cancel() as cancel, Channel(far, stall=60.0) as channel:
            try:
                self.arrived = Destination([path], channel, cancel, KINDS, folder=self.folder).run()
            except MigrationFailed as e:
                self.failed = e

    def receives(self) -> None:
        goal = self.nic.counts().received + FRAMES
        lab.wait_for(lambda: self.nic.counts().received >= goal, f"{FRAMES} frames")

    def close(self) -> None:
        self.traffic.pause()
        if self.arrived is not None:
            self.arrived.close()
        self.device.close()
        self.nic.close()
        self.memory.close()


@pytest.fixture
def owner(devices: tuple[str, str], tmp_path: Path) -> Iterator[Owner]:
    made = Owner(devices[0], tmp_path)
    yield made
    made.close()


def test_raw_guest_moves_between_devices_and_its_driver_loses_no_frame(owner: Owner, devices: tuple[str, str]) -> None:
    owner.start()
    owner.receives()
    owner.send(devices[1], pauses=True)
    assert owner.arrived is not None
    guest, [device] = owner.arrived.guest, owner.arrived.devices
    assert (owner.device.state, device.state) == (State.RESET, State.PASSTHROUGH)
    # the driver goes where its guest is: it takes its state along by itself
    before = owner.nic.state(None).pairs[0]
    pair = NicPair(guest.memory, *guest.queues(0))
    traffic = Traffic(SimpleNamespace(pairs=[pair]))  # type: ignore[arg-type]
    try:
        pair.load(before, owner.nic.features)
        traffic.run()
        lab.wait_for(lambda: pair.counts().received >= before.received + FRAMES, f"{FRAMES} frames at the destination")
        assert traffic.stop_sending(20.0)
        traffic.pause()
        counts = pair.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0)
    finally:
        traffic.end()
        os.close(pair.wake)


def test_raw_guest_that_its_owner_does_not_pause_stays_and_has_traffic(owner: Owner, devices: tuple[str, str]) -> None:
    owner.start()
    owner.receives()
    with pytest.raises(MigrationRefused, match="only its owner can pause it; the guest continues in passthrough"):
        owner.send(devices[1], pauses=False)
    assert "only its owner can pause it; nothing of the guest is left here" in str(owner.failed)
    assert owner.device.state is State.PASSTHROUGH
    owner.receives()
    assert owner.traffic.stop_sending(20.0)
    counts = owner.nic.counts()
    assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0)
