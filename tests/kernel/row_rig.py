"""A guest on one vdpa_hwsim device, driven by a row of the ladder, with its calls counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import hwsim
import lab

from pyvhostvdpa import GuestMemory, State, Trace, VdpaNetDevice
from pyvhostvdpa.bench import hwsim as counters
from pyvhostvdpa.bench.ladder.rows import LadderRow
from pyvhostvdpa.bench.ladder.run import regions
from pyvhostvdpa.device.procedure.series import Optimization
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.net.control import OK, VQ_PAIRS_SET, Class, ControlModel, command
from pyvhostvdpa.net.control_queue import NetGuestControl
from pyvhostvdpa.net.features import CONTROL, SUPPORTED

MEMORY = 64 << 20
HEAVY = 32 << 20


class Count(NamedTuple):
    messages: int
    set_maps: int
    heavy: int
    ioctls: int | None = None


class Rig:
    """A guest on one vdpa_hwsim device, driven by a plan; no cost, so that it is quick."""

    def __init__(self, plan: LadderRow, pairs: int, pieces: int) -> None:
        self.plan, self.pairs = plan, pairs
        self.uses_all = False
        self.keeps = Optimization.KEEP_AT_SWITCH in plan.switches
        self.sim = hwsim.add("hw0", pairs, heavy_min=HEAVY, clean_map="N" if self.keeps else "Y")
        self.memory = GuestMemory(regions(MEMORY, pieces))
        self.trace = Trace()
        self.open()
        options = NicOptions(pairs=pairs, features=self.device.features, control_index=self.device.groups.control_index)
        self.nic = GuestNic(self.memory, options)
        self.traffic = Traffic(self.nic)
        assert self.nic.control is not None
        self.control = NetGuestControl(self.nic.control.queue, ControlModel(self.device.features, mac=self.sim.mac))

    def open(self) -> None:
        """Open the device again, with memory attached as it is before a downtime."""
        self.device = VdpaNetDevice(
            self.sim.chardev,
            self.trace,
            self.plan.use,
            SUPPORTED | CONTROL,
            lambda target: self.plan.resolve(target, self.keeps).make(target),
        )
        resolution = self.plan.resolve(self.device.target, self.keeps)
        assert not resolution.left_out
        self.device.attach(self.memory)

    def close(self) -> None:
        self.traffic.pause()
        self.device.close()
        self.nic.close()
        self.memory.close()
        hwsim.remove(self.sim.name)

    def start(self, mode: State) -> None:
        self.device.start(mode, self.nic.queues, self.control)
        if not self.uses_all:
            self.uses_all = True
            self.use_all_pairs()

    def use_all_pairs(self) -> None:
        """What a guest's driver does once: a pair that is not in use forwards nothing."""
        assert self.nic.control is not None
        if self.pairs > 1:
            assert self.nic.control.send(command(Class.MQ, VQ_PAIRS_SET, self.pairs.to_bytes(2, "little"))) == OK

    def to(self, mode: State) -> None:
        self.device.stop(then=mode)
        self.start(mode)

    def count(self, act: Callable[[], None]) -> Count:
        """What an action takes: messages and ioctls as they were made, set_maps as the device saw them."""
        before = counters.counters(self.sim.name)
        with self.device.trace.in_phase("counted"):
            first = len(self.trace.events)
            act()
            made = [e.event for e in self.trace.events[first:]]
        after = counters.counters(self.sim.name)
        assert before is not None
        assert after is not None
        return Count(
            sum(name.startswith("IOTLB_") for name in made),
            after["set_map"] - before["set_map"],
            after["set_map_heavy"] - before["set_map_heavy"],
            sum(name.startswith("VHOST_") for name in made),
        )

    def calls(self, act: Callable[[], None]) -> list[str]:
        """The calls of an action in short: `U0` is an UPDATE in address space 0, `KICK3` a kick fd of queue 3."""
        first = len(self.trace.events)
        act()
        made = [e for e in self.trace.events[first:] if e.event.startswith(("VHOST_", "IOTLB_"))]
        return [_short(e.event, e.arguments) for e in made]

    def receives(self, frames: int) -> None:
        goal = self.nic.counts().received + frames
        self.traffic.run()
        lab.wait_for(lambda: self.nic.counts().received >= goal, f"{frames} frames")
        self.traffic.pause()

    def settle(self) -> None:
        """Let everything sent arrive, and demand a perfect account."""
        self.traffic.run()
        assert self.traffic.stop_sending(30.0)
        self.traffic.pause()
        counts = self.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted) == (0, 0, 0)


_MESSAGES = {"IOTLB_UPDATE": "U", "IOTLB_INVALIDATE": "I", "IOTLB_BATCH_BEGIN": "B", "IOTLB_BATCH_END": "E"}
_WITH_INDEX = ("NUM", "BASE", "ADDR", "KICK", "CALL", "ENABLE", "GROUP")


def _short(event: str, arguments: str) -> str:
    words = dict(word.split("=", 1) for word in arguments.split() if "=" in word)
    if event in _MESSAGES:
        return _MESSAGES[event] + words["asid"]
    name = event.removeprefix("VHOST_").removeprefix("VDPA_")
    if name == "SET_GROUP_ASID":
        return f"GROUP{words['index']}={words['num']}"
    if name == "SET_CONFIG_CALL":
        return "CONFIG-" if words["fd"] == "-1" else "CONFIG"
    return name.replace("SET_VRING_", "") + words["index"] if name.endswith(_WITH_INDEX) else name
