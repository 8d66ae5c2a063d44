"""A guest that is memory and rings only goes through a source, a destination and a file: nothing else is assumed."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from raw_guest import KINDS, RawGuest, Rings
from stub_migration import StubDevice
from test_destination import Device

from pyvhostvdpa.base.errors import MigrationFailed, MigrationRefused, StreamCorrupt, VhostVdpaError
from pyvhostvdpa.device.net import State
from pyvhostvdpa.guest import synthetic
from pyvhostvdpa.guest.arena import GuestArena, place_queue
from pyvhostvdpa.guest.codec import Writer
from pyvhostvdpa.guest.shape import SECTION, GuestShape
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, PAGE_SIZE, GuestMemory
from pyvhostvdpa.migration import destination, from_file
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.destination import Arrived, Destination
from pyvhostvdpa.migration.dirty import DirtyTracker
from pyvhostvdpa.migration.folder import Claim
from pyvhostvdpa.migration.from_file import start_saved
from pyvhostvdpa.migration.saved import SavedGuest, load, save
from pyvhostvdpa.migration.source import SendOptions, Source
from pyvhostvdpa.migration.stream import Channel
from pyvhostvdpa.net.features import SUPPORTED

LAYOUT = [(DEFAULT_GPA, 1 << 18), (DEFAULT_GPA + (1 << 21), 1 << 17)]
"""Two regions with a hole."""
DEVICES = 2


def raw_guest() -> RawGuest:
    memory = GuestMemory(LAYOUT)
    arena = GuestArena(memory)
    queues = [[place_queue(arena, index, 16) for index in range(2)] for _ in range(DEVICES)]
    with memory.regions[1].memory.buffer as buffer:
        buffer[:5] = b"hello"
    return RawGuest(memory, SUPPORTED, queues)


class World:
    """Both sides, each with two stub devices, and a raw guest on the source."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.guest = folder, raw_guest()
        self.here = [StubDevice(f"here{number}") for number in range(DEVICES)]
        self.there = [Device() for _ in range(DEVICES)]
        self.opened = iter(self.there)
        self.arrived: Arrived[Any] | None = None
        self.refused: VhostVdpaError | None = None

    def migrate(self, kinds: Any = KINDS, observer: Callable[[str], None] = lambda phase: None) -> None:
        near, far = socket.socketpair()
        with Cancel() as cancel, Channel(near, cancel.fileno(), stall=5.0) as channel:
            thread = threading.Thread(target=self._receive, args=(far, kinds))
            thread.start()
            options = SendOptions(folder=self.folder)
            try:
                Source(self.guest, self.here, channel, cancel, options, observer).run()  # type: ignore[arg-type]
            finally:
                channel.close()
                thread.join()

    def _receive(self, far: socket.socket, kinds: Any) -> None:
        with Cancel() as cancel, Channel(far, stall=5.0) as channel:
            try:
                paths = [f"there{number}" for number in range(DEVICES)]
                self.arrived = Destination(paths, channel, cancel, kinds, folder=self.folder).run()
            except VhostVdpaError as e:
                self.refused = e

    def close(self) -> None:
        if self.arrived is not None:
            self.arrived.close()
        self.guest.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path)
    for module in (destination, from_file):
        monkeypatch.setattr(module, "VdpaNetDevice", lambda *arguments, **options: next(made.opened))
    yield made
    made.close()


def content(memory: GuestMemory) -> list[bytes]:
    return [bytes(region.memory.buffer) for region in memory.regions]


def test_guest_of_memory_and_rings_arrives_whole_and_runs_there(world: World) -> None:
    world.migrate()
    assert world.arrived is not None
    arrived = world.arrived.guest
    assert isinstance(arrived, RawGuest)
    assert content(arrived.memory) == content(world.guest.memory)
    assert arrived._rings() == world.guest._rings()
    assert [device.state for device in world.there] == [State.PASSTHROUGH] * DEVICES
    assert [device.state for device in world.here] == [State.RESET] * DEVICES


def test_guest_that_only_its_owner_can_pause_stays_until_it_is_paused(world: World) -> None:
    world.guest.running = True
    with pytest.raises(MigrationRefused, match="only its owner can pause it; the guest continues in passthrough"):
        world.migrate()
    assert [device.state for device in world.here] == [State.PASSTHROUGH] * DEVICES
    assert world.arrived is None


def test_guest_that_its_owner_pauses_in_time_moves(world: World) -> None:
    world.guest.running = True

    def pause(phase: str) -> None:
        if phase == "stop":
            world.guest.running = False

    world.migrate(observer=pause)
    assert world.arrived is not None


def test_guest_that_cannot_be_paused_between_rounds_is_refused_where_it_would_have_to_be(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirtyTracker, "atomic", property(lambda tracker: False))
    with pytest.raises(MigrationRefused, match="only while the guest is paused"):
        world.migrate()
    assert all(device.calls == [] for device in world.here)


def test_running_guest_whose_devices_fail_is_reported_as_not_saved(world: World) -> None:
    world.guest.running = True
    failed = OSError(5, "Input/output error")
    world.here[0].failures = {"start_shadow": [failed], "start_passthrough": [failed]}
    with pytest.raises(MigrationFailed, match="still runs, without its devices") as raised:
        world.migrate()
    assert raised.value.hint == "pause it there"
    assert not list(world.folder.glob("*.saved"))


def test_guest_of_an_unknown_kind_is_refused_before_memory(world: World) -> None:
    with pytest.raises(MigrationRefused, match="of kind 'raw'; this side can run: synthetic"):
        world.migrate(synthetic.KINDS)
    assert isinstance(world.refused, MigrationRefused)
    assert all(device.calls == [] for device in (*world.here, *world.there))


def saved(world: World, role: str = "source", number: int = 0) -> Path:
    guest, devices = world.guest.state()
    memory = tuple((region.gpa, region.size) for region in world.guest.memory.regions)
    shape = GuestShape(bytes([number] * 16), "here", memory, world.guest.shapes(), False, world.guest.kind)
    return save(world.folder, role, SavedGuest(shape, guest, tuple(devices)), world.guest.memory)


def test_saved_guest_of_memory_and_rings_starts_from_its_file(world: World) -> None:
    path = saved(world)
    with start_saved(path, ["there0", "there1"], KINDS) as arrived:
        assert content(arrived.guest.memory) == content(world.guest.memory)
        assert [device.state for device in world.there] == [State.PASSTHROUGH] * DEVICES
    assert not path.exists()


def test_guest_that_both_sides_have_saved_is_started_once(world: World) -> None:
    """The two files may be in one folder, and each is whole: the second start would give it two owners."""
    path, other, stranger = saved(world), saved(world, "destination"), saved(world, number=1)
    (world.folder / "odd.saved").mkdir()
    with start_saved(path, ["there0", "there1"], KINDS) as arrived:
        assert f"saved as well in {other}, which is out of date now: rm {other.with_suffix('.stale')}" in arrived.note
    assert not path.exists()
    assert stranger.exists()
    with pytest.raises(MigrationRefused, match="No such file"):
        start_saved(other, ["there0", "there1"], KINDS)


def test_guest_is_started_from_one_of_its_files_at_a_time(world: World) -> None:
    path, other = saved(world), saved(world, "destination")
    with Claim(other), pytest.raises(MigrationRefused, match=f"both sides have saved this guest: {other} is in use"):
        start_saved(path, ["there0", "there1"], KINDS)
    assert all(device.calls == [] for device in world.there)
    assert path.exists()
    start_saved(path, ["there0", "there1"], KINDS).close()


def test_saved_guest_of_an_unknown_kind_stays_in_its_file(world: World) -> None:
    path = saved(world)
    with pytest.raises(MigrationRefused, match="of kind 'raw'; this side can run: synthetic"):
        load(path, synthetic.KINDS)
    assert path.exists()


def test_rings_that_are_not_in_memory_are_a_corrupt_stream_and_start_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first, second] = world.guest._rings()
    away = Rings(first.features, tuple((num, 1 << 50, avail, used) for num, _, avail, used in first.places), first.at)
    monkeypatch.setattr(RawGuest, "_rings", lambda guest: [away, second])
    with pytest.raises(MigrationFailed, match="the destination says: rings: "):
        world.migrate()
    assert isinstance(world.refused, MigrationFailed)
    assert isinstance(world.refused.__cause__, StreamCorrupt)
    assert not any("start_passthrough" in device.calls for device in world.there)


# -- SHAPE -------------------------------------------------------------------------------


def test_shape_names_the_kind_of_guest() -> None:
    shape = GuestShape(bytes(16), "here", ((DEFAULT_GPA, PAGE_SIZE),), raw_shapes(), False, "raw")
    assert GuestShape.decode(shape.encode()).kind == "raw"


@pytest.mark.parametrize("version", [1, 2])
def test_shape_before_version_3_is_of_a_synthetic_guest(version: int) -> None:
    w = Writer()
    w.put("16s", bytes(16))
    w.text("here")
    w.put("I", PAGE_SIZE)
    w.each([(DEFAULT_GPA, PAGE_SIZE)], lambda region: w.put("QQ", *region))
    w.each(raw_shapes(), lambda d: w.put("QIIH", d.features, d.pairs, d.ring_size, 0xFFFF))
    w.put("B", 0)
    if version == 2:
        w.put("B", 0)
    assert GuestShape.decode(w.section(SECTION, version)).kind == SyntheticGuest.kind


@pytest.mark.parametrize("kind", [b"\xff", b"a\nb", b"k" * 33])
def test_kind_that_cannot_be_a_name_is_a_corrupt_stream(kind: bytes) -> None:
    good = GuestShape(bytes(16), "here", ((DEFAULT_GPA, PAGE_SIZE),), raw_shapes(), False, "").encode()
    body = good[8:-4] + struct.pack("<I", len(kind)) + kind
    with pytest.raises(StreamCorrupt, match="kind"):
        GuestShape.decode(struct.pack("<HHI", SECTION, 3, len(body)) + body)


def raw_shapes() -> tuple[Any, ...]:
    return (Rings(int(SUPPORTED), ((16, 0, 0, 0), (16, 0, 0, 0)), ((0, 0), (0, 0))).shape,)
