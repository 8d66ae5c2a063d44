# SPDX-License-Identifier: MIT
"""The dirty log of a front-end: where marks go, and whether the log has everything that was written."""

from __future__ import annotations

from ..base.errors import VhostVdpaError
from ..memory.guest import GuestMemory
from ..memory.log import SharedLog
from .device import Device
from .messages import LogArea, MessageRefused


class FrontEndLog:
    """The log into which ``device`` marks what it writes of ``memory``; none at first."""

    def __init__(self, device: Device, memory: GuestMemory) -> None:
        self._device, self._memory = device, memory
        self._log: SharedLog | None = None
        self.wanted = False
        """Whether dirty pages are logged."""
        self.inexact = ""
        """Why everything is logged as dirty; "" while what the device writes is known."""
        self._error = ""
        """Why the log that the front-end gave last cannot be used."""
        self._missed = False
        """Whether the device wrote in shadow mode before there was a log."""
        self._read = False
        """Whether the front-end may have looked into the log for the last time: it does so behind a stop."""

    def set(self, area: LogArea, fd: int) -> bool:
        """Log into another bitmap from now on; not one bit goes to the old one when this returns.

        Returns whether there was an old one. MessageRefused if the new one cannot be used.
        """
        try:
            new = SharedLog(self._memory, fd, area.size, area.offset)
            try:
                self._device.set_log(new)
            except BaseException:
                new.close()
                raise
        except (VhostVdpaError, OSError) as e:
            # QEMU takes any answer for a yes: logging is refused when it is asked for
            self._error = str(e)
            raise MessageRefused(f"the dirty log cannot be used: {e}") from e
        self._error, self._read = "", False
        old, self._log = self._log, new
        if old is not None:
            old.close()
        if self._missed or (self.inexact and self.wanted):
            # what was written before there was a log is not known any more: everything may have been
            self._missed = False
            self.mark_all()
        return old is not None

    def want(self, wanted: bool) -> None:
        """Log from now on, or no more once the device is not in shadow mode: :meth:`end` follows then.

        MessageRefused if the log that the front-end gave cannot be used.
        """
        if wanted and self._error:
            raise MessageRefused(f"the dirty log cannot be used: {self._error}")
        self.wanted = wanted
        if wanted:
            self.inexact = ""

    def end(self) -> None:
        """Log no more: write out the last marks and release the log."""
        self.inexact = ""
        self._missed = self._read = False
        self.drop()

    def shadowed(self) -> None:
        """The device has been started in shadow mode."""
        if self._log is None or self._read:
            # without STATUS a device is started before it is given the log of this start
            self._missed = True

    def stopped(self) -> None:
        """The device has been stopped: have everything in the log, for its reader's last look."""
        self.publish_all()
        self._read = True

    def publish_all(self) -> None:
        """Log everything, if what the device wrote is not known; it does not run."""
        if self.inexact and self._log is not None:
            self.mark_all()
            self._log.publish()

    def mark_all(self) -> None:
        """Mark every page, for the next time that marks are moved into the log."""
        self._memory.mark_all()

    def drop(self) -> None:
        """Write out the last marks and release the log."""
        if self._log is not None:
            self._device.set_log(None)
            old, self._log = self._log, None
            old.close()

    def forget(self) -> None:
        """Be as in the beginning; the log was dropped."""
        self.wanted, self.inexact, self._missed, self._read, self._error = False, "", False, False, ""
