"""One virtual machine: a stock QEMU with the tiny guest, its monitor and its console."""

import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labvm.network import ADDRESS, AS_PROGRAMS_RUN, GUEST_ADDRESS, GUEST_MAC, has_huge_pages
from labvm.qmp import Console, Qmp, QmpError

PROGRAMS = Path("/opt/vmm/qemu/bin")
GUEST = Path("/opt/vmm/guest")
CALLS = GUEST / "calls.so"
TRANSLATED_MB = 64
"""For what QEMU has translated. Once it ends, this memory is slow for a while where this machine is emulated itself: it
holds code that the outer emulator has translated in turn."""
WATCHED_S, BUSIEST = 2.0, 8
"""For how long a machine is watched whose QEMU says nothing, and how many of its threads are named."""
RINGS = {"10.0": 1024}
"""Entries of the rings that a QEMU gives a guest whatever it is asked for; 256 where nothing else is known.

Debian's 10.0.13 does. A Linux guest gets EINVAL at SET_VRING_NUM from a device with smaller ones, and no network.
"""


def vmms() -> list[str]:
    """Return the versions of QEMU that are there, oldest first."""
    names = [path.name.removeprefix("qemu-") for path in PROGRAMS.glob("qemu-*")]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def ring_entries(vmm: str) -> int:
    """Return the ring size that a device must have for a QEMU's guests."""
    return RINGS.get(vmm, 256)


@functools.cache
def counter_khz() -> int:
    """Return how fast the time stamp counter runs, which an emulated guest shares with its machine."""
    done = subprocess.run([str(GUEST / "vm-peer"), "tsc"], capture_output=True, text=True, check=True)
    return int(done.stdout)


@dataclass(frozen=True)
class GuestMachine:
    """What a guest does, and how much memory it has."""

    memory: int = 128 << 20
    udp_us: int = 20000
    """Between two frames. An exchange costs an emulated guest in an emulated machine 2 to 3 ms, so this leaves it idle
    most of the time, and idle time is free in virtual time."""
    udp_bytes: int = 64
    memory_kib: int = 1024
    memory_pages: int = 2
    report_ms: int = 1000
    looped: bool = False
    """The device sends frames back to their sender, so there is no peer."""
    huge: bool = True
    """Its memory is huge pages, which :func:`network.wires` has set aside if the kernel can."""
    kernel: tuple[str, ...] = ()
    """More of its kernel's parameters."""
    firmware: bool = False
    """It is the network card's firmware (iPXE), which asks for an address and takes rings of at most 256 entries; it
    reports nothing."""
    options: tuple[str, ...] = ()
    """More of QEMU's options."""

    def words(self) -> str:
        """Return the kernel's command line."""
        words = ["console=ttyS0", "quiet", "panic=-1", "tsc=reliable", f"tsc_early_khz={counter_khz()}"]
        words += [f"{name}={getattr(self, name)}" for name in ("udp_us", "udp_bytes", "memory_kib", "memory_pages")]
        words += [f"report_ms={self.report_ms}"]
        words += self.kernel
        words += [] if self.looped else [f"guest_address={GUEST_ADDRESS}", f"peer_address={ADDRESS}"]
        return " ".join(words)


def vhost_vdpa(chardev: str, shadow: bool = False) -> list[str]:
    """Return the options by which QEMU itself drives a vDPA device."""
    return ["-netdev", f"vhost-vdpa,id=net,vhostdev={chardev}" + (",x-svq=on" if shadow else "")]


def vhost_user(socket: str, queues: int = 1) -> list[str]:
    """Return the options by which QEMU uses a back-end behind a socket, as `vhost-vdpa serve` is.

    It connects again if the back-end goes away.
    """
    return [
        *("-chardev", f"socket,id=backend,path={socket},reconnect-ms=1000"),
        *("-netdev", f"vhost-user,id=net,chardev=backend,queues={queues}"),
    ]


@dataclass
class Machine:
    """A running QEMU."""

    name: str
    process: subprocess.Popen[bytes]
    qmp: Qmp
    console: Console
    log: Path
    calls: Path | None = None
    said: list[str] = field(default_factory=list)
    trouble: Callable[[], str] = lambda: ""
    """Says why its network cannot work; "" while nothing is known to be wrong."""

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Return what the guest has reported on this console."""
        return self.console.reports

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.poll() is None

    def poll(self, seconds: float = 0.0) -> None:
        """Take events and reports that have come."""
        self.console.poll(seconds)
        self.qmp.poll(0.001)
        if not self.alive():
            raise QmpError(f"QEMU {self.name} ended with status {self.process.returncode}: {self.errors()}")

    def errors(self) -> str:
        """Return what QEMU printed."""
        return self.log.read_text(errors="replace").strip()


def command_line(vmm: str, folder: Path, name: str, netdev: Sequence[str], guest: GuestMachine) -> list[str]:
    """Return the arguments that start QEMU with the guest; it is the same machine on both sides of a move."""
    huge = ",hugetlb=on,hugetlbsize=2M" if guest.huge and has_huge_pages() else ""
    ram = f"memory-backend-memfd,id=ram,size={guest.memory},share=on{huge}"
    return [
        *(*AS_PROGRAMS_RUN, "prlimit", "--memlock=unlimited", str(PROGRAMS / f"qemu-{vmm}")),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", name),
        *("-object", ram, "-machine", "q35,memory-backend=ram", "-m", str(guest.memory >> 20)),
        *("-accel", f"tcg,tb-size={TRANSLATED_MB}", "-smp", "1"),
        *(() if guest.firmware else _linux(guest)),
        *netdev,
        *("-device", f"virtio-net-pci,netdev=net,mac={GUEST_MAC}," + ("bootindex=0" if guest.firmware else "romfile=")),
        *guest.options,
        *("-chardev", f"socket,id=console,path={folder / name}.console,server=on,wait=off"),
        *("-serial", "chardev:console", "-qmp", f"unix:{folder / name}.qmp,server=on,wait=off"),
    ]


def _linux(guest: GuestMachine) -> list[str]:
    kernel, initrd = str(GUEST / "vmlinux"), str(GUEST / "initrd")
    return ["-kernel", kernel, "-initrd", initrd, "-append", guest.words()]


@contextmanager
def started(
    vmm: str,
    folder: Path,
    name: str,
    netdev: Sequence[str],
    guest: GuestMachine,
    incoming: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Machine]:
    """Start QEMU; with `incoming` it waits for a guest. Its vhost-vdpa calls are logged. It is gone afterwards."""
    argv = command_line(vmm, folder, name, netdev, guest) + (["-incoming", "defer"] if incoming else [])
    calls, log = folder / f"{name}.calls", folder / f"{name}.log"
    variables = {**os.environ, "LD_PRELOAD": str(CALLS), "VDPA_CALLS": str(calls), **(environment or {})}
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables)
        stack.callback(_end, process)

        def alive() -> bool:
            return process.poll() is None

        def reads() -> bool:
            # uninterruptible sleep
            return alive() and Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("D")

        try:
            qmp = Qmp(f"{folder / name}.qmp", 120.0, alive, reads)
            stack.callback(qmp.close)
            console = Console(f"{folder / name}.console", 120.0, alive)
            stack.callback(console.close)
            stack.callback(_note, folder / f"{name}.reports", console)
        except (QmpError, TimeoutError) as error:
            said = log.read_text(errors="replace").strip()
            raise QmpError(f"QEMU {vmm} ({name}): {error}; {said}\n{_threads(process.pid)}") from error
        yield Machine(name, process, qmp, console, log, calls)


def _threads(pid: int) -> str:
    """Where a process's threads are, and who has the CPUs meanwhile: one that says nothing may wait, spin or starve."""
    before = _times()
    time.sleep(WATCHED_S)
    used = {task: _spent(now, before.get(task)) for task, now in _times().items()}
    lines: list[object] = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with suppress(OSError):
            state = next(line for line in (task / "status").read_text().splitlines() if line.startswith("State:"))
            at = (task / "syscall").read_text().strip()
            lines += [f"{used.get(task)}: {state}, {at}", (task / "stack").read_text()]
    lines += [f"in {WATCHED_S:g} s, by ticks of the CPU (user, system):"]
    lines += sorted(used.values(), key=lambda each: -each.ticks)[:BUSIEST]
    memory = Path("/proc/vmstat").read_text().splitlines()
    lines += [line for line in memory if line.startswith(("compact_", "nr_free_pages", "pgscan_direct ", "thp_fault"))]
    return "\n".join(map(str, lines))


def _times() -> dict[Path, list[str]]:
    """Return the name of each thread of the machine, and its /proc/PID/stat from field 3 on, by its folder."""
    found: dict[Path, list[str]] = {}
    for task in Path("/proc").glob("[0-9]*/task/*"):
        with suppress(OSError):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            found[task] = [name, *rest.split()]
    return found


@dataclass(frozen=True)
class Spent:
    """What a thread used of the CPU; priority and policy as in /proc/PID/stat."""

    name: str
    user: int
    system: int
    cpu: str
    priority: str
    policy: str

    @property
    def ticks(self) -> int:
        """All of its time."""
        return self.user + self.system


def _spent(now: list[str], before: list[str] | None) -> Spent:
    user, system = (int(now[at]) - int(before[at] if before else 0) for at in (12, 13))
    return Spent(now[0], user, system, cpu=now[37], priority=now[16], policy=now[39])


def _note(path: Path, console: Console) -> None:
    """Write down what the guest reported and what its kernel printed."""
    path.write_text("".join(f"{json.dumps(report)}\n" for report in console.reports))
    path.with_suffix(".console").unlink(missing_ok=True)
    path.with_suffix(".kernel").write_text("".join(f"{line}\n" for line in console.other))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
