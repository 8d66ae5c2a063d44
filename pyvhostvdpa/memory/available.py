# SPDX-License-Identifier: MIT
"""How much memory this process may still have, by every limit that counts, and which of them is the nearest.

The machine's MemAvailable is one of several: a cgroup has a limit of its own, beyond which its processes are killed,
and huge pages of the kernel's pool are neither part of the one nor of the other. What would fail later as "Bad address"
or by the OOM killer is refused in advance, with the limit named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from ..base import sysfs
from ..base.errors import MissingFeature
from ..base.record import Record
from . import hugepages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..base.sysfs import StrPath

_ROOT = "/"
_POOL_PAGE = 2 << 20
UNLIMITED = 1 << 60
"""What is beyond it stands for "no limit" in cgroup v1."""


class Bound(Record):
    """What a limit leaves: ``free`` bytes by ``source``, in words for a message; ``hint`` is what to change."""

    free: int
    source: str
    hint: str = "use a smaller guest, or free memory"

    def __str__(self) -> str:
        return f"{self.free >> 20} MiB available ({self.source})"


def _text(*parts: StrPath) -> str:
    return sysfs.read(os.path.join(*parts)) or ""


def _number(*parts: StrPath) -> int | None:
    """Return a number in a file, None without one or if it means no limit."""
    text = _text(*parts)
    return int(text) if text.isdecimal() and int(text) < UNLIMITED else None


def _fields(text: str, separator: str | None = None) -> dict[str, int]:
    """Read lines of a name and a number, which a unit may follow."""
    lines = (line.split(separator, 1) for line in text.splitlines())
    pairs = ((words[0], words[1].split()) for words in lines if len(words) == 2)
    return {name: int(value[0]) for name, value in pairs if value and value[0].isdecimal()}


class _Group(Record):
    """A cgroup's folder, and the names that its version gives to its files."""

    folder: str
    v2: bool

    @property
    def name(self) -> str:
        return self.folder

    def limit(self, what: str) -> int | None:
        return _number(self.folder, self.limit_name(what))

    def limit_name(self, what: str) -> str:
        return f"{what}.{'max' if self.v2 else 'limit_in_bytes'}"

    def used(self, what: str) -> int:
        return _number(self.folder, f"{what}.{'current' if self.v2 else 'usage_in_bytes'}") or 0

    def reclaimable(self) -> int:
        """Return the bytes of cached files, which the kernel takes back before it kills anything."""
        fields = _fields(_text(self.folder, "memory.stat"))
        prefix = "" if self.v2 else "total_"
        return sum(fields.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))


def _groups(controller: str, root: StrPath) -> Iterator[_Group]:
    """Yield the cgroups that bound this process by ``controller``, from its own up to the root as it is mounted."""
    for line in _text(root, "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        v2 = kind[0] == "cgroup2"
        if not v2 and controller not in kind[2].split(","):
            continue
        mounted = os.path.join(root, fields[4].lstrip("/")).rstrip("/") or "/"
        path = _path_of("" if v2 else controller, root)
        # within a container the path may be the host's, and only the container's part is mounted
        inside = path.removeprefix(fields[3].rstrip("/")).lstrip("/")
        folder = os.path.join(mounted, inside) if inside else mounted
        if not os.path.isdir(folder):
            folder = mounted
        while True:
            yield _Group(folder, v2)
            if folder == mounted:
                break
            folder = os.path.dirname(folder)


def _path_of(controller: str, root: StrPath) -> str:
    for line in _text(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def ordinary(root: StrPath = _ROOT) -> Bound:
    """Return what is left of ordinary memory: the machine's, or that of the tightest cgroup."""
    # without MemAvailable nothing is known, and nothing is refused for that
    kib = _fields(_text(root, "proc/meminfo"), ":").get("MemAvailable", sys.maxsize >> 10)
    found = [Bound(kib << 10, "MemAvailable of the machine")]
    for group in _groups("memory", root):
        limit = group.limit("memory")
        if limit is not None:
            free = max(0, limit - group.used("memory") + group.reclaimable())
            source = f"{group.limit_name('memory')} of cgroup {group.name} is {limit >> 20} MiB"
            found.append(Bound(free, source, "use a smaller guest, or raise that limit"))
    return min(found, key=lambda bound: bound.free)


def pool_left(root: StrPath = _ROOT) -> Bound:
    """Return what is left of the kernel's pool of 2 MiB pages: free and not promised, or what a cgroup allows."""
    folder = hugepages.pool(_POOL_PAGE, root)
    pages = (_number(folder, "free_hugepages") or 0) - (_number(folder, "resv_hugepages") or 0)
    found = [Bound(max(0, pages) * _POOL_PAGE, "the pool of 2 MiB pages", f"more pages: {folder}/nr_hugepages")]
    for group in _groups("hugetlb", root):
        for what in ("hugetlb.2MB", "hugetlb.2MB.rsvd"):
            limit = group.limit(what)
            if limit is not None:
                source = f"{group.limit_name(what)} of cgroup {group.name} is {limit >> 20} MiB"
                found.append(
                    Bound(max(0, limit - group.used(what)), source, "raise that limit, or do without the pool")
                )
    return min(found, key=lambda bound: bound.free)


def check_ordinary(size: int, copies: int = 1, root: StrPath = _ROOT) -> None:
    """Raise :class:`~pyvhostvdpa.MissingFeature` unless ``copies`` times ``size`` bytes of ordinary memory are left."""
    here = ordinary(root)
    if here.free < size * copies:
        raise MissingFeature(f"{_asked(size, copies)}, {here}", hint=here.hint)


def _asked(size: int, copies: int) -> str:
    return f"{size >> 20} MiB of guest memory asked for" + (f" {copies} times" if copies > 1 else "")


def from_pool(size: int, copies: int = 1, root: StrPath = _ROOT, private: bool = False) -> bool:
    """Decide whether ``size`` bytes, ``copies`` times, come from the pool of huge pages; False for ordinary memory.

    Ordinary memory that becomes contiguous on advice is preferred, and so is the pool over memory in small pages; each
    stands in for the other where it is not enough. ``private`` if it would be no file's memory. Raises
    :class:`~pyvhostvdpa.MissingFeature`, with the nearest limit named, if neither has room.
    """
    need, here, there = size * copies, ordinary(root), pool_left(root)
    in_pool = size % _POOL_PAGE == 0 and there.free >= need
    if not in_pool and here.free >= need:
        return False
    if in_pool and here.free < need:
        return True
    if in_pool:
        return not hugepages.advisable(hugepages.choice("enabled" if private else "shmem_enabled", root))
    beside = f"; in huge pages {there}" if hugepages.free(_POOL_PAGE, root) else ""
    raise MissingFeature(f"{_asked(size, copies)}, {here}{beside}", hint=here.hint)
