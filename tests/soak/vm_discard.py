# lab: --vmm --devices vdpa_hwsim:0 --memory 3G
"""A Linux guest on serve loses memory, and gets it back: reported within a second, and memory is right afterwards.

A balloon takes it away from the guest, or virtio-mem unplugs it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import pytest

from labvm import move, network
from labvm.backends import SERVE, attached
from labvm.machine import GuestMachine, Machine, ring_entries, started, vmms

ENTRIES = 1 << 20
MEMORY = 96 << 20
PLUGGED = 128 << 20
"""What virtio-mem can give: one block of an x86 guest's memory, which is what Linux adds and takes at once."""


@dataclass(frozen=True)
class Taker:
    """What takes memory away from a guest: its options, and how its size is set and read."""

    options: tuple[str, ...]
    full: int
    less: int
    set_size: Callable[[Machine, int], object]
    size: Callable[[Machine], int]
    kernel: tuple[str, ...] = ()


def _plugged(machine: Machine) -> int:
    return int(machine.qmp.command("qom_get", path="/machine/peripheral/plugged", property="size"))


BALLOON = Taker(
    ("-device", "virtio-balloon-pci,id=balloon"),
    MEMORY,
    MEMORY // 2,
    lambda machine, size: machine.qmp.command("balloon", value=size),
    lambda machine: int(machine.qmp.command("query_balloon")["actual"]),
)
VIRTIO_MEM = Taker(
    (
        *("-m", f"size={MEMORY >> 20}M,slots=1,maxmem=1G"),
        *("-object", f"memory-backend-memfd,id=more,size={PLUGGED},share=on"),
        *("-device", f"virtio-mem-pci,id=plugged,memdev=more,requested-size={PLUGGED}"),
    ),
    PLUGGED,
    0,
    lambda machine, size: machine.qmp.command(
        "qom_set", path="/machine/peripheral/plugged", property="requested-size", value=size
    ),
    _plugged,
    # what is to be taken away again may hold only pages that can move
    ("memhp_default_state=online_movable",),
)


@pytest.fixture
def small_pages() -> Iterator[None]:
    """Have devices take memory of small pages: of a huge one that is pinned a balloon gets nothing (mm/truncate.c)."""
    network.run("modprobe", "-r", "vhost_vdpa")
    network.run("modprobe", "vhost_vdpa", f"max_iotlb_entries={ENTRIES}")
    yield
    network.run("modprobe", "-r", "vhost_vdpa")
    network.run("modprobe", "vhost_vdpa")


def allocated(pid: int) -> int:
    """Return the bytes that the files of a QEMU's guest memory have."""
    links = [path for path in Path(f"/proc/{pid}/fd").iterdir() if "memory-backend-memfd" in os.readlink(path)]
    return sum({path.stat().st_ino: path.stat().st_blocks * 512 for path in links}.values())


@pytest.mark.parametrize("taker", [BALLOON, VIRTIO_MEM], ids=["balloon", "virtio-mem"])
def test_memory_that_is_taken_away_is_noticed_within_a_second_and_right_afterwards(
    small_pages: None, tmp_path: Path, taker: Taker
) -> None:
    guest = GuestMachine(memory=MEMORY, huge=False, options=taker.options, kernel=taker.kernel)
    plan = move.Plan(vmms()[-1], SERVE, guest=guest)
    with (
        network.wires(network.Costs(memory=MEMORY), ring_entries(plan.vmm), count=1, huge=False) as there,
        move.peer() as far,
        attached(SERVE, there.devices[0], tmp_path, "discard", options=["--allow-discard"]) as attachment,
        started(plan.vmm, tmp_path, "discard", attachment.netdev, plan.guest) as machine,
    ):
        machine.trouble = attachment.trouble

        def has(size: int) -> None:
            move.wait_until(machine, lambda: taker.size(machine) == size, f"the guest to have {size >> 20} MiB", 300.0)

        move.wait_until(machine, lambda: machine.reports, "the guest's first report", plan.limit)
        move.flows(machine, plan.limit)
        has(taker.full)
        before, seen = allocated(machine.process.pid), len(attachment.events())
        taker.set_size(machine, taker.less)
        while allocated(machine.process.pid) >= before:
            machine.poll(0.01)
        begun = time.monotonic()
        while "memory-discarded" not in [event["event"] for _, event in attachment.events()[seen:]]:
            machine.poll(0.01)
        reported_s = time.monotonic() - begun
        has(taker.less)
        move.flows(machine, plan.limit, machine.reports[-1]["udp"]["received"])
        taker.set_size(machine, taker.full)
        has(taker.full)
        move.serve(machine, 3.0)
        assert attachment.told("device-failed") is None
        machine.console.send("stop")
        move.wait_until(machine, lambda: machine.reports[-1]["guest"] == "stopped", "the guest's account", plan.limit)
        report, account = machine.reports[-1], far.report()["udp"]
    print(f"reported after {reported_s * 1000:.0f} ms")
    assert reported_s < 1
    memory, tcp = report["memory"], report["tcp"]
    assert (memory["wrong"], tcp["wrong"], tcp["broken"]) == (0, 0, 0)
    assert memory["verified"] > 0
    assert (account["corrupted"], account["duplicated"], account["lost"]) == (0, 0, 0)
    assert report["udp"]["corrupted"] == 0
