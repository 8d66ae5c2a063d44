# lab: --devices vdpa_hwsim:2 --memory 2G
"""Migrations back and forth between two processes, traffic and a CPU that writes memory all the time."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

from world import World

from pyvhostvdpa.guest.synthetic import GuestOptions

DEVICES = ("/dev/vhost-vdpa-0", "/dev/vhost-vdpa-1")
MIGRATIONS = int(os.environ.get("PYVHOSTVDPA_SOAK_MIGRATIONS", "200"))
GUEST = GuestOptions(memory=16 << 20, ring_size=64, frame_size=128, write_rate=2 << 20)
LIMIT, DOWNTIME = 4 << 20, 0.3
"""The stream takes twice what the guest's CPU writes, and less than a busy machine moves: so it is not the machine that
decides. The CPU writes a quarter of memory, which takes the stream 1 s; what it writes meanwhile takes 0.5 s, more than
the downtime, and from then on half as long each round, beside the NIC's buffers."""


def test_back_and_forth(tmp_path: Path) -> None:
    begin, rounds, hashes = time.monotonic(), [], set()
    world = World([DEVICES[0]], [DEVICES[1]], tmp_path, GUEST, DOWNTIME)
    try:
        # the guest's CPU has written all of its memory once by then
        time.sleep(GUEST.memory / 2 / GUEST.write_rate)
        for number in range(1, MIGRATIONS + 1):
            report = world.migrates(LIMIT)
            rounds.append(report["rounds"])
            hashes.add(report["hash"])
            world.lives()
            if number % 20 == 0:
                world.is_sound()
                taken = time.monotonic() - begin
                print(f"{number} migrations, {sum(rounds)} rounds, {taken:.0f} s, nothing lost", flush=True)
        received = world.here.call("receives", 100)
        world.is_sound()
        assert not world.files()
    finally:
        world.close()
    assert len(hashes) == MIGRATIONS, "memory did not change between two migrations"
    assert min(rounds) >= 3, "the guest wrote too little for several rounds"
    print(
        f"{MIGRATIONS} migrations, {min(rounds)} to {max(rounds)} rounds, {statistics.mean(rounds):.1f} on average; "
        f"memory identical by hash each time; {received:,} frames, 0 lost, duplicated or corrupted; "
        f"no page other than written",
        flush=True,
    )
