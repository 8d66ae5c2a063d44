# SPDX-License-Identifier: MIT
"""What discards guest memory behind a device's back, found before it does harm, or soon after.

A device works on the pages that were pinned when memory was mapped. QEMU's balloon, free page reporting, virtio-mem
and postcopy punch holes into the shared file: the guest gets new pages there, the device keeps the old ones. QEMU
refuses that for its own vhost-vdpa (ram_block_discard_disable); for vhost-user it does not know.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from .notices import FileNotices

_BLOCK = 512
"""Bytes of a unit of st_blocks, on every file system (stat(2))."""
_DEVICES = re.compile(r"\b(virtio-balloon|virtio-mem)[-\w]*")


def discarding_devices(pid: int, proc: Path = Path("/proc")) -> list[str] | None:
    """Return the devices on a front-end's command line that discard memory, None if that cannot be read."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return discarding_words([word.decode(errors="replace") for word in words])


def discarding_words(words: Sequence[str]) -> list[str]:
    """Return the devices among the words of a command line that discard memory."""
    found = []
    for option, value in pairwise(words):
        # also JSON: -device {"driver":"virtio-balloon-pci",...}
        if option in ("-device", "--device") and (match := _DEVICES.search(value)):
            found.append(match.group())
    return found


class HoleWatch:
    """Watches the files of guest memory: one whose allocated bytes shrink has got a hole.

    Every page of a region is allocated when a device gets it, so a file has at least its regions' bytes from then on,
    whatever it has when it is looked at first: pages may be discarded while others are being mapped. A hole that is
    filled again between two looks is not seen.
    """

    def __init__(self) -> None:
        self._allocated: dict[tuple[int, int], int] = {}
        """Bytes by device and inode."""
        self.notices = FileNotices()
        self._looked = False

    @property
    def notified(self) -> bool:
        """Whether the kernel reports each hole from now on, so that there is nothing to look for without a notice."""
        return self._looked and bool(self.notices.fds)

    def begin(
        self,
        files: Mapping[tuple[int, int], int],
        ranges: Mapping[tuple[int, int], Sequence[tuple[int, int]]],
    ) -> None:
        """Watch these files, descriptors by device and inode.

        ``ranges`` are what devices have of each, as begin and end, which is taken to be allocated.
        """
        # before the files are looked at: a later hole is reported, an earlier one is seen
        self.notices.watch(files.values())
        self._looked = False
        self._allocated = {key: _expected(fd, ranges.get(key, ())) for key, fd in files.items()}

    def forget_others(self, files: Mapping[tuple[int, int], int]) -> None:
        """Watch these files only: what is watched keeps its memory, also when nobody else has it."""
        if gone := self._allocated.keys() - files.keys():
            for key in gone:
                del self._allocated[key]
            self.notices.watch(files.values())
            self._looked = False

    def look(self, files: Mapping[tuple[int, int], int]) -> int:
        """Return the bytes that the files have lost since the last look."""
        self.notices.drain()
        self._looked = True
        lost = 0
        for key, fd in files.items():
            now = allocated(fd)
            lost += max(0, self._allocated.get(key, now) - now)
            self._allocated[key] = now
        return lost


def _expected(fd: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Return the bytes that a file has allocated if it has no hole in its ranges."""
    total, reached = 0, 0
    for begin, end in sorted(ranges):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    # more: whole huge pages, and memory outside regions
    return max(total, allocated(fd))


def allocated(fd: int) -> int:
    """Return the bytes of a file that are allocated."""
    return os.fstat(fd).st_blocks * _BLOCK
