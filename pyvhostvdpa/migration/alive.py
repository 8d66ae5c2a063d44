# SPDX-License-Identifier: MIT
"""How much ALIVE the other side of a migration may send instead of what is waited for."""

from __future__ import annotations

import time

from ..base.errors import StreamCorrupt

BURST = 64
"""ALIVE frames at once; after them one per second. A side that is at work sends one every few seconds."""
SECONDS = 3600.0
"""How long a side may send nothing but ALIVE. A terabyte is allocated and pinned in less."""


class AliveLimit:
    """Counts the ALIVE frames of one migration."""

    def __init__(self) -> None:
        self._began = self._progress = time.monotonic()
        self._count = 0

    def progress(self) -> None:
        """Note that something else arrived."""
        self._progress = time.monotonic()

    def count(self) -> None:
        """Count a frame; :class:`~pyvhostvdpa.StreamCorrupt` if that is too many."""
        now = time.monotonic()
        self._count += 1
        if self._count > BURST + now - self._began:
            raise StreamCorrupt(f"{self._count} ALIVE frames within {now - self._began:.0f} s")
        if now - self._progress > SECONDS:
            raise StreamCorrupt(f"nothing but ALIVE frames for {SECONDS:.0f} s")
