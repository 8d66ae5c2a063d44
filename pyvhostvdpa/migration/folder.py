# SPDX-License-Identifier: MIT
"""The folder of saved guests: a file appears whole or not at all, and one process at a time may claim it.

A claim is a lock on the open file (flock(2)). The kernel releases it when the
process ends, however it ends, so a file whose claimant was killed can be
claimed again under the same name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from ..base.closing import Closing
from ..base.errors import MigrationRefused
from ..base.eventfds import close_all

SAVED = ".saved"
HALF = ".half"
"""The suffix of a file that is still being written. Without a lock on it, its process has died."""

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def _is_at(fd: int, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    """Make names that were added or removed outlive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Draft(Closing):
    """A new file in ``folder`` under a random name, locked until it is closed; ``publish`` gives it its name.

    Raises OSError if the folder cannot be written. Closing one that was not published removes it.
    """

    def __init__(self, folder: Path) -> None:
        # a message names the file, and its reader may be in another folder
        self.folder = folder.absolute()
        self.path, self._fd = self._create()
        self._published = False

    def _create(self) -> tuple[Path, int]:
        while True:
            path = self.folder / f"{secrets.token_hex(8)}{HALF}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
            with ExitStack() as unless_locked:
                unless_locked.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
                # a process that cleans up may have seen it before it was locked
                if _is_at(fd, path):
                    unless_locked.pop_all()
                    return path, fd

    def fileno(self) -> int:
        """Return the descriptor, open for reading and writing."""
        return self._fd

    def publish(self, stem: str) -> Path:
        """Name the file ``stem.saved``, or ``stem-2.saved`` and so on: no other file is replaced. Return its path."""
        os.fsync(self._fd)
        for number in count(1):
            path = self.folder / f"{stem}{f'-{number}' if number > 1 else ''}{SAVED}"
            with suppress(FileExistsError):
                self._name(path)
                break
        self.path, self._published = path, True
        _sync(self.folder)
        return path

    def _name(self, path: Path) -> None:
        try:
            os.link(self.path, path)
        except OSError as e:
            if e.errno not in _NO_HARD_LINKS:
                raise
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self.path.rename(path)
        else:
            self.path.unlink()

    def close(self) -> None:
        """Release the lock: from now on the file can be claimed. Idempotent."""
        if self._fd >= 0:
            if not self._published:
                with suppress(OSError):
                    self.path.unlink()
            fd, self._fd = self._fd, -1
            close_all([fd])


def clean(folder: Path) -> None:
    """Remove what processes that were killed while they saved a guest have left: it holds guest memory."""
    for path in folder.glob(f"*{HALF}"):
        with suppress(OSError):
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, path):
            path.unlink()
    finally:
        os.close(fd)


def check_saved_folder(folder: Path) -> int:
    """Make ``folder``, remove abandoned files, try to write there, and return its free bytes.

    Raises :class:`~pyvhostvdpa.MigrationRefused` if no file can be made there, or if other users could exchange it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
        clean(folder)
        Draft(folder).close()
        room = os.statvfs(folder)
    except OSError as e:
        raise MigrationRefused(
            f"no place to save a guest: {folder}: {e.strerror}",
            hint="vhost-vdpa send and receive take another folder with --state DIR",
        ) from e
    return room.f_bavail * room.f_frsize


def _check_private(folder: Path) -> None:
    mode = folder.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        raise MigrationRefused(
            f"{folder} can be written by other users: they could exchange a saved guest",
            hint=f"chmod go-w {folder}; vhost-vdpa send and receive take another folder with --state DIR",
        )


def _locker(fd: int) -> int:
    """Return the process that locked an open file, 0 if unknown.

    A line of /proc/locks: "N: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF".
    """
    with suppress(OSError, LookupError, ValueError):
        place = _place_in_locks(fd)
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if "FLOCK" in fields and place in fields and fields[4].isdecimal():
                return int(fields[4])
    return 0


def _place_in_locks(fd: int) -> str:
    """Return how /proc/locks calls an open file.

    Not by what fstat() says: on overlayfs and btrfs that is another device
    and another inode than the ones the kernel locks (fs/locks.c:lock_get_status).
    """
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    info = dict(line.split(":", 1) for line in lines if ":" in line)
    mount = info["mnt_id"].strip()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        number, _, device, *_ = line.split()
        if number == mount:
            major, minor = map(int, device.split(":"))
            inode = info["ino"].strip() if "ino" in info else str(os.fstat(fd).st_ino)
            return f"{major:02x}:{minor:02x}:{inode}"
    raise LookupError(f"mount {mount}")


class Claim(Closing):
    """The right to start the guest in the file at ``path``, which one process at a time can have.

    Raises :class:`~pyvhostvdpa.MigrationRefused` if another process has it,
    if there is no such file, or if it could not be removed afterwards: it
    would be started a second time then.
    """

    def __init__(self, path: Path) -> None:
        # what is removed in the end has to be the file, not a symbolic link to it
        self.path = path.resolve()
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise MigrationRefused(f"{path}: {e.strerror}", hint=f"ls -l {self.path.parent}") from e
        with ExitStack() as unless_claimed:
            unless_claimed.callback(self.close)
            self._check()
            unless_claimed.pop_all()

    def _check(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            pid = _locker(self._fd)
            raise MigrationRefused(
                f"{self.path} is in use: process {pid or '(unknown)'} is starting the guest from it, or holds it "
                "until the other side cannot start the guest any more. Once that process has ended, and if the file "
                "is still there, this command works",
                hint=f"ps -fp {pid}" if pid else f"ls -l {self.path.parent}",
            ) from e
        except OSError as e:
            raise MigrationRefused(f"{self.path} cannot be locked: {e.strerror}") from e
        if not _is_at(self._fd, self.path):
            raise MigrationRefused(
                f"{self.path}: another process has just started the guest from it", hint=f"ls -l {self.path.parent}"
            )
        if not os.access(self.path.parent, os.W_OK):
            raise MigrationRefused(
                f"{self.path.parent} cannot be written: the file could not be removed once its guest runs, and would "
                "be started again",
                hint=f"mv {self.path} to a folder that can be written, or mount it read-write",
            )

    def fileno(self) -> int:
        """Return the descriptor, open for reading."""
        return self._fd

    def remove(self) -> None:
        """Remove the file: its guest runs. Raises OSError; the claim is then kept until :meth:`close`."""
        if _is_at(self._fd, self.path):
            self.path.unlink()
            with suppress(OSError):
                _sync(self.path.parent)

    def close(self) -> None:
        """Release the claim. Idempotent."""
        fd, self._fd = self._fd, -1
        close_all([fd])


@contextmanager
def claimed(path: Path) -> Iterator[Claim]:
    """Claim a file for the block, and remove it if the block ends well."""
    with Claim(path) as claim:
        yield claim
        claim.remove()
