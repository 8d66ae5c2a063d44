# SPDX-License-Identifier: MIT
"""Two back-ends of one migration: the source announces the guest to the destination, while the guest still runs.

A front-end gives a destination's back-end no memory before the guest is about to run there. But its memory exists, and
the source knows how it is laid out, where the rings are and what the guest negotiated. With that the destination's
device is opened, mapped, set up and suspended during the migration; what remains is compared with what the front-end
says, and whatever differs is done then.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .._cdefs import lib
from ..base.errors import MissingFeature, VhostVdpaError
from ..migration.endpoint import Address, Listener, Tls, connect
from ..migration.stream import Frame
from ..net.control import ControlModel
from ..virtqueue.layout import GuestQueue
from .coming import ComingGuest, ComingRegion, ComingRing, MemoryFile
from .memory import MAX_SLOTS, SharedRegion
from .messages import MessageRefused
from .state import check_integer, control_from_dict, control_to_dict

SCHEMA = "pyvhostvdpa/serve-peer/1"
RETRY = 1.0
"""Seconds until the guest is announced again to a destination that was not ready."""
ANSWER_SECONDS = 600.0
"""How long a destination may take to map the memory of a guest."""
MAX_SOURCES = 16
"""Sources that are listened to at once."""
_U64 = 1 << 64


def describe(
    features: int,
    pairs: int,
    memory: Sequence[SharedRegion],
    files: dict[tuple[int, int], int],
    queues: Sequence[GuestQueue],
    model: ControlModel | None,
) -> bytes:
    """Return the message that announces a guest to a destination; ``files`` are descriptors by device and inode."""
    numbers = {key: number for number, key in enumerate(files)}
    message = {
        "schema": SCHEMA,
        "features": features,
        "pairs": pairs,
        "files": [{"name": _name_of(f"/proc/self/fd/{fd}"), "size": os.fstat(fd).st_size} for fd in files.values()],
        "regions": [
            {"gpa": each.gpa, "size": each.size, "offset": each.offset, "file": numbers[each.file]} for each in memory
        ],
        "rings": [{name: getattr(each, name) for name in ComingRing.__slots__} for each in queues],
        "control": None if model is None else control_to_dict(model),
    }
    return json.dumps(message, separators=(",", ":")).encode()


def parse(data: bytes) -> ComingGuest:
    """Return the guest that a message announces, checked in full; :class:`MessageRefused` for any other message."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise MessageRefused(f"the peer's message is not JSON: {e}") from None
    if not isinstance(message, dict) or message.get("schema") != SCHEMA:
        raise MessageRefused("the peer is not a server of the same version", hint="install the same version on both")
    check_integer(message, "features", 0, _U64)
    check_integer(message, "pairs", 1, 1 << 15)
    files = tuple(MemoryFile(_text(each, "name"), each["size"]) for each in _items(message, "files", {"size": _U64}))
    fields = {"gpa": _U64, "size": _U64, "offset": _U64, "file": len(files)}
    regions = tuple(ComingRegion(**_only(each, fields)) for each in _items(message, "regions", fields))
    ring = {"index": 1 << 16, "num": 1 << 16, "desc": _U64, "avail": _U64, "used": _U64}
    rings = tuple(ComingRing(**_only(each, ring)) for each in _items(message, "rings", ring))
    control = message.get("control")
    return ComingGuest(
        message["features"],
        message["pairs"],
        files,
        regions,
        rings,
        None if control is None else control_from_dict(control),
    )


def _items(message: dict[str, Any], name: str, fields: dict[str, int]) -> Iterator[dict[str, Any]]:
    items = message.get(name)
    if not isinstance(items, list) or not 0 < len(items) <= MAX_SLOTS:
        raise MessageRefused(f"the peer's message has no list of {name}")
    for each in items:
        if not isinstance(each, dict):
            raise MessageRefused(f"the peer's message has {each!r} among its {name}")
        for field, limit in fields.items():
            check_integer(each, field, 0, limit)
        yield each


def _only(item: dict[str, Any], fields: dict[str, int]) -> dict[str, int]:
    return {name: item[name] for name in fields}


def _text(item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise MessageRefused(f"the peer's message has {name} = {value!r}")
    return value


# -- the memory of a front-end before it has sent it -----------------------------------


def _name_of(link: str | Path) -> str:
    """Return the name of an open file without what differs between two processes."""
    return re.sub(r" \(deleted\)$", "", os.readlink(link))


def find_files(pid: int, wanted: Sequence[MemoryFile], proc: Path = Path("/proc")) -> list[int]:
    """Open the memory files of a process that look like ``wanted``, each once; the caller closes them.

    A file with the same name is taken before one that only has the same size. :class:`~pyvhostvdpa.MissingFeature` if
    there are not enough, or if this process may not look (it takes the same user, or CAP_SYS_PTRACE).
    """
    there = _memory_files(pid, proc)
    found: list[int] = []
    try:
        for file in wanted:
            same_size = [each for each in there if each[1].size == file.size]
            if not same_size:
                raise MissingFeature(f"process {pid} has no memory file of {file.size:#x} bytes like {file.name}")
            chosen = next((each for each in same_size if each[1].name == file.name), same_size[0])
            there.remove(chosen)
            found.append(os.open(chosen[0], os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        _close(found)
        raise MissingFeature(f"the memory of process {pid} cannot be opened: {e.strerror}") from e
    except BaseException:
        _close(found)
        raise
    return found


def _memory_files(pid: int, proc: Path) -> list[tuple[Path, MemoryFile]]:
    """Return the memory files that a process has open, by descriptor, each file once."""
    try:
        links = sorted((proc / str(pid) / "fd").iterdir(), key=lambda path: int(path.name))
    except OSError as e:
        raise MissingFeature(
            f"the open files of process {pid} cannot be seen: {e.strerror}",
            hint="run both as the same user, or give the server CAP_SYS_PTRACE",
        ) from e
    seen: set[tuple[int, int]] = set()
    found = []
    for link in links:
        try:
            name = _name_of(link)
            if not name.startswith("/") or name.startswith(("/dev/kvm", "/dev/vhost")):
                continue
            status = os.stat(link)
            key = status.st_dev, status.st_ino
            if status.st_size and key not in seen and _is_memory(link):
                seen.add(key)
                found.append((link, MemoryFile(name, status.st_size)))
        except OSError:
            # closed meanwhile, or we may not open it
            continue
    return found


def _is_memory(link: Path) -> bool:
    fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return bool(lib.is_memory_file(fd) > 0)
    finally:
        os.close(fd)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


# -- the channel ---------------------------------------------------------------------------


class Telling:
    """Announces a guest to a destination, in a thread, repeatedly until it is ready or :meth:`stop` is called."""

    def __init__(self, address: Address, tls: Tls | None, message: bytes, report: Callable[[str, str], None]) -> None:
        self._address, self._tls, self._message, self._report = address, tls, message, report
        self._cancel = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Have it end, wherever it is, without waiting for that: see :meth:`join`."""
        self._stopped.set()
        os.eventfd_write(self._cancel, 1)

    def join(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, after :meth:`stop`; whether it has. It is released then."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        os.close(self._cancel)
        return True

    def _run(self) -> None:
        last = ""
        while not self._stopped.is_set():
            try:
                words = self._tell()
                if not self._stopped.is_set():
                    self._report("peer-ready", words)
                return
            except (VhostVdpaError, OSError) as e:
                # reported once, then retried: the destination may come up later
                if str(e) != last and not self._stopped.is_set():
                    last = str(e)
                    self._report("peer-not-ready", last)
            self._stopped.wait(RETRY)

    def _tell(self) -> str:
        with connect(self._address, self._tls, self._cancel) as channel:
            channel.send_frame(Frame.STAND_BY, self._message)
            kind, words = channel.expect(Frame.ACCEPT, Frame.REFUSE, seconds=ANSWER_SECONDS)
            text = words.decode(errors="replace")
            if kind is Frame.REFUSE:
                raise MessageRefused(text)
            return text


class Hearing:
    """Takes announcements of sources, and has them carried out by ``ask``, which returns words or raises."""

    def __init__(self, listener: Listener, ask: Callable[[ComingGuest], str]) -> None:
        self.listener = listener
        self._ask = ask
        self._threads: list[threading.Thread] = []
        self._cancel = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Return the socket that sources connect to."""
        return self.listener.fileno()

    def accept(self) -> None:
        """Serve one source in a thread; one too many is sent away, it tries again."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        try:
            connection = self.listener.accept_socket()
        except OSError:
            # it left again before it was accepted
            return
        if len(self._threads) >= MAX_SOURCES:
            # a new peer has shown no certificate yet, and descriptors are for the guest
            connection.close()
            return
        thread = threading.Thread(target=self._serve, args=(connection,), name="peer", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, connection: Any) -> None:
        try:
            with self.listener.admit(connection, self._cancel) as channel:
                _, message = channel.expect(Frame.STAND_BY)
                try:
                    channel.send_text(Frame.ACCEPT, self._ask(parse(message)))
                except (VhostVdpaError, ValueError, OSError) as e:
                    channel.send_text(Frame.REFUSE, str(e))
                channel.finish()
        except (VhostVdpaError, OSError):
            # the peer is gone
            return

    def close(self) -> None:
        """Listen no more."""
        self.listener.close()
        os.eventfd_write(self._cancel, 1)
        for thread in self._threads:
            thread.join()
        os.close(self._cancel)
