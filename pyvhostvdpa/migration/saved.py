# SPDX-License-Identifier: MIT
"""A stopped guest in a file: for the side that cannot know whether the guest is its own.

The file holds everything, so the process may end. The process that starts the guest
from it (``vhost-vdpa receive --take``, ``vhost-vdpa send --resume``) removes
it: a guest is started once.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..base.errors import MigrationFailed, MigrationRefused, StreamCorrupt
from ..guest.protocol import DeviceSection, G, Kinds, Section, kind_of
from ..guest.shape import MAX_DEVICES, BadState, GuestShape, check_shapes
from ..memory.guest import GuestMemory
from ..memory.mapped import ProgressCallback
from .folder import SAVED, Claim, Draft, check_saved_folder
from .pages import memory_hash, stream_sum
from .stream import MAX_CONTROL

log = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("/var/lib/pyvhostvdpa")
MAGIC = b"vdpa-gst"
VERSION = 2
"""Of the file. One of version 1 has no checksums but that of memory; it is read, with a warning."""
UNCHECKED_VERSION = 1
_HEAD = struct.Struct("<8sIIQ")
_LENGTH = struct.Struct("<I")
_SUM = struct.Struct("<Q")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """A guest without its memory."""

    shape: GuestShape
    guest: Section
    devices: tuple[DeviceSection, ...]


def check_room(folder: Path, size: int) -> None:
    """Make ``folder`` and raise :class:`~pyvhostvdpa.MigrationRefused` if a guest of ``size`` bytes cannot be saved."""
    free = check_saved_folder(folder)
    if free < size:
        raise MigrationRefused(
            f"{folder} has {free >> 20} MiB free; a guest whose stream breaks at the hand-over is saved there, "
            f"and takes {size >> 20} MiB",
            hint="vhost-vdpa send and receive take another folder with --state DIR",
        )


def save(folder: Path, role: str, saved: SavedGuest, memory: GuestMemory) -> Path:
    """Write a stopped guest to a file in ``folder`` and return its path; MigrationFailed if that cannot be done."""
    with save_held(folder, role, saved, memory) as held:
        return held.path


def save_held(folder: Path, role: str, saved: SavedGuest, memory: GuestMemory) -> Draft:
    """Do what :func:`save` does, but keep the file: it has its name, and cannot be claimed before that is closed."""
    # the number is the other side's choice: it names the file, and replaces none
    stem = f"guest-{saved.shape.id.hex()[:12]}-{role}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as unless_saved:
            draft = unless_saved.enter_context(Draft(folder))
            with open(os.dup(draft.fileno()), "wb") as file:
                _write(file, saved, memory)
            draft.publish(stem)
            unless_saved.pop_all()
    except OSError as e:
        raise MigrationFailed(f"the guest could not be saved to {folder / stem}{SAVED}: {e.strerror}") from e
    return draft


def _write(file: BinaryIO, saved: SavedGuest, memory: GuestMemory) -> None:
    _write_checked(file, _HEAD.pack(MAGIC, VERSION, len(saved.devices), memory_hash(memory)))
    for section in (saved.shape.encode(), saved.guest.encode(), *(device.encode() for device in saved.devices)):
        _write_checked(file, _LENGTH.pack(len(section)) + section)
    zeros = bytes(_CHUNK)
    for region in memory.regions:
        with region.memory.buffer as buffer:
            for at in range(0, len(buffer), _CHUNK):
                chunk = bytes(buffer[at : at + _CHUNK])
                if chunk == zeros:
                    file.seek(_CHUNK, os.SEEK_CUR)
                else:
                    file.write(chunk)
    # a hole at the end counts as well
    file.truncate()


def load(path: Path, kinds: Kinds[G], progress: ProgressCallback = lambda done: None) -> tuple[SavedGuest, GuestMemory]:
    """Return the guest in a file, and its memory, which is the caller's to close.

    Raises :class:`~pyvhostvdpa.MigrationRefused` if there is no such
    file or the guest is of none of these ``kinds``, :class:`~pyvhostvdpa.StreamCorrupt` if it is not a saved guest or
    damaged, :class:`~pyvhostvdpa.MissingFeature` without the memory.
    It claims nothing: use :func:`load_claimed` to start the guest.
    """
    try:
        with path.open("rb") as file:
            return _load(file, path, kinds, progress)
    except OSError as e:
        raise MigrationRefused(f"{path}: {e.strerror}", hint=f"ls -l {path.absolute().parent}") from e


def load_claimed(
    claim: Claim, kinds: Kinds[G], progress: ProgressCallback = lambda done: None
) -> tuple[SavedGuest, GuestMemory]:
    """Return the guest in a file that this process has claimed; raises what :func:`load` does."""
    try:
        with open(os.dup(claim.fileno()), "rb") as file:
            return _load(file, claim.path, kinds, progress)
    except OSError as e:
        raise MigrationRefused(f"{claim.path}: {e.strerror}", hint=f"ls -l {claim.path.parent}") from e


def _write_checked(file: BinaryIO, data: bytes) -> None:
    file.write(data + _SUM.pack(stream_sum(data)))


def _load(file: BinaryIO, path: Path, kinds: Kinds[G], progress: ProgressCallback) -> tuple[SavedGuest, GuestMemory]:
    saved, digest = read_sections(file, path, kinds)
    memory = GuestMemory(saved.shape.memory, progress)  # type: ignore[arg-type]
    try:
        _fill(file, memory, path)
        if memory_hash(memory) != digest:
            raise StreamCorrupt(f"{path} is damaged: the hash of its memory differs")
        if file.read(1):
            raise StreamCorrupt(f"{path} is damaged: there are bytes after its memory")
    except BaseException:
        memory.close()
        raise
    return saved, memory


def read_sections(file: BinaryIO, path: Path, kinds: Kinds[G]) -> tuple[SavedGuest, int]:
    """Return the guest without its memory, which follows in the file, and that memory's hash.

    Raises :class:`~pyvhostvdpa.StreamCorrupt` if any bit of it was changed
    since it was written; a file of version 1 has a checksum of its memory only, and gets a warning.
    """
    version, count, digest = _read_head(file, path)
    checked = version == VERSION
    if not checked:
        log.warning(
            "%s has format version %d: apart from its memory it is unchecked, damage may go unnoticed", path, version
        )
    shape = GuestShape.decode(_section(file, path, checked))
    kind = kind_of(shape, kinds)
    guest = kind.decode_guest(_section(file, path, checked))
    devices = tuple(kind.decode_device(_section(file, path, checked)) for _ in range(count))
    try:
        check_shapes([device.shape for device in devices], shape.devices)
    except BadState as e:
        raise StreamCorrupt(f"{path}: {e}") from e
    return SavedGuest(shape, guest, devices), digest


def _read_head(file: BinaryIO, path: Path) -> tuple[int, int, int]:
    """Return the version of a file, how many devices follow, and the hash of memory."""
    head = _exactly(file, _HEAD.size, path)
    magic, version, count, digest = _HEAD.unpack(head)
    if magic != MAGIC or version not in (UNCHECKED_VERSION, VERSION):
        raise StreamCorrupt(f"{path} is not a saved guest of version {UNCHECKED_VERSION} or {VERSION}")
    if version == VERSION:
        _check_sum(file, head, path)
    if count > MAX_DEVICES:
        raise StreamCorrupt(f"{path}: {count} devices, at most {MAX_DEVICES} are possible")
    return version, count, digest


def other_files(path: Path, guest: bytes) -> list[Path]:
    """Return the other files in the folder of ``path`` that hold the guest of this id: both sides may have saved it."""
    return [other for other in sorted(path.parent.glob(f"*{SAVED}")) if other != path and _id_in(other) == guest]


def _id_in(path: Path) -> bytes | None:
    """Return the id of the guest in a file, None if it is not a saved guest or is gone."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with path.open("rb") as file:
            version, _, _ = _read_head(file, path)
            return GuestShape.decode(_section(file, path, version == VERSION)).id
    except (OSError, StreamCorrupt):
        return None


def _fill(file: BinaryIO, memory: GuestMemory, path: Path) -> None:
    for region in memory.regions:
        with region.memory.buffer as buffer:
            at = 0
            while at < len(buffer):
                count = file.readinto(buffer[at : at + _CHUNK])  # type: ignore[attr-defined]
                if not count:
                    raise StreamCorrupt(f"{path} ends within memory, at {region.gpa + at:#x}")
                at += count


def _exactly(file: BinaryIO, size: int, path: Path) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise StreamCorrupt(f"{path} ends within its head")
    return data


def _section(file: BinaryIO, path: Path, checked: bool) -> bytes:
    head = _exactly(file, _LENGTH.size, path)
    (length,) = _LENGTH.unpack(head)
    if length > MAX_CONTROL:
        raise StreamCorrupt(f"{path}: a section of {length} bytes")
    section = _exactly(file, length, path)
    if checked:
        _check_sum(file, head + section, path)
    return section


def _check_sum(file: BinaryIO, data: bytes, path: Path) -> None:
    if _exactly(file, _SUM.size, path) != _SUM.pack(stream_sum(data)):
        raise StreamCorrupt(f"{path} is damaged: the checksum of its state differs")
