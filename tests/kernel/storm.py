"""Migrations that come to harm at random, and what has to hold after each, seen from outside.

A storm is drawn from its seed: on which devices, over what stream, which
faults and when. Afterwards there is exactly one owner of the guest, or a file
whose command starts it, or a process was killed that had it.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hwsim
from peers import Failed, Gone, Peer
from wire import Wire
from world import OPTIONS, PERFECT, PROCEDURES

from pyvhostvdpa.migration.source import SendOptions

SOURCE = ("handshake", "switch", "memory", "stop", "state", *("ready", "go", "running") * 2)
DESTINATION = ("handshake", "map", "memory", "load", *("ready", "start", "running") * 2)
"""Phases at which a side is held while it is harmed, those of the hand-over twice as often."""
KNOBS = ("fail_suspend", "fail_set_map", "fail_vq_create", "cvq_mute")
DROPS = ("errors", "overruns", "filtered", "down", "faults")
PATIENCE, MARGIN, STALL = 4.0, 1.5, 3.0
"""Seconds, in place of a minute."""
END_SECONDS = 90.0
COMMAND_SECONDS = 300.0
"""A program starts beside other storms on an emulated machine: that alone takes half a minute."""
NOFILE = 1024
_CANCELLING = ("SIGINT", "SIGTERM")
Devices = Sequence[tuple[str, hwsim.HwSim | None]]
"""Two nodes, each with its knobs if it has any."""
VERBOSE = bool(os.environ.get("PYVHOSTVDPA_SOAK_VERBOSE"))


@dataclass
class End:
    """How a side ended: a result, an error that says where the guest is, or neither because it was killed."""

    result: dict[str, Any] | None = None
    failed: Failed | None = None
    gone: bool = False

    def __str__(self) -> str:
        return "killed" if self.gone else f"{self.failed} (next: {self.failed.hint})" if self.failed else "well"


@dataclass
class Fault:
    """What is done, to whom, and what makes it good again."""

    name: str
    do: Callable[[], None]
    undo: Callable[[], None] = lambda: None


@dataclass
class Tally:
    """Storms, by how the guest came out of them."""

    migrations: int = 0
    takes: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Count what another one has counted."""
        self.migrations += other.migrations
        self.takes += other.takes
        self.ends += other.ends
        self.faults += other.faults

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.ends.items()))
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        return f"{self.migrations} migrations ({ends}); {self.takes} files used; faults: {faults}"


class Storm:
    """A guest, two processes with a device each, and a folder that may be full or read-only."""

    def __init__(self, devices: Devices, folder: Path) -> None:
        self.folder, self.tally = folder, Tally()
        self.paths = dict(zip(("left", "right"), (path for path, _ in devices), strict=True))
        self.sims = dict(zip(("left", "right"), (sim for _, sim in devices), strict=True))
        self._empty: dict[str, Any] = {}
        self.here, self.there = self._fork("left"), self._fork("right")
        self._start()

    def _fork(self, name: str) -> Peer:
        peer = Peer(name, self.folder)
        self._empty[name] = peer.call("resources")
        return peer

    def _start(self) -> None:
        self.here.call("start", [self.paths[self.here.name]], OPTIONS)

    # -- one migration -------------------------------------------------------------------

    def migrate(self, seed: int) -> None:
        """One migration with the faults of a seed; raises AssertionError with the story if something does not hold."""
        chance = random.Random(seed)
        self.tally.migrations += 1
        story: list[str] = [f"seed {seed}, {self.paths[self.here.name]} to {self.paths[self.there.name]}"]
        before = self._dropped()
        try:
            ends = self._run(chance, story)
            story += [f"{name}: {end}" for name, end in ends.items()]
            how = self._settle(chance, ends, story)
            story.append(how)
            self._is_as_before()
        except BaseException as e:
            story += [f"{name}: {count - before.get(name, 0)}" for name, count in self._dropped().items()]
            e.add_note("\n".join(story))
            raise
        self.tally.ends[how] += 1
        if VERBOSE:
            print("; ".join(story), flush=True)

    def _run(self, chance: random.Random, story: list[str]) -> dict[str, End]:
        with ExitStack() as stack:
            wire = None
            if chance.random() < 0.4:
                wire = Wire()
                stack.callback(wire.close)
                left, right = wire.left, wire.right
            else:
                left, right = socket.socketpair()
                stack.callback(left.close)
                stack.callback(right.close)
            faults = [self._draw(chance, wire) for _ in range(chance.choice([0, 1, 1, 2, 2, 3]))]
            side = chance.choice([self.here, self.there])
            phase = chance.choice(SOURCE if side is self.here else DESTINATION)
            held = faults and chance.random() < 0.75
            story.append(f"over {'a network' if wire else 'a Unix socket'}")
            if held:
                story.append(f"held at the {self._role(side)}'s {phase}")
            options = SendOptions(folder=self.folder, downtime=0.5, hashed=chance.random() < 0.3)
            self.here.ask("send", options, phase if held and side is self.here else "", fd=left.fileno())
            hold_at = phase if held and side is self.there else ""
            procedure = chance.choice(PROCEDURES)
            self.there.ask("receive", [self.paths[self.there.name]], hold_at, procedure, fd=right.fileno())
            # a stream that is open here would not end with the process
            left.close()
            right.close()
            arrived = bool(held) and side.comes_to(phase)
            self._harm(chance, faults, story)
            if arrived and side.alive:
                side.go_on()
            return self._ends(faults, story)

    def _harm(self, chance: random.Random, faults: list[Fault], story: list[str]) -> None:
        for fault in faults:
            time.sleep(chance.uniform(0.0, 0.6))
            self.tally.faults[fault.name.partition(" ")[0]] += 1
            story.append(fault.name)
            fault.do()

    def _ends(self, faults: list[Fault], story: list[str]) -> dict[str, End]:
        time.sleep(0.2)
        # a full disk cannot be emptied while it is read-only, if that came later
        for fault in reversed(faults):
            fault.undo()
        return {"source": self._end(self.here, story), "destination": self._end(self.there, story)}

    def _end(self, peer: Peer, story: list[str]) -> End:
        if not peer.alive:
            return End(gone=True)
        peer.control.settimeout(END_SECONDS)
        try:
            return End(result=peer.final())
        except Failed as e:
            if e.kind == "crashed":
                if "KeyboardInterrupt" not in e.message:
                    raise
                # the second signal ends the process, and what it has with it
                peer.kill()
                return End(gone=True)
            return End(failed=e)
        except Gone:
            # the second signal has its former effect
            signals = [line for line in story if line in (f"{name} to the {self._role(peer)}" for name in _CANCELLING)]
            assert peer.ended_by() == signal.SIGTERM, f"{peer.name} ended by itself"
            assert len(signals) >= 2, f"{peer.name} ended by a single signal"
            return End(gone=True)

    def _dropped(self) -> dict[str, int]:
        """What devices say of frames and chains that came to nothing, and of faults; counts that are 0 are left out."""
        found = {}
        for name, sim in self.sims.items():
            for counter, value in sim.read("stats").items() if sim is not None else ():
                if counter.rpartition(".")[2] in DROPS and int(value):
                    found[f"{self.paths[name]} {counter}"] = int(value)
        return found

    # -- faults ----------------------------------------------------------------------------

    def _draw(self, chance: random.Random, wire: Wire | None) -> Fault:
        kinds: list[Callable[[random.Random], Fault]] = [self._signal, self._signal, self._pause, self._kill]
        kinds += [self._kill, self._limit, self._disk]
        if any(self.sims.values()):
            kinds += [self._device, self._device]
        if wire is not None:
            kinds += [lambda chance: self._network(chance, wire)] * 6
        return chance.choice(kinds)(chance)

    def _victim(self, chance: random.Random) -> Peer:
        return chance.choice([self.here, self.there])

    def _role(self, peer: Peer) -> str:
        return "source" if peer is self.here else "destination"

    def _signal(self, chance: random.Random) -> Fault:
        peer, number = self._victim(chance), chance.choice([signal.SIGINT, signal.SIGTERM])
        return Fault(f"{number.name} to the {self._role(peer)}", lambda: peer.signal(number))

    def _kill(self, chance: random.Random) -> Fault:
        peer = self._victim(chance)
        return Fault(f"SIGKILL to the {self._role(peer)}", peer.kill)

    def _pause(self, chance: random.Random) -> Fault:
        peer, seconds = self._victim(chance), chance.choice([0.1, 0.5, 2.0, STALL + 1, 2 * PATIENCE + 3 * MARGIN])

        def undo() -> None:
            if peer.alive:
                time.sleep(seconds)
                peer.thaw()

        return Fault(f"SIGSTOP to the {self._role(peer)} for {seconds} s", lambda: peer.signal(signal.SIGSTOP), undo)

    def _limit(self, chance: random.Random) -> Fault:
        peer, room = self._victim(chance), chance.randrange(4)

        def do() -> None:
            if peer.alive:
                used = max(map(int, os.listdir(f"/proc/{peer.pid}/fd")))
                resource.prlimit(peer.pid, resource.RLIMIT_NOFILE, (used + 1 + room, NOFILE))

        def undo() -> None:
            if peer.alive:
                time.sleep(1.0)
                resource.prlimit(peer.pid, resource.RLIMIT_NOFILE, (NOFILE, NOFILE))

        return Fault(f"ulimit of the {self._role(peer)} to {room} more", do, undo)

    def _disk(self, chance: random.Random) -> Fault:
        read_only, filler = chance.random() < 0.5, self.folder / "filler"
        opened = list[Path]()

        def do() -> None:
            if read_only:
                remount(self.folder, "ro")
                return
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                opened.append(filler)
                while True:
                    file.write(bytes(1 << 20))

        def undo() -> None:
            time.sleep(1.0)
            if read_only:
                remount(self.folder, "rw")
            # a disk that was read-only before it could be filled still is
            for path in opened:
                path.unlink(missing_ok=True)

        return Fault("disk read-only" if read_only else "disk full", do, undo)

    def _device(self, chance: random.Random) -> Fault:
        peer = self._victim(chance)
        sim, knob, value = self.sims[peer.name], chance.choice(KNOBS), chance.randrange(1, 4)
        assert sim is not None
        if knob == "cvq_mute":
            value = 1
        return Fault(
            f"device of the {self._role(peer)}: {knob}={value}",
            lambda: sim.write(f"fault/{knob}", value),
            lambda: sim.write(f"fault/{knob}", 0),
        )

    def _network(self, chance: random.Random, wire: Wire) -> Fault:
        way, seconds = chance.randrange(2), chance.choice([0.2, 1.0, STALL + 1])

        def later() -> None:
            time.sleep(seconds)
            wire.go_on()

        return chance.choice(
            [
                Fault("network cut", wire.cut),
                Fault(f"network cut one way {way}", lambda: wire.cut_one_way(way)),
                Fault(f"network stops for {seconds} s", wire.stop, later),
                Fault(f"network trickles for {seconds} s", wire.trickle, later),
            ]
        )

    # -- what has to hold --------------------------------------------------------------------

    def _settle(self, chance: random.Random, ends: dict[str, End], story: list[str]) -> str:
        """Find the owner; do what the messages say; then the guest runs in ``here``. How it came out."""
        killed = [peer for peer in (self.here, self.there) if not peer.alive]
        owners = [peer for peer in (self.here, self.there) if peer.alive and peer.call("runs")]
        files = sorted(self.folder.glob("*.saved"))
        story.append(f"owners {[self._role(peer) for peer in owners]}, files {[path.name for path in files]}")
        said = [end.failed for end in ends.values() if end.failed is not None]
        assert len(owners) <= 1, "two sides run the guest"
        assert owners or files or killed, "the guest is nowhere, and nobody was killed"
        for path in files:
            named = [str(path) in failure.message and str(path) in failure.hint for failure in said]
            assert any(named) or killed, f"nobody says what {path} is"
        if owners:
            return self._keep(owners[0], ends, killed, files)
        for peer in (self.here, self.there):
            if peer.alive:
                peer.call("drop_stopped")
        self._replace(killed)
        if files:
            return self._use(chance, files, said, story)
        self._start()
        return "died with its process"

    def _keep(self, owner: Peer, ends: dict[str, End], killed: list[Peer], files: list[Path]) -> str:
        """The guest runs; what the other side saved is removed, as its hint says."""
        self._check_owner(owner, ends)
        for path in files:
            path.unlink()
        stayed = owner is self.here
        self._replace(killed)
        if stayed:
            return "stayed"
        self.here.call("drop_stopped")
        self.here, self.there = self.there, self.here
        return "arrived"

    def _replace(self, killed: list[Peer]) -> None:
        for peer in killed:
            fresh = self._fork(peer.name)
            self.here, self.there = (fresh if each is peer else each for each in (self.here, self.there))

    def _check_owner(self, owner: Peer, ends: dict[str, End]) -> None:
        """The words of each side agree with who runs the guest."""
        source, destination = ends["source"], ends["destination"]
        if owner is self.here:
            assert source.failed is not None
            assert "the guest continues in passthrough" in source.failed.message
            if destination.failed is not None:
                words = ("nothing of the guest is left here", "may have resumed it", "the source has it")
                assert any(word in destination.failed.message for word in words)
        else:
            assert destination.result is not None
            if source.failed is not None:
                assert "saved in" in source.failed.message

    def _use(self, chance: random.Random, files: list[Path], said: list[Failed], story: list[str]) -> str:
        """Run the command that a message names for a file, on one side only."""
        path = chance.choice(files)
        how = f"started from the {'destination' if 'destination' in path.name else 'source'}'s file"
        lines = [line for failure in said for line in failure.hint.splitlines()]
        commands = [command for line in lines if (command := _command(line)) and str(path) in command]
        self.tally.takes += 1
        if not commands:
            # its process was killed after it had saved the guest
            story.append(f"{path}: nobody was left to say")
            commands = [["vhost-vdpa", "receive", "--take", str(path), self.paths[self.here.name]]]
        story.append(shlex.join(commands[0]))
        tidy = chance.random() < 0.5
        for other in files:
            if other != path and tidy:
                other.unlink()
        device = commands[0][-1]
        if chance.random() < 0.25:
            self._run_command(commands[0])
            self._start()
            return how
        taker = self.here if self.paths[self.here.name] == device else self.there
        taker.call("take", path, [device])
        assert not path.exists()
        if taker is self.there:
            self.here, self.there = self.there, self.here
        return how

    def _run_command(self, command: list[str]) -> None:
        """Run it as it is printed; what it reports is sound, and the guest has ended with it."""
        argv, environment = [*command, "--seconds", "1", "--json"], {**os.environ, "PYTHONFAULTHANDLER": "1"}
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                _, said = process.communicate(timeout=COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                # where it stands is in what it says then
                process.send_signal(signal.SIGABRT)
                _, said = process.communicate()
        assert process.returncode == 0, said

    def _is_as_before(self) -> None:
        self.here.call("receives", 20)
        assert self.there.call("mappings") == 0
        have, had = self.there.call("resources"), self._empty[self.there.name]
        assert have == had, f"descriptors, pinned, threads: {have}, at its begin {had}"
        begin = time.monotonic()
        counts = self.here.call("settle")
        if {name: counts[name] for name in PERFECT} != PERFECT:
            took, rings = time.monotonic() - begin, self.here.call("rings")
            raise AssertionError(f"account of frames and pages: {counts}, after {took:.1f} s; rings {rings}")
        for path in self.folder.glob("*.stale"):
            path.unlink()
        left = [path.name for path in self.folder.iterdir() if path.suffix != ".half"]
        assert left == []

    def close(self) -> None:
        for peer in (self.here, self.there):
            peer.kill()


def _command(line: str) -> list[str] | None:
    found = re.search(r"vhost-vdpa (send --resume|receive --take) .*", line)
    return shlex.split(found.group()) if found else None


def clear_up(devices: Devices, folder: Path) -> None:
    """Leave neither a fault nor a file, whatever went wrong in between."""
    for _, sim in devices:
        for knob in KNOBS if sim is not None else ():
            sim.write(f"fault/{knob}", 0)
    remount(folder, "rw")
    for path in folder.iterdir():
        path.unlink()


def remount(folder: Path, how: str) -> None:
    # a file that is being written there keeps it as it is
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=how == "rw", capture_output=True)
