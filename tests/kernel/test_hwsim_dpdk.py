"""DPDK's testpmd, whose virtio_user driver opens vhost-vdpa devices, forwards frames through two wired ones."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import hwsim
import lab
from hwsim import HwSim

FRAMES = 5000
TEST_ETHERTYPE = b"\x88\xb5"
FILE_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)


def frame(number: int) -> bytes:
    """A broadcast frame of random length and content, which depend on its number alone."""
    chance = random.Random(number)
    payload = chance.randbytes(chance.randrange(46, 1501))
    return b"\xff" * 6 + b"\x02\0\0\0\0\1" + TEST_ETHERTYPE + payload


def write_capture(path: Path, frames: list[bytes]) -> None:
    path.write_bytes(FILE_HEADER + b"".join(struct.pack("<IIII", 0, 0, len(each), len(each)) + each for each in frames))


def read_capture(path: Path) -> list[bytes]:
    data, position, frames = path.read_bytes(), len(FILE_HEADER), []
    while position < len(data):
        length = struct.unpack_from("<I", data, position + 8)[0]
        frames.append(data[position + 16 : position + 16 + length])
        position += 16 + length
    return frames


def forwarder(near: str, far: str, source: Path, target: Path) -> list[str]:
    """Forward a capture file to the near device, and what the far device receives to another file.

    One core does both, in bursts of 32, and the near queue is the shorter one: so the far queue never runs out of
    buffers, and no frame has a reason to be lost.
    """
    unused = source.with_name("unused")
    return [
        *("prlimit", "--memlock=unlimited", "dpdk-testpmd", "-l", "0,1", "--no-huge", "-m", "128", "--iova-mode=va"),
        *("--no-telemetry", "--no-pci", "--vdev", f"net_pcap0,rx_pcap={source},tx_pcap={unused}"),
        *("--vdev", f"net_virtio_user0,path={near},queue_size=64", "--vdev", f"net_virtio_user1,path={far}"),
        *("--vdev", f"net_pcap1,tx_pcap={target}"),
        *("--", "-i", "--total-num-mbufs=4096", "--no-flush-rx"),
    ]


def forward(argv: list[str], far: HwSim, folder: Path) -> None:
    """Run a forwarder until the far device has received every frame."""
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            assert process.stdin is not None
            process.stdin.write("set fwd io retry\nset burst tx delay 100 retry 1000\nstart\n")
            process.stdin.flush()
            lab.wait_for(
                lambda: process.poll() is not None or int(far.read("stats")["vq0.packets"]) >= FRAMES,
                "the last frame",
                120,
            )
            process.communicate("stop\nquit\n", 60)
        finally:
            process.kill()
        log.seek(0)
        assert process.returncode == 0, log.read()


def test_every_frame_is_forwarded_unchanged(tmp_path: Path) -> None:
    source, target = tmp_path / "source.pcap", tmp_path / "target.pcap"
    frames = [frame(number) for number in range(FRAMES)]
    write_capture(source, frames)
    near, far = (hwsim.add(name, wire="Y") for name in ("near", "far"))
    try:
        forward(forwarder(near.chardev, far.chardev, source, target), far, tmp_path)
        assert read_capture(target) == frames
        assert near.read("stats")["vq1.packets"] == far.read("stats")["vq0.packets"] == str(FRAMES)
        assert [sim.read("state")["fault"] for sim in (near, far)] == ["", ""]
        assert [sim.read("state")["status"] for sim in (near, far)] == ["0x00", "0x00"]
    finally:
        for sim in (near, far):
            hwsim.remove(sim.name)
