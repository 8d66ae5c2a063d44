"""How fast a guest sends through a device, and how much CPU time the back-end's process uses meanwhile."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from labvm import calls
from labvm.backends import attached
from labvm.machine import ring_entries, started
from labvm.move import Plan, Say, flows, peer, wait_until
from labvm.network import wires

SCHEMA = "pyvhostvdpa/vm/flood/1"
TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")


def cpu_ms(pid: int) -> float:
    """Return the CPU time that a process has used, in ms, as finely as the kernel counts it."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6
    except FileNotFoundError:
        user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) * TICK_MS


def _floods(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [report for report in reports if "flood" in report]


def run(plan: Plan, folder: Path, say: Say, count: int, size: int = 64) -> dict[str, Any]:
    """Have a guest send so many frames, and return the row of it."""
    with ExitStack() as stack:
        there = stack.enter_context(wires(plan.costs, ring_entries(plan.vmm), count=1))
        stack.enter_context(peer())
        attachment = stack.enter_context(attached(plan.backend, there.devices[0], folder, "flood"))
        say(f"QEMU {plan.vmm} starts the guest ({plan.backend})")
        machine = stack.enter_context(started(plan.vmm, folder, "flood", attachment.netdev, plan.guest))
        wait_until(machine, lambda: machine.reports, "the guest's first report", plan.limit)
        flows(machine, plan.limit)
        process = attachment.process
        sent, cpu = there.devices[0].counters()["vq1.packets"], cpu_ms(process.pid) if process else 0.0
        say(f"the guest sends {count:,} frames")
        begin = calls.now_ns()
        machine.console.send(f"flood {count} {size}")
        wait_until(machine, lambda: _floods(machine.reports), "the end of the flood", 100 * plan.limit)
        seconds = (calls.now_ns() - begin) / 1e9
        used = cpu_ms(process.pid) - cpu if process else 0.0
        [told] = _floods(machine.reports)
        taken = there.devices[0].counters()["vq1.packets"] - sent
    say(f"{told['flood'] / seconds:,.0f} frames/s")
    return {
        "vmm": plan.vmm,
        "backend": plan.backend,
        "frames": told["flood"],
        "seconds": round(seconds, 3),
        "frames_per_s": round(told["flood"] / (told["ns"] / 1e9), 1),
        "process_cpu_ms": round(used, 3) if process else None,
        "device": {"sent": taken},
    }
