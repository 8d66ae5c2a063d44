"""A source that means harm, or is broken: the destination refuses it by name, and is as before."""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peers import Failed, Peer

from pyvhostvdpa import VhostVdpa
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.shape import DeviceShape, GuestShape
from pyvhostvdpa.guest.state import DeviceState, GuestState
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration.pages import stream_sum
from pyvhostvdpa.migration.stream import HEADER, PAGES, ZERO, Channel, Frame
from pyvhostvdpa.net.features import SUPPORTED, Feature

SIZE = 4 << 20
SHAPE = GuestShape(
    id=bytes(16),
    source="nobody",
    memory=((DEFAULT_GPA, SIZE),),
    devices=(DeviceShape(int(SUPPORTED), 1, 64, None),),
    hashed=False,
)


def raw(kind: int, count: int, payload: bytes, wrong: int = 0) -> bytes:
    return HEADER.pack(kind, count, len(payload), stream_sum(payload) ^ wrong) + payload


def page(gpa: int, wrong: int = 0) -> bytes:
    return raw(PAGES, 1, struct.pack("<QQ", gpa, 4096) + bytes(range(256)) * 16, wrong)


def control(kind: Frame, payload: bytes = b"", count: int = 0) -> bytes:
    return raw(kind, count, payload)


@pytest.fixture(scope="module")
def state() -> Iterator[DeviceState]:
    """What a source would say of a NIC just started, whose memory never arrives."""
    with GuestMemory([(DEFAULT_GPA, SIZE)]) as memory:
        guest = SyntheticGuest(memory)
        guest.add(GuestNic(memory, NicOptions(ring_size=64, features=SUPPORTED)), None)
        yield guest.state()[1][0]
        guest.detach()


GUEST = control(Frame.GUEST, GuestState(0).encode())
FINAL = control(Frame.FINAL)


def device(state: DeviceState, count: int = 0) -> bytes:
    return control(Frame.DEVICE, state.encode(), count)


def outside(state: DeviceState) -> DeviceState:
    [pair] = state.nic.pairs
    moved = dataclasses.replace(pair, rx_gpa=1 << 50)
    return dataclasses.replace(state, nic=dataclasses.replace(state.nic, pairs=(moved,)))


def other_features(state: DeviceState) -> DeviceState:
    queues = tuple(dataclasses.replace(queue, used=0, avail=0, heads=()) for queue in state.queues)
    nic = dataclasses.replace(state.nic, features=int(SUPPORTED & ~Feature.MTU))
    return dataclasses.replace(state, queues=queues, nic=nic)


Attack = Callable[[DeviceState], bytes]
ATTACKS: dict[str, tuple[Attack, str]] = {
    "a page outside memory": (lambda s: page(1 << 50), "refused"),
    "a page that is half outside": (lambda s: page(DEFAULT_GPA + SIZE - 2048), "refused"),
    "a page with a wrong sum": (lambda s: page(DEFAULT_GPA, wrong=1), "its checksum is wrong"),
    "zeros without end": (lambda s: raw(ZERO, 1, struct.pack("<QQ", DEFAULT_GPA, 1 << 60)), "refused"),
    "more runs than bytes": (lambda s: raw(PAGES, 1 << 30, bytes(64)), "refused"),
    "a frame of no type": (lambda s: raw(0x66, 0, b""), "unknown frame type 0x66"),
    "a frame of 16 EiB": (lambda s: HEADER.pack(PAGES, 1, (1 << 64) - 1, 0), "8388608 are possible"),
    "junk for a device": (lambda s: control(Frame.DEVICE, b"junk" * 9), "state of a device"),
    "a device that does not exist": (lambda s: device(s, 5), "a DEVICE frame in the middle"),
    "a device twice": (lambda s: device(s) + device(s, 1), "a DEVICE frame in the middle"),
    "an end without a guest": (lambda s: FINAL, "the state of the guest is missing"),
    "an end without a device": (lambda s: GUEST + FINAL, "0 devices, the SHAPE section has 1"),
    "buffers outside memory": (lambda s: GUEST + device(outside(s)) + FINAL, "is not guest memory"),
    "memory of another guest": (lambda s: GUEST + device(s) + FINAL, "the source left used 0, avail 64"),
    "other features": (
        lambda s: GUEST + device(other_features(s)) + FINAL,
        "device 0 does not match the SHAPE section: features",
    ),
    "GO out of turn": (lambda s: control(Frame.GO, bytes(8)), "a GO frame in the middle of memory and state"),
    "a round of no size": (lambda s: control(Frame.ROUND, b"123"), "a ROUND frame in the middle"),
}


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer("right", tmp_path)
    yield peer
    peer.kill()


def attack(peer: Peer, path: str, *frames: bytes) -> Failed:
    """Be a source up to ACCEPT, then send these; how the destination took it."""
    ours, theirs = socket.socketpair()
    with Channel(ours, stall=20.0) as channel:
        with theirs:
            peer.ask("receive", [path], "", None, fd=theirs.fileno())
        channel.send_frame(Frame.SHAPE, SHAPE.encode())
        while channel.expect(Frame.ALIVE, Frame.ACCEPT)[0] is not Frame.ACCEPT:
            pass
        for data in frames:
            channel.send(data)
        said = channel.last_words()
    with pytest.raises(Failed) as failed:
        peer.result()
    assert said in failed.value.message
    return failed.value


def test_every_attack_is_refused_by_name(
    devices: tuple[str, str], peer: Peer, state: DeviceState, tmp_path: Path
) -> None:
    before, mapped = peer.call("resources"), peer.call("mappings")
    for name, (frames, words) in ATTACKS.items():
        refused = attack(peer, devices[0], frames(state))
        assert words in refused.message, name
        assert "nothing of the guest is left here" in refused.message, name
        assert peer.call("resources") == before, name
        assert peer.call("mappings") == mapped, name
    assert not list(tmp_path.iterdir())
    with VhostVdpa(devices[0]) as dev:
        assert dev.get_status() == 0
