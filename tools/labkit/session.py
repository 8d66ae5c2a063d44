"""What every sub-command that runs something shares: set-up on demand, and running a command in a VM."""

import contextlib
import itertools
import os
import selectors
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from labkit import accelerator, archive, console, devices, host, kernel, modules, output, uml_config, vm
from labkit.cache import DONE, PARTIAL, Cache, leftovers, remove
from labkit.environment import Environment
from labkit.errors import LabError
from labkit.kernel import Kernel
from labkit.progress import Progress, seconds
from labkit.tree import Tree
from labkit.uml_home import MACHINE as UML
from labkit.uml_home import Uml
from labkit.uml_kernel import OWN, UmlBuilder, UmlKernel
from labkit.vmm import VmmBuilder

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
    vmm: bool = False
    machine: str = "vm"


class Session:
    """The cache, the tree, a kernel and the project's environment, each made when first needed."""

    def __init__(self, progress: Progress | None = None, cache: Cache | None = None) -> None:
        self.cache = cache or Cache()
        self.progress = progress or Progress()
        self.tree = Tree(self.cache, self.progress)
        self.environment = Environment(self.cache, self.tree, PROJECT, self.progress)
        self._specs = itertools.count(1)
        self._preparing = threading.Lock()

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
        """Remove what an interrupted set-up left, unless this one continues it."""
        for path in leftovers(self.cache.root):
            whole = path.with_name(path.name.removesuffix(PARTIAL))
            needed = whole == self.tree.folder or (
                whole.parent == self.cache.kernels and archive.fits(whole.name, wanted)
            )
            if needed and (path / DONE).is_dir():
                self.progress.say(f"continuing an interrupted set-up: {path.name}")
            else:
                self.progress.say(f"removing what an interrupted set-up left: {path.name}")
                remove(path)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keep the cache from being removed meanwhile."""
        with self.cache.in_use():
            yield

    def mode(self, request: Request, chosen: Kernel) -> str:
        """Return the accelerator to use, and report it; UML for a machine that is a process."""
        if request.machine == UML:
            self.progress.say(f"kernel {self.uml(request, chosen).release} as User Mode Linux")
            return UML
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
        """Return the full description of a machine for a request."""
        plan = devices.parse(request.devices)
        passed = {variable: os.environ[variable] for variable in PASSED_ON if variable in os.environ}
        spec = vm.Spec(
            command=request.command,
            folder=PROJECT,
            kernel=chosen.image,
            boot_modules=chosen.boot_modules(),
            busybox=self.tree.root / "usr/bin/busybox",
            disks=[],
            devices=plan,
            mounts=self.vmm().ensure().mounts() if request.vmm else {},
            console_log=self.cache.log(f"console-{name}-{os.getpid()}-{next(self._specs)}"),
            mode=mode,
            cpus=request.cpus,
            memory=request.memory,
            shares=[PROJECT, *request.shares],
            environment={"PYVHOSTVDPA_LAB_ACCEL": mode, **passed, **request.environment},
            timeout=request.timeout,
            name=name,
        )
        return self._in_process(spec, request, chosen) if mode == UML else self._in_qemu(spec, chosen)

    def _in_qemu(self, spec: vm.Spec, chosen: Kernel) -> vm.Spec:
        disks = [self.tree.image, chosen.modules_image]
        if self.environment.ready:
            disks.append(self.environment.image)
        own = modules.build_own(self.tree, chosen, PROJECT, spec.devices)
        return replace(spec, disks=disks, modules=own, home=vm.Qemu(self.tree.root))

    def _in_process(self, spec: vm.Spec, request: Request, chosen: Kernel) -> vm.Spec:
        mine = self.uml(request, chosen)
        site = self.environment.site if self.environment.ready else None
        own: dict[str, Path] = {}
        if modules.own_kinds(spec.devices):
            with self.cache.building_kernel():
                own[OWN] = self.uml_builder().module(mine, PROJECT)
        return replace(spec, modules=own, home=Uml(mine, self.tree, site))

    def uml_builder(self) -> UmlBuilder:
        """Return the maker of plain kernels that are processes."""
        return UmlBuilder(kernel.Builder(self.cache, self.tree, self.progress), uml_config.PLAIN)

    def uml(self, request: Request, chosen: Kernel) -> UmlKernel:
        """Return such a kernel of the line that was asked for; build it if necessary."""
        wanted = ".".join(chosen.release.split(".")[:2]) if request.kernel == archive.LATEST else request.kernel
        with self.cache.building_kernel():
            return self.uml_builder().ensure(wanted)

    def vmm(self) -> VmmBuilder:
        """Return the maker of what runs with virtual machines need."""
        return VmmBuilder(kernel.Builder(self.cache, self.tree, self.progress), PROJECT)

    def run(
        self, request: Request, command: str = "run", out: output.Sink | None = None, err: output.Sink | None = None
    ) -> int:
        """Run a command in a VM, its output live on this process's own or to sinks; return its exit status.

        Several threads may each run one.
        """
        devices.parse(request.devices)
        with self._preparing:
            chosen = self.set_up(request.kernel, command)
        with self.using():
            with self._preparing:
                spec = self.spec(request, chosen, self.mode(request, chosen))
            return vm.run(spec, out or output.writer(1), err or output.writer(2), self.progress.say)

    def shell(self, request: Request) -> int:
        """Give the user an interactive shell in a VM."""
        if not sys.stdin.isatty():
            raise LabError("a shell needs a terminal", "Standard input is not one.", "tools/lab run -- COMMAND")
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
