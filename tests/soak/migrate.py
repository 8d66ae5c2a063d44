# lab: --devices vdpa_sim_net:2 --memory 4G
"""Migrations back and forth for as long as asked, some of them interrupted."""

from __future__ import annotations

import os
import random
import signal
import time

from pyvhostvdpa import GuestOptions, MigrationCancelled, MigrationOptions, migrate
from pyvhostvdpa.memory.pinned import pinned_bytes

DEVICES = ("/dev/vhost-vdpa-0", "/dev/vhost-vdpa-1")
PARTS = (
    *("start", "passthrough", "connect", "handshake", "switch", "shadow", "memory", "stop", "state", "ready", "go"),
    *("running", "destination"),
)
MINUTES = float(os.environ.get("PYVHOSTVDPA_SOAK_MINUTES", "10"))


def migrate_once(number: int, chance: random.Random) -> int:
    source, destination = DEVICES if number % 2 else DEVICES[::-1]
    stop_at = chance.choice(PARTS) if chance.random() < 0.3 else None

    def observe(part: str) -> None:
        if part == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    guest = GuestOptions(64 << 20, ring_size=chance.choice([16, 64, 256]), write_rate=chance.choice([0, 1 << 20]))
    try:
        report = migrate(source, destination, MigrationOptions(guest, seconds=1.5), observe)
    except KeyboardInterrupt:
        return 0
    except MigrationCancelled as e:
        report = e.report
    frames = report.frames
    assert report.bad_pages == 0
    assert (frames.lost, frames.duplicated, frames.corrupted, frames.reordered) == (0, 0, 0, 0)
    return frames.received


def test_migrations_one_after_the_other() -> None:
    seed = int(os.environ.get("PYVHOSTVDPA_SOAK_SEED", str(time.time_ns() % 1_000_000)))
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    end = time.monotonic() + MINUTES * 60
    descriptors, number, frames = len(os.listdir("/proc/self/fd")), 0, 0
    while time.monotonic() < end or number == 0:
        frames += migrate_once(number, chance)
        number += 1
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert pinned_bytes() == 0
        if number % 20 == 0:
            print(f"{number} migrations, {frames} frames", flush=True)
    print(f"{number} migrations, {frames} frames, none lost", flush=True)
