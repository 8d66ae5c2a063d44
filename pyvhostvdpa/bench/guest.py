# SPDX-License-Identifier: MIT
"""A guest for benchmarks: memory, a NIC with its control queue, on a device that it can be started on."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

from .._cdefs import lib
from ..base.closing import Closing
from ..base.errors import MissingFeature, NotProved
from ..device.net import State, VdpaNetDevice
from ..guest.nic import GuestNic, NicOptions
from ..memory.guest import DEFAULT_GPA, GuestMemory
from ..net.control import OK, VQ_PAIRS_SET, Class, ControlModel, command
from ..net.control_queue import NetGuestControl
from ..net.features import CONTROL, SUPPORTED
from ..trace.recorder import Trace
from ..virtqueue.layout import indices

MEMORY = 64 << 20
_SECONDS = 5.0
_SLICE_NS = 10_000_000


class BenchGuest(Closing):
    """``pairs`` queue pairs; :class:`~pyvhostvdpa.MissingFeature` if the device has fewer."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        pairs: int = 1,
        frame_size: int = 256,
        patience: float = _SECONDS,
        shadow: str | None = None,
    ) -> None:
        self.patience = patience
        """Seconds that the device may take to finish a descriptor."""
        self._stack = ExitStack()
        try:
            self._set_up(path, pairs, frame_size, shadow)
        except BaseException:
            self._stack.close()
            raise

    def _set_up(self, path: str | os.PathLike[str], pairs: int, frame_size: int, shadow: str | None) -> None:
        self.pairs = pairs
        self.trace = Trace()
        self.device = VdpaNetDevice(path, self.trace, wanted=SUPPORTED | CONTROL, shadow=shadow)
        self._stack.callback(self.device.close)
        most = self.device.groups.max_pairs
        if pairs > most:
            raise MissingFeature(
                f"{self.device.path} has {most} queue pairs that can be used, {pairs} were asked for",
                hint="vdpa dev add … max_vqp N makes one with more, where the driver can",
            )
        self.memory = self._stack.enter_context(GuestMemory([(DEFAULT_GPA, MEMORY)]))
        options = NicOptions.fitting(self.device, pairs, frame_size=frame_size)
        self.nic = GuestNic(self.memory, options)
        self._stack.callback(self.nic.close)
        # the device releases rings and memory before they are freed
        self._stack.callback(self.device.close)
        self.control = None
        if self.nic.control is not None:
            self.control = NetGuestControl(
                self.nic.control.queue, ControlModel(self.device.features, mac=self.device.mac)
            )
        self.device.attach(self.memory)

    def start(self, mode: State = State.PASSTHROUGH) -> None:
        """Start the device in a mode."""
        self.device.start(mode, self.nic.queues, self.control)

    def use_pairs(self) -> None:
        """Take all pairs into use, as a guest's driver does once; later starts replay it."""
        if self.pairs > 1 and self.nic.control is not None:
            answer = self.nic.control.send(command(Class.MQ, VQ_PAIRS_SET, self.pairs.to_bytes(2, "little")))
            if answer != OK:
                raise MissingFeature(f"{self.device.path} refused to use {self.pairs} queue pairs")

    def moves(self) -> None:
        """Send on every pair until the device has finished something there; :class:`NotProved` if it does not."""
        for pair in self.nic.pairs:
            before = indices(pair.tx, self.memory)[1]
            deadline = time.monotonic() + self.patience
            while indices(pair.tx, self.memory)[1] == before:
                if time.monotonic() > deadline:
                    which = f"{self.device.path}: pair {pair.c.flow - 1}"
                    raise NotProved(f"{which} finished no descriptor within {self.patience:g} s")
                lib.nic_run(pair.c, time.monotonic_ns() + _SLICE_NS)

    def close(self) -> None:
        """Reset and close the device, then give everything back."""
        self._stack.close()
