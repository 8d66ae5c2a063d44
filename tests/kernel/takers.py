"""Several processes that want the same saved guest at once, some of which are killed: one of them has it in the end."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers import Failed, Gone, Peer
from world import PERFECT

from pyvhostvdpa.guest.synthetic import GuestOptions

REFUSALS = ("is in use: process ", "has just started the guest from it", "No such file or directory")


@dataclass
class Tally:
    """What happened. A guest is lost if the process that ran it was killed, as with any virtual machine."""

    takes: int = 0
    started: int = 0
    killed: int = 0
    again: int = 0
    lost: int = 0

    def __str__(self) -> str:
        return (
            f"{self.takes} takes: {self.started} started the guest, {self.killed} were killed, {self.again} times the "
            f"same file was taken again, {self.lost} guests died with their process"
        )


class Takers:
    """One process per device; the guest lives in one of them, is saved there, and taken by all at once."""

    def __init__(self, paths: Sequence[str], folder: Path, options: GuestOptions, chance: random.Random) -> None:
        self.paths, self.folder, self.options, self.chance = list(paths), folder, options, chance
        self.tally = Tally()
        self.pace = 0.3
        """Seconds that a take takes here."""
        self.peers = [self._fork(number) for number in range(len(paths))]
        self.owner: Peer | None = None
        self._start()

    def _fork(self, number: int) -> Peer:
        return Peer(str(number), self.folder)

    def _start(self) -> None:
        self.owner = self.peers[0]
        self.owner.call("start", [self.paths[0]], self.options)
        self.owner.call("receives", 20)

    def round(self) -> None:
        """Save the guest, and let all take it until it runs, or died with its process."""
        assert self.owner is not None
        path = self.owner.call("save")
        self.owner = None
        attempts = 0
        while self.owner is None:
            # what `ls *.saved` shows
            assert sorted(self.folder.glob("*.saved")) == [path]
            # the command that a message named stays the same, whichever process was killed with the file
            if not self._attempt(path, kills=attempts < 3):
                self.tally.lost += 1
                self._start()
                return
            self.tally.again += attempts > 0
            attempts += 1
        assert not list(self.folder.iterdir())
        self.owner.call("receives", 20)

    def _attempt(self, path: Path, kills: bool) -> bool:
        """Let all take it once, and kill some meanwhile; whether the guest is anywhere afterwards."""
        for number, peer in enumerate(self.peers):
            peer.ask("take", path, [self.paths[number]])
        self.tally.takes += len(self.peers)
        begin = time.monotonic()
        # at any moment of a take, from its first to its last
        time.sleep(self.chance.uniform(0.0, self.pace))
        victims = self.chance.sample(range(len(self.peers)), self.chance.randrange(len(self.peers))) if kills else []
        for number in victims:
            self.peers[number].kill()
        winners = [number for number, peer in enumerate(self.peers) if number not in victims and _took(peer)]
        assert len(winners) <= 1, f"{len(winners)} processes run the guest"
        if not victims:
            self.pace = time.monotonic() - begin
        for number in victims:
            self.peers[number] = self._fork(number)
        self.tally.killed += len(victims)
        if winners:
            self.tally.started += 1
            self.owner = self.peers[winners[0]]
            assert not path.exists()
            return True
        # no file and no owner: one of the victims had started it
        assert path.exists() or victims
        return path.exists()

    def is_sound(self) -> None:
        assert self.owner is not None
        counts = self.owner.call("settle")
        assert {name: counts[name] for name in PERFECT} == PERFECT

    def close(self) -> None:
        for peer in self.peers:
            peer.kill()


def _took(peer: Peer) -> bool:
    try:
        result = peer.result()
    except Gone:
        raise AssertionError(f"process {peer.name} ended by itself") from None
    except Failed as e:
        if not any(words in e.message for words in REFUSALS):
            raise
        return False
    assert result["note"] == ""
    return True
