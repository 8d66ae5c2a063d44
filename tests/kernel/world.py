"""A guest that lives through a row of migrations between two processes, some of which come to harm."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers import Peer

from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.migration.source import SendOptions

MEMORY = 8 << 20
OPTIONS = GuestOptions(memory=MEMORY, ring_size=64, frame_size=128, write_rate=1 << 20)
PROCEDURES = (None, None, "direct")
"""What each device is driven by, at random: the best that it can do, or what it could do without RESUME."""
ANY = "any"
PERFECT = {"lost": 0, "duplicated": 0, "corrupted": 0, "reordered": 0, "bad_pages": 0}


class World:
    """Two processes, ``here`` with the guest and ``there`` without; each has devices of its own."""

    def __init__(
        self, here: Sequence[str], there: Sequence[str], folder: Path, options: GuestOptions, downtime: float = 0.5
    ) -> None:
        self.folder, self.options, self.downtime = folder, options, downtime
        self.paths = {"left": list(here), "right": list(there)}
        self._empty: dict[str, Any] = {}
        self._random = random.Random(len(here))
        self.procedure: str | None = ANY
        """What the next destination is driven by."""
        self.here, self.there = self.fork("left"), self.fork("right")
        self.start_again()

    # -- migrations ----------------------------------------------------------------

    @contextmanager
    def migration(
        self,
        hashed: bool = False,
        hold: tuple[str, str] = ("", ""),
        limit: float | None = None,
        procedure: str | None = None,
    ) -> Iterator[socket.socket]:
        """Begin one; what is yielded is the stream, to be broken. ``hold`` one side at a phase."""
        left, right = socket.socketpair()
        try:
            side, phase = hold
            options = SendOptions(folder=self.folder, downtime=self.downtime, hashed=hashed, limit=limit)
            self.here.ask("send", options, phase if side == "source" else "", fd=left.fileno())
            at = phase if side == "destination" else ""
            if procedure is None:
                procedure = self._random.choice(PROCEDURES) if self.procedure is ANY else self.procedure
            self.there.ask("receive", self.paths[self.there.name], at, procedure, fd=right.fileno())
            right.close()
            yield left
        finally:
            left.close()
            right.close()

    def migrates(self, limit: float | None = None) -> dict[str, Any]:
        """Migrate without a fault; memory is compared by hash. The guest then is in the other process."""
        with self.migration(hashed=True, limit=limit) as stream:
            stream.close()
            sent, received = self.here.result(), self.there.result()
        assert sent["hash"] == received["hash"] != ""
        self.here, self.there = self.there, self.here
        sent.update(received)
        return dict(sent)

    def move_to(self, procedure: str | None) -> None:
        """Have the guest on a device that is driven in this way."""
        self.procedure = procedure
        try:
            self.migrates()
        finally:
            self.procedure = ANY

    # -- what has to hold ----------------------------------------------------------------

    def lives(self) -> None:
        """The guest runs where it is thought to be, and nothing is left of it on the other side."""
        self.here.call("receives", 100)
        assert self.there.call("mappings") == 0
        assert self.there.call("resources") == self._empty[self.there.name]

    def is_sound(self) -> None:
        """Not a frame was lost, duplicated or corrupted, and every page is as it was written."""
        counts = self.here.call("settle")
        assert {name: counts[name] for name in PERFECT} == PERFECT

    def files(self) -> list[Path]:
        """Guests that were saved."""
        return sorted(self.folder.glob("*.saved"))

    # -- processes -------------------------------------------------------------------------

    def fork(self, name: str) -> Peer:
        """A new process, in the place of one that died."""
        peer = Peer(name, self.folder)
        self._empty[name] = peer.call("resources")
        return peer

    def start_again(self) -> None:
        """A new guest, because the last one died with its process."""
        self.here.call("start", self.paths[self.here.name], self.options, self._random.choice(PROCEDURES))

    def close(self) -> None:
        for peer in (self.here, self.there):
            peer.kill()
