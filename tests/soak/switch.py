# lab: --devices vdpa_sim_net:2 --devices vdpa_hwsim:0
"""200 switches to shadow virtqueues and back under traffic, with descriptors held at every suspend."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

import hwsim
import lab
from hw_guest import HwGuest

from pyvhostvdpa import GuestMemory, State, VdpaNetDevice
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.guest.nic import GuestNic
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.features import CONTROL, SUPPORTED

SWITCHES = int(os.environ.get("PYVHOSTVDPA_SOAK_SWITCHES", "200"))


@pytest.mark.parametrize("base_avail", [0, 1], ids=["base is the used index", "base is the avail index"])
def test_hwsim_4_pairs_out_of_order_while_shadowed(base_avail: int) -> None:
    sim = hwsim.add("hw0", 4, inflight=16, base_avail=base_avail)
    guest = HwGuest(sim, 4, SUPPORTED | CONTROL, BackendFeature(0))
    held = 0
    try:
        guest.start()
        guest.use_all_pairs()
        guest.traffic.run()
        for _ in range(SWITCHES // 2):
            guest.receives(20)
            guest.switch()
            sim.write("reorder", "Y")
            guest.receives(20)
            held += sum(int(sim.read("state")[f"vq{queue}.held"]) for queue in range(8))
            sim.write("reorder", "N")
            guest.switch()
        guest.settle()
        print(f"{SWITCHES} switches, {held} descriptors seen held, {guest.nic.counts()}", flush=True)
        assert held > SWITCHES
    finally:
        guest.close()
        hwsim.remove(sim.name)


def test_vdpa_sim_net_1_pair() -> None:
    with GuestMemory([(DEFAULT_GPA, lab.SMALL)]) as memory, VdpaNetDevice(lab.DEVICES[0]) as device:
        device.attach(memory)
        nic = GuestNic(memory)
        traffic = Traffic(nic)
        device.start_passthrough(nic.queues)
        traffic.run()
        for _ in range(SWITCHES):
            time.sleep(0.02)
            mode = State.SHADOW if device.state is State.PASSTHROUGH else State.PASSTHROUGH
            device.stop()
            device.start(mode, nic.queues)
        assert traffic.stop_sending(30.0)
        traffic.pause()
        counts = nic.counts()
        print(f"{SWITCHES} switches, {counts}", flush=True)
        assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0)
        device.close()
        nic.close()
