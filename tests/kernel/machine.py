"""A virtual machine without a VMM: memory in a memfd, a driver in it, a scripted vhost-user front-end before it.

The driver is the package's synthetic one. The back-end is ``vhost-vdpa serve`` in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from qtest import wait_for
from vhost_front_end import EVERY, FrontEnd, status_of

from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import FileRegion, GuestMemory
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.vhost_user.messages import ProtocolFeature

MiB = 1 << 20
MEMORY = 64 * MiB
PAGE = 4096
LAYOUT = ((0, 640 << 10, 0), (MiB, MEMORY - MiB, MiB))
WANTED = int(Feature.VERSION_1 | Feature.MQ | Feature.MRG_RXBUF) & ~int(Feature.MRG_RXBUF) | 1 << 30


class Serve:
    """``vhost-vdpa serve`` on one device."""

    def __init__(self, device: str, folder: Path, *options: str) -> None:
        self.device, self._folder, self._options = device, folder, options
        self.path = str(folder / f"{os.path.basename(device)}.sock")
        words = [sys.executable, "-m", "pyvhostvdpa", "serve", device, "--socket-path", self.path, "--json", *options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            # the last socket that it makes; one of a server that was killed may still be there
            wait_for(lambda: self._answers() or self.process.poll() is not None, 60.0)
        except BaseException:
            self.process.kill()
            raise
        if self.process.poll() is not None:
            raise AssertionError(self.process.communicate()[1])

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as asking:
            return asking.connect_ex(f"{self.path}.status") == 0

    def again(self) -> Serve:
        """Another process in its place."""
        return Serve(self.device, self._folder, *self._options)

    def connect(self, use: ProtocolFeature = EVERY) -> FrontEnd:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(self.path)
        return FrontEnd(connection, use)

    def status(self) -> dict[str, Any]:
        return status_of(self.path)

    def cpu_ns(self) -> int:
        """CPU time that the process has used, ns; it does not change while no thread of it runs."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)

    def end(self) -> list[dict[str, Any]]:
        """End it as a service manager does; its events."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, err
        return [json.loads(line) for line in out.splitlines()]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


class Machine:
    """A virtual machine with traffic. It is paused as long as its front-end is not started."""

    def __init__(self, pairs: int = 1) -> None:
        self.pairs = pairs
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, MEMORY)
        self.memory = GuestMemory.from_files(FileRegion(gpa, size, self.fd, offset) for gpa, size, offset in LAYOUT)
        self.nic = GuestNic(self.memory, NicOptions(pairs=pairs, features=Feature.VERSION_1))
        self.traffic = Traffic(self.nic)
        self.front: FrontEnd | None = None
        self.bases = [0] * (2 * pairs)
        self._shared = False

    @classmethod
    def copy_of(cls, other: Machine) -> Machine:
        """The other side of a migration: memory of its own, the same driver."""
        made = cls.__new__(cls)
        made.pairs, made.bases = other.pairs, list(other.bases)
        made.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(made.fd, MEMORY)
        made.memory = GuestMemory.from_files(FileRegion(gpa, size, made.fd, offset) for gpa, size, offset in LAYOUT)
        made.front, made._shared = None, False
        return made

    def take_driver(self, other: Machine) -> None:
        """Continue where the other's driver stopped; the memory is there already."""
        self.bases = list(other.bases)
        self.nic = GuestNic.restore(self.memory, other.nic.state(None))
        self.traffic = Traffic(self.nic)

    def plug(self, front: FrontEnd) -> None:
        """Connect the NIC to a back-end."""
        front.layout, front.queues, front.memory = LAYOUT, self.nic.queues, os.dup(self.fd)
        front.connect()
        front.features = front.offered & WANTED
        if self.pairs == 1:
            front.features &= ~int(Feature.MQ)
        self.front, self._shared = front, False

    def cont(self, log: bool = False) -> None:
        """Let the machine run."""
        assert self.front is not None
        slots = ProtocolFeature.CONFIGURE_MEM_SLOTS in self.front.protocol
        self.front.start(self.pairs, share=not (self._shared and slots), log=log, bases=self.bases)
        self._shared = True
        self.traffic.run()

    def stop(self) -> None:
        """Pause the machine: its CPU first, then its device."""
        assert self.front is not None
        self.traffic.pause()
        self.bases = self.front.stop(2 * self.pairs)

    def receives(self, frames: int = 300, seconds: float = 60.0) -> None:
        goal = self.nic.counts().received + frames
        wait_for(lambda: self.nic.counts().received >= goal, seconds)

    def settle(self) -> None:
        """Let everything sent arrive, and demand a perfect account."""
        assert self.traffic.stop_sending(30.0)
        counts = self.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0), counts

    def break_ring(self, index: int = 1) -> None:
        """Make more available than the ring has, which stops a device (virtio 1.3, 2.7)."""
        queue = self.nic.queues[index]
        at = ffi.cast("uint16_t *", self.memory.hva(queue.avail + 2, 2))
        at[0] = (at[0] + queue.num + 1) % (1 << 16)
        os.eventfd_write(queue.kick, 1)

    def page(self, gpa: int) -> bytes:
        return bytes(ffi.buffer(ffi.cast("char *", self.memory.hva(gpa, PAGE)), PAGE))

    def pages(self) -> Iterator[int]:
        for gpa, size, _ in LAYOUT:
            yield from range(gpa, gpa + size, PAGE)

    def put(self, gpa: int, content: bytes) -> None:
        ffi.memmove(ffi.cast("char *", self.memory.hva(gpa, PAGE)), content, PAGE)

    def unplug(self) -> None:
        if self.front is not None:
            self.front.close()
            self.front = None

    def close(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.pause()
        self.unplug()
        if hasattr(self, "nic"):
            self.nic.close()
        self.memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def logged(log: int) -> set[int]:
    """The pages that a log has, taken out of it as a front-end does."""
    size = os.fstat(log).st_size
    content = os.pread(log, size, 0)
    return {(8 * at + bit) * PAGE for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1}
