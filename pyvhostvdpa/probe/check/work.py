# SPDX-License-Identifier: MIT
"""Work for a device, one unit after the other: a frame for a network device, a request for a disk.

Rules that are not about a kind of device see :class:`Work` only.
"""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

from ...net.control import MAC_ADDR_SET, OK, Class, command
from .bench import PATIENCE_S, REST_S, Arena, Bench
from .queue import Place, Queue, Used
from .rule import Broken, CannotTell, demand

HEADER = 12
"""Bytes in front of a frame with VIRTIO_F_VERSION_1 (virtio 1.3, 5.1.6)."""
BUFFER = 2048
SLOTS = 32
"""Frames that are under way at most."""
FRAME = 64
ETHERTYPE = b"\x88\xb5"
SECTOR = 512
READ, WRITE_OUT, FLUSH, GET_ID = 0, 1, 4, 8
_LOOKS = 3
"""Attempts to catch a device that does not look at its rings: its look after an earlier kick may come late."""
_LOOP_S = 0.3
_SOURCE = b"\x52\x54\x91\x76\x64\x02"


def pattern(size: int, seed: int) -> bytes:
    """Return ``size`` bytes that follow from ``seed``."""
    out = bytearray()
    word = (seed + 1) * 0x9E3779B97F4A7C15
    while len(out) < size:
        word = (word * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        out += word.to_bytes(8, "little")
    return bytes(out[:size])


class Work(ABC):
    """A device of some kind with queues of its own, set up and not yet started."""

    queues: tuple[Queue, ...]
    slots: int
    """Units that can be under way at the same time."""
    main: Queue
    """The queue whose used elements show what was done."""

    def __init__(self, bench: Bench, arena: Arena | None = None, buffers: Arena | None = None) -> None:
        self.bench = bench
        self.rings = arena or bench.arena()
        self.buffers = buffers or self.rings
        self.submitted = 0
        self.finished: list[Used] = []
        self._since: list[int] | None = None

    @abstractmethod
    def submit(self, count: int = 1) -> None:
        """Make units of work available, without a notification."""

    @abstractmethod
    def check(self, units: Sequence[Used]) -> str:
        """Demand that what was finished is right; return what was seen."""

    def set_up(self, base: int = 0, enable: bool = True) -> None:
        """Give the device the queues."""
        for queue in self.queues:
            self.bench.set_up(queue, base, enable)

    def start(self, base: int = 0) -> Self:
        """Give the device the queues and write DRIVER_OK; return this."""
        self.set_up(base)
        self.bench.driver_ok()
        return self

    def kick(self) -> None:
        """Notify the device of all queues."""
        for queue in self.queues:
            queue.kick()

    def give(self, count: int = 1) -> None:
        """Make units of work available, and notify."""
        self.submit(count)
        self.kick()

    def waits_for_kick(self) -> bool:
        """Make a unit available without a notification; return whether the device leaves it alone.

        A device that is still at its last look, after an earlier kick, may use it: that alone says nothing.
        """
        for _ in range(_LOOKS):
            self.submit()
            if not self.wait(1, REST_S):
                return True
        return False

    def wait(self, count: int, seconds: float = PATIENCE_S) -> list[Used]:
        """Return what is finished of ``count`` units in so many seconds."""
        got = self.main.collect(count, seconds)
        self.finished += got
        return got

    def works(self, count: int = 1, what: str = "") -> str:
        """Submit, notify, wait, and demand that all of it is done and right."""
        self.give(count)
        return self.finish(count, what)

    def finish(self, count: int, what: str = "") -> str:
        """Demand that ``count`` units are finished, and right."""
        got = self.wait(count)
        status = self.bench.c.get_status()
        demand(
            len(got) == count,
            f"{what or 'running'}: {len(got)} of {count} descriptors were used within {PATIENCE_S:g} s "
            f"(status {int(status):#x})",
        )
        return self.check(got)

    def from_now(self) -> None:
        """Have the next :meth:`rests` compare with the indices of now: a device may be faster than the driver."""
        self._since = [queue.used_index for queue in self.queues]

    def offer(self, count: int = 1) -> None:
        """Make work available to a device that must not use it: :meth:`rests` compares with the indices of before."""
        self.from_now()
        self.submit(count)

    def rests(self, what: str, seconds: float = REST_S) -> None:
        """Demand that no descriptor is used for a while, nor since :meth:`offer`."""
        before = self._since or [queue.used_index for queue in self.queues]
        self._since = None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = [queue.used_index for queue in self.queues]
            demand(now == before, f"{what}: used indices moved from {before} to {now}")
            time.sleep(0.005)

    def ignored(self, what: str, count: int = 1) -> None:
        """Demand that work is not touched though it is made available and notified of."""
        self.offer(count)
        self.kick()
        self.rests(what)


class NetWork(Work):
    """Frames to oneself: queue ``2 * pair`` receives what queue ``2 * pair + 1`` sends, if the device loops."""

    def __init__(
        self, bench: Bench, arena: Arena | None = None, buffers: Arena | None = None, num: int | None = None,
        pair: int = 0, base: int = 0, target: bytes = b"\xff" * 6,
    ) -> None:  # fmt: skip
        super().__init__(bench, arena, buffers)
        num = num or bench.ring_size(2 * pair, 2 * pair + 1)
        self.rx = bench.queue(2 * pair, num, base, self.rings)
        self.tx = bench.queue(2 * pair + 1, num, base, self.rings)
        self.queues, self.main = (self.rx, self.tx), self.tx
        self.slots = min(num, SLOTS)
        self.target = target
        self.inbox = self.buffers.allocate(self.slots * BUFFER)
        self.outbox = self.buffers.allocate(self.slots * BUFFER)
        self.sent: list[bytes] = []
        self.posted: dict[int, Place] = {}
        self.received: list[bytes] = []
        self.loops = bench.facts.loops
        """Whether frames come back; None if that is not known yet."""

    def frame(self, size: int = FRAME) -> bytes:
        """Return the next frame to send."""
        head = self.target + _SOURCE + ETHERTYPE
        return head + pattern(size - len(head), self.submitted)

    def post(self) -> None:
        """Make one receive buffer available."""
        n = self.submitted % self.slots
        place = self.inbox.part(n * BUFFER, BUFFER)
        place.write(bytes(BUFFER))
        head = self.rx.add([(place, True)])
        self.posted[head] = place
        self.rx.publish(head)

    def send(self, frame: bytes, parts: Sequence[int] = ()) -> None:
        """Make one frame available to send, its bytes in descriptors of these sizes (one without)."""
        n = self.submitted % self.slots
        place = self.outbox.part(n * BUFFER, BUFFER)
        data = bytes(HEADER) + frame
        place.write(data)
        chain, at = [], 0
        for size in [*parts, len(data) - sum(parts)]:
            if size > 0:
                chain.append((place.part(at, size), False))
                at += size
        self.tx.publish(self.tx.add(chain))
        self.sent.append(frame)
        self.submitted += 1

    def submit(self, count: int = 1) -> None:
        """Post a buffer and send a frame, so many times."""
        for _ in range(count):
            self.post()
            self.send(self.frame())

    def receive(self, count: int, seconds: float) -> list[bytes]:
        """Return frames that came back; Broken if a used element of the RX queue makes no sense."""
        frames = []
        for used in self.rx.collect(count, seconds):
            place = self.posted.pop(used.id, None)
            if place is None:
                raise Broken(f"RX used id {used.id}, which was not made available (virtio 1.3, 2.7.8)")
            demand(
                HEADER <= used.length <= BUFFER,
                f"RX used length {used.length} for a buffer of {BUFFER} bytes (virtio 1.3, 2.7.8.2)",
            )
            frames.append(place.read(used.length)[HEADER:])
        return frames

    def check(self, units: Sequence[Used]) -> str:
        """Demand that frames that come back are those that were sent, in order."""
        heads = [used.id for used in units]
        demand(all(head < self.tx.num for head in heads), f"TX used ids {heads} of a ring of {self.tx.num}")
        sent, self.sent = self.sent[: len(units)], self.sent[len(units) :]
        back = [f for f in self.receive(len(units), 0.0 if self.loops is False else _LOOP_S) if f[12:14] == ETHERTYPE]
        self.received += back
        if self.loops is None:
            self.loops = bool(back)
        if not self.loops:
            return f"{len(units)} frames sent; the device does not send them back"
        demand(len(back) == len(sent), f"{len(back)} of {len(sent)} frames came back")
        wrong = [i for i, (a, b) in enumerate(zip(sent, back, strict=True)) if a != b]
        demand(not wrong, f"frame {wrong[0] if wrong else 0} came back with other bytes or in another order")
        return f"{len(units)} frames sent, and back whole"

    def needs_loop(self) -> None:
        """Raise :class:`CannotTell` on a device that sends frames away."""
        if not self.loops:
            raise CannotTell("the device does not send frames back to itself")


class BlockWork(Work):
    """Reads of a disk's first sectors; other requests by :meth:`request`."""

    def __init__(
        self, bench: Bench, arena: Arena | None = None, buffers: Arena | None = None, num: int | None = None,
        base: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(bench, arena, buffers)
        self.main = bench.queue(0, num or bench.ring_size(0), base, self.rings)
        self.queues = (self.main,)
        self.slots = max(1, min(self.main.num // 4, 16))
        self._area = self.buffers.allocate(self.slots * 8192)
        self.waiting: dict[int, Place] = {}
        self._data: dict[int, int] = {}

    def submit(self, count: int = 1) -> None:
        """Read a sector, so many times."""
        for _ in range(count):
            self.request(READ, self.submitted % 8, SECTOR)

    def request(self, kind: int, sector: int, data: int = 0, out: bytes = b"") -> int:
        """Make one request available (virtio 1.3, 5.2.6): ``data`` bytes to read, or ``out`` to write."""
        place = self._area.part(self.submitted % self.slots * 8192, 8192)
        place.write(bytes(4096) + b"\xee" * 4096)
        place.write(struct.pack("<IIQ", kind, 0, sector))
        parts = [(place.part(0, 16), False)]
        if out:
            place.write(out, 16)
            parts.append((place.part(16, len(out)), False))
        if data:
            parts.append((place.part(4096, data), True))
        parts.append((place.part(4096 + data, 1), True))
        head = self.main.add(parts)
        self.waiting[head], self._data[head] = place, data
        self.main.publish(head)
        self.submitted += 1
        return head

    def answer(self, used: Used) -> tuple[int, bytes]:
        """Return a finished request's status and its data; Broken if it was not sent."""
        place = self.waiting.pop(used.id, None)
        if place is None:
            raise Broken(f"used id {used.id}, which was not made available (virtio 1.3, 2.7.8)")
        size = self._data.pop(used.id)
        data = place.read(size + 1, 4096)
        return data[size], data[:size]

    def do(self, kind: int, sector: int, data: int = 0, out: bytes = b"") -> tuple[int, bytes]:
        """Make one request and wait for it."""
        self.request(kind, sector, data, out)
        self.kick()
        got = self.wait(1)
        demand(got, f"request of type {kind} was not finished within {PATIENCE_S:g} s")
        return self.answer(got[0])

    def check(self, units: Sequence[Used]) -> str:
        """Demand that each was answered OK."""
        states = [self.answer(used)[0] for used in units]
        demand(not any(states), f"requests were answered with {states}")
        return f"{len(units)} sectors read"


class Control:
    """The control queue of a network device; commands one by one (virtio 1.3, 5.1.6.5)."""

    def __init__(self, bench: Bench, index: int, arena: Arena | None = None, most: int = 16) -> None:
        self.bench = bench
        self.queue = bench.queue(index, bench.ring_size(index, most=most), 0, arena)
        self.room = (arena or bench.arena()).allocate(8192)

    def set_up(self, enable: bool = True) -> None:
        """Give the device the queue."""
        self.bench.set_up(self.queue, 0, enable)

    def submit(self, command: bytes, room: int = 1) -> None:
        """Make a command available with ``room`` bytes for the answer."""
        self.room.write(command)
        self.room.write(b"\xee" * 16, 4096)
        parts = [(self.room.part(0, len(command)), False)] if command else []
        if room:
            parts.append((self.room.part(4096, room), True))
        self.queue.publish(self.queue.add(parts))

    def answer(self, seconds: float = PATIENCE_S) -> int | None:
        """Wait for a command's answer: 0 (OK), 1 (ERR); None if none came."""
        got = self.queue.collect(1, seconds)
        return self.room.read(1, 4096)[0] if got else None

    def command(self, command: bytes) -> int:
        """Send a command; Broken without an answer, or if it is neither OK nor ERR."""
        self.submit(command)
        self.queue.kick()
        ack = self.answer()
        if ack is None:
            raise Broken(f"command {command[:2].hex(' ')} was not answered within {PATIENCE_S:g} s")
        demand(ack in (0, 1), f"command {command[:2].hex(' ')} was answered with {ack:#x} (virtio 1.3, 5.1.6.5)")
        return ack

    def accepts(self, command: bytes, what: str) -> str:
        """Demand that a command is answered with OK."""
        demand(self.command(command) == OK, f"{what}: answered with ERR")
        return f"{what}: OK"

    def refuses(self, command: bytes, what: str) -> str:
        """Demand that a command is answered with ERR."""
        demand(self.command(command) != OK, f"{what}: answered with OK")
        return f"{what}: ERR"


def work(
    bench: Bench, arena: Arena | None = None, buffers: Arena | None = None, num: int | None = None, base: int = 0
) -> Work:
    """Return work for the device under test; :class:`CannotTell` for a kind that has no test driver in this package."""
    bench.kind_needed()
    if bench.facts.is_block:
        return BlockWork(bench, arena, buffers, num, base)
    return NetWork(bench, arena, buffers, num, base=base)


def second_pair_rests(job: NetWork, what: str) -> None:
    """Demand that a pair that was not asked for receives nothing; :class:`CannotTell` if it only sends.

    The driver must not queue on it (virtio 1.3, 5.1.6.5.6), and nothing says what a device does with it then.
    """
    received = job.rx.used_index
    try:
        job.ignored(what)
    except Broken as e:
        time.sleep(REST_S)
        demand(job.rx.used_index == received, f"{what}: it received ({e})")
        raise CannotTell(f"{what}: its transmit queue is served; the driver must not use it then") from e


def running(bench: Bench, groups: Mapping[int, int] | None = None, control: bool = False) -> Work:
    """Own, map, negotiate, set up and start a device with work of its kind."""
    bench.kind_needed()
    bench.prepare()
    bench.bind(groups or {})
    job = work(bench)
    job.set_up()
    if control:
        Control(bench, bench.needs_control()).set_up()
    bench.driver_ok()
    return job


def running_net(bench: Bench) -> NetWork:
    """Return :func:`running` for a rule that is for network devices only."""
    job = running(bench)
    assert isinstance(job, NetWork)
    return job


LOOPS, SENDS_AWAY = "frames come back", "frames are sent away"


def look_for_loop(bench: Bench) -> str:
    """Return :data:`LOOPS` or :data:`SENDS_AWAY`; Broken if the device sends nothing."""
    job = running_net(bench)
    job.works()
    return LOOPS if job.loops else SENDS_AWAY


def running_block(bench: Bench) -> BlockWork:
    """Return :func:`running` for a rule that is for disks only."""
    job = running(bench)
    assert isinstance(job, BlockWork)
    return job


def controlled(bench: Bench, features: int | None = None, most: int = 16) -> tuple[NetWork, Control]:
    """Start a network device with its first pair and the control queue, of ``most`` descriptors at most."""
    index = bench.needs_control()
    bench.prepare(features)
    job = NetWork(bench)
    job.set_up()
    control = Control(bench, index, most=most)
    control.set_up()
    bench.driver_ok()
    return job, control


def put_address_back(bench: Bench) -> str:
    """Give a network device the MAC address that it had before the first rule; Broken if it does not accept that."""
    mac = bench.facts.mac
    if mac is None or bench.c.get_config(0, len(mac)) == mac:
        return "unchanged"
    _, control = controlled(bench)
    control.accepts(command(Class.MAC, MAC_ADDR_SET, mac), "MAC_ADDR_SET")
    got = bench.c.get_config(0, len(mac))
    demand(got == mac, f"it has the address {got.hex(':')} now, and had {mac.hex(':')}")
    return "put back"
