"""A guest with a control queue and any number of pairs on a vdpa_hwsim device."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import hwsim
import lab
from hwsim import HwSim

from pyvhostvdpa import GuestMemory, State, VdpaNetDevice
from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.device.shadowing import FULL, USED
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net import control
from pyvhostvdpa.net.control import Class, ControlModel, command
from pyvhostvdpa.net.control_queue import NetGuestControl
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.trace.phases import DT1_START, DT1_STOP, DT2_STOP
from pyvhostvdpa.virtqueue.layout import SplitLayout

Make = Callable[..., "HwGuest"]


class HwGuest:
    """A guest on a vdpa_hwsim device, with a control queue where the device keeps it separate."""

    def __init__(
        self,
        sim: HwSim,
        pairs: int,
        wanted: Feature,
        without: BackendFeature,
        ring_size: int = 256,
        memory: int = lab.SMALL * 2,
        procedure: str | None = None,
        shadow: str | None = FULL,
    ) -> None:
        self.procedure, self.shadow = procedure, shadow
        self.sim, self.pairs = sim, pairs
        self.wanted, self.without = wanted, without
        self.memory = GuestMemory([(DEFAULT_GPA, memory)])
        self.devices: list[VdpaNetDevice] = []
        with ExitStack() as undo:
            undo.callback(self.memory.close)
            undo.callback(self._close_devices)
            self.device = self.attach(sim)
            index = self.device.groups.control_index
            self.nic = GuestNic(
                self.memory,
                NicOptions(
                    pairs=pairs,
                    ring_size=ring_size,
                    features=self.device.features,
                    control_index=index,
                    rx_relayed=self.device.shadow == USED,
                ),
            )
            undo.pop_all()
        self.device.guest_config = self.nic.config
        self.traffic = Traffic(self.nic)
        self.model = ControlModel(self.device.features, mac=sim.mac)
        self.control = None if self.nic.control is None else NetGuestControl(self.nic.control.queue, self.model)

    def attach(self, sim: HwSim) -> VdpaNetDevice:
        device = VdpaNetDevice(
            sim.chardev,
            use=ALL_BACKEND_FEATURES & ~self.without,
            wanted=self.wanted,
            procedure=self.procedure,
            shadow=self.shadow,
        )
        self.devices.append(device)
        device.attach(self.memory)
        return device

    def close(self) -> None:
        self.traffic.pause()
        self._close_devices()
        self.nic.close()
        self.memory.close()

    @contextmanager
    def destination(self, pairs: int = 1, **parameters: object) -> Iterator[HwSim]:
        """Another device to move to; all of the guest's devices are closed before it goes."""
        sim = hwsim.add("destination", pairs, **parameters)
        try:
            yield sim
        finally:
            self._close_devices()
            hwsim.remove(sim.name)

    def _close_devices(self) -> None:
        for device in self.devices:
            device.close()

    def start(self, mode: State = State.PASSTHROUGH) -> None:
        self.device.start(mode, self.nic.queues, self.control)

    def switch(self) -> None:
        mode = State.PASSTHROUGH if self.device.state is State.SHADOW else State.SHADOW
        self.device.stop()
        self.start(mode)

    def switch_and_stop(self) -> None:
        """Start, and go through the phases of DT1 and DT2."""
        trace = self.device.trace
        self.start()
        with trace.in_phase(DT1_STOP):
            self.device.stop()
        with trace.in_phase(DT1_START):
            self.start(State.SHADOW)
        with trace.in_phase(DT2_STOP):
            self.device.stop()

    def move(self, sim: HwSim) -> None:
        """Go on in passthrough on another device, as after a migration."""
        device = self.attach(sim)
        device.guest_config = self.nic.config
        running = self.traffic.running
        self.traffic.pause()
        self.device.stop()
        self.sim, self.device = sim, device
        self.start()
        if running:
            self.traffic.run()

    def restart_driver(self) -> None:
        """What a guest does after a reset: its rings and its account begin anew."""
        for pair in self.nic.pairs:
            for queue in pair.queues:
                size = SplitLayout(queue.num).size
                ffi.memmove(ffi.cast("char *", self.memory.hva(queue.desc, size)), bytes(size), size)
            p = pair.c
            p.rx_avail = p.rx_used = p.tx_avail = p.tx_used = p.sent = p.received = p.highest = 0
            ffi.memmove(p.seen, bytes(ffi.sizeof(p.seen)), ffi.sizeof(p.seen))
            lib.nic_start(p)

    def send(self, kind: Class, number: int, payload: bytes = b"") -> int:
        assert self.nic.control is not None
        return self.nic.control.send(command(kind, number, payload))

    def use_all_pairs(self) -> None:
        if self.pairs > 1:
            assert self.send(Class.MQ, control.VQ_PAIRS_SET, self.pairs.to_bytes(2, "little")) == control.OK

    def is_interrupted(self, seconds: float = 10.0) -> bool:
        """Whether the guest gets a configuration interrupt; one that came is taken."""
        came, _, _ = select.select([self.nic.config.call], [], [], seconds)
        if came:
            os.eventfd_read(self.nic.config.call)
        return bool(came)

    def receives(self, frames: int, seconds: float = 60.0) -> None:
        """Wait until each pair has got that many more frames."""
        goals = [pair.counts().received + frames for pair in self.nic.pairs]

        def reached() -> bool:
            self.device.check()
            return all(pair.counts().received >= goal for pair, goal in zip(self.nic.pairs, goals, strict=True))

        lab.wait_for(reached, f"{frames} frames on each of {self.pairs} pairs", seconds)

    def dropped(self) -> int:
        """How many frames the device has dropped because it had no receive buffer."""
        counters = self.sim.read("stats")
        return sum(int(value) for name, value in counters.items() if name.endswith(".overruns"))

    def settle(self) -> None:
        assert self.traffic.stop_sending(30.0), f"{self.nic.counts()}, {self.dropped()} of them had no buffer"
        counts = self.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted) == (0, 0, 0)
