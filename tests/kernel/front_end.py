"""A stub of a virtual machine: it describes its guest memory (a memfd), rings and eventfds to another process.

It has what a vhost-user front-end has and nothing of the device: memory from GPA 0 on with the holes of a PC, ring
addresses, sizes, eventfds, a dirty log that it reads itself. :class:`FrontEnd` is the side of the process that owns
the device; both talk over a socket, descriptors come with the messages.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyvhostvdpa
from pyvhostvdpa import FileRegion, GuestMemory
from pyvhostvdpa.guest.arena import GuestArena
from pyvhostvdpa.guest.nic import FRAME_BUFFER, GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import GUEST_PAGE
from pyvhostvdpa.net.features import SUPPORTED, Feature
from pyvhostvdpa.virtqueue.layout import GuestQueue, indices

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LAYOUT = ((0, 640 * KIB, 0), (MIB, 15 * MIB, MIB), (4 * GIB, 4 * MIB, 32 * MIB))
"""GPA, bytes and offset in the memfd of each region."""
PLUGGED = (5 * GIB, 2 * MIB, 40 * MIB)
"""A region that comes while the machine runs."""
END = PLUGGED[0] + PLUGGED[1]
LOG_BYTES = END // GUEST_PAGE // 8
RING = 32


# -- the machine -------------------------------------------------------------------


class Machine:
    """Does what it is asked for by name; each answer is a value and descriptors."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.ram = os.memfd_create("vm", os.MFD_CLOEXEC)
        os.ftruncate(self.ram, 48 * MIB)
        self.memory = GuestMemory.from_files(
            FileRegion(gpa, size, self.ram, at) for gpa, size, at in (*LAYOUT, PLUGGED)
        )
        self.log = os.memfd_create("vhost-log", os.MFD_CLOEXEC)
        self.nic: GuestNic | None = None
        self.traffic: Traffic | None = None

    def serve(self) -> None:
        while data := self.control.recv(1 << 16):
            name, *arguments = pickle.loads(data)
            try:
                value, descriptors = getattr(self, name)(*arguments)
            except BaseException:
                value, descriptors = traceback.format_exc(), []
                name = "crashed"
            socket.send_fds(self.control, [pickle.dumps((name, value))], descriptors)

    def regions(self) -> Any:
        return [(gpa, size, at) for gpa, size, at in LAYOUT], [self.ram]

    def driver(self, region: int, offered: int) -> Any:
        """A driver starts: features of those offered, and rings in one region."""
        gpa, size, _ = LAYOUT[region]
        features = SUPPORTED & Feature(offered)
        self.nic = GuestNic(
            self.memory, NicOptions(ring_size=RING, features=features), GuestArena(self.memory, gpa, size)
        )
        self.traffic = Traffic(self.nic)
        return int(features), []

    def rings(self) -> Any:
        """Ring addresses, sizes and eventfds, as they are now."""
        assert self.nic is not None
        queues = self.nic.queues
        places = [replace(queue, kick=-1, call=-1) for queue in queues]
        return places, [fd for queue in queues for fd in (queue.kick, queue.call)]

    def renew(self, index: int) -> Any:
        """Another pair of eventfds for one queue, that the driver uses from now on."""
        assert self.nic is not None
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        pair = self.nic.pairs[0]
        old = pair.rx if index == 0 else pair.tx
        new = replace(old, kick=kick, call=call)
        self.pause()
        if index == 0:
            pair.rx, pair.c.rx_kick, pair.c.rx_call = new, kick, call
        else:
            pair.tx, pair.c.tx_kick, pair.c.tx_call = new, kick, call
        # close the old ones: a notification through them would not wake the other side
        os.close(old.kick)
        os.close(old.call)
        self.run()
        return None, [kick, call]

    def run(self) -> Any:
        assert self.traffic is not None
        self.traffic.run()
        return None, []

    def pause(self) -> Any:
        assert self.traffic is not None
        self.traffic.pause()
        return None, []

    def drain(self) -> Any:
        assert self.traffic is not None
        return self.traffic.stop_sending(20.0), []

    def counts(self) -> Any:
        assert self.nic is not None
        counts = self.nic.counts()
        return (counts.received, counts.lost, counts.duplicated, counts.corrupted), []

    def used(self) -> Any:
        assert self.nic is not None
        return {queue.index: indices(queue, self.memory)[1] for queue in self.nic.queues}, []

    def new_log(self, size: int) -> Any:
        """Another dirty log, which is read from now on."""
        os.close(self.log)
        self.log = os.memfd_create("vhost-log", os.MFD_CLOEXEC)
        os.ftruncate(self.log, size)
        return None, [self.log]

    def dirty(self) -> Any:
        """The numbers of the pages in the log, which a front-end reads by its own mapping."""
        with mmap.mmap(self.log, 0) as log:
            content = bytes(log)
        return [8 * at + bit for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1], []

    def receive_pages(self) -> Any:
        """The numbers of the pages of receive buffers and used rings."""
        assert self.nic is not None
        pair = self.nic.pairs[0]
        return _pages((int(pair.c.rx_gpa), RING * FRAME_BUFFER), pair.rx.parts[2], pair.tx.parts[2]), []

    def used_pages(self) -> Any:
        """The numbers of the pages of used rings."""
        assert self.nic is not None
        return _pages(*(queue.parts[2] for queue in self.nic.queues)), []

    def close_driver(self) -> Any:
        assert self.nic is not None
        self.pause()
        self.nic.close()
        self.nic = self.traffic = None
        return None, []


def _pages(*places: tuple[int, int]) -> list[int]:
    pages = [range(gpa // GUEST_PAGE, (gpa + size - 1) // GUEST_PAGE + 1) for gpa, size in places]
    return sorted({page for each in pages for page in each})


# -- the side of the device -------------------------------------------------------------


class FrontEnd:
    """The machine as the process sees it that has the device."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(pyvhostvdpa.__file__).parents[1]), *sys.path]),
        }
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._open: list[int] = []

    def ask(self, name: str, *arguments: Any) -> tuple[Any, list[int]]:
        self.control.send(pickle.dumps((name, *arguments)))
        data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 20, 8)
        self._open += descriptors
        assert data, "the machine is gone"
        answered, value = pickle.loads(data)
        assert answered == name, value
        return value, descriptors

    def value(self, name: str, *arguments: Any) -> Any:
        return self.ask(name, *arguments)[0]

    def regions(self) -> list[FileRegion]:
        places, [fd] = self.ask("regions")
        return [FileRegion(gpa, size, fd, at) for gpa, size, at in places]

    def plugged(self) -> FileRegion:
        """The region that comes later."""
        _, [fd] = self.ask("regions")
        gpa, size, at = PLUGGED
        return FileRegion(gpa, size, fd, at)

    def queues(self) -> list[GuestQueue]:
        places, descriptors = self.ask("rings")
        return [
            replace(place, kick=kick, call=call)
            for place, kick, call in zip(places, descriptors[::2], descriptors[1::2], strict=True)
        ]

    def received(self, more: int) -> None:
        """Wait until ``more`` frames than now have come in."""
        want, end = self.value("counts")[0] + more, time.monotonic() + 30
        while self.value("counts")[0] < want:
            assert time.monotonic() < end, f"{self.value('counts')} frames, {want} were waited for"
            time.sleep(0.05)

    def close(self) -> None:
        self.control.close()
        self.process.wait(20)
        for fd in self._open:
            os.close(fd)


if __name__ == "__main__":
    Machine(socket.socket(fileno=int(sys.argv[1]))).serve()
