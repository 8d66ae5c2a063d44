"""A migration between two hosts, and what must be refused first.

    tools/lab pair --devices vdpa_hwsim:1 -- python3 tests/pair/two_hosts.py source \\
        --- python3 tests/pair/two_hosts.py destination

The source is VM a, the destination VM b. The certificates are made on b and
carried over by a connection of their own, before anything else.
"""

from __future__ import annotations

import io
import json
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from certificates import authority, issue

from pyvhostvdpa.migration.endpoint import Tls
from pyvhostvdpa.migration.pages import stream_sum
from pyvhostvdpa.migration.stream import HEADER, MAGIC, VERSION, Frame

B = "10.77.0.2"
CERTIFICATES, STREAM = 4443, 4444
DEVICE = "/dev/vhost-vdpa-0"
FOLDER = Path("/tmp/two-hosts")


def options(tls: Tls) -> list[str]:
    return ["--tls-cert", tls.cert, "--tls-key", tls.key, "--tls-ca", tls.ca, "--state", "/tmp", "--json"]


def named(name: str, ca: str = "ca") -> Tls:
    return Tls(f"{FOLDER}/{ca}-{name}.pem", f"{FOLDER}/{ca}-{name}.key", f"{FOLDER}/ca.pem")


def make_certificates() -> None:
    FOLDER.mkdir()
    ca = authority(FOLDER)
    issue(ca, "a")
    issue(ca, "b", f"DNS:b,IP:{B}")
    issue(authority(FOLDER, "other"), "a")


def hand_out() -> None:
    """Give the source its files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.add(FOLDER, arcname=".")
    with socket.create_server(("0.0.0.0", CERTIFICATES)) as server:
        peer, _ = server.accept()
        with peer:
            peer.sendall(data.getvalue())


def fetch() -> None:
    end = time.monotonic() + 120
    while True:
        try:
            peer = socket.create_connection((B, CERTIFICATES), 5)
            break
        except OSError:
            assert time.monotonic() < end, "b does not hand out certificates"
            time.sleep(0.5)
    with peer, peer.makefile("rb") as file:
        data = io.BytesIO(file.read())
    with tarfile.open(fileobj=data) as archive:
        archive.extractall(FOLDER, filter="data")


def send(tls: Tls) -> subprocess.CompletedProcess[str]:
    guest = ("--memory", "16M", "--seconds", "2", "--write", "256K", "--downtime", "3000", "--hash")
    argv = ["vhost-vdpa", "send", DEVICE, "--to", f"tcp:{B}:{STREAM}", *guest, *options(tls)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def say(tls: Tls, data: bytes) -> bytes:
    """Say something else than a source does, with a right certificate; what comes back."""
    answer = b""
    with (
        socket.create_connection((B, STREAM), 10) as plain,
        tls.context(server=False).wrap_socket(plain, server_hostname=B) as sock,
    ):
        sock.sendall(data)
        while part := _more(sock):
            answer += part
    return answer


def _more(sock: ssl.SSLSocket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except OSError:
        return b""


def hostile() -> list[bytes]:
    """What a peer with a right certificate may send instead of a guest."""
    hello = struct.pack("<8sII", MAGIC, VERSION, 0)
    junk = bytes(range(256)) * 16
    return [
        struct.pack("<8sII", MAGIC, VERSION + 1, 0),
        junk,
        hello + junk,
        hello + HEADER.pack(Frame.SHAPE, 0, 1 << 40, 0),
        hello + HEADER.pack(Frame.SHAPE, 0, len(junk), stream_sum(junk)) + junk,
        hello + HEADER.pack(Frame.GO, 0, 0, stream_sum(b"")),
        hello + HEADER.pack(0x100, 1, len(junk), stream_sum(junk)) + junk,
    ]


def source() -> None:
    fetch()
    time.sleep(3)
    stranger = send(Tls(named("a", "other").cert, named("a", "other").key, f"{FOLDER}/ca.pem"))
    assert stranger.returncode == 1, stranger
    assert "does not know the authority of this side's certificate" in stranger.stderr, stranger.stderr
    assert "the guest continues" in stranger.stderr, stranger.stderr
    assert json.loads(stranger.stdout)["frames"]["lost"] == 0
    for data in hostile():
        say(named("a"), data)
    done = send(named("a"))
    print(done.stderr, end="", flush=True)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    print(f"sent {report['id']}, {len(report['rounds'])} rounds, hash {report['memory_hash']}", flush=True)


def destination() -> None:
    make_certificates()
    listen = ["vhost-vdpa", "receive", DEVICE, "--listen", f"tcp:0.0.0.0:{STREAM}", "--seconds", "2"]
    with subprocess.Popen(
        [*listen, *options(named("b"))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        hand_out()
        said, told = process.communicate()
    print(told, end="", flush=True)
    lines = told.splitlines()
    refused = [line for line in lines if "] refused: " in line]
    assert process.returncode == 0
    assert len(refused) == 1 + len(hostile()), refused
    assert "certificate is refused" in refused[0]
    assert f"speaks version {VERSION + 1}" in refused[1]
    touched = next(k for k, line in enumerate(lines) if "allocating and mapping guest memory" in line)
    assert all(lines.index(line) < touched for line in refused), "something was touched before the last was refused"
    report = json.loads(said)
    frames = report["frames"]
    assert frames["received"] > 1000
    assert (frames["lost"], frames["duplicated"], frames["corrupted"], report["bad_pages"]) == (0, 0, 0, 0)
    print(f"received {report['id']}, hash {report['memory_hash']}, frames {frames}", flush=True)


{"source": source, "destination": destination}[sys.argv[1]]()
