# SPDX-License-Identifier: MIT
"""The rounds in which guest memory is sent: all of it, then the pages written meanwhile, until few are left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..base.errors import MigrationFailed
from ..guest.protocol import Guest
from ..memory.guest import GUEST_PAGE
from .common import ReportCallback
from .convergence import Convergence, duration
from .dirty import DirtyTracker, PageSet
from .pages import PageSender, RoundStatistics
from .stream import Channel, Frame

_REPORT_SECONDS = 1.0


class Rounds:
    """Sends a guest's memory to the other end of ``channel``.

    ``limit`` in bytes per second, None for none, holds until :meth:`last`;
    ``check`` is called again and again and may raise, which ends the round.
    """

    def __init__(
        self, guest: Guest, channel: Channel, limit: float | None, check: Callable[[], None], report: ReportCallback
    ) -> None:
        self._guest, self._channel, self._check, self._report = guest, channel, check, report
        self._tracker = DirtyTracker(guest.memory)
        self._sender = PageSender(guest.memory, channel, limit, self._progress)
        self._reported = self._began = time.monotonic()
        self.statistics: list[RoundStatistics] = []
        """Of each round that was sent, in order."""
        self.left = PageSet(guest.memory)
        """The pages for the last round."""
        self.left_by_devices = PageSet(guest.memory)
        """Those of :attr:`left` that the devices were seen to write."""
        self._used: PageSet | None = None
        """What was reported since only used pages are looked at: what is reported again was written."""
        self.c_map: Any = guest.memory.c_map
        """Where C reads guest memory."""

    @property
    def atomic(self) -> bool:
        """Whether written pages are collected in one step, so that the guest may run meanwhile."""
        return self._tracker.atomic

    def until_few_are_left(self, downtime: float) -> None:
        """Send rounds until sending what is left takes no longer than ``downtime`` seconds.

        Raises :class:`~pyvhostvdpa.MigrationFailed` if the guest writes faster than the stream moves memory.
        """
        # all of memory goes after this, so earlier writes do not matter
        self._tracker.start()
        converging = Convergence(downtime)
        pages = PageSet.all(self._guest.memory)
        short = False
        while True:
            self._send(pages)
            pages = self._collect()
            takes = converging.words(pages, self._sender.bandwidth, self._sender.measured)
            self._report(
                f"round {len(self.statistics)}: {_speed(self.statistics[-1])}; "
                f"{pages.bytes >> 10:,} KiB written since, {takes}"
            )
            done = converging.done(pages, self._sender.bandwidth)
            if done and not short:
                short = True
                self._look_at_used(pages)
                if pages.count:
                    # this round is known to be short: the guest runs for it, and is paused for what it writes meanwhile
                    continue
            if done:
                self.left = pages
                self.left_by_devices.update(self._tracker.written_by_devices)
                return
            if self._diverges(converging, pages):
                raise MigrationFailed(
                    f"the guest writes memory faster than the stream moves it: after {len(self.statistics)} rounds "
                    f"{pages.bytes >> 10:,} KiB are left, {takes}",
                    hint="allow a longer downtime, or a faster stream, or let the guest write less",
                )

    def _look_at_used(self, pages: PageSet) -> None:
        """Make looks short from here on; add to ``pages`` what was written until now."""
        c_map = self._tracker.look_at_used(pages)
        if c_map is not None:
            self._read_through(c_map)
            self._used = PageSet(self._guest.memory)

    def _diverges(self, converging: Convergence, pages: PageSet) -> bool:
        """Whether the guest writes too much. Where used pages are looked at, ``pages`` has what it only reads once."""
        if self._used is None:
            return converging.diverges(pages)
        written = pages.common(self._used) * GUEST_PAGE
        self._used.update(pages)
        return not converging.fits(written, self._sender.bandwidth) and converging.diverges(pages, written)

    def _read_through(self, c_map: Any) -> None:
        self.c_map = c_map
        self._sender.read_through(c_map)

    def collect_written_by_cpu(self) -> None:
        """Add to :attr:`left` what the guest's CPU has written since; the guest is paused."""
        self._tracker.scan_into(self.left)

    def collect_written_by_devices(self) -> None:
        """Add to :attr:`left` what its devices have written since; they are stopped."""
        self._tracker.drain_into(self.left, self.left_by_devices)

    def last(self) -> None:
        """Send the pages in :attr:`left`, as fast as the stream takes them."""
        self._sender.limit = None
        self._send(self.left)

    def stop(self) -> None:
        """Watch memory no more. Idempotent; it takes longer the more memory there is."""
        # what is read through is unmapped with the tracker
        self._read_through(self._guest.memory.c_map)
        self._tracker.stop()

    def _collect(self) -> PageSet:
        if self._tracker.atomic:
            return self._tracker.collect()
        self._guest.pause()
        try:
            return self._tracker.collect()
        finally:
            self._guest.run()

    def _send(self, pages: PageSet) -> None:
        self._channel.send_frame(Frame.ROUND, pages.bytes.to_bytes(8, "little"), len(self.statistics) + 1)
        self._began = self._reported = time.monotonic()
        self.statistics.append(self._sender.send(pages))
        self._check()

    def _progress(self, moved: int, total: int) -> None:
        self._check()
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS:
            return
        self._reported = now
        rate = moved / (now - self._began)
        left = f", {duration((total - moved) / rate)} left" if rate else ""
        done = f"{moved >> 20} of {total >> 20} MiB"
        self._report(f"round {len(self.statistics) + 1}: {done}, {rate / (1 << 20):,.1f} MiB/s{left}")


def _speed(round_: RoundStatistics) -> str:
    rate = round_.memory / round_.seconds / (1 << 20) if round_.seconds else 0.0
    return (
        f"{round_.memory >> 20} MiB ({round_.zero_pages:,} pages of zeros) in {round_.seconds:.2f} s, {rate:,.0f} MiB/s"
    )
