"""The exchange in one go: it does what the steps do one by one, and leaves to them whatever is anything else."""

from __future__ import annotations

import gc
import os
import random
import select
import socket
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from test_rest import World

from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.errors import MigrationCancelled, StreamBroken, StreamCorrupt
from pyvhostvdpa.guest.rest import DeviceRest, DriverRest
from pyvhostvdpa.guest.state import GuestState
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.migration import handover
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.fence import Fence
from pyvhostvdpa.migration.handover import Arriving, Leaving
from pyvhostvdpa.migration.stream import HEADER, Channel, Frame, encoded
from pyvhostvdpa.trace import gap
from pyvhostvdpa.trace.recorder import Trace

GO = bytes(8)


class Exchange:
    """A stopped guest at one end, and at the other what expects it."""

    def __init__(self) -> None:
        self.world = World()
        self.near, self.far = socket.socketpair()
        self.cancels = Cancel(), Cancel()
        self.here, self.there = (
            Channel(end, cancel.fileno(), stall=5.0)
            for end, cancel in zip((self.near, self.far), self.cancels, strict=True)
        )
        self.trace = Trace()
        self.job = ffi.new("struct device_job *")
        self.config = ffi.new("uint8_t[]", b"mtu"), ffi.new("uint8_t[]", b"mtu")
        self.leaving, self.arriving = self.leave(), self.arrive()

    def leave(self) -> Leaving:
        sections = self.world.guest.sections()
        assert sections is not None
        return Leaving(self.here, sections, self.trace.device("here"))

    def arrive(self) -> Arriving:
        sections = self.world.expected.sections()
        assert sections is not None
        look: Any = SimpleNamespace(fill=self._fill, settle=lambda: None)
        return Arriving(self.there, sections, [look], self.trace.device("there"))

    def _fill(self, answer: Any) -> None:
        answer.job = self.job
        answer.found, answer.expected = self.config
        answer.length = 3

    @property
    def frames(self) -> bytes:
        """The state as it goes step by step."""
        own, rests = self.world.guest.rest()
        each = [(Frame.REST, rest.encode(), number) for number, rest in enumerate(rests)]
        frames = [(Frame.GUEST, own.encode(), 0), *each, (Frame.FINAL, b"", 0)]
        return b"".join(encoded(*frame) for frame in frames)

    def waiting(self) -> bytes:
        """What the destination has not taken."""
        return self.far.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT) if self.there.readable() else b""

    def arrived(self) -> bool:
        here, there = self.world.guest.state(), self.world.expected.state()
        return there[1] == here[1] and there[0].writer_written == here[0].writer_written

    def close(self) -> None:
        for each in (self.here, self.there, *self.cancels):
            each.close()
        self.world.close()


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    made = Exchange()
    yield made
    made.close()


def without_clock(frames: bytes) -> bytes:
    """Of GUEST the sum is left out, and the clock behind the section's head."""
    return frames[:16] + frames[24 : HEADER.size + 8] + frames[HEADER.size + 16 :]


def test_whole_exchange_in_one_go(exchange: Exchange) -> None:
    fence = Fence(5.0, 0)
    assert exchange.leaving.send()
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    answer = []
    other = threading.Thread(target=lambda: (exchange.arriving.run(), answer.append(exchange.arriving.go(fence))))
    other.start()
    assert exchange.leaving.await_ready()
    giving = threading.Thread(target=exchange.leaving.give)
    giving.start()
    other.join()
    exchange.there.send_frame(Frame.RUNNING)
    giving.join()
    assert exchange.here.expect(Frame.RUNNING) == (Frame.RUNNING, b"")
    [(kind, payload)] = answer
    assert kind is Frame.GO
    assert 0 < int.from_bytes(payload, "little") <= exchange.arriving.go_at
    assert exchange.arrived()
    exchange.leaving.record()
    exchange.arriving.record()
    assert {event.phase for event in exchange.trace.events} == {gap.STATE, gap.LOAD, gap.HAND_OVER}


def test_state_goes_as_it_does_step_by_step(exchange: Exchange) -> None:
    expected = exchange.frames
    assert exchange.leaving.send()
    assert without_clock(exchange.waiting()) == without_clock(expected)


def test_state_that_was_sent_step_by_step_is_taken_in_one_go(exchange: Exchange) -> None:
    exchange.here.send(exchange.frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    exchange.here.send(encoded(Frame.GO, GO, 0))
    exchange.arriving.run()
    assert exchange.arriving.go(Fence(5.0, 0)) == (Frame.GO, GO)
    assert exchange.here.expect(Frame.READY) == (Frame.READY, b"")
    assert exchange.arrived()


def test_state_that_was_sent_in_one_go_is_taken_step_by_step(exchange: Exchange) -> None:
    assert exchange.leaving.send()
    _, own = exchange.there.expect(Frame.GUEST)
    _, rest = exchange.there.expect(Frame.REST)
    exchange.world.expected.load(
        SyntheticGuest.decode_guest(own), [SyntheticGuest.decode_rest(rest)], exchange.world.guest.shapes()
    )
    assert exchange.there.expect(Frame.FINAL) == (Frame.FINAL, b"")
    assert exchange.arrived()


def test_an_incomplete_frame_stays_in_the_stream(exchange: Exchange) -> None:
    frames = exchange.frames
    before = exchange.world.expected.state()[1]
    for end in [*range(1, 100, 7), len(frames) // 2, len(frames) - HEADER.size, len(frames) - 1]:
        exchange.near.send(frames[:end])
        assert not exchange.arriving.look()
        assert exchange.waiting() == frames[:end]
        assert exchange.far.recv(1 << 20) == frames[:end]
    assert exchange.world.expected.state()[1] == before


def test_any_byte_that_differs_is_left_to_the_steps(exchange: Exchange) -> None:
    frames, chance = exchange.frames, random.Random(1)
    before = exchange.world.expected.state()[1]
    for at in [*range(120), *chance.sample(range(120, len(frames)), 200)]:
        wrong = bytearray(frames)
        wrong[at] ^= 1 << chance.randrange(8)
        exchange.near.send(wrong)
        assert not exchange.arriving.look(), at
        assert exchange.far.recv(1 << 20) == wrong
    assert exchange.world.expected.state()[1] == before


def test_state_is_taken_as_it_was_checked(exchange: Exchange) -> None:
    """Whatever is in the socket by then: a sender on the same machine may still write into the pages that it sent."""
    frames = exchange.frames
    [pair, *_] = exchange.world.guest.nics[0].pairs
    pair.c.duplicated += 5
    other = exchange.frames
    pair.c.duplicated -= 5
    assert len(other) == len(frames)
    exchange.near.send(frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    assert exchange.far.recv(len(frames)) == frames
    exchange.near.send(other)
    exchange.arriving.run()
    assert exchange.arriving.went_on
    assert not exchange.waiting()
    assert exchange.arrived()


def accepts(exchange: Exchange, own: bytes, rest: bytes) -> bool:
    """Whether the steps accept such sections."""
    try:
        exchange.world.expected.load(
            SyntheticGuest.decode_guest(own), [SyntheticGuest.decode_rest(rest)], exchange.world.guest.shapes()
        )
    except StreamCorrupt:
        return False
    return True


def test_a_state_that_is_loaded_again_leaves_no_descriptor_open(exchange: Exchange) -> None:
    guest, [device] = exchange.world.guest.rest()
    own, rest = guest.encode(), device.encode()
    assert accepts(exchange, own, rest)
    before = len(os.listdir("/proc/self/fd"))
    assert accepts(exchange, own, rest)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_hand_over_in_c_accepts_the_frames_that_the_steps_accept(exchange: Exchange) -> None:
    """Sections with some other bytes and right sums. A control queue's state that comes again is for the steps."""
    guest, [device] = exchange.world.guest.rest()
    own, rest, chance = guest.encode(), device.encode(), random.Random(2)
    fitting = 0
    for number in range(3000):
        wrong_own, wrong_rest = bytearray(own), bytearray(rest)
        target = wrong_own if number % 4 == 0 else wrong_rest
        for _ in range(chance.randrange(1, 3)):
            # most of a rest is counters and heads; its end has the control queue
            at = chance.choice(
                [chance.randrange(len(target)), chance.randrange(24), len(target) - 1 - chance.randrange(12)]
            )
            target[at] = chance.choice([0, 1, 255, target[at] ^ 1 << chance.randrange(8)])
        parts = encoded(Frame.GUEST, bytes(wrong_own), 0), encoded(Frame.REST, bytes(wrong_rest), 0)
        exchange.near.send(b"".join(parts) + encoded(Frame.FINAL, b"", 0))
        fits = exchange.arriving.look()
        exchange.far.recv(1 << 20)
        accepted = accepts(exchange, bytes(wrong_own), bytes(wrong_rest))
        assert fits == accepted, (wrong_own.hex(), wrong_rest.hex())
        fitting += fits
    assert 100 < fitting < 2900


@pytest.mark.parametrize(
    "change",
    [
        {"writer_pages": 1 << 60},
        {"writer_pages": 1 << 40},
        {"writer_gpa": 0},
        {"writer_gpa": 0x40000000},
        {"writer_gpa": 0x40100001},
        {"writer_gpa": 0x400C0000, "writer_pages": 16},
        {"writer_rate": (1 << 32) + 1},
        {"writer_pages": (1 << 52) + 64},
    ],
)
def test_cpu_that_would_write_elsewhere_does_not_fit(exchange: Exchange, change: dict[str, int]) -> None:
    guest, [rest] = exchange.world.guest.rest()
    values = {name: getattr(guest, name) for name in GuestState.__slots__} | change
    own = GuestState(**values).encode()
    exchange.near.send(
        encoded(Frame.GUEST, own, 0) + encoded(Frame.REST, rest.encode(), 0) + encoded(Frame.FINAL, b"", 0)
    )
    assert not exchange.arriving.look()
    assert not accepts(exchange, own, rest.encode())


@pytest.mark.parametrize("change", [(1, 0, 1), (1, 1, 0), (0, 65535, 1), (0, 0, 0)])
def test_control_queue_that_is_not_as_in_memory_does_not_fit(exchange: Exchange, change: tuple[int, int, int]) -> None:
    own, [device] = exchange.world.guest.rest()
    assert isinstance(device, DeviceRest)
    assert device.control is not None
    indices = [(value + more) & 0xFFFF for value, more in zip(device.control, change, strict=True)]
    rest = DeviceRest(device.pairs, DriverRest(*indices), None).encode()
    exchange.near.send(
        encoded(Frame.GUEST, own.encode(), 0) + encoded(Frame.REST, rest, 0) + encoded(Frame.FINAL, b"", 0)
    )
    fits = exchange.arriving.look()
    assert fits == accepts(exchange, own.encode(), rest)
    assert fits == (change in [(0, 0, 0), (0, 65535, 1)])


def test_control_state_set_since_the_outline_is_for_the_steps(exchange: Exchange) -> None:
    control = exchange.world.guest.controls[0]
    assert control is not None
    control.model.vlans.add(5)
    assert exchange.world.guest.sections() is None
    exchange.here.send(exchange.frames)
    assert not exchange.arriving.look()


@pytest.mark.parametrize(
    "first", [encoded(Frame.CANCEL, b"no", 0), encoded(Frame.ALIVE, b"", 0), encoded(Frame.ROUND, bytes(8), 3)]
)
def test_another_frame_stays_in_the_stream(exchange: Exchange, first: bytes) -> None:
    exchange.here.send(first + exchange.frames)
    assert not exchange.arriving.look()
    assert exchange.waiting()[: len(first)] == first


def test_silence_and_the_end_of_the_stream_are_left_to_the_steps(exchange: Exchange) -> None:
    assert not exchange.arriving.look()
    exchange.here.close()
    assert not exchange.arriving.look()
    with pytest.raises(StreamBroken, match="closed"):
        exchange.there.receive_header(1.0)


# -- the destination, behind the state --------------------------------------------------


def test_device_that_answers_otherwise_is_asked_again_step_by_step(exchange: Exchange) -> None:
    exchange.config[0][1] = ord("u")
    exchange.here.send(exchange.frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    exchange.arriving.run()
    assert exchange.arriving.taken
    assert not exchange.arriving.went_on
    assert exchange.arrived()
    assert not exchange.here.readable()


def test_cancelled_destination_does_not_say_that_it_is_ready(exchange: Exchange) -> None:
    exchange.here.send(exchange.frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    exchange.cancels[1].set()
    exchange.arriving.run()
    assert not exchange.arriving.went_on
    assert not exchange.here.readable()


def test_destination_that_is_cancelled_later_has_said_that_it_is_ready(exchange: Exchange) -> None:
    exchange.here.send(exchange.frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    threading.Timer(0.05, exchange.cancels[1].set).start()
    exchange.arriving.run()
    assert exchange.here.expect(Frame.READY) == (Frame.READY, b"")
    with pytest.raises(MigrationCancelled):
        exchange.arriving.go(Fence(5.0, 0))


def test_go_that_was_there_first_counts_more_than_a_cancel(exchange: Exchange) -> None:
    exchange.here.send(exchange.frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()

    def both() -> None:
        select.select([exchange.near], [], [])
        exchange.here.send(encoded(Frame.GO, GO, 0))
        exchange.cancels[1].set()

    other = threading.Thread(target=both)
    other.start()
    exchange.arriving.run()
    other.join()
    assert exchange.arriving.go(Fence(5.0, 0)) == (Frame.GO, GO)


@pytest.mark.parametrize("answer", [encoded(Frame.CANCEL, b"no", 0), encoded(Frame.GO, GO, 0)[:-1]])
def test_anything_but_a_whole_go_is_for_the_steps(exchange: Exchange, answer: bytes) -> None:
    exchange.here.send(exchange.frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    exchange.near.send(answer)
    exchange.arriving.run()
    assert exchange.waiting() == answer
    if answer[0] == Frame.CANCEL:
        assert exchange.arriving.go(Fence(5.0, 0)) == (Frame.CANCEL, b"no")
        return
    exchange.there.stall = 0.1
    with pytest.raises(StreamBroken):
        exchange.arriving.go(Fence(0.1, 0))


def test_ready_that_cannot_go_breaks_the_stream(exchange: Exchange) -> None:
    exchange.here.send(exchange.frames)
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    exchange.here.close()
    exchange.arriving.run()
    assert exchange.arriving.went_on
    with pytest.raises(StreamBroken):
        exchange.arriving.go(Fence(1.0, 0))


# -- the source -------------------------------------------------------------------------


def test_cancelled_source_sends_nothing(exchange: Exchange) -> None:
    exchange.cancels[0].set()
    assert not exchange.leaving.send()
    assert not exchange.waiting()
    exchange.leaving.record()
    assert not exchange.trace.events


def test_source_whose_state_needs_more_room_leaves_it_to_the_steps(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_ROOM", 500)
    assert not exchange.leave().send()
    assert not exchange.waiting()


def test_full_socket_takes_the_rest_of_the_state_later(exchange: Exchange) -> None:
    frames = exchange.frames
    filled = 0
    exchange.near.setblocking(False)
    try:
        while True:
            filled += exchange.near.send(bytes(100))
    except BlockingIOError:
        pass
    assert exchange.leaving.send()
    read = bytearray()

    def empty() -> None:
        while len(read) < filled + len(frames):
            select.select([exchange.far], [], [])
            read.extend(exchange.far.recv(1 << 16))

    reader = threading.Thread(target=empty)
    reader.start()
    exchange.leaving.complete()
    reader.join()
    assert without_clock(bytes(read[filled:])) == without_clock(frames)
    assert not exchange.here.torn


@pytest.mark.parametrize(
    "answer",
    [encoded(Frame.READY, b"8 bytes!", 0), encoded(Frame.FAILED, b"no", 0), encoded(Frame.FAILED, b"", 0), b"\0", b""],
)
def test_anything_but_ready_without_a_hash_is_for_the_steps(exchange: Exchange, answer: bytes) -> None:
    assert exchange.leaving.send()
    if answer:
        exchange.far.send(answer)
    assert not exchange.leaving.await_ready()
    assert not answer or exchange.near.recv(100) == answer


def test_cancel_while_the_source_waits_is_seen(exchange: Exchange) -> None:
    assert exchange.leaving.send()
    exchange.cancels[0].set()
    assert not exchange.leaving.await_ready()


def test_go_into_a_closed_stream_is_an_error(exchange: Exchange) -> None:
    exchange.there.close()
    with pytest.raises(StreamBroken):
        exchange.leaving.give()


def test_go_waits_only_a_moment_for_an_answer(exchange: Exchange) -> None:
    exchange.leaving.give()
    kind, payload = exchange.there.expect(Frame.GO)
    assert kind is Frame.GO
    assert len(payload) == 8


def test_objects_that_c_reaches_by_pointers_live_as_long_as_the_sections(exchange: Exchange) -> None:
    guest = exchange.world.guest
    assert guest.writer is not None
    kept = weakref.ref(guest._rests[0]), weakref.ref(guest.writer)
    # an outline that is taken anew, a CPU that ends
    guest.outline()
    guest.writer.close()
    guest.writer = None
    gc.collect()
    assert [each() is not None for each in kept] == [True, True]


def test_rest_of_a_guest_without_a_cpu(exchange: Exchange) -> None:
    world = exchange.world
    assert world.guest.writer is not None
    world.guest.writer.close()
    world.guest.writer = None
    leaving = exchange.leave()
    assert leaving.send()
    assert exchange.arriving.look()
    exchange.arriving.prepare()
    assert world.expected.writer is None
    [rest] = world.rests
    assert isinstance(rest, DeviceRest)
