"""A migration between two hosts, recorded on each, and the recordings joined.

    tools/lab pair --devices vdpa_hwsim:1 -- python3 tests/pair/watch_two_hosts.py source \\
        --- python3 tests/pair/watch_two_hosts.py destination

The source is VM a, the destination VM b. The real time of b is first set to that of a, as chrony would; the offset of
their monotonic clocks is then measured over the network, independently of the recordings.
"""

from __future__ import annotations

import io
import json
import shlex
import socket
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

from tracing import mounted

from pyvhostvdpa.trace import phases, records
from pyvhostvdpa.trace.recorder import Trace

B = "10.77.0.2"
STREAM, CLOCK = 4444, 4445
DEVICE = "/dev/vhost-vdpa-0"
FOLDER = Path("/tmp/watch-two-hosts")
GUEST = ("--memory", "64M", "--seconds", "2", "--downtime", "3000")
PLAIN = ("--insecure-plain", "--state", "/tmp", "--json")
TIMES = struct.Struct("<qq")
QUESTIONS = 200
SLACK_NS = 1_000_000
"""A recording notes its clock with two reads; an emulated CPU may pause in between."""


class Asked:
    """The other host: it says its times, sets it as it is told, and waits for a word before each step."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def times(self) -> tuple[int, int, int]:
        """Return by how much its real time and its monotonic time are ahead, and half of the round trip.

        Of many answers the quickest counts. All in ns.
        """
        answers = []
        for _ in range(QUESTIONS):
            real, mono = time.time_ns(), time.monotonic_ns()
            self._sock.sendall(b"t")
            there = TIMES.unpack(self._file.read(TIMES.size))
            half = (time.monotonic_ns() - mono) // 2
            answers.append((half, there[0] - real - half, there[1] - mono - half))
        half, real, mono = min(answers)
        return real, mono, half

    def step(self, ns: int) -> None:
        """Set its real time forward."""
        self._sock.sendall(b"s" + struct.pack("<q", ns))
        assert self._file.read(1) == b"."

    def go(self) -> None:
        """Let it begin to receive; return once it listens."""
        self._sock.sendall(b"g")
        assert self._file.read(1) == b"."

    def fetch(self) -> None:
        """Get its files, once it has received."""
        self._sock.sendall(b"g")
        with tarfile.open(fileobj=io.BytesIO(self._file.read())) as archive:
            archive.extractall(FOLDER, filter="data")


def answer(sock: socket.socket) -> None:
    """Be the other host until it is told to go on."""
    while (word := sock.recv(1)) != b"g":
        if word == b"t":
            sock.sendall(TIMES.pack(time.time_ns(), time.monotonic_ns()))
        elif word == b"s":
            (ns,) = struct.unpack("<q", sock.recv(8, socket.MSG_WAITALL))
            time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + ns)
            sock.sendall(b".")
        else:
            raise EOFError("the source has gone")


def listens(port: int) -> bool:
    """Whether a process here listens on a port of TCP; to connect would be to be its source."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in lines[1:])


def connected(port: int) -> socket.socket:
    end = time.monotonic() + 120
    while True:
        try:
            return socket.create_connection((B, port), 5)
        except OSError:
            assert time.monotonic() < end, f"b does not listen on {port}"
            time.sleep(0.2)


def watched(name: str, *words: str) -> list[str]:
    """A command under watch, which records itself too."""
    traced = [*words, "--trace", f"{FOLDER}/{name}-own.jsonl", "--trace-format", "records", *PLAIN]
    command = f"exec {shlex.join(traced)} > {FOLDER}/{name}.json"
    return ["vhost-vdpa", "watch", "--json", "--trace", f"{FOLDER}/{name}.jsonl", "--", "sh", "-c", command]


def report(*words: str) -> str:
    argv = ["vhost-vdpa", "report", f"{FOLDER}/source.jsonl", f"{FOLDER}/destination.jsonl", *words]
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout


def source() -> None:
    FOLDER.mkdir()
    with connected(CLOCK) as sock, mounted():
        sock.settimeout(300)
        other = Asked(sock)
        real, _, half = other.times()
        print(f"real time of b: {real / 1e6:+.3f} ms ahead, to {half / 1e6:.3f} ms", flush=True)
        other.step(-real)
        real, before, half = other.times()
        print(f"set alike: {real / 1e6:+.3f} ms ahead, to {half / 1e6:.3f} ms", flush=True)
        other.go()
        argv = watched("source", "vhost-vdpa", "send", DEVICE, "--to", f"tcp:{B}:{STREAM}", *GUEST)
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
        other.fetch()
    print(report(), flush=True)
    joined = json.loads(report("--json"))
    offset = -joined["recording"]["joined"][1]["offset_ns"]
    print(f"b's clock: {offset} ns ahead by the recordings, {before} when it was asked", flush=True)
    assert abs(offset - before) <= half + abs(real) + SLACK_NS
    check(joined, before)


def own(name: str) -> Trace:
    with open(f"{FOLDER}/{name}-own.jsonl", encoding="utf-8") as file:
        return records.read_recording(file)[0]


def check(joined: dict[str, Any], ahead_ns: int) -> None:
    """The figures of the joined recordings are those of the two programs' own traces, by the clock as it was asked."""
    assert joined["lost_events"] == 0
    (migration,) = joined["migrations"]
    assert migration["source"] == f"source:{DEVICE}"
    assert migration["destination"] == f"destination:{DEVICE}"
    stop = own("source").select(DEVICE, phases.DT2_STOP)
    start = own("destination").select(DEVICE, phases.DEST_START)
    stopped, running = min(e.t_begin for e in stop), max(e.t_end for e in start) - ahead_ns
    stop_to_run_ms = (running - stopped) / 1e6
    print(f"joined {migration}\nby their own traces: stop to run {stop_to_run_ms:.3f} ms", flush=True)
    parts = migration["stop_to_run_parts_ms"]
    assert abs(migration["stop_to_run_ms"] - sum(parts.values())) < 0.01
    assert abs(migration["stop_to_run_ms"] - stop_to_run_ms) < 0.05 * stop_to_run_ms


def destination() -> None:
    FOLDER.mkdir()
    with socket.create_server(("0.0.0.0", CLOCK)) as server, mounted():
        peer, _ = server.accept()
        with peer:
            peer.settimeout(300)
            answer(peer)
            listen = ("--listen", f"tcp:0.0.0.0:{STREAM}", "--seconds", "2")
            argv = watched("destination", "vhost-vdpa", "receive", DEVICE, *listen)
            with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as receiving:
                while not listens(STREAM):
                    assert receiving.poll() is None
                    time.sleep(0.1)
                peer.sendall(b".")
            assert receiving.returncode == 0
            answer(peer)
            data = io.BytesIO()
            with tarfile.open(fileobj=data, mode="w") as archive:
                archive.add(FOLDER, arcname=".")
            peer.sendall(data.getvalue())


{"source": source, "destination": destination}[sys.argv[1]]()
