"""A guest that moves back and forth between two devices, as often as one likes; each move by a QEMU of its own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from labvm import calls
from labvm.backends import Attachment, attached
from labvm.machine import Machine, started
from labvm.move import MIGRATING, Plan, Say, flows, migrate, wait_until
from labvm.network import Wires


class Tour:
    """The guest and the QEMU that has it now."""

    def __init__(self, plan: Plan, folder: Path, there: Wires, say: Say) -> None:
        self.plan = plan
        self._folder = folder
        self._there = there
        self._say = say
        self._number = 0
        self._stack = ExitStack()
        self.machine, self.attachment = self._start(self._stack, incoming=False)
        wait_until(self.machine, lambda: self.machine.reports, "the guest's first report", plan.limit)
        flows(self.machine, plan.limit)

    def _start(self, stack: ExitStack, incoming: bool) -> tuple[Machine, Attachment]:
        name = f"qemu{self._number}"
        sim = self._there.devices[self._number % len(self._there.devices)]
        self._number += 1
        onward = f"qemu{self._number}"
        attachment = stack.enter_context(attached(self.plan.backend, sim, self._folder, name, onward))
        netdev, guest = attachment.netdev, self.plan.guest
        return stack.enter_context(started(self.plan.vmm, self._folder, name, netdev, guest, incoming)), attachment

    def hop(self) -> calls.Move:
        """Move the guest to the other device; the QEMU that had it ends once traffic flows there."""
        with ExitStack() as stack:
            machine, attachment = self._start(stack, incoming=True)
            begun = len(self.machine.qmp.events)
            uri = f"unix:{self._folder}/migration{self._number}"
            migrating: list[int] = []

            def say(text: str) -> None:
                if text == MIGRATING:
                    migrating.append(calls.now_ns())

            migrate(self.machine, machine, uri, self.plan.limit, say, self.attachment)
            flows(machine, self.plan.limit, self.machine.reports[-1]["udp"]["received"])
            [paused] = [event for event in self.machine.qmp.events[begun:] if event.name == "STOP"]
            resumed = machine.qmp.find("RESUME")
            assert resumed is not None
            self._stack.close()
            logs = calls.on_device(self.attachment.calls), calls.on_device(attachment.calls)
            self._stack, self.machine, self.attachment = stack.pop_all(), machine, attachment
        return calls.move(*logs, migrating[0], paused.at_ns, resumed.at_ns)

    def stop(self) -> dict[str, Any]:
        """Have the guest send nothing more, and return its account."""
        self.machine.console.send("stop")
        reports = self.machine.reports
        wait_until(
            self.machine, lambda: reports[-1].get("guest") == "stopped", "the guest's last report", self.plan.limit
        )
        return reports[-1]

    def close(self) -> None:
        """End the QEMU that has the guest, and what drives its device."""
        self._stack.close()


@contextmanager
def tour(plan: Plan, folder: Path, there: Wires, say: Say) -> Iterator[Tour]:
    """Start a guest on the first device."""
    travelling = Tour(plan, folder, there, say)
    try:
        yield travelling
    finally:
        travelling.close()
