#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How fast guest memory moves between two processes, beside what plain C does.

The measure is copy_stream.c: it sends each chunk with the checksum that the
stream of a migration has, over the same kind of socket, and checks it at the
other side. Each kind has two processes, and all copy their memory in turns,
so that what else the machine does meets all alike; medians are compared, of
pairs that stood side by side. Both processes share the CPU that all kinds
have, or have one each with --apart: left to itself the scheduler puts some
pairs together, whose data then stays in a cache, and separates others, and that is
half of the time that they take. With a CPU for each the busier one sets the pace, so
its CPU time is printed as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import PageReceiver, PageSender
from pyvhostvdpa.migration.stream import Channel, Frame

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 256 << 10
"""At which plain C is fastest."""
PATIENCE = 600.0
"""Seconds that a receiver waits for its turn."""
PLAIN, MOVER, TLS, SENDFILE = "plain C", "page mover", "page mover, TLS", "sendfile"
KINDS = (PLAIN, MOVER, TLS, SENDFILE)
SELDOM = 5
"""What is only printed beside is measured in one turn out of so many."""
_DONE = struct.Struct("<d")


@dataclass(frozen=True)
class Run:
    """Copying once: seconds by the clock, and of CPU on each side."""

    seconds: float
    sender: float
    receiver: float

    @property
    def busier(self) -> float:
        """CPU seconds of the side that sets the pace."""
        return max(self.sender, self.receiver)


def cpu_seconds() -> float:
    """Return the CPU time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def build(folder: Path) -> Path:
    """Compile the plain program as the package is compiled."""
    program = folder / "copy_stream"
    sources = [ROOT / "tools" / "bench" / "copy_stream.c", ROOT / "cdefs" / "sum.c"]
    subprocess.run(["cc", "-std=gnu11", "-O2", f"-I{ROOT / 'cdefs'}", *sources, "-o", program], check=True)
    return program


def certificate(folder: Path) -> Path:
    """Make a key and its certificate, in one file."""
    file = folder / "peer.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -days 1"
    command = ["openssl", *request.split(), "-keyout", file, "-out", folder / "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(file.read_text() + (folder / "cert.pem").read_text())
    return file


def channel(end: socket.socket, pem: str, server: bool) -> Channel:
    """Return one end of the stream, with TLS if there is a certificate."""
    if pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(pem)
        if server:
            context.load_cert_chain(pem)
        end = context.wrap_socket(end, server_side=server)
    return Channel(end)


def receive(end: socket.socket, pem: str, size: int) -> None:
    """Be the destination: receive rounds and report the CPU time that each took."""
    with GuestMemory([(DEFAULT_GPA, size)]) as memory, channel(end, pem, True) as stream:
        receiver = PageReceiver(memory, stream)
        stream.send_frame(Frame.ACCEPT)
        while (header := stream.receive_header(PATIENCE)).type != Frame.CANCEL:
            before = cpu_seconds()
            while header.type != Frame.FINAL:
                receiver.receive(header)
                header = stream.receive_header()
            stream.send_frame(Frame.READY, _DONE.pack(cpu_seconds() - before))


def send(sender: PageSender, stream: Channel, memory: GuestMemory) -> Run:
    """Copy all memory in one round."""
    cpu, begin = cpu_seconds(), time.monotonic()
    sent = sender.send(PageSet.all(memory))
    stream.send_frame(Frame.FINAL)
    _, answer = stream.expect(Frame.READY)
    run = Run(time.monotonic() - begin, cpu_seconds() - cpu, *_DONE.unpack(answer))
    assert (sent.zero_pages, sent.memory) == (0, memory.size)
    return run


def stay(others: int) -> None:
    """Stay on the first CPU that there is, or on the one after so many."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[others]})


def move(size: int, pem: str, apart: bool) -> None:
    """Copy memory from this process to another one for each line on standard input."""
    near, far = socket.socketpair()
    child = os.fork()
    stay(apart and not child)
    if not child:
        near.close()
        receive(far, pem, size)
        os._exit(0)
    far.close()
    with GuestMemory([(DEFAULT_GPA, size)]) as memory, channel(near, pem, False) as stream:
        some = os.urandom(1 << 20)
        for at in range(0, size, len(some)):
            memory.regions[0].memory.buffer[at : at + len(some)] = some[: size - at]
        sender = PageSender(memory, stream)
        stream.expect(Frame.ACCEPT, seconds=120)
        for _ in sys.stdin:
            run = send(sender, stream, memory)
            print(run.seconds, run.sender, run.receiver, flush=True)
        stream.send_frame(Frame.CANCEL)
    os.waitpid(child, 0)


class Mover:
    """A process that copies its memory to another one on request."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def copy(self) -> Run:
        """Copy all of it once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"{self._process.args!r} ended"
        return Run(*map(float, line.split()))


def take_turns(size: int, repeat: int, tell: Callable[[str], None], apart: bool = False) -> dict[str, list[Run]]:
    """Let the kinds copy in turns, those that are compared ``repeat`` times; ``tell`` is called before each.

    Sender and receiver share a CPU, or have one each.
    """
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program, moves = build(folder), [sys.executable, __file__, "--move", str(size), *(["--apart"] if apart else [])]
        commands: dict[str, list[str | Path]] = {
            PLAIN: [program, "sum", str(size), str(CHUNK), str(int(apart))],
            MOVER: [*moves],
            TLS: [*moves, "--pem", certificate(folder)],
            SENDFILE: [program, "sendfile", str(size), str(CHUNK), str(int(apart))],
        }
        movers = {kind: stack.enter_context(Mover(commands[kind])) for kind in KINDS}
        for turn in range(repeat):
            for kind, mover in movers.items():
                if kind in (TLS, SENDFILE) and turn % SELDOM:
                    continue
                tell(f"{turn + 1} of {repeat}: {kind}")
                runs[kind].append(mover.copy())
    return runs


def ratio(runs: dict[str, list[Run]], figure: str) -> float:
    """Return how much faster the mover was than plain C, the median over runs that stood side by side."""
    pairs = zip(runs[PLAIN], runs[MOVER], strict=True)
    return median(getattr(plain, figure) / getattr(mover, figure) for plain, mover in pairs)


def report(runs: dict[str, list[Run]], size: int) -> dict[str, object]:
    """Return what is printed with --json."""
    return {
        "schema": "pyvhostvdpa/bench-memory/1",
        "bytes": size,
        "chunk": CHUNK,
        "rows": [
            {
                "name": kind,
                "gb_per_s": size / 1e9 / median(run.seconds for run in each),
                "seconds": [run.seconds for run in each],
                "cpu": {
                    "sender": median(run.sender for run in each),
                    "receiver": median(run.receiver for run in each),
                },
            }
            for kind, each in runs.items()
        ],
        "mover_to_plain": {"clock": ratio(runs, "seconds"), "cpu": ratio(runs, "busier")},
    }


def table(runs: dict[str, list[Run]], size: int) -> str:
    """Return the same for reading."""
    lines = [f"{'':<16} {'GB/s':>6}  {'sender, CPU s/GB':>16}  {'receiver, CPU s/GB':>18}"]
    for kind, each in runs.items():
        speed = size / 1e9 / median(run.seconds for run in each)
        sender, receiver = (median(getattr(run, side) for run in each) / size * 1e9 for side in ("sender", "receiver"))
        lines.append(f"{kind:<16} {speed:>6.2f}  {sender:>16.3f}  {receiver:>18.3f}")
    lines.append(
        f"mover to plain C: {ratio(runs, 'seconds'):.2f} by the clock, "
        f"{ratio(runs, 'busier'):.2f} by the CPU time of the busier side"
    )
    return "\n".join(lines)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="guest memory (default 256)")
    parser.add_argument("--repeat", type=int, default=15, metavar="K", help="rounds of those compared (default 15)")
    parser.add_argument("--apart", action="store_true", help="a CPU for each process; they share one otherwise")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--move", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--pem", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Run all kinds in turns and print."""
    chosen = options()
    if chosen.move:
        move(chosen.move, chosen.pem, chosen.apart)
        return 0
    size = chosen.memory << 20
    runs = take_turns(size, chosen.repeat, lambda text: print(text, file=sys.stderr), chosen.apart)
    print(json.dumps(report(runs, size), indent=2) if chosen.json else table(runs, size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
