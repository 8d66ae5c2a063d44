"""The guest's NIC against a loopback of a few lines: its account of frames must be right."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.guest.nic import GuestNic, NicOptions, NicPair
from pyvhostvdpa.guest.protocol import Window
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.net.features import CONTROL, SUPPORTED


class Loopback:
    """Stand-in for a device: moves TX frames into RX buffers on request."""

    def __init__(self, memory: GuestMemory, pair: NicPair) -> None:
        self.memory, self.pair = memory, pair
        self.tx_seen = self.rx_seen = 0
        self.held: list[bytes] = []

    def _chain(self, ring: object, head: int) -> list[tuple[int, int]]:
        segments = []
        while True:
            d = ring.desc[head]
            segments.append((d.addr, d.len))
            if not d.flags & lib.VRING_DESC_F_NEXT:
                return segments
            head = d.next

    def take(self) -> int:
        """Take what the guest sent."""
        ring, count = self.pair.c.tx, 0
        while self.tx_seen != ring.avail.idx:
            head = ring.avail.ring[self.tx_seen % ring.num]
            self.held.append(b"".join(self._bytes(gpa, size) for gpa, size in self._chain(ring, head)))
            e = ring.used.ring[ring.used.idx % ring.num]
            e.id, e.len = head, 0
            ring.used.idx += 1
            self.tx_seen += 1
            count += 1
        return count

    def _bytes(self, gpa: int, size: int) -> bytes:
        return bytes(ffi.buffer(ffi.cast("char *", self.memory.hva(gpa, size)), size))

    def deliver(self, frame: bytes) -> None:
        ring = self.pair.c.rx
        assert self.rx_seen != ring.avail.idx, "the guest sent more than it can receive"
        head = ring.avail.ring[self.rx_seen % ring.num]
        [(gpa, _)] = self._chain(ring, head)
        ffi.memmove(ffi.cast("char *", self.memory.hva(gpa, len(frame))), frame, len(frame))
        e = ring.used.ring[ring.used.idx % ring.num]
        e.id, e.len = head, len(frame)
        ring.used.idx += 1
        self.rx_seen += 1


@pytest.fixture(params=[False, True], ids=["one descriptor", "chained"])
def looped(request: pytest.FixtureRequest) -> Iterator[tuple[NicPair, Loopback]]:
    with GuestMemory([(DEFAULT_GPA, 4 << 20)]) as memory:
        nic = GuestNic(memory, NicOptions(ring_size=16, frame_size=128, chained=request.param))
        yield nic.pairs[0], Loopback(memory, nic.pairs[0])
        nic.close()


def test_header_is_as_long_as_the_features_make_it() -> None:
    """A device that reports hashes puts the frame behind 20 bytes, and looks for it there (virtio 1.3, 5.1.6)."""
    for features, header in ((SUPPORTED, 12), (SUPPORTED | CONTROL, 20)):
        with GuestMemory([(DEFAULT_GPA, 4 << 20)]) as memory:
            nic = GuestNic(memory, NicOptions(ring_size=16, frame_size=128, features=features))
            [pair] = nic.pairs
            device = Loopback(memory, pair)
            run(pair)
            device.take()
            assert {len(data) for data in device.held} == {header + 128}
            for data in device.held:
                device.deliver(b"\xff" * header + data[header:])
            run(pair)
            assert pair.counts().received == len(device.held)
            assert pair.counts().corrupted == 0
            nic.close()


def run(pair: NicPair, milliseconds: int = 5) -> None:
    lib.nic_run(pair.c, time.monotonic_ns() + milliseconds * 1_000_000)


def test_nic_keeps_fewer_frames_in_flight_than_rx_buffers_posted(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    run(pair)
    assert device.take() == 8
    run(pair)
    assert device.take() == 0


def test_every_frame_that_comes_back_is_counted_once(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    for _ in range(5):
        run(pair)
        device.take()
        for frame in device.held:
            device.deliver(frame)
        device.held.clear()
    pair.c.sending = 0
    run(pair)
    counts = pair.counts()
    assert counts.sent == counts.received == 40
    assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0)


def test_loss_duplicates_corruption_and_order_are_counted_separately(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    run(pair)
    device.take()
    pair.c.sending = 0
    frames = device.held
    broken = bytearray(frames[3])
    broken[60] ^= 1
    for frame in (frames[0], frames[0], frames[2], frames[1], bytes(broken), frames[4][:-1]):
        device.deliver(frame)
    run(pair)
    counts = pair.counts()
    assert counts.sent == 8
    assert counts.received == 3
    assert counts.lost == 5
    assert counts.duplicated == 1
    assert counts.reordered == 1
    assert counts.corrupted == 2


def test_a_frame_that_was_never_sent_is_corrupt(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    run(pair)
    device.take()
    pair.c.sending = 0
    pair.c.sent = 3
    device.deliver(device.held[5])
    run(pair)
    assert pair.counts().corrupted == 1


def test_the_longest_gap_is_measured_between_frames(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    run(pair)
    device.take()
    device.deliver(device.held[0])
    run(pair)
    time.sleep(0.08)
    device.deliver(device.held[1])
    run(pair)
    begin, end = max(pair.gaps(), key=lambda gap: gap[1] - gap[0])
    assert 80e6 <= end - begin < 2e9


def frame_after(pair: NicPair, device: Loopback, seconds: float) -> None:
    """Receive one frame more, so long after the last one."""
    time.sleep(seconds)
    device.deliver(device.held.pop())
    run(pair, 1)


def test_window_gap_shorter_than_all_kept_gaps_is_reported(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    traffic = Traffic(GuestNic.__new__(GuestNic))
    traffic._nic.pairs = [pair]
    run(pair)
    device.take()
    device.held *= 2
    frame_after(pair, device, 0)
    with traffic.watching(Window.SWITCH):
        begin = time.monotonic_ns()
        time.sleep(0.005)
        end = time.monotonic_ns()
    assert traffic.window_gap(Window.SWITCH) is None
    frame_after(pair, device, 0)
    frame_after(pair, device, 0.5)
    for slot in pair.c.gaps:
        # 64 longer gaps at another time
        slot.begin, slot.end = 1, 10**9
    assert traffic.longest_gap(begin, end) is None
    gap = traffic.window_gap(Window.SWITCH)
    assert gap is not None
    assert 5 <= gap < 500, "the gap of half a second is later"
    assert traffic.window_gap(Window.START) is None


def test_window_begun_again_forgets_its_gap(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    run(pair)
    device.take()
    frame_after(pair, device, 0)
    pair.begin_window(Window.START)
    frame_after(pair, device, 0.5)
    longer = pair.window_gap(Window.START)
    assert longer is not None
    pair.begin_window(Window.START)
    assert pair.window_gap(Window.START) is None
    frame_after(pair, device, 0)
    gap = pair.window_gap(Window.START)
    assert gap is not None
    assert gap < longer


def test_invalid_used_elements_are_counted_and_survived(looped: tuple[NicPair, Loopback]) -> None:
    pair, device = looped
    run(pair)
    device.take()
    ring = pair.c.rx
    ring.used.ring[0].id, ring.used.ring[0].len = 9999, 64
    ring.used.ring[1].id, ring.used.ring[1].len = 0, 1 << 30
    ring.used.idx += 2
    pair.c.sending = 0
    run(pair)
    assert pair.counts().corrupted == 2
