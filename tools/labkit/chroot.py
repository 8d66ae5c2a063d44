"""Running programs inside the lab's Debian tree: a private mount namespace, the tree itself kept pristine."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODES = ("null", "zero", "full", "random", "urandom", "tty")


def contained(command: Sequence[str]) -> list[str]:
    """Return the command line by which neither a mount nor a process of `command` outlives it."""
    return ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", *command]


@dataclass(frozen=True)
class Chroot:
    """A Debian tree, read-only layers over it, and what is bound into it from outside."""

    root: Path
    mount_point: Path
    layers: Sequence[Path] = ()
    binds: Mapping[Path, str] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = "/"

    def argv(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` in there and ends all of it when it is itself ended."""
        script = "\n".join([*self._mounts(), self._enter(command)])
        return contained(["sh", "-ec", script])

    def _mounts(self) -> list[str]:
        base = shlex.quote(str(self.mount_point))
        lower = ":".join(str(path).replace(":", "\\:") for path in [*self.layers, self.root])
        options = shlex.quote(f"lowerdir={lower},upperdir={self.mount_point}/up,workdir={self.mount_point}/work")
        lines = [
            f"mount -t tmpfs -o mode=755 lab {base}",
            f"cd {base}",
            "mkdir up work root",
            f"mount -t overlay -o {options} lab root",
            "mount -t proc proc root/proc",
            "mount --bind /sys root/sys",
            "mount -t tmpfs -o mode=755 dev root/dev",
            "mkdir root/dev/shm root/dev/pts",
            "mount -t tmpfs -o mode=1777 shm root/dev/shm",
            "mount -t devpts -o newinstance,ptmxmode=0666 devpts root/dev/pts",
            "ln -s pts/ptmx root/dev/ptmx",
            "ln -s /proc/self/fd root/dev/fd",
            *(f"ln -s fd/{number} root/dev/{name}" for number, name in enumerate(("stdin", "stdout", "stderr"))),
        ]
        for node in NODES:
            lines.append(f": > root/dev/{node}; mount --bind /dev/{node} root/dev/{node}")
        for path, inside in self.files.items():
            target = shlex.quote(f"root{inside}")
            lines.append(f"rm -f {target}; mkdir -p $(dirname {target}); cp -L {shlex.quote(str(path))} {target}")
        for path, inside in self.binds.items():
            target = shlex.quote(f"root{inside}")
            lines.append(f"mkdir -p {target}; mount --bind {shlex.quote(str(path))} {target}")
        return lines

    def _enter(self, command: Sequence[str]) -> str:
        variables = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", **self.environment}
        words = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        inner = f"cd {shlex.quote(self.folder)} && exec {shlex.join(command)}"
        return f"exec chroot root {shlex.join([*words, 'sh', '-c', inner])}"
