"""A guest with a control queue and any number of pairs on a vdpa_hwsim device."""

from __future__ import annotations

import lab
from hwsim import HwSim

from pyvhostvdpa import GuestMemory, State, VdpaNetDevice
from pyvhostvdpa.memory import DEFAULT_GPA
from pyvhostvdpa.net import control
from pyvhostvdpa.net.control import Class, ControlModel, command
from pyvhostvdpa.net.control_queue import GuestControl
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.net.nic import GuestNic, NicOptions
from pyvhostvdpa.net.traffic import Traffic
from pyvhostvdpa.uapi import ALL_BACKEND_FEATURES, BackendFeature


class HwGuest:
    """A guest with a control queue on a vdpa_hwsim device."""

    def __init__(
        self,
        sim: HwSim,
        pairs: int,
        wanted: Feature,
        without: BackendFeature,
        ring_size: int = 256,
        size: int = lab.SMALL * 2,
    ) -> None:
        self.sim, self.pairs = sim, pairs
        self.memory = GuestMemory([(DEFAULT_GPA, size)])
        self.device = VdpaNetDevice(sim.chardev, use=ALL_BACKEND_FEATURES & ~without, wanted=wanted)
        self.device.attach(self.memory)
        index = self.device.groups.control_index
        self.nic = GuestNic(
            self.memory,
            NicOptions(pairs=pairs, ring_size=ring_size, features=self.device.features, control_index=index),
        )
        self.traffic = Traffic(self.nic)
        self.model = ControlModel(self.device.features, mac=sim.mac)
        assert self.nic.control is not None
        self.control = GuestControl(self.nic.control.queue, self.model)

    def close(self) -> None:
        self.traffic.pause()
        self.device.close()
        self.nic.close()
        self.memory.close()

    def start(self, mode: State = State.PASSTHROUGH) -> None:
        start = self.device.start_shadow if mode is State.SHADOW else self.device.start_passthrough
        start(self.nic.queues, self.control)

    def switch(self) -> None:
        mode = State.PASSTHROUGH if self.device.state is State.SHADOW else State.SHADOW
        self.device.stop()
        self.start(mode)

    def send(self, kind: Class, number: int, payload: bytes = b"") -> int:
        assert self.nic.control is not None
        return self.nic.control.send(command(kind, number, payload))

    def use_all_pairs(self) -> None:
        if self.pairs > 1:
            assert self.send(Class.MQ, control.VQ_PAIRS_SET, self.pairs.to_bytes(2, "little")) == control.OK

    def receives(self, frames: int, seconds: float = 60.0) -> None:
        """Wait until each pair has got that many more frames."""
        goals = [pair.counts().received + frames for pair in self.nic.pairs]

        def reached() -> bool:
            self.device.check()
            return all(pair.counts().received >= goal for pair, goal in zip(self.nic.pairs, goals, strict=True))

        lab.wait_for(reached, f"{frames} frames on each of {self.pairs} pairs", seconds)

    def settle(self) -> None:
        assert self.traffic.stop_sending(30.0), self.nic.counts()
        counts = self.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted) == (0, 0, 0)
