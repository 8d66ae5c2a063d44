#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How fast guest memory moves between two processes, beside what plain C does.

The measure is copy_stream.c: it sends each chunk with the checksum that the
stream of a migration has, over the same kind of socket, and checks it at the
other side. All runs are of fresh processes, one kind after the other in
turns, and medians are compared, so that what else the machine does meets
all alike. With a core for each process the busier one sets the pace: its CPU
time is what tells on a machine that has other work.
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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pyvhostvdpa.memory import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.pages import PageReceiver, PageSender
from pyvhostvdpa.migration.stream import Channel, Frame

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 256 << 10
PLAIN, MOVER, TLS, SENDFILE = "plain C", "page mover", "page mover, TLS", "sendfile"
KINDS = (PLAIN, MOVER, TLS, SENDFILE)
_DONE = struct.Struct("<d")


@dataclass(frozen=True)
class Run:
    """One copy: seconds by the clock, and of CPU on each side."""

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
    """Be the destination: receive until the end and tell the CPU time it took."""
    with GuestMemory([(DEFAULT_GPA, size)]) as memory, channel(end, pem, True) as stream:
        receiver = PageReceiver(memory, stream)
        stream.send_frame(Frame.ACCEPT)
        before = cpu_seconds()
        while (header := stream.receive_header()).type != Frame.FINAL:
            receiver.receive(header)
        stream.send_frame(Frame.READY, _DONE.pack(cpu_seconds() - before))


def move(size: int, pem: str) -> Run:
    """Copy memory from this process to another one, in one round."""
    near, far = socket.socketpair()
    child = os.fork()
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
        cpu, begin = cpu_seconds(), time.monotonic()
        sent = sender.send(PageSet.all(memory))
        stream.send_frame(Frame.FINAL)
        _, answer = stream.expect(Frame.READY)
        run = Run(time.monotonic() - begin, cpu_seconds() - cpu, *_DONE.unpack(answer))
        assert (sent.zero_pages, sent.memory) == (0, size)
    os.waitpid(child, 0)
    return run


def measure(kind: str, size: int, program: Path, pem: Path) -> Run:
    """Run one kind in processes of its own."""
    command: list[str | Path] = {
        PLAIN: [program, "sum", str(size), str(CHUNK)],
        SENDFILE: [program, "sendfile", str(size), str(CHUNK)],
        MOVER: [sys.executable, __file__, "--move", str(size)],
        TLS: [sys.executable, __file__, "--move", str(size), "--pem", pem],
    }[kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Run(*map(float, done.stdout.split()))


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
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="guest memory (default 512)")
    parser.add_argument("--repeat", type=int, default=7, metavar="K", help="runs of each kind (default 7)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--move", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--pem", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Run all kinds in turns and print."""
    chosen = options()
    if chosen.move:
        run = move(chosen.move, chosen.pem)
        print(run.seconds, run.sender, run.receiver)
        return 0
    size = chosen.memory << 20
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program, pem = build(folder), certificate(folder)
        for turn in range(chosen.repeat):
            for kind in KINDS:
                print(f"{turn + 1} of {chosen.repeat}: {kind}", file=sys.stderr)
                runs[kind].append(measure(kind, size, program, pem))
    print(json.dumps(report(runs, size), indent=2) if chosen.json else table(runs, size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
