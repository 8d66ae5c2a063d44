"""User Mode Linux as a home for machines: a kernel that is a process, with the lab's tree as its root."""

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from labkit import vm, xstate
from labkit.cache import SCRATCH
from labkit.devices import DevicePlan
from labkit.environment import INSIDE
from labkit.errors import LabError
from labkit.tree import Tree
from labkit.uml_kernel import KERNEL, RUN, UmlKernel, arguments, as_child

MACHINE = "uml"
INIT = Path(__file__).with_name("guest") / "uml-init.sh"
SHARES, IMAGES = "/lab/share", "/lab/image"


class Uml:
    """One kernel of this kind, and what it finds when it starts."""

    program = "User Mode Linux"
    ports = "/dev/ttyS"
    # There are no huge pages here: an entry maps one small page, not a huge one.
    entries = "max_iotlb_entries=1000000"

    def __init__(self, kernel: UmlKernel, tree: Tree, site: Path | None) -> None:
        self.kernel = kernel
        self.tree = tree
        self.site = site
        self._folder: Path | None = None

    def share(self, number: int, folder: str) -> str:
        """Return the command that mounts a folder of this machine."""
        return f"busybox mount --bind {SHARES}{number} {folder}"

    def image(self, number: int, folder: str) -> str:
        """Return the command that mounts an image on a folder; disks are counted from 0."""
        return f"busybox mount -t ext4 -o ro,noatime /dev/ubd{chr(ord('a') + number)} {folder}"

    def start(
        self, spec: vm.Spec, ends: Mapping[int, socket.socket], _: socket.socket | None
    ) -> subprocess.Popen[bytes]:
        """Start the kernel; its console goes to the log."""
        folder = self._folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.tree.cache.root))
        self._write(folder, spec)
        variables = xstate.variables(self.tree, self.tree.progress, folder, RUN)
        words = ["env", *(f"{name}={value}" for name, value in variables.items()), *command_line(spec, ends)]
        chroot = self.tree.chroot(layers=(self.kernel.layer,), binds=self._binds(folder, spec))
        with spec.console_log.open("wb") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *chroot.argv(as_child(words))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[end.fileno() for end in ends.values()],
                start_new_session=True,
            )

    @staticmethod
    def _write(folder: Path, spec: vm.Spec) -> None:
        (folder / "modules").mkdir()
        for name, path in spec.modules.items():
            shutil.copyfile(path, folder / "modules" / f"{name}.ko")
        (folder / "init").write_bytes(INIT.read_bytes())
        (folder / "init").chmod(0o755)
        (folder / "main.sh").write_bytes((vm.GUEST / "main.sh").read_bytes())
        (folder / "config.sh").write_text(vm.configuration(spec))

    def _binds(self, folder: Path, spec: vm.Spec) -> dict[Path, str]:
        binds = {folder: RUN, self.kernel.folder: KERNEL}
        binds |= {path: f"{SHARES}{number}" for number, path in enumerate(spec.shares)}
        binds |= {path.parent: f"{IMAGES}{number}" for number, path in enumerate(spec.mounts.values())}
        return binds | ({self.site: INSIDE} if self.site else {})

    def leave(self) -> None:
        """Remove what the kernel found."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def command_line(spec: vm.Spec, ends: Mapping[int, socket.socket]) -> list[str]:
    """Return the arguments that start the kernel within the tree."""
    ports = [f"ssl{port}=fd:{end.fileno()}" for port, end in ends.items()]
    disks = [f"ubd{number}r={IMAGES}{number}/{path.name}" for number, path in enumerate(spec.mounts.values())]
    return [*arguments(spec.memory), "loglevel=4", *ports, *disks]


def refuse(plan: DevicePlan, *, cpus: int | None, accel: str, icount: bool) -> None:
    """Raise LabError for what User Mode Linux cannot be or have."""
    said = [
        (icount, "--icount", "Its clock is this machine's: there is no virtual time."),
        (accel != "auto", f"--accel {accel}", "It is a process of this machine: nothing accelerates or emulates it."),
        (cpus not in (None, 1), f"--cpus {cpus}", "It has one CPU."),
        (
            any(group.kind.name == "vduse" for group in plan.groups),
            "--devices vduse",
            "The kernel's vduse depends on ARCH_HAS_DMA_OPS, which User Mode Linux lacks.",
        ),
    ]
    for wrong, what, why in said:
        if wrong:
            raise LabError(f"--machine {MACHINE} takes no {what}", why, "the same command without --machine uml")
