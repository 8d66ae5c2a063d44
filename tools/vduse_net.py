#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A virtio-net device in user space (VDUSE) that sends back every frame it is given.

    tools/vduse_net.py [--background] NAME=MAC...
    vdpa dev add name NAME mgmtdev vduse

It needs the kernel's `vduse` module and nothing else. One RX and one TX
queue, no control queue (VDUSE allows none for net), no suspend: what a
vhost-vdpa tool meets on a device of the lesser sort. A frame waits in the TX
queue until there is an RX buffer for it, so no frame is lost. SIGUSR1 pulls the
link's plug, or puts it back, with a configuration interrupt.

The rings are touched from Python, which has no memory barriers: it runs on
x86 only, where loads and stores keep their order but for a store before a
load, and every wait here is a system call. It always notifies, since whether
to would be just such a load.
"""

import argparse
import fcntl
import mmap
import os
import platform
import selectors
import signal
import struct
import sys
from dataclasses import dataclass, field

CREATE_DEV, DESTROY_DEV = 0x41508102, 0x41008103
SET_API_VERSION = 0x40088101
IOTLB_GET_FD = 0xC0208110
SET_CONFIG, INJECT_CONFIG_IRQ = 0x40088112, 0x8113
VQ_SETUP, VQ_GET_INFO, VQ_SETUP_KICKFD, VQ_INJECT_IRQ = 0x40208114, 0xC0308115, 0x40088116, 0x40048117
GET_VQ_STATE, SET_STATUS, UPDATE_IOTLB = range(3)
DRIVER_OK = 4

VERSION_1, ACCESS_PLATFORM, MTU, MAC, STATUS = 1 << 32, 1 << 33, 1 << 3, 1 << 5, 1 << 16
FEATURES = VERSION_1 | ACCESS_PLATFORM | MTU | MAC | STATUS
RX, TX = 0, 1
RING_SIZE, VIRTIO_ID_NET = 256, 1
DESC_F_NEXT, DESC_F_WRITE = 1, 2
REQUEST = struct.Struct("=II16x128s")
RESPONSE = struct.Struct("=II16x128s")
ENTRY = struct.Struct("=QQQB7x")
INFO = struct.Struct("=IIQQQH6xB7x")
DESC = struct.Struct("<QIHH")
USED = struct.Struct("<II")


@dataclass
class Memory:
    """What the device may reach: the driver's files, mapped here when first needed."""

    fd: int
    regions: list[tuple[int, int, memoryview]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop every mapping: the driver has changed its maps."""
        self.regions.clear()

    def view(self, iova: int, size: int) -> memoryview:
        """Return `size` bytes at `iova`; ValueError if that is not one mapping."""
        for start, last, view in self.regions:
            if start <= iova and iova + size - 1 <= last:
                return view[iova - start : iova - start + size]
        entry = bytearray(ENTRY.pack(0, iova, iova, 0))
        try:
            fd = fcntl.ioctl(self.fd, IOTLB_GET_FD, entry)
        except OSError as error:
            raise ValueError(f"{iova:#x} is not mapped: {error.strerror}") from None
        offset, start, last, perm = ENTRY.unpack(entry)
        access = {1: mmap.PROT_READ, 2: mmap.PROT_WRITE}.get(perm, mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            pages = mmap.mmap(fd, last - start + 1, mmap.MAP_SHARED, access, offset=offset)
        finally:
            os.close(fd)
        if iova + size - 1 > last:
            raise ValueError(f"{size} bytes at {iova:#x} leave the mapping {start:#x}-{last:#x}")
        self.regions.append((start, last, memoryview(pages)))
        return self.view(iova, size)


class Queue:
    """One split virtqueue, from the device's side."""

    def __init__(self, memory: Memory, num: int, addresses: tuple[int, int, int], base: int) -> None:
        desc, avail, used = addresses
        self.memory = memory
        self.num = num
        self.desc = memory.view(desc, 16 * num)
        # element access of a cast view is one load or store, an index is never torn
        self.avail = memory.view(avail, 4 + 2 * num).cast("H")
        self.used_ring = memory.view(used, 4 + 8 * num)
        self.used = self.used_ring[:4].cast("H")
        self.taken = base
        self.returned = self.used[1]

    def __len__(self) -> int:
        """How many chains the driver has made available."""
        return (self.avail[1] - self.taken) & 0xFFFF

    def take(self) -> tuple[int, list[memoryview]]:
        """Take the next chain: its head, and its buffers."""
        head = at = self.avail[2 + self.taken % self.num]
        buffers = []
        for _ in range(self.num):
            address, length, flags, following = DESC.unpack_from(self.desc, 16 * at)
            buffers.append(self.memory.view(address, length))
            if not flags & DESC_F_NEXT:
                break
            at = following
        self.taken = (self.taken + 1) & 0xFFFF
        return head, buffers

    def put(self, head: int, written: int) -> None:
        """Hand a chain back; not visible before `publish`."""
        USED.pack_into(self.used_ring, 4 + 8 * (self.returned % self.num), head, written)
        self.returned = (self.returned + 1) & 0xFFFF

    def publish(self) -> None:
        """Publish the used index to the driver."""
        self.used[1] = self.returned


class Device:
    """One VDUSE device with its rings."""

    def __init__(self, control: int, name: str, mac: bytes) -> None:
        self.name, self.control = name, control
        config = mac + struct.pack("<HHH", 1, 1, 1500)
        head = struct.pack("=256sIIQII", name.encode(), 0, VIRTIO_ID_NET, FEATURES, 2, 4096)
        fcntl.ioctl(control, CREATE_DEV, head.ljust(332, b"\0") + struct.pack("=I", len(config)) + config)
        self.fd = os.open(f"/dev/vduse/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        for index in (RX, TX):
            fcntl.ioctl(self.fd, VQ_SETUP, struct.pack("=IH26x", index, RING_SIZE))
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in (RX, TX)]
        self.memory = Memory(self.fd)
        self.queues: list[Queue | None] = [None, None]
        self.running = False
        self.link = 1

    def toggle_link(self) -> None:
        """Change the link's status and notify the driver, if there is one."""
        self.link ^= 1
        fcntl.ioctl(self.fd, SET_CONFIG, struct.pack("=IIH", 6, 2, self.link))
        if self.running:
            fcntl.ioctl(self.fd, INJECT_CONFIG_IRQ)

    def answer(self) -> None:
        """Read one message of the kernel and answer it.

        The kernel waits for an answer only so long. It takes a message back that was not read, and does not know one
        that is answered too late (drivers/vdpa/vdpa_user/vduse_dev.c:vduse_dev_write_iter).
        """
        try:
            kind, number, payload = REQUEST.unpack(os.read(self.fd, REQUEST.size))
        except BlockingIOError:
            # a device that the kernel has marked broken is always ready and has nothing to read; this fails on it
            self._info(RX)
            return
        result = b""
        if kind == GET_VQ_STATE:
            (index,) = struct.unpack_from("=I", payload)
            result = struct.pack("=IH", index, self._base(index))
        elif kind == SET_STATUS:
            self._set_status(payload[0])
        elif kind == UPDATE_IOTLB:
            self._remap()
        try:
            os.write(self.fd, RESPONSE.pack(number, 0, result))
        except FileNotFoundError:
            print(f"{self.name}: answered too late, the kernel waits no more", file=sys.stderr, flush=True)

    def _base(self, index: int) -> int:
        queue = self.queues[index]
        return queue.taken if queue else self._info(index)[5]

    def _info(self, index: int) -> tuple[int, ...]:
        info = bytearray(INFO.pack(index, *[0] * 6))
        fcntl.ioctl(self.fd, VQ_GET_INFO, info)
        return INFO.unpack(info)

    def _set_status(self, status: int) -> None:
        if not status & DRIVER_OK:
            self.running = False
            self.queues = [None, None]
        elif not self.running:
            self.running = True
            self._start({})

    def _remap(self) -> None:
        """Take up the queues where they are, in the memory as it is now."""
        at = {index: queue.taken for index, queue in enumerate(self.queues) if queue}
        self.queues = [None, None]
        self.memory.forget()
        if self.running:
            self._start(at)

    def _start(self, at: dict[int, int]) -> None:
        for index in (RX, TX):
            _, num, desc, driver, device, base, ready = self._info(index)
            if ready:
                try:
                    self.queues[index] = Queue(self.memory, num, (desc, driver, device), at.get(index, base))
                except ValueError as error:
                    self._complain(index, error)
            fcntl.ioctl(self.fd, VQ_SETUP_KICKFD, struct.pack("=Ii", index, self.kicks[index]))

    def _complain(self, index: int, error: ValueError) -> None:
        self.queues[index] = None
        print(f"{self.name}: queue {index} stopped: {error}", file=sys.stderr, flush=True)

    def loop_back(self) -> None:
        """Move every frame there is an RX buffer for."""
        rx, tx = self.queues
        if rx is None or tx is None:
            return
        moved = 0
        while len(tx) and len(rx):
            try:
                self._move(tx, rx)
            except ValueError as error:
                self._complain(TX, error)
                break
            moved += 1
        if moved:
            for index, queue in enumerate((rx, tx)):
                queue.publish()
                fcntl.ioctl(self.fd, VQ_INJECT_IRQ, struct.pack("=I", index))

    def _move(self, tx: Queue, rx: Queue) -> None:
        sent, pieces = tx.take()
        frame = b"".join(pieces)
        head, buffers = rx.take()
        written = 0
        for buffer in buffers:
            part = frame[written : written + len(buffer)]
            buffer[: len(part)] = part
            written += len(part)
        rx.put(head, written)
        tx.put(sent, 0)

    def destroy(self) -> None:
        """Remove the device; EBUSY while the vdpa bus has it."""
        os.close(self.fd)
        fcntl.ioctl(self.control, DESTROY_DEV, self.name.encode().ljust(256, b"\0"))


def serve(devices: list[Device]) -> None:
    """Serve messages and kicks until a signal ends it."""
    with selectors.DefaultSelector() as selector:
        for device in devices:
            selector.register(device.fd, selectors.EVENT_READ, (device, None))
            for kick in device.kicks:
                selector.register(kick, selectors.EVENT_READ, (device, kick))
        while True:
            for key, _ in selector.select():
                device, kick = key.data
                try:
                    if kick is None:
                        device.answer()
                    else:
                        os.eventfd_read(kick)
                    device.loop_back()
                except PermissionError:
                    # the kernel has given the device up and allows nothing more; the others are served on
                    print(
                        f"{device.name}: broken, to be deleted: vdpa dev del {device.name}", file=sys.stderr, flush=True
                    )
                    for fd in (device.fd, *device.kicks):
                        selector.unregister(fd)
                    break


def _background() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)


def main() -> int:
    """Make the devices, then serve them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="+", metavar="NAME=MAC")
    parser.add_argument("--background", action="store_true", help="return once the devices can be added")
    options = parser.parse_args()
    if platform.machine() != "x86_64":
        parser.error("runs on x86_64 only: it relies on that processor's order of loads and stores")
    control = os.open("/dev/vduse/control", os.O_RDWR | os.O_CLOEXEC)
    # version 0 is what every kernel with VDUSE speaks
    fcntl.ioctl(control, SET_API_VERSION, struct.pack("=Q", 0))
    devices = []
    for word in options.devices:
        name, _, mac = word.partition("=")
        devices.append(Device(control, name, bytes.fromhex((mac or "52:54:91:a1:b2:f1").replace(":", ""))))
    if options.background:
        _background()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGUSR1, lambda *_: [device.toggle_link() for device in devices] and None)
    try:
        serve(devices)
    finally:
        for device in devices:
            device.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
