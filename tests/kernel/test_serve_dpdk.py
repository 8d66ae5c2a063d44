"""DPDK's testpmd in front of ``vhost-vdpa serve``: its virtio_user driver speaks vhost-user, with orders of its own."""

from __future__ import annotations

from pathlib import Path

import hwsim
from machine import Serve
from test_hwsim_dpdk import FRAMES, forward, forwarder, frame, read_capture, write_capture


def test_every_frame_is_forwarded_unchanged(tmp_path: Path) -> None:
    source, target = tmp_path / "source.pcap", tmp_path / "target.pcap"
    frames = [frame(number) for number in range(FRAMES)]
    write_capture(source, frames)
    near, far = (hwsim.add(name, wire="Y") for name in ("near", "far"))
    servers = []
    try:
        servers = [Serve(sim.chardev, tmp_path) for sim in (near, far)]
        forward(forwarder(servers[0].path, servers[1].path, source, target), far, tmp_path)
        assert read_capture(target) == frames
        for server in servers:
            assert server.status()["failed"] is None
            assert "refused" not in [each["event"] for each in server.end()]
    finally:
        for server in servers:
            server.close()
        for sim in (near, far):
            hwsim.remove(sim.name)
