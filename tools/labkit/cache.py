"""The lab's one folder: what is where, which process may write, and that nothing half-made is ever taken for whole."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from labkit.errors import LabError

DEFAULT = "/var/cache/pyvhostvdpa"
VARIABLE = "PYVHOSTVDPA_CACHE"
PARTIAL = ".partial"
DONE = "done"
"""In a half-made folder: a file for each step of its making that need not be done again."""
KEPT_LOGS = 20
MARKER = ".pyvhostvdpa-lab"
"""In a cache folder: it was made by the lab, and so was everything in it that has one of the lab's names."""
FOLDERS = (
    *("trees", "kernels", "environments", "apt-lists", "logs", "results", "mnt", "debug", "mypy", "mutants", "vmm"),
    *("bare", "uml"),
)
FILES = (MARKER, "accelerator.json", "latest-kernel", "setup.lock", "debug.lock", "vmm.lock", "use.lock")
SCRATCH = "uml-"


class Cache:
    """Paths in the cache folder, and its two locks: one for set-up, one for use."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or Path(os.environ.get(VARIABLE) or DEFAULT)).absolute()
        self.trees = self.root / "trees"
        self.kernels = self.root / "kernels"
        self.environments = self.root / "environments"
        self.lists = self.root / "apt-lists"
        self.logs = self.root / "logs"
        self.results = self.root / "results"
        self.mount_point = self.root / "mnt"
        self.accelerator = self.root / "accelerator.json"
        self.latest_kernel = self.root / "latest-kernel"
        self.mutants = self.root / "mutants"
        self.bare = self.root / "bare"

    def create(self) -> None:
        """Make the folder; say what is wrong when that cannot be done. A folder with other things in it is refused."""
        try:
            if not (self.root / MARKER).exists():
                self._adopt()
            self.mount_point.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise LabError(
                f"the cache folder {self.root} cannot be made", str(error), f"set {VARIABLE} to a folder of your choice"
            ) from error

    def _adopt(self) -> None:
        """Put the marker into a folder that is new, empty, or a cache of a lab that had no marker yet."""
        self.root.mkdir(parents=True, exist_ok=True)
        if any(self.root.iterdir()) and not self._is_ours():
            raise LabError(
                f"{self.root} is not a cache folder of the lab",
                "It has other files in it, and no file named " + MARKER + ".",
                f"set {VARIABLE} to a folder that is new or empty",
            )
        (self.root / MARKER).write_text("Made by tools/lab of pyvhostvdpa; tools/lab clean removes it.\n")

    def _is_ours(self) -> bool:
        """Return whether the lab made the folder: by its marker, or by its lock and nothing that is not the lab's."""
        return (self.root / MARKER).exists() or ((self.root / "setup.lock").exists() and not self._foreign())

    def _foreign(self) -> list[str]:
        """Return the names in the folder that are not the lab's."""
        names = sorted(path.name for path in self.root.iterdir())
        return [name for name in names if name not in (*FOLDERS, *FILES) and not name.startswith(SCRATCH)]

    @contextlib.contextmanager
    def _locked(self, name: str, kind: int, busy: str, wait: bool) -> Iterator[None]:
        self.create()
        with (self.root / name).open("a") as handle:
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not wait:
                    raise LabError(busy, f"It holds {self.root / name}.", "wait for it, or end it") from error
                print(f"lab: {busy}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(handle, kind)
            yield

    def setting_up(self) -> contextlib.AbstractContextManager[None]:
        """Hold the right to change the cache, alone; wait for another set-up to end."""
        return self._locked("setup.lock", fcntl.LOCK_EX, "another set-up is at work in this cache", wait=True)

    def building_kernel(self) -> contextlib.AbstractContextManager[None]:
        """Hold the right to build User Mode Linux, alone; everything else continues meanwhile."""
        return self._locked("debug.lock", fcntl.LOCK_EX, "User Mode Linux is being built in this cache", wait=True)

    def building_vmm(self) -> contextlib.AbstractContextManager[None]:
        """Hold the right to make what runs with virtual machines need, alone; other runs continue meanwhile."""
        return self._locked("vmm.lock", fcntl.LOCK_EX, "QEMU and its guest are being made in this cache", wait=True)

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Hold the right to use what is there; shared by all runs."""
        return self._locked("use.lock", fcntl.LOCK_SH, "the cache is being removed", wait=True)

    def removing(self) -> contextlib.AbstractContextManager[None]:
        """Hold the right to remove it all, refused while a VM runs from it."""
        return self._locked("use.lock", fcntl.LOCK_EX, "a VM of the lab is running from this cache", wait=False)

    def clean(self) -> int:
        """Remove what the lab made, unless it is in use; return how many bytes that freed.

        The folder goes too if nothing else is in it. LabError if it is not the lab's, or another user's.
        """
        if self.root.exists() and not self._is_ours():
            raise LabError(
                f"{self.root} was not made by the lab; nothing is removed",
                f"It has no file named {MARKER}.",
                f"set {VARIABLE} to the lab's cache folder, or remove that folder yourself",
            )
        with self.removing():
            foreign = self._foreign()
            freed = used(self.root)
            try:
                for path in sorted(self.root.iterdir(), key=lambda path: path.name == MARKER):
                    if path.name not in foreign:
                        remove(path)
                if not foreign and not self.root.is_symlink():
                    self.root.rmdir()
            except PermissionError as error:
                raise LabError(f"{self.root} cannot be removed", str(error), "sudo tools/lab clean") from error
        return freed - (used(self.root) if foreign else 0)

    def log(self, name: str) -> Path:
        """Return a path for a log, and drop the oldest ones."""
        self.create()
        for path in by_age(self.logs)[:-KEPT_LOGS]:
            path.unlink(missing_ok=True)
        return self.logs / f"{name}.log"

    def require_space(self, needed: int, purpose: str) -> None:
        """Refuse to begin what would not fit on the disk."""
        self.create()
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise LabError(
                f"not enough disk space for {purpose}",
                f"{self.root} has {size(free)} free, {size(needed)} are needed.",
                f"free some space, or set {VARIABLE} to a folder on a larger disk",
            )


def by_age(folder: Path) -> list[Path]:
    """Return what is in a folder, the oldest first; another process may be removing some of it."""
    found = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime
    return sorted(found, key=lambda path: found[path])


_held: dict[Path, int] = {}


def hold(build: Path) -> Path:
    """Keep a build from being removed as an old one, by any process, as long as this one lives; return it.

    FileNotFoundError if it is not there, also if it is removed right now.
    """
    if build not in _held or not _is_at(_held[build], build):
        descriptor = os.open(build, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_at(descriptor, build):
            os.close(descriptor)
            raise FileNotFoundError(build)
        _held[build] = descriptor
    return build


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def forget_old(builds: Path, kept: int) -> None:
    """Remove all but the newest builds in a folder, and those that somebody holds."""
    for path in by_age(builds)[:-kept]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def building(target: Path, goes_on: bool = False) -> Iterator[Path]:
    """Build a folder as TARGET.partial and rename it when whole.

    What an interrupted build left is removed; or continued, by a builder whose steps are done by `once()`.
    """
    partial = target.with_name(target.name + PARTIAL)
    if not (goes_on and (partial / DONE).is_dir()):
        remove(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except OSError as error:
        raise LabError(
            f"failed while building {target.name}",
            str(error),
            "free some space and run the same command again" if error.errno == 28 else "run the same command again",
        ) from error
    remove(target)
    remove(partial / DONE)
    partial.rename(target)


def once(partial: Path, step: str, act: Callable[[], None]) -> None:
    """Do a step of building a folder, unless an earlier attempt has done it; `act` may find its own half-made work."""
    mark = partial / DONE / step
    if not mark.exists():
        act()
        mark.parent.mkdir(exist_ok=True)
        mark.touch()


def remove(path: Path) -> None:
    """Remove a file or folder, should it be there; another process may be removing it too."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leftovers(root: Path) -> list[Path]:
    """Return what interrupted builds left in the cache."""
    return sorted(path for path in root.glob(f"*/*{PARTIAL}"))


def used(path: Path) -> int:
    """Return the disk space below a path, in bytes, as the file system counts it."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder, _, names in os.walk(path):
        for name in [".", *names]:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(os.path.join(folder, name))
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return total


def size(count: float) -> str:
    """Return a number of bytes for humans."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
