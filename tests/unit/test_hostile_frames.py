"""Frames of a source that means harm, in any order and cut anywhere: refused in words, or the guest runs."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_destination import Source, World

from pyvhostvdpa.base.errors import MigrationEnded, MissingFeature, StreamBroken
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.migration import destination, fence
from pyvhostvdpa.migration import stream as stream_module
from pyvhostvdpa.migration.pages import PAGES, ZERO, FrameHeader, PageSender, PageSet, stream_sum
from pyvhostvdpa.migration.stream import HEADER, Channel, Frame

INPUTS = int(os.environ.get("PYVHOSTVDPA_FUZZ_INPUTS", "150"))
MOST_MEMORY = 64 << 20
"""Of a SHAPE: more would be had, and cost this machine."""
_TYPES = (*(int(kind) for kind in Frame), PAGES, ZERO, 0, 0xFFFF)
_COUNTS = (0, 1, 2, 255, 1 << 31, (1 << 32) - 1)
_LENGTHS = (0, 1, 1 << 20, 1 << 63, (1 << 64) - 1)

Frames = list[tuple[FrameHeader, bytes]]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A destination that does not wait for its peer."""
    made = World(tmp_path)
    monkeypatch.setattr(destination, "VdpaNetDevice", lambda *arguments, **options: made.device)
    monkeypatch.setattr(destination, "patience", lambda shape: 0.05)
    monkeypatch.setattr(fence, "MARGIN", 0.01)
    monkeypatch.setattr(stream_module, "_LAST_WORDS_SECONDS", 0.05)
    monkeypatch.setattr(destination, "GuestMemory", little_memory)
    yield made
    made.close()


def little_memory(regions: Any, *more: Any) -> GuestMemory:
    if sum(size for _, size in regions) > MOST_MEMORY:
        raise MissingFeature("more memory than a test may have")
    return GuestMemory(regions, *more)


def honest(world: World) -> Frames:
    """Return what a source sends when no peer answers it."""
    found: Frames = []

    def send(source: Source) -> None:
        own, devices = source.guest.state()
        with suppress(StreamBroken):
            source.channel.send_frame(Frame.SHAPE, source.shape.encode())
            for number, outline in enumerate(source.guest.outline()):
                source.channel.send_frame(Frame.STAND_BY, outline.encode(), number)
            PageSender(source.guest.memory, source.channel).send(PageSet.all(source.guest.memory))
            source.channel.send_frame(Frame.GUEST, own.encode())
            for number, device in enumerate(devices):
                source.channel.send_frame(Frame.DEVICE, device.encode(), number)
            source.channel.send_frame(Frame.FINAL)
            source.channel.send_frame(Frame.GO, bytes(8))

    near, far = stream_module.socket.socketpair()
    with Channel(near) as channel, Channel(far) as other:
        thread = threading.Thread(target=lambda: send(Source(other, world.guest, world.shape)))
        thread.start()
        while not found or found[-1][0].type != Frame.GO:
            header = channel.receive_header()
            payload = bytearray(header.length)
            channel.receive_into(payload)
            found.append((header, bytes(payload)))
        thread.join()
    return found


def harmed(frames: Frames, chance: random.Random) -> bytes:
    """Return the frames as bytes, some of them lost, doubled, exchanged, of another kind, changed or cut."""
    frames = list(frames)
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        at = chance.randrange(len(frames))
        header, payload = frames[at]
        way = chance.randrange(8)
        if way == 0 and len(frames) > 1:
            frames.pop(at)
        elif way == 1:
            frames.insert(chance.randrange(len(frames) + 1), frames[at])
        elif way == 2:
            other = chance.randrange(len(frames))
            frames[at], frames[other] = frames[other], frames[at]
        elif way == 3:
            payload = changed(payload, chance)
            frames[at] = FrameHeader(header.type, header.count, len(payload), stream_sum(payload)), payload
        elif way == 4:
            del frames[at + 1 :]
        else:
            fields = [header.type, header.count, header.length, header.sum]
            values = (chance.choice(_TYPES), chance.choice(_COUNTS), chance.choice(_LENGTHS), chance.getrandbits(64))
            which = chance.randrange(4)
            fields[which] = values[which]
            frames[at] = FrameHeader(*fields), payload
    data = b"".join(HEADER.pack(h.type, h.count, h.length, h.sum) + payload for h, payload in frames)
    return data[: chance.randrange(len(data) + 1)] if chance.random() < 0.2 else data


def changed(payload: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return payload[: chance.randrange(len(payload) + 1)]
    data = bytearray(payload)
    for _ in range(chance.randrange(1, 4) if data else 0):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def test_destination_reports_an_error_or_runs_the_guest_on_any_frames(world: World) -> None:
    frames, chance = honest(world), random.Random(1)
    ends: set[str] = set()
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(INPUTS):
        data = b"".join(HEADER.pack(h.type, h.count, h.length, h.sum) + p for h, p in frames)
        data = harmed(frames, chance) if number else data

        def send(source: Source, data: bytes = data) -> None:
            with suppress(StreamBroken):
                source.channel.send(data)
                while True:
                    source.channel.receive_into(bytearray(1), 0.5)

        try:
            world.receive(send).close()
            ends.add("runs")
        except MigrationEnded as e:
            ends.add(type(e).__name__)
        assert len(os.listdir("/proc/self/fd")) == descriptors, f"input {number}"
        assert threading.active_count() <= 3, f"input {number}"
        for path in world.files():
            path.unlink()
        if number == 0:
            assert ends == {"runs"}
    assert {"runs", "MigrationFailed", "Stray"} <= ends
