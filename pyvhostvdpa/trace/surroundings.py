# SPDX-License-Identifier: MIT
"""What calls do not show and the system still knows while they are recorded: where memory lies.

Both are looked up once, when they are new, and noted in the trace: the process may be gone when a reader asks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from .advice import MEMORY_NOTE, RINGS_NOTE
from .recorder import Event
from .sessions import Episode, Follower, What
from .spans import GUEST_MEMORY_MIN

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
"""Of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst)."""


def is_private(pid: int, address: int, proc: Path = Path("/proc")) -> bool | None:
    """Return whether memory at an address is private to its process; None if that cannot be known."""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / str(pid) / "maps").read_text().splitlines():
            span, rights = line.split(" ", 2)[:2]
            begin, _, end = span.partition("-")
            if int(begin, 16) <= address < int(end, 16):
                return rights[3] == "p"
    return None


def physical_runs(pid: int, address: int, size: int, proc: Path = Path("/proc")) -> tuple[int, int] | None:
    """Return on how many contiguous physical runs memory lies, and of how many pages; None if that cannot be known."""
    first, last = address // _PAGE, (address + size - 1) // _PAGE
    try:
        with open(proc / str(pid) / "pagemap", "rb") as pagemap:
            pagemap.seek(first * 8)
            raw = pagemap.read((last - first + 1) * 8)
    except OSError:
        return None
    entries = [entry for (entry,) in struct.iter_unpack("=Q", raw)]
    frames = [entry & _FRAME for entry in entries]
    if not frames or not all(entry & _PRESENT for entry in entries) or not all(frames):
        return None
    return 1 + sum(after != before + 1 for before, after in itertools.pairwise(frames)), len(frames)


def uses_process_addresses(device: str) -> bool | None:
    """Return whether a device reaches memory as the process does (vdpa_sim with use_va); None if that is not known."""
    with contextlib.suppress(OSError):
        info = os.stat(device)
        node = os.path.realpath(f"/sys/dev/char/{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}")
        if "vdpasim" in node:
            return Path("/sys/module/vdpa_sim/parameters/use_va").read_text().strip() in ("Y", "1")
        return False
    return None


class Facts:
    """Notes to add to a recording as its events come."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, int | None, int]] = set()

    def notes(self, event: Event, follower: Follower, episode: Episode | None) -> Iterator[Event]:
        """Yield what an event gives occasion to note, once it was followed."""
        if event.result is None or event.result < 0:
            return
        pid = follower.session.pid
        if pid is None:
            return
        if event.event == "IOTLB_UPDATE" and int(event.fields["size"]) >= GUEST_MEMORY_MIN:
            yield from self._memory(event, pid)
        if episode is not None and episode.what is What.START and episode.shadow:
            yield from self._rings(event, follower, episode, pid)

    def _memory(self, event: Event, pid: int) -> Iterator[Event]:
        key = (event.device, pid, int(event.fields["uaddr"]))
        if key in self._seen:
            return
        self._seen.add(key)
        private = is_private(pid, int(event.fields["uaddr"]))
        if private is not None:
            kind = "private" if private else "shared"
            use_va = int(bool(uses_process_addresses(event.device)))
            yield _note(event, MEMORY_NOTE, {kind: int(event.fields["size"]), "use_va": use_va})

    def _rings(self, event: Event, follower: Follower, episode: Episode, pid: int) -> Iterator[Event]:
        for index in follower.locations.addresses:
            key = (f"{event.device} {index}", pid, episode.first)
            memory = follower.locations.ring_memory(index)
            if key in self._seen or memory is None:
                continue
            self._seen.add(key)
            found = physical_runs(pid, *memory)
            if found is not None:
                yield _note(event, RINGS_NOTE, {"index": index, "runs": found[0], "pages": found[1]})


def _note(event: Event, name: str, fields: dict[str, int | str]) -> Event:
    return Event(event.t_end, event.t_end, event.device, "", name, fields, None)
