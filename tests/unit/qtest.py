"""Stock QEMU as a vhost-user front-end, without a guest: this process has the driver.

Debian's QEMU has no ``-accel qtest`` in all versions, so its CPU is an emulated one whose firmware is HLT throughout. A
client of QEMU's qtest socket (docs/devel/testing/qtest.rst) writes to the virtio-net device's registers as a driver
does. Guest memory is a file that this process has mapped too: rings and buffers are the synthetic NIC's. QEMU's own
event loop carries a notification to the back-end's eventfd; the other way no interrupt is needed, since the
driver is woken regularly.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import FileRegion, GuestMemory
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.virtqueue.layout import GuestQueue

MiB = 1 << 20
MEMORY = 64 * MiB
LOW = 640 << 10
MAC = "52:54:00:12:34:56"
SLOT = 4
BAR = 0xE0000000
WANTED = int(Feature.VERSION_1)
MULTIQUEUE = int(Feature.VERSION_1 | Feature.MQ | Feature.CTRL_VQ)
_CONFIG_ADDRESS, _CONFIG_DATA = 0xCF8, 0xCFC
_BAR4, _COMMAND, _CAPABILITIES = 0x20, 4, 0x34
_VENDOR, _COMMON_CFG, _NOTIFY_CFG = 9, 1, 2
_FEATURE_SELECT, _FEATURE, _GUEST_SELECT, _GUEST_FEATURE = 0, 4, 8, 12
_NUM_QUEUES, _STATUS, _QUEUE, _QUEUE_SIZE, _QUEUE_ENABLE, _QUEUE_NOTIFY = 18, 20, 22, 24, 28, 30
_QUEUE_DESC, _QUEUE_DRIVER, _QUEUE_DEVICE = 32, 40, 48
_KICK_S = 0.002
_HLT, _FIRMWARE = b"\xf4", 64 << 10
_FILLED = 8 * MiB
"""Many times what a socket holds."""


class Server(Protocol):
    """What a machine is connected to."""

    path: str


def versions() -> list[str]:
    """The programs of stock QEMU that are here."""
    if chosen := os.environ.get("PYVHOSTVDPA_QEMU"):
        return chosen.split(":")
    found = sorted(str(path) for path in Path("/opt/vmm/qemu/bin").glob("qemu-*"))
    return found or [path for path in [shutil.which("qemu-system-x86_64")] if path]


class QtestError(Exception):
    """QEMU ended, or does not answer."""


class Monitor:
    """QEMU's monitor (QMP): commands by their names, answers, and the names of events so far."""

    def __init__(self, path: Path, alive: Callable[[], bool], seconds: float = 60.0) -> None:
        self._socket = connect(path, alive, seconds)
        self._lines = self._socket.makefile("rw")
        self.events: list[str] = []
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while True:
            line = self._lines.readline()
            if not line:
                raise QtestError("QEMU closed its monitor")
            message = json.loads(line)
            if "error" in message:
                raise QtestError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self.events.append(message["event"])

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def connect(path: Path, alive: Callable[[], bool], seconds: float = 60.0) -> socket.socket:
    """Connect to a socket that QEMU is about to open."""
    until = time.monotonic() + seconds
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(seconds)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            if not alive() or time.monotonic() > until:
                raise QtestError("QEMU ended or does not listen") from None
            time.sleep(0.02)
        else:
            return connection


class Qemu:
    """One QEMU with a virtio-net device before a vhost-user back-end, and a driver in this process.

    ``program`` is the QEMU, ``folder`` has its sockets and the file of guest memory, which its machines share:
    a migration leaves it where it is (``x-ignore-shared``). With ``listens`` the back-end connects to it. Its monitor
    has to answer within ``seconds``. The device is not set up before :meth:`probe`.
    """

    def __init__(
        self,
        program: str,
        folder: Path,
        name: str,
        backend: str,
        pairs: int = 1,
        options: tuple[str, ...] = (),
        listens: bool = False,
        seconds: float = 60.0,
    ) -> None:
        self.pairs = pairs
        self.name = name
        self.log = folder / f"{name}.log"
        self.ram = folder / "ram"
        self._notifier: threading.Thread | None = None
        self.nic: GuestNic | None = None
        self.memory: GuestMemory | None = None
        firmware = folder / "halt"
        firmware.write_bytes(_HLT * _FIRMWARE)
        words = [
            *(program, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-M", "q35"),
            *("-bios", str(firmware)),
            *("-m", str(MEMORY // MiB), "-machine", "memory-backend=ram", "-object"),
            f"memory-backend-file,id=ram,size={MEMORY},mem-path={self.ram},share=on",
            *("-chardev", f"socket,id=c,path={backend}{',server=on' if listens else ''}"),
            *("-netdev", f"vhost-user,id=n,chardev=c,queues={pairs}"),
            "-device",
            f"virtio-net-pci,netdev=n,id=nic,addr={SLOT},mq={'on' if pairs > 1 else 'off'},mac={MAC},romfile=",
            *("-qmp", f"unix:{folder / name}.qmp,server=on,wait=off"),
            *("-qtest", f"unix:{folder / name}.qtest,server=on,wait=off", "-qtest-log", os.devnull),
            *options,
        ]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            self.qmp = Monitor(folder / f"{name}.qmp", self.alive, seconds)
            self._socket = connect(folder / f"{name}.qtest", self.alive, seconds)
        except Exception as e:
            self.process.kill()
            self.process.wait()
            raise QtestError(f"{e}: {self.said()}") from e
        self._lines = self._socket.makefile("rw")
        self._lock = threading.Lock()

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def said(self) -> str:
        """What QEMU printed."""
        return self.log.read_text(errors="replace").strip()

    # -- registers -------------------------------------------------------------------

    def _ask(self, words: str) -> int:
        with self._lock:
            self._lines.write(words + "\n")
            self._lines.flush()
            while True:
                answer = self._lines.readline().split()
                if not answer:
                    raise QtestError(f"QEMU ended: {self.said()}")
                if answer[0] == "OK":
                    return int(answer[1], 0) if len(answer) > 1 else 0
                if answer[0] != "IRQ":
                    raise QtestError(f"{words}: {answer}")

    def _config(self, offset: int, value: int | None = None, width: str = "l") -> int:
        self._ask(f"outl {_CONFIG_ADDRESS:#x} {1 << 31 | SLOT << 11 | offset & ~3:#x}")
        port = _CONFIG_DATA + (offset & 3)
        return self._ask(f"in{width} {port:#x}" if value is None else f"out{width} {port:#x} {value:#x}")

    def _read(self, offset: int, width: str = "l") -> int:
        return self._ask(f"read{width} {self._common + offset:#x}")

    def _write(self, offset: int, value: int, width: str = "l") -> None:
        self._ask(f"write{width} {self._common + offset:#x} {value:#x}")

    # -- the driver ------------------------------------------------------------------

    def probe(self) -> int:
        """Map the device's registers and reset it; the features that it offers."""
        self._config(_BAR4, BAR)
        self._config(_BAR4 + 4, 0)
        self._config(_COMMAND, 7, "w")
        at, found = self._config(_CAPABILITIES) & 0xFF, {}
        while at:
            head = self._config(at)
            if head & 0xFF == _VENDOR:
                found.setdefault(head >> 24, self._config(at + 8))
                if head >> 24 == _NOTIFY_CFG:
                    self._multiplier = self._config(at + 16)
            at = head >> 8 & 0xFF
        self._common, self._notify = BAR + found[_COMMON_CFG], BAR + found[_NOTIFY_CFG]
        for status in (0, 1, 3):
            self._write(_STATUS, status, "b")
        offered = 0
        for word in range(2):
            self._write(_FEATURE_SELECT, word)
            offered |= self._read(_FEATURE) << 32 * word
        return offered

    def make_driver(self, ring_size: int = 256) -> None:
        """Put a driver into guest memory, which starts as QEMU has it."""
        fd = os.open(self.ram, os.O_RDWR | os.O_CLOEXEC)
        try:
            regions = [FileRegion(0, LOW, fd, 0), FileRegion(MiB, MEMORY - MiB, fd, MiB)]
            self.memory = GuestMemory.from_files(regions)
        finally:
            os.close(fd)
        control = 2 * self.pairs if self.pairs > 1 else None
        options = NicOptions(
            pairs=self.pairs, ring_size=ring_size, features=Feature.VERSION_1, control_index=control, control_ring=64
        )
        self.nic = GuestNic(self.memory, options)
        self.traffic = Traffic(self.nic)

    def take_driver(self, other: Qemu) -> None:
        """Continue with the driver of a machine that has moved here."""
        other.pause()
        self.nic, self.memory, self.traffic = other.nic, other.memory, other.traffic
        other.nic = other.memory = None
        self._common, self._notify, self._multiplier = other._common, other._notify, other._multiplier
        self._offsets = other._offsets
        # unlike a CPU it ran on while no machine did, and what it kicked went to the one that had stopped
        for queue in self._queues():
            os.eventfd_write(queue.kick, 1)

    def start(self, features: int) -> None:
        """FEATURES_OK, rings, DRIVER_OK."""
        assert self.nic is not None
        for word in range(2):
            self._write(_GUEST_SELECT, word)
            self._write(_GUEST_FEATURE, features >> 32 * word & 0xFFFFFFFF)
        self._write(_STATUS, 11, "b")
        assert self._read(_STATUS, "b") == 11, "QEMU refused the features"
        self._offsets = {}
        for queue in self._queues():
            self._write(_QUEUE, queue.index, "w")
            self._write(_QUEUE_SIZE, queue.num, "w")
            for at, address in ((_QUEUE_DESC, queue.desc), (_QUEUE_DRIVER, queue.avail), (_QUEUE_DEVICE, queue.used)):
                self._write(at, address & 0xFFFFFFFF)
                self._write(at + 4, address >> 32)
            self._write(_QUEUE_ENABLE, 1, "w")
            self._offsets[queue.index] = self._read(_QUEUE_NOTIFY, "w")
        self._write(_STATUS, 15, "b")

    def _queues(self) -> list[GuestQueue]:
        assert self.nic is not None
        return [*self.nic.queues, *([self.nic.control.queue] if self.nic.control else [])]

    def status(self) -> int:
        """The device status as the driver reads it."""
        return self._read(_STATUS, "b")

    def reset_driver(self) -> None:
        """What a driver does that is unloaded."""
        self.pause()
        self._write(_STATUS, 0, "b")

    def run(self) -> None:
        """Let the driver run: frames, and notifications by way of QEMU."""
        self.run_control()
        self.traffic.run()

    def run_control(self) -> None:
        """Carry notifications by way of QEMU: enough for commands on the control queue."""
        if self._notifier is None:
            self._stopping = threading.Event()
            self._notifier = threading.Thread(target=self._notify_both_ways)
            self._notifier.start()

    def pause(self) -> None:
        """Stop the driver where it is, as a stopped CPU does."""
        if self.nic is not None:
            self.traffic.pause()
        if self._notifier is not None:
            self._stopping.set()
            self._notifier.join()
            self._notifier = None

    def _notify_both_ways(self) -> None:
        with contextlib.suppress(QtestError, OSError, ValueError):
            while not self._stopping.is_set():
                for queue in self._queues():
                    if _taken(queue.kick):
                        at = self._notify + self._offsets[queue.index] * self._multiplier
                        self._ask(f"writew {at:#x} {queue.index}")
                    os.eventfd_write(queue.call, 1)
                time.sleep(_KICK_S)

    def fill(self) -> None:
        """Write into guest memory that the driver does not use, so that a migration has that to send."""
        with self.ram.open("r+b") as file:
            file.seek(MEMORY - _FILLED)
            file.write(b"\x5a" * _FILLED)

    def receives(self, frames: int = 100, seconds: float = 60.0) -> None:
        """Wait until that many more frames came back."""
        assert self.nic is not None
        goal = self.nic.counts().received + frames
        wait_for(lambda: self.nic is not None and self.nic.counts().received >= goal, seconds)

    def settle(self) -> None:
        """Let everything sent arrive, and demand a perfect account."""
        assert self.nic is not None
        assert self.traffic.stop_sending(30.0)
        counts = self.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0), counts

    def send_again(self) -> None:
        """Send after :meth:`settle`."""
        assert self.nic is not None
        for pair in self.nic.pairs:
            pair.c.sending = 1

    def close(self) -> None:
        """End QEMU and the driver."""
        self.pause()
        self._lines.close()
        self._socket.close()
        self.qmp.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.nic is not None:
            self.nic.close()
        if self.memory is not None:
            self.memory.close()


def _taken(kick: int) -> bool:
    try:
        return os.eventfd_read(kick) > 0
    except BlockingIOError:
        return False


def wait_for(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return what ``what`` returns once that is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, f"waited {seconds} s"
        time.sleep(0.02)
    return found


def migrate(source: Qemu, destination: Qemu, folder: Path, seconds: float = 120.0) -> dict[str, Any]:
    """Move the machine and its driver; what query-migrate said at the end.

    ``destination`` was started with ``-incoming defer``.
    """
    path = f"unix:{folder / 'migration.sock'}"
    begin_migration(source, destination, path)
    found: dict[str, Any] = wait_for(lambda: ended(source), seconds)
    if found["status"] == "completed":
        wait_for(lambda: destination.qmp("query-status")["status"] == "running", seconds)
        destination.take_driver(source)
    return found


def begin_migration(source: Qemu, destination: Qemu | None, uri: str, shared: bool = True) -> None:
    """Start a migration; without a destination, its other end is not a QEMU of this rig.

    Guest memory is ``shared`` and stays where it is, or it is sent.
    """
    for machine in (source, destination):
        if machine is not None:
            capabilities = [{"capability": "x-ignore-shared", "state": shared}]
            machine.qmp("migrate-set-capabilities", capabilities=capabilities)
    if destination is not None:
        destination.qmp("migrate-incoming", uri=uri)
    source.qmp("migrate", uri=uri)


@contextlib.contextmanager
def endless_migration(source: Qemu, folder: Path) -> Iterator[None]:
    """Begin a migration whose first round does not end, whatever that takes: only a cancel ends it.

    The other end takes the connection and reads nothing, and there is more to send than a socket holds. A limit of
    the bandwidth would not do: with 4 KiB a second QEMU still sends two pages each 100 ms, and is done in 2 s.
    """
    source.fill()
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(folder / "nobody"))
        nobody.listen()
        begin_migration(source, None, f"unix:{folder / 'nobody'}", shared=False)
        yield


def begun(machine: Qemu) -> str | None:
    """What query-migrate says once the migration has been set up."""
    status: str | None = machine.qmp("query-migrate").get("status")
    return None if status in (None, "setup") else status


def ended(machine: Qemu) -> dict[str, Any] | None:
    """What query-migrate says once the migration is over."""
    found: dict[str, Any] = machine.qmp("query-migrate")
    return found if found.get("status") in ("completed", "failed", "cancelled") else None


class QemuRig:
    """Machines of one test, of one program, in one folder; all are closed with ``stack``."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder, self._program = folder, program
        self.stack = contextlib.ExitStack()

    def qemu(
        self,
        name: str,
        server: Server,
        pairs: int = 1,
        options: tuple[str, ...] = (),
        listens: bool = False,
        seconds: float = 60.0,
    ) -> Qemu:
        """A machine on a server, paused."""
        made = Qemu(self._program, self.folder, name, server.path, pairs, options, listens, seconds)
        self.stack.callback(made.close)
        return made

    @contextlib.contextmanager
    def migrating(self, machine: Qemu) -> Iterator[None]:
        """A migration whose first round does not end; it is cancelled behind the block."""
        with endless_migration(machine, self.folder):
            yield
            # "setup" until the migration's own thread has come that far; nothing ends it but the cancel
            assert wait_for(lambda: begun(machine)) == "active"
            machine.qmp("migrate_cancel")
            assert wait_for(lambda: ended(machine))["status"] == "cancelled"

    def driven(self, server: Server, pairs: int, options: tuple[str, ...]) -> Qemu:
        """A machine whose driver has started the device."""
        machine = self.qemu("source", server, pairs, options)
        offered = machine.probe()
        machine.make_driver()
        machine.start(offered & (MULTIQUEUE if pairs > 1 else WANTED))
        return machine


@contextlib.contextmanager
def running(machine: Qemu) -> Iterator[Qemu]:
    """Close a machine at the end of a block."""
    try:
        yield machine
    finally:
        machine.close()
