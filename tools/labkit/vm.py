"""One machine from start to end: what its first program is told, its ports, and what comes out of them."""

import os
import selectors
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from labkit import kernel_log, qemu
from labkit.chroot import PATH
from labkit.devices import DevicePlan
from labkit.environment import INSIDE
from labkit.errors import EXIT_TIMEOUT, LabError, NotBooted
from labkit.images import Cpio
from labkit.output import Sink

GUEST = Path(__file__).with_name("guest")
BOOT_LIMIT_S = {"kvm": 60.0, "tcg": 180.0, "icount": 400.0, "uml": 120.0}
SHOWN_CONSOLE_LINES = 25
SHOWN_PANIC_LINES = 100
SHOWN_LINE = 200
# The VM reports how many bytes its command wrote; if it cannot (a process left behind holds the output open), no more
# is expected after this long without any.
DRAIN_S = 2.0


class Home(Protocol):
    """What a machine lives in: how it is started, and how it reaches inside what it is given."""

    program: str
    """What the user knows it by."""
    ports: str
    """What the names of its ports begin with, inside; a pattern of the shell."""
    entries: str
    """Parameters of vhost_vdpa."""

    def share(self, number: int, folder: str) -> str:
        """Return the command that mounts a folder of this machine."""

    def image(self, number: int, folder: str) -> str:
        """Return the command that mounts an image on a folder; disks are counted from 0."""

    def start(
        self, spec: "Spec", ends: Mapping[int, socket.socket], shell: socket.socket | None
    ) -> subprocess.Popen[bytes]:
        """Start the machine; the far ends of its ports are closed here afterwards."""

    def leave(self) -> None:
        """Remove what starting it has made; the process has ended."""


class Qemu:
    """A virtual machine: disks and ports of virtio, folders by 9p, an initial RAM file system."""

    program = "QEMU"
    ports = "/dev/vport*p"
    entries = ""

    def __init__(self, tree: Path | None = None) -> None:
        self.tree = tree

    def share(self, number: int, folder: str) -> str:
        """Return the command that mounts a folder of this machine."""
        options = "trans=virtio,version=9p2000.L,msize=524288,cache=mmap"
        return f"busybox mount -t 9p -o {options} share{number} {folder}"

    def image(self, number: int, folder: str) -> str:
        """Return the command that mounts an image on a folder; disks are counted from 0."""
        return f"busybox mount -t ext4 -o ro,noatime /dev/vd{chr(ord('a') + number)} {folder}"

    def start(
        self, spec: "Spec", ends: Mapping[int, socket.socket], shell: socket.socket | None
    ) -> subprocess.Popen[bytes]:
        """Start QEMU."""
        inherited = [*ends.values(), *([shell] if shell else []), *([spec.network[0]] if spec.network else [])]
        descriptor = os.memfd_create("initrd")
        try:
            _write_all(descriptor, initial_ram_disk(spec))
            argv = qemu.command_line(self._hardware(spec, descriptor, ends, shell))
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[descriptor, *(end.fileno() for end in inherited)],
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    def _hardware(
        self, spec: "Spec", initrd: int, ends: Mapping[int, socket.socket], shell: socket.socket | None
    ) -> qemu.Hardware:
        return qemu.Hardware(
            kernel=spec.kernel,
            initrd_fd=initrd,
            disks=[*spec.disks, *spec.mounts.values()],
            shares=[qemu.Share(path, f"share{number}") for number, path in enumerate(spec.shares)],
            ports={port: end.fileno() for port, end in ends.items()},
            console_log=spec.console_log,
            mode=spec.mode,
            tree=self.tree,
            cpus=1 if spec.mode == "icount" else spec.cpus,
            memory=spec.memory,
            shell_fd=shell.fileno() if shell else None,
            network_fd=spec.network[0].fileno() if spec.network else None,
            network_mac=spec.network[2] if spec.network else "",
        )

    def leave(self) -> None:
        """Remove nothing: all of it was QEMU's."""


@dataclass(frozen=True)
class Spec:
    """What a machine shall be and do."""

    command: Sequence[str]
    folder: Path
    kernel: Path
    boot_modules: Sequence[Path]
    busybox: Path
    disks: Sequence[Path]
    devices: DevicePlan
    console_log: Path
    mode: str = "tcg"
    cpus: int = 2
    memory: str = "4G"
    shares: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Path] = field(default_factory=dict)
    mounts: Mapping[str, Path] = field(default_factory=dict)
    timeout: float | None = None
    boot_limit: float | None = None
    shell: bool = False
    name: str = "lab"
    network: tuple[socket.socket, str, str] | None = None
    home: Home = field(default_factory=Qemu)


def default_environment() -> dict[str, str]:
    """Return the variables that every command in the VM gets."""
    return {
        "PATH": f"{INSIDE}/bin:{PATH}",
        "PYTHONPATH": INSIDE,
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPYCACHEPREFIX": "/tmp/pycache",
        "PYVHOSTVDPA_LAB": "1",
    }


def configuration(spec: Spec) -> str:
    """Return config.sh: all that the VM has to know about this run."""
    shares = [(str(path), partial(spec.home.share, number)) for number, path in enumerate(spec.shares)]
    images = [(path, partial(spec.home.image, number)) for number, path in enumerate(spec.mounts, len(spec.disks))]
    mounts = []
    for folder, mount in (*shares, *images):
        mounts.append(f"busybox mkdir -p {shlex.quote(folder)}; must {mount(shlex.quote(folder))}")
    if spec.network:
        _, address, _ = spec.network
        mounts += ["must modprobe virtio_net", f"must ip address add {address}/24 dev eth0", "must ip link set eth0 up"]
        mounts += ["printf '10.77.0.1 a\\n10.77.0.2 b\\n' >>/etc/hosts"]
    loads = [" ".join(["must modprobe vhost_vdpa", *spec.home.entries.split()])] if spec.devices.groups else []
    for module, parameters in spec.devices.modules():
        if module in spec.modules:
            loads.append(shlex.join(["must", "insmod", f"/run/lab/modules/{module}.ko", *parameters]))
        else:
            loads.append(shlex.join(["must", "modprobe", module, *parameters]))
    additions = [f"cd {shlex.quote(str(spec.folder))}"] if spec.devices.daemons() else []
    additions += [shlex.join(["must", *words]) for words in spec.devices.daemons()]
    additions += [shlex.join(["must", "vdpa", "dev", "add", *words]) for words in spec.devices.additions()]
    variables = {**default_environment(), **spec.environment}
    words = ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *spec.command]
    command = f"cd {shlex.quote(str(spec.folder))} && exec {shlex.join(words)}"
    return "\n".join(
        [
            f"LAB_NAME={shlex.quote(spec.name)} LAB_DEVICES={spec.devices.count} LAB_SHELL={int(spec.shell)} "
            f"LAB_PATIENCE={20 if spec.mode == 'icount' else 1} LAB_PORTS={shlex.quote(spec.home.ports)}",
            *(_function("lab_mounts", mounts)),
            *(_function("lab_modules", loads)),
            *(_function("lab_devices", additions)),
            *(_function("lab_command", [command])),
            "",
        ]
    )


def _function(name: str, lines: list[str]) -> list[str]:
    return [f"{name}() {{", *(f"    {line}" for line in lines or [":"]), "}"]


def initial_ram_disk(spec: Spec) -> bytes:
    """Return the cpio archive that the kernel starts from."""
    cpio = Cpio()
    for name in ("bin", "dev", "proc", "sys", "modules", "lab", "lab/modules"):
        cpio.folder(name)
    cpio.character_device("dev/console", 5, 1)
    cpio.file("bin/busybox", spec.busybox.read_bytes(), executable=True)
    cpio.link("bin/sh", "busybox")
    for path in spec.boot_modules:
        cpio.file(f"modules/{path.name}", path.read_bytes())
    for name, path in spec.modules.items():
        cpio.file(f"lab/modules/{name}.ko", path.read_bytes())
    cpio.file("init", (GUEST / "init.sh").read_bytes(), executable=True)
    cpio.file("lab/main.sh", (GUEST / "main.sh").read_bytes())
    cpio.file("lab/config.sh", configuration(spec).encode())
    return cpio.finish()


class Machine:
    """A running VM. Use as a context manager; leaving it ends the VM."""

    def __init__(self, spec: Spec, out: Sink, err: Sink) -> None:
        self.spec = spec
        self.status: int | None = None
        self.booted = False
        self.started_after: float | None = None
        self._sinks = {qemu.OUT: out, qemu.ERR: err}
        self._received = {qemu.OUT: 0, qemu.ERR: 0}
        self._expected: dict[int, int] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._shell: socket.socket | None = None
        self._closed: set[int] = set()
        self._control = self._line = b""
        self._begin = self._last_data = time.monotonic()
        self._ended_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Machine":
        ends: dict[int, socket.socket] = {}
        for port in (qemu.CONTROL, qemu.OUT, qemu.ERR):
            self._sockets[port], ends[port] = socket.socketpair()
        inherited = list(ends.values())
        shell_end = None
        if self.spec.shell:
            self._shell, shell_end = socket.socketpair()
            inherited.append(shell_end)
        if self.spec.network:
            inherited.append(self.spec.network[0])
        try:
            self._process = self.spec.home.start(self.spec, ends, shell_end)
        finally:
            for end in inherited:
                end.close()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            if self._process.stdout:
                self._process.stdout.close()
        self.spec.home.leave()
        for end in [*self._sockets.values(), *([self._shell] if self._shell else [])]:
            end.close()

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have this VM's ports watched."""
        for port, end in self._sockets.items():
            selector.register(end, selectors.EVENT_READ, (self, port))

    @property
    def shell(self) -> socket.socket:
        """Return the near end of the VM's console."""
        assert self._shell is not None
        return self._shell

    def receive(self, selector: selectors.BaseSelector, port: int) -> None:
        """Take what has come in at a port."""
        try:
            data = self._sockets[port].recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            selector.unregister(self._sockets[port])
            self._closed.add(port)
        elif port == qemu.CONTROL:
            self._control += data
            *lines, self._control = self._control.split(b"\n")
            for line in lines:
                self._report(line.decode(errors="replace").strip())
        else:
            self._received[port] += len(data)
            self._last_data = time.monotonic()
            if port == qemu.OUT:
                self._line = (self._line + data)[-SHOWN_LINE:].rpartition(b"\n")[2]
            self._sinks[port](data)

    def _report(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "booted":
            self.booted = True
        elif word == "started":
            self.started_after = time.monotonic() - self._begin
        elif word == "failed":
            raise LabError(f"the VM could not make its devices: {rest}", self._console(), self._look())
        elif word == "exit":
            status, out, err = map(int, rest.split())
            self._expected = {qemu.OUT: out, qemu.ERR: err}
            self.status = status
            self._ended_at = time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether the command has ended and all of its output is here."""
        if self.status is None or self._ended_at is None:
            return False
        if all(self._received[port] >= count >= 0 for port, count in self._expected.items()):
            return True
        return time.monotonic() - max(self._ended_at, self._last_data) > DRAIN_S

    def check(self) -> None:
        """Raise when the VM has died, hangs, or its time is over."""
        if self.finished:
            return
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None and len(self._closed) == len(self._sockets):
            raise self._death()
        limit = self.spec.boot_limit or BOOT_LIMIT_S[self.spec.mode]
        boot = self.spec.boot_limit or limit / 2
        if not self.booted and now - self._begin > boot:
            raise NotBooted(f"the VM did not boot within {boot:.0f} s", self._console(), self._look())
        if self.started_after is None and now - self._begin > limit:
            raise LabError(f"the VM did not get to its command within {limit:.0f} s", self._console(), self._look())
        if self.spec.timeout is not None and self.started_after is not None:
            over = now - self._begin - self.started_after - self.spec.timeout
            if over > 0 and self.status is None:
                raise LabError(
                    f"time-out: the command ran longer than {self.spec.timeout:g} s; the VM was stopped",
                    "Its output so far is above.",
                    "give it more with --timeout, or none",
                    EXIT_TIMEOUT,
                )

    def _death(self) -> LabError:
        assert self._process is not None
        said = self._process.stdout.read().decode(errors="replace").strip() if self._process.stdout else ""
        console = self._console()
        if kernel_log.PANIC in console:
            what = "the VM's kernel panicked before the command ended"
        elif self.started_after is None:
            status = f"{self.spec.home.program}'s status {self._process.returncode}"
            what = f"the VM ended before its command started ({status})"
        else:
            what = "the VM stopped before the command ended"
        # a QEMU that ends by itself with an error refuses its command line or lacks something: so it would again
        refused = self._process.returncode > 0 and kernel_log.PANIC not in console
        kind = LabError if self.booted or refused else NotBooted
        reached = self._line.decode(errors="replace").strip()
        last = f"the command's output ends with: {reached}" if reached else ""
        return kind(what, "\n".join(part for part in (said, last, console) if part), self._look())

    def _console(self) -> str:
        try:
            lines = self.spec.console_log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        lines = [line.rstrip() for line in lines if line.strip()]
        return "\n".join(f"| {line}" for line in kernel_log.end(lines, SHOWN_CONSOLE_LINES, SHOWN_PANIC_LINES))

    def _look(self) -> str:
        return f"less {self.spec.console_log}   (the kernel's whole console)"


def drive(machines: Sequence[Machine], selector: selectors.BaseSelector, idle: Callable[[object], None]) -> None:
    """Serve running VMs until all of them have finished; `idle` gets events that are not a VM's."""
    for machine in machines:
        machine.register(selector)
    while not all(machine.finished for machine in machines):
        for key, _ in selector.select(0.2):
            if isinstance(key.data, tuple):
                machine, port = key.data
                machine.receive(selector, port)
            else:
                idle(key.data)
        for machine in machines:
            machine.check()


def run(spec: Spec, out: Sink, err: Sink, tell: Callable[[str], None]) -> int:
    """Do as run_once(), and start an emulated VM that does not boot a second time, which is reported.

    In one boot of some hundred the emulator loses a timer's interrupt or trips
    over the kernel's patching of its own code. What comes after the kernel's
    boot, which is all of the project's own, is never tried again.
    """
    try:
        return run_once(spec, out, err)
    except NotBooted as e:
        if spec.mode in ("kvm", "uml"):
            raise
        log = spec.console_log.with_stem(f"{spec.console_log.stem}-not-booted")
        if spec.console_log.exists():
            spec.console_log.replace(log)
        tell(f"{e.what}; starting it again (the console of the first: {log})")
        return run_once(spec, out, err)


def run_once(spec: Spec, out: Sink, err: Sink) -> int:
    """Run a VM's command; return its exit status."""
    with Machine(spec, out, err) as machine, selectors.DefaultSelector() as selector:
        drive([machine], selector, lambda _: None)
    assert machine.status is not None
    return machine.status


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
