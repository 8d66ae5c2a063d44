"""Files that a VM boots from: ext4 images and the cpio archive of an initial RAM file system."""

import os
import stat
from pathlib import Path

from labkit.cache import Cache
from labkit.progress import Progress

BLOCK = 4096
INODE = 256
SLACK = 16 << 20


def image_size(folder: Path) -> tuple[int, int]:
    """Return the bytes and the inodes that an ext4 image of a folder needs."""
    inodes, blocks = 1, 1
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            status = os.lstat(os.path.join(parent, name))
            inodes += 1
            if stat.S_ISREG(status.st_mode):
                blocks += -(-status.st_size // BLOCK)
            elif stat.S_ISDIR(status.st_mode):
                blocks += max(1, -(-status.st_size // BLOCK))
            elif stat.S_ISLNK(status.st_mode):
                blocks += status.st_size > 59
    inodes += inodes // 10 + 64
    size = blocks * BLOCK + inodes * INODE
    size += size // 50 + SLACK
    return -(-size // (1 << 20)) << 20, inodes


def make_image(cache: Cache, progress: Progress, folder: Path, image: Path, title: str) -> None:
    """Write a folder into a new ext4 image, to be mounted read-only: no journal, no checksums of metadata."""
    size, inodes = image_size(folder)
    image.unlink(missing_ok=True)
    features = "^has_journal,^metadata_csum,^resize_inode"
    argv = ["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-O", features, "-E", "lazy_itable_init=1", "-m", "0"]
    argv += ["-N", str(inodes), "-d", str(folder), str(image), f"{size >> 10}k"]
    progress.call(title, argv, cache.log(f"image-{image.name}"))


class Cpio:
    """An initial RAM file system in the "newc" format."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._count = 0

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        path = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self._data += b"070701" + b"".join(b"%08X" % value for value in fields)
        for part in (path, data):
            self._data += part
            self._data += b"\0" * (-len(self._data) % 4)

    def folder(self, name: str) -> None:
        """Add a folder."""
        self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, executable: bool = False) -> None:
        """Add a regular file."""
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """Return the whole archive."""
        self._entry("TRAILER!!!", 0)
        return bytes(self._data) + b"\0" * (-len(self._data) % 512)
