# lab: --vmm --devices vdpa_hwsim:0 --memory 3G
"""A Linux guest moves 50 times between two devices under a stock QEMU, its memory, frames and stream checked.

PYVHOSTVDPA_BACKEND chooses what drives the devices (`vhost-vdpa`, which is QEMU itself, or `serve`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from labvm import network
from labvm.machine import GuestMachine, ring_entries, vmms
from labvm.move import Plan, peer
from labvm.tour import tour

MOVES = int(os.environ.get("PYVHOSTVDPA_MOVES", "50"))
BACKEND = os.environ.get("PYVHOSTVDPA_BACKEND", "vhost-vdpa")


def test_guest_moves_back_and_forth(tmp_path: Path) -> None:
    plan = Plan(vmms()[-1], BACKEND, guest=GuestMachine(memory=64 << 20))
    costs = network.Costs(memory=64 << 20)
    with network.wires(costs, ring_entries(plan.vmm)) as there, peer() as far:
        with tour(plan, tmp_path, there, print) as guest:
            for number in range(MOVES):
                figures = guest.hop()
                print(f"move {number + 1}: switch {figures.dt1_ms} ms, stop {figures.dt2_ms} ms", flush=True)
            told, account = guest.stop(), far.report()["udp"]
        sent = sum(sim.counters()["vq1.packets"] for sim in there.devices)
        states = [sim.read("state") for sim in there.devices]
    assert told["memory"]["wrong"] == 0
    assert told["memory"]["verified"] > 0
    assert (told["tcp"]["broken"], told["tcp"]["wrong"]) == (0, 0)
    assert (account["duplicated"], account["corrupted"]) == (0, 0)
    assert sent == told["frames"]["tx"]
    assert [(state["fault"], state["status"]) for state in states] == [("", "0x00"), ("", "0x00")]
