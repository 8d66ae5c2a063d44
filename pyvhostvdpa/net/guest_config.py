# SPDX-License-Identifier: MIT
"""What a guest sees of its device beside the rings: status, configuration space, configuration interrupt.

The guest keeps its view while the device below it is reset, switched and
exchanged. Two things in it come from here: NEEDS_RESET, which means that
a queue has failed, and the request to announce itself after a move.
"""

from __future__ import annotations

import os
from typing import Protocol

from ..base.eventfds import close_all
from ..base.uapi import Status
from .config import ANNOUNCE
from .control import ControlModel
from .features import Feature

_MAC, _STATUS = slice(0, 6), slice(6, 8)
_RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class Below(Protocol):
    """What stands below the guest: a device that runs."""

    @property
    def path(self) -> str:
        """What distinguishes it from other devices."""

    def failure(self) -> str:
        """Why the guest has to reset it; "" while it works."""

    def read_config(self) -> bytes:
        """The device's configuration space."""

    def set_config_call(self, eventfd: int) -> None:
        """Where the device raises its configuration interrupt, -1 for nowhere."""


class GuestConfig:
    """The guest's view of its virtio-net device (virtio 1.3, 2.1, 2.5 and 5.1.4).

    ``features`` are those that the guest negotiated; ``call`` is the
    configuration interrupt, an eventfd that this object owns.
    """

    def __init__(self, features: Feature) -> None:
        self.features = features
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.failed = ""
        """Why NEEDS_RESET is set; stays until the guest resets."""
        self._model: ControlModel | None = None
        self._below: Below | None = None
        self._last_path = ""
        self._last_config = b""

    # -- the guest's side --------------------------------------------------------

    @property
    def status(self) -> Status:
        """The device status as the driver reads it."""
        self._look()
        return _RUNNING | Status.NEEDS_RESET if self.failed else _RUNNING

    def read(self) -> bytes:
        """Return the configuration space as the driver reads it."""
        if self._below is not None:
            self._last_config = self._below.read_config()
        space = bytearray(self._last_config)
        if self._model is not None and self._model.mac is not None and Feature.CTRL_MAC_ADDR in self.features:
            space[_MAC] = self._model.mac
        if Feature.GUEST_ANNOUNCE in self.features:
            status = int.from_bytes(space[_STATUS], "little") & ~ANNOUNCE
            space[_STATUS] = (status | ANNOUNCE * self.asks_to_announce).to_bytes(2, "little")
        return bytes(space)

    def known(self) -> bytes | None:
        """Return what :meth:`read` does; None for a guest that has not been on a device yet."""
        return self.read() if self._below is not None or self._last_config else None

    @property
    def asks_to_announce(self) -> bool:
        """Whether the guest was asked to announce itself and has not acknowledged it."""
        return self._model is not None and self._model.announce

    def reset(self) -> None:
        """Forget what went wrong: the guest has reset its device and starts again."""
        self.failed = ""

    # -- our side ----------------------------------------------------------------

    def announce(self) -> None:
        """Ask the guest to announce itself on its network; ANNOUNCE_ACK ends that. Nothing if it cannot."""
        if Feature.GUEST_ANNOUNCE in self.features and self._model is not None:
            self._model.announce = True
            self.interrupt()

    def interrupt(self) -> None:
        """Raise the configuration interrupt."""
        os.eventfd_write(self.call, 1)

    def connect(self, below: Below, model: ControlModel | None) -> None:
        """Put a device that just started below the guest.

        The interrupt is raised once, since one of before may have been lost.
        A guest that was on another device is asked to announce itself.
        """
        self._below, self._model = below, model
        below.set_config_call(self.call)
        if not self._last_config:
            self._last_config = below.read_config()
        moved = self._last_path not in ("", below.path)
        self._last_path = below.path
        if moved:
            self.announce()
        self.interrupt()

    def disconnect(self) -> None:
        """Take the device away; the guest still sees it as it was."""
        if self._below is None:
            return
        self._look()
        below, self._below = self._below, None
        below.set_config_call(-1)

    def _look(self) -> None:
        if not self.failed and self._below is not None:
            self.failed = self._below.failure()

    def close(self) -> None:
        """Close the eventfd; no device may have it any more. Idempotent."""
        call, self.call = self.call, -1
        close_all([call])
