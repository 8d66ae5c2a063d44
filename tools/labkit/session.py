"""What every sub-command that runs something shares: set-up on demand, and running a command in a VM."""

import contextlib
import itertools
import os
import selectors
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from labkit import accelerator, archive, console, devices, host, kernel, modules, output, vm
from labkit.cache import DONE, PARTIAL, Cache, leftovers, remove
from labkit.environment import Environment
from labkit.errors import LabError
from labkit.kernel import Kernel
from labkit.progress import Progress, seconds
from labkit.tree import Tree

PROJECT = Path(__file__).resolve().parents[2]
PASSED_ON = ("TERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")


@dataclass(frozen=True)
class Request:
    """What the user asked of one VM."""

    command: Sequence[str] = ()
    kernel: str = "6.12"
    devices: Sequence[str] = ()
    cpus: int = 2
    memory: str = "4G"
    accel: str = "auto"
    icount: bool = False
    timeout: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    shares: Sequence[Path] = ()


class Session:
    """The cache, the tree, a kernel and the project's environment, each made when first needed."""

    def __init__(self, progress: Progress | None = None, cache: Cache | None = None) -> None:
        self.cache = cache or Cache()
        self.progress = progress or Progress()
        self.tree = Tree(self.cache, self.progress)
        self.environment = Environment(self.cache, self.tree, PROJECT, self.progress)
        self._specs = itertools.count(1)

    def set_up(self, wanted: str, command: str, refresh: bool = False) -> Kernel:
        """Make all that a run needs; return at once when it is all there."""
        host.check_machine(command)
        found = kernel.find(self.cache, wanted)
        built = self.environment.ready or not self.environment.exists
        if found and self.tree.ready and built and not refresh and not host.missing_packages():
            return found
        begin = time.monotonic()
        with self.cache.setting_up():
            self._look_at_leftovers(wanted)
            host.ensure_packages(self.cache, self.progress)
            self.tree.ensure()
            found = kernel.Builder(self.cache, self.tree, self.progress).ensure(wanted, refresh)
            self.environment.ensure()
        self.progress.say(f"set-up: done, {seconds(time.monotonic() - begin)}; kept in {self.cache.root}")
        return found

    def _look_at_leftovers(self, wanted: str) -> None:
        """Remove what an interrupted set-up left, unless this one goes on with it."""
        for path in leftovers(self.cache.root):
            whole = path.with_name(path.name.removesuffix(PARTIAL))
            needed = whole == self.tree.folder or (
                whole.parent == self.cache.kernels and archive.fits(whole.name, wanted)
            )
            if needed and (path / DONE).is_dir():
                self.progress.say(f"going on with what an interrupted set-up left: {path.name}")
            else:
                self.progress.say(f"removing what an interrupted set-up left: {path.name}")
                remove(path)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keep the cache from being removed meanwhile."""
        with self.cache.in_use():
            yield

    def mode(self, request: Request, chosen: Kernel) -> str:
        """Return the accelerator to use, and say so."""
        if request.icount:
            verdict = accelerator.Verdict("icount", "--icount counts instructions, one CPU")
        else:
            verdict = accelerator.decide(self.cache, request.accel, lambda limit: self._proof(chosen, limit))
        self.progress.say(f"kernel {chosen.release}, {accelerator.describe(verdict)}")
        return verdict.mode

    def _proof(self, chosen: Kernel, limit: float) -> None:
        self.progress.say("trying whether a VM boots with KVM")
        spec = self.spec(Request(command=["true"], devices=["none"]), chosen, "kvm", "proof")
        begin = time.monotonic()
        spec = replace(spec, boot_limit=limit, timeout=limit)
        status = vm.run_once(spec, _ignore, _ignore)
        if status != 0:
            raise LabError(f"`true` ended with status {status}")
        self.progress.say(f"it does, {seconds(time.monotonic() - begin)}")

    def spec(self, request: Request, chosen: Kernel, mode: str, name: str = "lab") -> vm.Spec:
        """Return the full description of a VM for a request."""
        disks = [self.tree.image, chosen.modules_image]
        if self.environment.ready:
            disks.append(self.environment.image)
        plan = devices.parse(request.devices)
        passed = {variable: os.environ[variable] for variable in PASSED_ON if variable in os.environ}
        return vm.Spec(
            command=request.command,
            folder=PROJECT,
            kernel=chosen.image,
            boot_modules=chosen.boot_modules(),
            busybox=self.tree.root / "usr/bin/busybox",
            disks=disks,
            devices=plan,
            modules=modules.build_own(self.tree, chosen, PROJECT, plan),
            console_log=self.cache.log(f"console-{name}-{os.getpid()}-{next(self._specs)}"),
            mode=mode,
            cpus=request.cpus,
            memory=request.memory,
            shares=[PROJECT, *request.shares],
            environment={"PYVHOSTVDPA_LAB_ACCEL": mode, **passed, **request.environment},
            timeout=request.timeout,
            name=name,
        )

    def run(self, request: Request, command: str = "run") -> int:
        """Run a command in a VM, its output live on ours; return its exit status."""
        devices.parse(request.devices)
        chosen = self.set_up(request.kernel, command)
        with self.using():
            spec = self.spec(request, chosen, self.mode(request, chosen))
            return vm.run(spec, output.writer(1), output.writer(2), self.progress.say)

    def shell(self, request: Request) -> int:
        """Give the user an interactive shell in a VM."""
        if not sys.stdin.isatty():
            raise LabError("a shell needs a terminal", "Standard input is none.", "tools/lab run -- COMMAND")
        chosen = self.set_up(request.kernel, "shell")
        with self.using():
            spec = self.spec(request, chosen, self.mode(request, chosen))
            spec = replace(spec, shell=True, command=console.shell_command())
            with (
                vm.Machine(spec, output.writer(1), output.writer(2)) as machine,
                selectors.DefaultSelector() as selector,
                console.attached(machine.shell, selector) as pump,
            ):
                vm.drive([machine], selector, pump)
        return machine.status or 0


def _ignore(_: object) -> None:
    pass
