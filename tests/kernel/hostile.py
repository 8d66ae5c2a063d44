"""A client that does to a vdpa_hwsim device what no driver should; unharmed.py has the means to see what that did."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import hwsim
from hwsim import HwSim
from visits import use

from pyvhostvdpa import KernelError, Status, VhostVdpa
from pyvhostvdpa.base.uapi import IOCTLS
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.memory.pinned import allow_pinning
from pyvhostvdpa.net.features import CONTROL, RING, SUPPORTED, Feature

EXTRA = (
    RING
    | Feature.CTRL_RX
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_GUEST_OFFLOADS
    | Feature.GUEST_ANNOUNCE
    | Feature.MRG_RXBUF
    | Feature.RSS
    | Feature.HASH_REPORT
)
VARIANTS: dict[str, dict[str, object]] = {
    "set_map": {},
    "dma_map": {"dma_map": "Y"},
    "held descriptors, out of order": {"inflight": 3, "reorder": "Y", "inflight_us": 2000},
    "a doorbell page": {"doorbell_us": 200, "base_avail": "Y", "resume_cvq": "Y"},
    "large rings, indirect tables with the data": {"ring_max": 32768, "indirect_in_data": "Y"},
}
RINGS, BUFFERS = 0x7_0000_0000, 0x4000_0000
SLOT = 0x10000
AVAIL, USED = 0x8000, 0xC000
SIZE = 2 << 20  # a huge page: one entry a map
POLITE_STEPS, RUDE_STEPS = 25, 35
ROUNDS_AN_OPENING = 8
STATUS = Status.ACKNOWLEDGE | Status.DRIVER
NEXT, WRITE, INDIRECT = 1, 2, 4


Action = Callable[["Client", VhostVdpa], None]


@dataclass
class Queue:
    """A queue whose memory the client writes as it likes."""

    index: int
    num: int
    kick: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    call: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    avail: int = 0

    @property
    def offset(self) -> int:
        return self.index * SLOT

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)


@dataclass
class Tally:
    """What a run did."""

    rounds: int = 0
    steps: int = 0
    refused: int = 0
    frames: int = 0
    faults: int = 0
    commands: int = 0
    maps: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())


def scribble(memory: memoryview, seed: int) -> None:
    """Change descriptors under the device's eyes, and change them back, while the last byte of memory is not zero."""
    chance = random.Random(seed)
    while True:
        for _ in range(100 * memory[SIZE - 1]):
            where = chance.randrange(3) * SLOT + 16 * chance.randrange(64) + chance.choice([0, 8, 12, 14])
            before = bytes(memory[where : where + 2])
            memory[where : where + 2] = chance.randbytes(2)
            memory[where : where + 2] = before
        time.sleep(0.001)


class Client:
    """One hostile client of one device."""

    def __init__(self, sim: HwSim, seed: int, pairs: int = 1) -> None:
        self.sim, self.chance = sim, random.Random(seed)
        self.queues_count = 2 * pairs + 1
        self.rings = SharedMemory("hostile-rings", SIZE)
        self.buffers = SharedMemory("hostile-buffers", SIZE)
        allow_pinning(64 << 20)
        self.queues: list[Queue] = []
        self.device: VhostVdpa | None = None
        self.features = Feature(0)
        self.tally = Tally()
        context = multiprocessing.get_context("fork")
        self.scribbler = context.Process(target=scribble, args=(self.rings.buffer, seed), daemon=True)
        self.scribbler.start()

    def close(self) -> None:
        self.end_round()
        if self.device is not None:
            self.device.close()
        self.scribbler.kill()
        self.scribbler.join()
        self.scribbler.close()
        self.rings.close()
        self.buffers.close()

    def open(self) -> VhostVdpa:
        """Open the device, and reopen it every few rounds."""
        if self.device is not None and self.tally.rounds % ROUNDS_AN_OPENING == 0:
            self.device.close()
            self.device = None
        if self.device is None:
            self.device = VhostVdpa(self.sim.chardev)
            self.device.set_owner()
            self.device.set_backend_features(self.device.get_backend_features())
        return self.device

    def run(self, rounds: int, seconds: float) -> Tally:
        """Do harm, for that many rounds and that long."""
        end = time.monotonic() + seconds
        while self.tally.rounds < rounds or time.monotonic() < end:
            self.round()
        self.end_round()
        stats = {name: int(value) for name, value in self.sim.read("stats").items()}
        self.tally.faults, self.tally.maps = stats["faults"], stats["set_map"] + stats["dma_map"]
        self.tally.commands = stats["cvq_command"] + stats["cvq_refused"]
        self.tally.frames = stats["vq1.packets"] + stats["vq1.errors"]
        return self.tally

    def round(self) -> None:
        """Set the device up about as a driver would, then leave all manners behind."""
        device = self.open()
        self.tally.rounds += 1
        self.end_round()
        try:
            self.set_up(device)
        except KernelError:
            self.tally.refused += 1
            return
        self.act(device, POLITE, POLITE_STEPS)
        self.rings.buffer[SIZE - 1] = 1
        self.act(device, POLITE | RUDE, RUDE_STEPS)

    def act(self, device: VhostVdpa, actions: Mapping[Action, int], times: int) -> None:
        """Do that many of these, chosen by their weight; a device that has failed is left alone soon."""
        kinds, weights = list(actions), list(actions.values())
        for step in range(times):
            self.tally.steps += 1
            if step % 4 == 3 and device.get_status() & Status.NEEDS_RESET and self.chance.random() < 0.6:
                break
            try:
                self.chance.choices(kinds, weights)[0](self, device)
            except (KernelError, OSError):
                self.tally.refused += 1

    def end_round(self) -> None:
        """Reset and unmap, and close a batch that may be open."""
        device = self.device
        if device is not None:
            device.set_status(Status(0))
            for asid in (0, 1):
                for kind, iova, size in ((6, 0, 0), (3, 0, (1 << 64) - 1)):
                    with contextlib.suppress(KernelError):
                        self.message(device, kind, iova, size, asid=asid)
        for queue in self.queues:
            queue.close()
        self.queues = []

    def set_up(self, device: VhostVdpa) -> None:
        offered = device.get_features()
        for bit in Feature:
            if bit not in SUPPORTED and self.chance.random() < 0.4:
                offered &= ~int(bit)
        if not offered & Feature.CTRL_VQ:
            offered &= ~int(CONTROL | Feature.GUEST_ANNOUNCE)
        self.features = Feature(offered)
        ring_asid, data_asid, control_asid = (self.chance.randrange(2) for _ in range(3))
        for group, asid in ((0, data_asid), (1, control_asid), (2, ring_asid)):
            device.set_group_asid(group, asid)
        device.set_status(STATUS)
        device.set_features(offered)
        device.set_status(STATUS | Status.FEATURES_OK)
        self.rings.buffer[:] = bytes(SIZE)
        for asid in {ring_asid, control_asid}:
            self.map(device, RINGS, self.rings, asid)
        self.map(device, BUFFERS, self.buffers, data_asid)
        num = self.chance.choice([1, 4, 64, 256])
        for index in range(self.queues_count):
            self.queues.append(Queue(index, num))
            self.set_up_queue(device, self.queues[-1])
        device.set_status(STATUS | Status.FEATURES_OK | Status.DRIVER_OK)

    def set_up_queue(self, device: VhostVdpa, queue: Queue) -> None:
        at = RINGS + queue.offset
        device.set_vring_num(queue.index, queue.num)
        device.set_vring_addr(queue.index, at, at + AVAIL, at + USED)
        device.set_vring_base(queue.index, 0)
        device.set_vring_kick(queue.index, queue.kick)
        device.set_vring_call(queue.index, queue.call)
        device.set_vring_enable(queue.index, True)

    # -- what a driver does, with arguments that no driver uses ---------------------

    def message(
        self, device: VhostVdpa, kind: int, iova: int = 0, size: int = 0, uaddr: int = 0, perm: int = 3, asid: int = 0
    ) -> None:
        """Write one IOTLB message, all of it of our choice."""
        head = struct.pack("<IIQQQBB", 2, asid, iova, size, uaddr, perm, kind)
        try:
            os.write(device.fileno(), head.ljust(72, b"\0"))
        except OSError as error:
            raise KernelError(error.errno or 0, "write", "") from error

    def map(self, device: VhostVdpa, iova: int, memory: SharedMemory, asid: int) -> None:
        """Map it in one batch: without one, the whole tree would be rebuilt for each page that is not contiguous."""
        self.message(device, 5, asid=asid)
        self.message(device, 2, iova, SIZE, memory.hva, 3, asid)
        self.message(device, 6, asid=asid)

    def any_queue(self) -> Queue:
        return self.chance.choice(self.queues)

    def address(self) -> int:
        """An address somewhere, often one that is mapped."""
        chance = self.chance
        return chance.choice(
            [
                chance.getrandbits(64),
                RINGS + chance.randrange((self.queues_count + 1) * SLOT),
                BUFFERS + chance.randrange(SIZE),
                BUFFERS + chance.randrange(SIZE),
                chance.randrange(1 << 21),
                (1 << 64) - chance.randrange(1, 1 << 16),
            ]
        )

    def descriptor(self, queue: Queue, index: int, address: int, size: int, flags: int, following: int = 0) -> None:
        raw = struct.pack("<QIHH", address, size, flags, following)
        at = queue.offset + 16 * (index % 512)
        self.rings.buffer[at : at + 16] = raw

    def publish(self, queue: Queue, head: int) -> None:
        at = queue.offset + AVAIL
        slot = at + 4 + 2 * (queue.avail % queue.num)
        self.rings.buffer[slot : slot + 2] = head.to_bytes(2, "little")
        queue.avail = (queue.avail + 1) & 0xFFFF
        self.rings.buffer[at + 2 : at + 4] = queue.avail.to_bytes(2, "little")
        os.eventfd_write(queue.kick, 1)

    def chain(self, device: VhostVdpa) -> None:
        """A chain that could be one."""
        chance, queue = self.chance, self.any_queue()
        for _ in range(chance.randrange(1, 5)):
            size = chance.choice([chance.randrange(4096), chance.getrandbits(32), 12, 16, 64, 65536])
            flags = chance.choice([0, NEXT, WRITE, WRITE | NEXT, INDIRECT, INDIRECT | NEXT, chance.getrandbits(16)])
            following = chance.randrange(queue.num) if chance.random() < 0.8 else chance.getrandbits(16)
            self.descriptor(queue, chance.randrange(queue.num), self.address(), size, flags, following)
        self.publish(queue, chance.randrange(queue.num) if chance.random() < 0.9 else chance.getrandbits(16))

    def garbage(self, device: VhostVdpa) -> None:
        queue = self.any_queue()
        at = queue.offset + self.chance.randrange(SLOT - 64)
        self.rings.buffer[at : at + 64] = self.chance.randbytes(64)
        os.eventfd_write(queue.kick, 1)

    def leap(self, device: VhostVdpa) -> None:
        """An avail index far from the last."""
        queue = self.any_queue()
        queue.avail = self.chance.getrandbits(16)
        self.publish(queue, 0)

    def frame(self, device: VhostVdpa) -> None:
        """A frame with every buffer in its place and a header that asks for anything."""
        chance, rx, tx = self.chance, self.queues[0], self.queues[1]
        for _ in range(chance.choice([1, 1, 2, 8])):
            size = chance.choice([2048, 2048, 256, 65550])
            self.descriptor(rx, rx.avail % rx.num, BUFFERS + chance.randrange(1 << 18), size, WRITE)
            self.publish(rx, rx.avail % rx.num)
        header = self.net_header()
        data = header + self.packet()
        at = (1 << 19) + chance.randrange(1 << 18)
        self.buffers.buffer[at : at + len(data)] = data
        first = tx.avail % tx.num
        if tx.num > 2 and chance.random() < 0.5:
            cut = chance.choice([len(header), chance.randrange(1, len(data))])
            second = (first + 1) % tx.num
            self.descriptor(tx, first, BUFFERS + at, cut, NEXT, second)
            self.descriptor(tx, second, BUFFERS + at + cut, len(data) - cut, 0)
        else:
            self.descriptor(tx, first, BUFFERS + at, len(data), 0)
        self.publish(tx, first)

    def net_header(self) -> bytes:
        chance = self.chance
        if chance.random() < 0.4:
            return bytes(20 if Feature.HASH_REPORT in self.features else 12)
        gso = chance.choice([0, 1, 4, 0x81, 0x84, 3, 5, 255])
        start, offset = chance.choice([14, 34, 54, 38, chance.getrandbits(16)]), chance.choice([16, 6, 65535])
        size = chance.choice([0, 1, 48, 536, 1448, 65535])
        raw = struct.pack("<BBHHHHH", chance.choice([0, 1, 1, 2, 255]), gso, 54, size, start, offset, 0)
        return raw + bytes(8 if Feature.HASH_REPORT in self.features else 0)

    def packet(self) -> bytes:
        """TCP or UDP over IPv4 or IPv6, perhaps tagged, its own fields as they come."""
        chance = self.chance
        target = chance.choice([self.sim.mac, b"\xff" * 6, chance.randbytes(6)])
        tag = struct.pack(">HH", 0x8100, chance.randrange(4096)) if chance.random() < 0.2 else b""
        transport = chance.choice([6, 17, chance.randrange(256)])
        if chance.random() < 0.5:
            network = struct.pack(">BBHHHBBH", chance.choice([0x45, 0x4F, 0x40]), 0, 40, 0, 0, 64, transport, 0)
            network = b"\x08\x00" + network + chance.randbytes(8)
        else:
            network = b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, 20, transport, 64) + chance.randbytes(32)
        segment = chance.randbytes(12) + bytes([chance.choice([0x50, 0x50, 0xF0, 0])]) + chance.randbytes(7)
        payload = bytes(chance.choice([0, 1, 60, 1400, 9000, 65000]))
        whole = target + b"\x02\0\0\0\0\1" + tag + network + segment + payload
        return whole[: chance.choice([len(whole), len(whole), chance.randrange(1, len(whole))])]

    def command(self, device: VhostVdpa) -> None:
        """A control command of an existing class with a payload that may fit."""
        chance, queue = self.chance, self.queues[-1]
        payload = chance.choice(
            [
                chance.randbytes(chance.randrange(300)),
                chance.randrange(5).to_bytes(2, "little"),
                chance.randrange(3).to_bytes(4, "little") + chance.randbytes(24),
                struct.pack("<IHH", 0x3F, 3, 0) + bytes(8) + b"\2\0" + b"\x28" + chance.randbytes(40),
            ]
        )
        words = bytes([chance.randrange(7), chance.randrange(7)]) + payload
        at = self.queues_count * SLOT
        self.rings.buffer[at : at + len(words)] = words
        if queue.num > 1:
            self.descriptor(queue, 0, RINGS + at, len(words), NEXT, 1)
            self.descriptor(queue, 1, RINGS + at + 8192, 1, WRITE)
            self.publish(queue, 0)

    def iotlb(self, device: VhostVdpa) -> None:
        chance = self.chance
        memory = chance.choice([self.rings, self.buffers])
        size = chance.choice([4096, 4096 * chance.randrange(1, 9), chance.getrandbits(64), 1, 0])
        where = memory.hva + chance.randrange(SIZE) // 4096 * 4096 + chance.choice([0, 0, 0, 8])
        kind = chance.choice([1, 2, 2, 2, 3, 3, 4, 5, 6, 7])
        self.message(device, kind, self.address(), size, where, chance.randrange(8), chance.randrange(3))

    def half_a_message(self, device: VhostVdpa) -> None:
        os.write(device.fileno(), self.chance.randbytes(self.chance.choice([0, 1, 8, 71, 72, 73, 4096])))

    def unmap(self, device: VhostVdpa) -> None:
        iova, size = self.chance.choice([(RINGS, SIZE), (BUFFERS, SIZE)])
        self.message(device, 3, iova, size, asid=self.chance.randrange(2))

    def map_again(self, device: VhostVdpa) -> None:
        iova, memory = self.chance.choice([(RINGS, self.rings), (BUFFERS, self.buffers)])
        self.map(device, iova, memory, self.chance.randrange(2))

    def suspend(self, device: VhostVdpa) -> None:
        device.suspend()

    def resume(self, device: VhostVdpa) -> None:
        device.resume()

    def any_request(self, device: VhostVdpa) -> None:
        """Any ioctl with any argument; half of them for a queue that exists."""
        chance = self.chance
        name = chance.choice(sorted(IOCTLS))
        size = IOCTLS[name].size
        argument = bytearray(chance.randbytes(size))
        if size >= 8 and chance.random() < 0.5:
            argument[:8] = struct.pack("<II", chance.randrange(self.queues_count), chance.choice([0, 1, 2, 256, 32768]))
        device.request(name, bytes(argument) if size else b"")

    def queue_request(self, device: VhostVdpa) -> None:
        chance, index = self.chance, self.any_queue().index
        value = chance.choice([0, 1, 2, 3, 64, 256, 512, 32768, chance.getrandbits(16), chance.getrandbits(32)])
        make = chance.choice([device.set_vring_num, device.set_vring_base, device.set_vring_enable])
        make(index, value & 1 if make == device.set_vring_enable else value)

    def queue_addresses(self, device: VhostVdpa) -> None:
        desc, avail, used = self.address(), self.address() & ~1, self.address() & ~3
        device.set_vring_addr(self.any_queue().index, desc, avail, used)

    def queue_again(self, device: VhostVdpa) -> None:
        self.set_up_queue(device, self.any_queue())

    def group(self, device: VhostVdpa) -> None:
        device.set_group_asid(self.chance.randrange(4), self.chance.randrange(3))

    def status(self, device: VhostVdpa) -> None:
        device.set_status(Status(self.chance.choice([0, 1, 3, 11, 15, 0x4F, 255])))

    def doorbell(self, device: VhostVdpa) -> None:
        with device.mmap_doorbell(self.chance.randrange(self.queues_count + 2)) as page:
            page[0:4] = self.chance.randbytes(4)

    def knob(self, device: VhostVdpa) -> None:
        """What the machine's owner may do meanwhile."""
        chance = self.chance
        countdowns = ("fail_set_map", "fail_suspend", "fail_resume", "fail_vq_create", "corrupt_used_id")
        file, value = chance.choice(
            [
                (f"fault/{chance.choice(countdowns)}", chance.randrange(3)),
                ("link", chance.randrange(2)),
                ("announce", 1),
                ("reorder", chance.choice("YN")),
                ("inflight", chance.choice([0, 3])),
            ]
        )
        with contextlib.suppress(FileNotFoundError):
            self.sim.write(file, value)

    def look(self, device: VhostVdpa) -> None:
        self.sim.read("state")
        self.sim.read("stats")
        device.get_config(0, 12)

    def pause(self, device: VhostVdpa) -> None:
        time.sleep(0.002)


POLITE: dict[Action, int] = {
    Client.frame: 40,
    Client.command: 15,
    Client.map_again: 4,
    Client.suspend: 3,
    Client.resume: 5,
    Client.queue_again: 2,
    Client.doorbell: 3,
    Client.knob: 2,
    Client.look: 2,
    Client.pause: 10,
}
"""What leaves the rings as a driver would have them."""
RUDE: dict[Action, int] = {
    Client.chain: 20,
    Client.garbage: 4,
    Client.leap: 3,
    Client.iotlb: 12,
    Client.half_a_message: 2,
    Client.unmap: 2,
    Client.any_request: 8,
    Client.queue_request: 6,
    Client.queue_addresses: 2,
    Client.group: 2,
    Client.status: 2,
}


def fuzz(variant: str, seed: int, rounds: int = 0, seconds: float = 0, pairs: int = 1) -> Tally:
    """Let a hostile client at a new device; afterwards a guest on the same one has its frames."""
    sim = hwsim.add("prey", pairs, extra_features=int(EXTRA), **VARIANTS[variant])
    try:
        client = Client(sim, seed, pairs)
        try:
            tally = client.run(rounds, seconds)
        finally:
            client.close()
        for file in ("fail_set_map", "fail_suspend", "fail_resume", "fail_vq_create", "corrupt_used_id"):
            sim.write(f"fault/{file}", 0)
        sim.write("link", 1)
        use(sim, pairs)
    finally:
        hwsim.remove(sim.name)
    return tally
