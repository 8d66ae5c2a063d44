"""A destination with stub devices, at the other end of a socket from a source that does what a test says."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import signal
import socket
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stub_migration import MEMORY, StubDevice
from waiting import wait_for

from pyvhostvdpa.base.errors import KernelError, MigrationFailed, MigrationRefused, StreamBroken
from pyvhostvdpa.device.net import State
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.shape import ID_BYTES, GuestShape
from pyvhostvdpa.guest.state import GuestState
from pyvhostvdpa.guest.synthetic import KINDS, SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration import destination
from pyvhostvdpa.migration import saved as saved_guests
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.common import hash_bytes
from pyvhostvdpa.migration.destination import Arrived, Destination
from pyvhostvdpa.migration.dirty import PageSet
from pyvhostvdpa.migration.handover import Arriving
from pyvhostvdpa.migration.pages import PageSender
from pyvhostvdpa.migration.stream import Channel, Frame
from pyvhostvdpa.net.features import SUPPORTED, Feature

SPACE = struct.pack("<6sHHH", bytes.fromhex("52540000000a"), 1, 1, 1500).ljust(24, b"\0")
SMALLER_MTU = SPACE[:10] + struct.pack("<H", 1000) + SPACE[12:]
FEATURES = SUPPORTED & ~Feature.RSS & ~Feature.HASH_REPORT
Answer = tuple[Frame, bytes]


class Space:
    """An address space that refuses maps while ``error`` is set."""

    def __init__(self) -> None:
        self.mappings: list[Any] = []
        self.error: KernelError | None = None

    def map(self, iova: int, hva: int, size: int) -> None:
        if self.error is not None:
            raise self.error

    def unmap(self, iova: int, size: int) -> None: ...


class Device(StubDevice):
    """What a destination opens: reset, until it is started."""

    def __init__(self) -> None:
        super().__init__("stub1")
        self.state = State.RESET
        self.features = FEATURES
        self.largest = 256
        self.spaces = [config := SPACE, config]
        """The configuration space when it is opened, and later."""
        self.space = Space()
        limits = SimpleNamespace(first=0, last=(1 << 48) - 1, pinned=None, entries=None, private=False)
        self.iotlb = SimpleNamespace(limits=limits, space=lambda asid: self.space)

    @property
    def groups(self) -> Any:
        return SimpleNamespace(max_pairs=1, control_index=None, config=self.spaces[0])

    def config(self) -> bytes:
        return self.spaces[1]

    def largest_ring(self, queues: Any) -> int:
        return self.largest

    def attach(self, memory: GuestMemory) -> None:
        self._call("attach")

    def stand_by(self, queues: Any, control: Any = None) -> str:
        self._call("stand_by")
        return "stands by"

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class Source:
    """The other end, which has a stopped guest."""

    def __init__(self, channel: Channel, guest: SyntheticGuest, shape: GuestShape) -> None:
        self.channel, self.guest, self.shape = channel, guest, shape

    def ask(self, kind: Frame, payload: bytes = b"") -> Answer:
        """Send a frame and return the answer, past any ALIVE."""
        self.channel.send_frame(kind, payload)
        while (answer := self.channel.expect(*Frame, seconds=30.0))[0] is Frame.ALIVE:
            pass
        return answer

    def offer(self) -> Answer:
        return self.ask(Frame.SHAPE, self.shape.encode())

    def load(self, devices: tuple[int, ...] = (0,), state: bool = True) -> Answer:
        """Send memory and state up to FINAL, and return the answer."""
        assert self.offer()[0] is Frame.ACCEPT
        PageSender(self.guest.memory, self.channel).send(PageSet.all(self.guest.memory))
        guest, [device] = self.guest.state()
        if state:
            self.channel.send_frame(Frame.GUEST, guest.encode())
        for number in devices:
            self.channel.send_frame(Frame.DEVICE, device.encode(), number)
        return self.ask(Frame.FINAL)

    def give(self) -> Answer:
        assert self.load()[0] is Frame.READY
        return self.ask(Frame.GO, bytes(8))


class World:
    """A source's guest, a destination's device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = Device()
        self.memory = GuestMemory([(DEFAULT_GPA, MEMORY)])
        self.guest = SyntheticGuest(self.memory)
        self.guest.add(GuestNic(self.memory, NicOptions(ring_size=16, features=FEATURES)), None)
        shapes = tuple(dataclasses.replace(shape, config=SPACE) for shape in self.guest.shapes())
        memory = tuple((region.gpa, region.size) for region in self.memory.regions)
        self.shape = GuestShape(os.urandom(ID_BYTES), "a test", memory, shapes, hashed=False)
        self.heard: list[Answer] = []
        self.cancel = Cancel()

    def receive(
        self, does: Callable[[Source], Answer | None], observer: Callable[[str], None] = lambda phase: None
    ) -> Arrived[SyntheticGuest]:
        """Let a source do something, and the destination receive what comes of it."""
        near, far = socket.socketpair()

        def run() -> None:
            with Channel(far, stall=30.0) as channel:
                answer = does(Source(channel, self.guest, self.shape))
                if answer is not None:
                    self.heard.append(answer)

        thread = threading.Thread(target=run)
        with Channel(near, self.cancel.fileno(), stall=5.0) as channel:
            thread.start()
            try:
                return Destination(["stub1"], channel, self.cancel, KINDS, folder=self.folder, observer=observer).run()
            finally:
                channel.close()
                thread.join()

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.saved"))

    def close(self) -> None:
        self.cancel.close()
        self.guest.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path)
    monkeypatch.setattr(destination, "VdpaNetDevice", lambda *arguments, **options: made.device)
    yield made
    made.close()


def test_destination_runs_the_guest_after_go(world: World) -> None:
    with world.receive(Source.give) as arrived:
        assert [kind for kind, _ in world.heard] == [Frame.RUNNING]
        assert arrived.guest.traffic[0].running
        assert world.device.state is State.PASSTHROUGH
    assert not world.files()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": FEATURES & ~Feature.MTU}, "lacks features that the guest uses"),
        ({"largest": 8}, "queue pairs of at most 8, the guest uses 1 of 16"),
        ({"spaces": [SMALLER_MTU, SPACE]}, "MTU is 1000"),
    ],
)
def test_shape_that_does_not_fit_is_refused_before_memory(world: World, change: dict[str, Any], words: str) -> None:
    for name, value in change.items():
        setattr(world.device, name, value)
    with pytest.raises(MigrationRefused, match=words):
        world.receive(Source.offer)
    [(kind, said)] = world.heard
    assert kind is Frame.REFUSE
    assert words in said.decode()
    assert world.device.calls == []


def test_device_that_did_not_take_its_maps_is_refused(world: World) -> None:
    world.device.space.error = KernelError(12, "VHOST_IOTLB_UPDATE", "")
    with pytest.raises(MigrationRefused, match="VHOST_IOTLB_UPDATE"):
        world.receive(Source.offer)
    assert [kind for kind, _ in world.heard] == [Frame.REFUSE]


LIMITS = [OSError(errno.EMFILE, "Too many open files"), MemoryError("no room")]


def failing(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", LIMITS)
def test_limit_that_is_met_before_memory_moves_is_reported_and_refuses_the_guest(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The listener continues after a refusal: another source may need less, and strangers may have left meanwhile."""
    monkeypatch.setattr(destination, "GuestMemory", failing(error))
    with pytest.raises(MigrationRefused, match=f"{error}; nothing of the guest is left here".replace("[", "\\[")):
        world.receive(Source.offer)
    [(kind, said)] = world.heard
    assert kind is Frame.REFUSE
    assert str(error) in said.decode()


@pytest.mark.parametrize("error", LIMITS)
def test_limit_that_is_met_while_state_is_loaded_gives_the_guest_back(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(SyntheticGuest, "restore", failing(error))
    with pytest.raises(MigrationFailed, match="nothing of the guest is left here, the source has it"):
        world.receive(Source.load)
    [(kind, said)] = world.heard
    assert kind is Frame.FAILED
    assert str(error) in said.decode()


def test_device_whose_configuration_changed_meanwhile_gives_the_guest_back(world: World) -> None:
    world.device.spaces[1] = SMALLER_MTU
    with pytest.raises(MigrationFailed, match="MTU is 1000"):
        world.receive(Source.load)
    assert [kind for kind, _ in world.heard] == [Frame.FAILED]


@pytest.mark.parametrize("hashed", [True, False])
def test_ready_has_the_hash_of_memory_if_it_was_asked_for(world: World, hashed: bool) -> None:
    world.shape = dataclasses.replace(world.shape, hashed=hashed)
    with pytest.raises(MigrationFailed, match="saved in"):
        world.receive(Source.load)
    assert world.heard == [(Frame.READY, hash_bytes(world.memory) if hashed else b"")]


@pytest.mark.parametrize(
    ("devices", "state", "words"),
    [
        ((0,), False, "the state of the guest is missing"),
        ((), True, "0 devices, the SHAPE section has 1"),
        ((1,), True, "a DEVICE frame in the middle"),
        ((0, 1), True, "a DEVICE frame in the middle"),
    ],
)
def test_incomplete_state_is_never_ready(world: World, devices: tuple[int, ...], state: bool, words: str) -> None:
    def send(source: Source) -> Answer:
        return source.load(devices, state)

    with pytest.raises(MigrationFailed, match=f"{words}.*the source has it"):
        world.receive(send)
    assert [kind for kind, _ in world.heard] == [Frame.FAILED]
    assert not world.files()


def test_stream_that_breaks_between_ready_and_go_saves_the_guest(world: World) -> None:
    with pytest.raises(MigrationFailed, match="it must run on one side only") as failed:
        world.receive(Source.load)
    [path] = world.files()
    assert f"vhost-vdpa receive --take {path} stub1" in failed.value.hint
    assert "start_passthrough" not in world.device.calls


def unread(channel: Channel) -> int:
    """Return the bytes that the other end has not read (unix(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(channel.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def test_guest_that_is_saved_is_the_one_that_was_loaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the source has sent another state of it before the one that is taken in one go."""
    now = world.guest.outline()[0].encode()
    state, [rest] = world.guest.rest()
    assert isinstance(state, GuestState)
    earlier = dataclasses.replace(state, clock=state.clock - 1)

    def send(source: Source) -> None:
        assert source.offer()[0] is Frame.ACCEPT
        source.channel.send_frame(Frame.STAND_BY, now)
        PageSender(source.guest.memory, source.channel).send(PageSet.all(source.guest.memory))
        source.channel.send_frame(Frame.GUEST, earlier.encode())
        # what arrives with a GUEST frame is read with it, and taken step by step
        wait_for(lambda: not unread(source.channel))
        source.channel.send_frame(Frame.ROUND, bytes(8))
        together = [(Frame.GUEST, state.encode(), 0), (Frame.REST, rest.encode(), 0), (Frame.FINAL, b"", 0)]
        source.channel.send_frames(*together)
        assert source.channel.expect(Frame.READY, Frame.ALIVE, seconds=30.0)[0] is Frame.READY

    taken: list[bool] = []

    def run(arriving: Arriving) -> None:
        before(arriving)
        taken.append(arriving.taken)

    before = Arriving.run
    monkeypatch.setattr(Arriving, "run", run)
    with pytest.raises(MigrationFailed, match="saved in"):
        world.receive(send)
    assert taken == [True]
    [path] = world.files()
    saved, memory = saved_guests.load(path, KINDS)
    memory.close()
    assert saved.guest == state


def test_source_that_cancels_between_ready_and_go_keeps_its_guest(world: World) -> None:
    def cancel(source: Source) -> None:
        assert source.load()[0] is Frame.READY
        source.channel.send_text(Frame.CANCEL, "changed its mind")

    with pytest.raises(MigrationFailed, match="the source says: changed its mind"):
        world.receive(cancel)
    assert "start_passthrough" not in world.device.calls
    assert not world.files()


@pytest.mark.parametrize("error", [KernelError(5, "VHOST_VDPA_SET_STATUS", ""), MemoryError()])
def test_failed_start_resets_the_devices_and_gives_the_guest_back(world: World, error: Exception) -> None:
    world.device.failures["start_passthrough"] = [error]
    with pytest.raises(MigrationFailed, match="it does not run here, the source has it"):
        world.receive(Source.give)
    assert [kind for kind, _ in world.heard] == [Frame.FAILED]
    assert world.device.calls[-2:] == ["start_passthrough", "reset"]


def test_destination_that_was_stopped_for_too_long_saves_the_guest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = SimpleNamespace(left=30.0, passed=True)
    monkeypatch.setattr(destination, "Fence", lambda seconds, margins: passed)
    with pytest.raises(MigrationFailed, match="so late that the source may have been started again"):
        world.receive(_given_up_by_the_destination)
    assert len(world.files()) == 1
    assert "start_passthrough" not in world.device.calls


def _given_up_by_the_destination(source: Source) -> None:
    with pytest.raises(StreamBroken):
        source.give()


@pytest.fixture
def former() -> Iterator[list[int]]:
    """Signals that had their former effect."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGINT, before)


def test_interrupts_after_go_are_too_late(world: World, former: list[int]) -> None:
    def interrupt(phase: str) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with world.cancel.on_signals(), world.receive(Source.give, interrupt):
        assert [kind for kind, _ in world.heard] == [Frame.RUNNING]
    assert former == []
