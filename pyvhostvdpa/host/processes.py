# SPDX-License-Identifier: MIT
"""What ``/proc`` shows of vDPA devices: which process has one open, waits for one, or serves one.

A descriptor counts by the number of the device behind it. Names prove nothing: a container runtime calls a node what
it likes, and a device that is being deleted has no node any more.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator

from ..base import sysfs
from ..base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..base.sysfs import StrPath

_PROC = "/proc"
_SECOND_LOOK = 0.05
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""Its inode (include/linux/proc_ns.h:PROC_PID_INIT_INO)."""
_REMOVERS = ("rmmod", "modprobe", "kmod")
_PARENTS = ("vdpa", "vduse", "ifcvf", "mlx5_core")


class Holder(Record):
    """A process that has a chardev open, or waits for one."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})"


class Daemon(Record):
    """A process that serves a VDUSE device. ``state`` is the letter of proc(5): T stopped, t traced, Z zombie."""

    pid: int
    name: str
    state: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})"

    @property
    def stopped(self) -> bool:
        """Whether it cannot answer the kernel now, however long one waits."""
        return self.state in "TtZX"


class _Stat(Record):
    name: str
    state: str
    began: int


def _processes(proc: StrPath) -> Iterator[str]:
    """Yield the processes' folders. There may be thousands, with many files each: strings are what costs least."""
    return (f"{proc}/{pid}" for pid in os.listdir(proc) if pid.isdigit())


def _pid(process: str) -> int:
    return int(os.path.basename(process))


def _descriptors(process: str) -> list[str]:
    try:
        return [f"{process}/fd/{number}" for number in os.listdir(f"{process}/fd")]
    except OSError:
        return []


def _contents(path: str) -> bytes:
    """Return the beginning of a file of a process, empty if that is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _stat(process: str) -> _Stat | None:
    """Read a process's name, state and start (clock ticks since boot); None if it is gone."""
    return _parsed(_contents(f"{process}/stat"))


def _parsed(stat_line: bytes) -> _Stat | None:
    # the name is in brackets and may contain any character
    name, _, rest = stat_line.decode(errors="replace").partition("(")[2].rpartition(")")
    fields = rest.split()
    return _Stat(name, fields[0], int(fields[19])) if len(fields) > 19 else None


def device_number(path: str | os.PathLike[str]) -> int | None:
    """Return the number of the device behind a node, None without one."""
    try:
        return os.stat(path).st_rdev
    except OSError:
        return None


def _majors(proc: StrPath) -> frozenset[int]:
    """Return the major numbers that the kernel gave to vhost-vdpa."""
    lines = (sysfs.read(f"{os.fspath(proc)}/devices") or "").partition("Block devices:")[0].splitlines()
    numbered = (line.split(maxsplit=1) for line in lines)
    return frozenset(int(words[0]) for words in numbered if len(words) == 2 and words[1] == "vhost-vdpa")


def _opened(descriptor: str, majors: frozenset[int]) -> int | None:
    """Return the number of the vhost-vdpa device that a descriptor is open on; None for any other, or a closed one."""
    try:
        target = os.readlink(descriptor)
        if not target.startswith("/"):
            return None
        info = os.stat(descriptor)
    except OSError:
        return None
    device = stat.S_ISCHR(info.st_mode) and os.major(info.st_rdev) in majors
    return info.st_rdev if device or "/vhost-vdpa-" in target else None


def sees_all(proc: StrPath = _PROC) -> bool:
    """Return whether every process of this machine can be seen from here: by root, outside of a PID namespace.

    Otherwise "no holder" means that no holder is visible.
    """
    try:
        return os.geteuid() == 0 and os.stat(f"{os.fspath(proc)}/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def openers(proc: StrPath = _PROC) -> dict[int, tuple[Holder, ...]]:
    """Return the processes that have a vhost-vdpa device open, by device number, if this user may see them.

    This process counts like any other. A device that is being deleted is among them: its node is gone, its number is
    not. ``proc`` is where procfs is mounted.
    """
    majors = _majors(proc)
    found: dict[int, list[Holder]] = {}
    for process in _processes(proc):
        numbers = {_opened(descriptor, majors) for descriptor in _descriptors(process)} - {None}
        if not numbers:
            continue
        status = _stat(process)
        for number in numbers:
            found.setdefault(number or 0, []).append(Holder(_pid(process), status.name if status else "?"))
    return {number: tuple(who) for number, who in found.items()}


def _waits(process: str) -> tuple[int, int, str] | None:
    """Return when a process began that sleeps uninterruptibly in vDPA's management, its pid and its name."""
    line = _contents(f"{process}/stat")
    status = _parsed(line) if b") D " in line else None
    if status is None or status.state != "D":
        return None
    if status.name != "vdpa" and not (status.name in _REMOVERS and _removes_a_parent(process)):
        return None
    return status.began, _pid(process), status.name


def _removes_a_parent(process: str) -> bool:
    words = _contents(f"{process}/cmdline").decode(errors="replace").split("\0")
    removing = "rmmod" in words[0] or any(word in ("-r", "--remove") for word in words)
    return removing and any(parent in word for word in words[1:] for parent in _PARENTS)


def stuck(proc: StrPath = _PROC) -> tuple[Holder, ...]:
    """Return the processes that sleep uninterruptibly in vDPA's management, the one that the others wait for first.

    A deletion (``vdpa dev del``) or the removal of a parent driver (``rmmod``) waits until the device is closed, with a
    lock that every ``vdpa`` command needs (drivers/vhost/vdpa.c:vhost_vdpa_remove, drivers/vdpa/vdpa.c). The first is
    the one that began first. Looked at twice: any process occasionally sleeps like that for a moment.
    """
    found = sorted(waiting for process in _processes(proc) if (waiting := _waits(process)))
    if not found:
        return ()
    time.sleep(_SECOND_LOOK)
    return tuple(Holder(pid, name) for _, pid, name in found if _waits(f"{proc}/{pid}"))


def vduse_daemon(name: str, proc: StrPath = _PROC) -> Daemon | None:
    """Return the process that serves a VDUSE device; None without one that this user may see."""
    wanted = f"/dev/vduse/{name}"
    for process in _processes(proc):
        for descriptor in _descriptors(process):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target == wanted:
                status = _stat(process)
                return Daemon(_pid(process), status.name, status.state) if status else None
    return None
