# SPDX-License-Identifier: MIT
"""A stopped guest in a file: for the side that cannot know whether the guest is its own.

The file holds everything, so the process may end. Whoever starts the guest
from it (``vhost-vdpa receive --take``, ``vhost-vdpa send --resume``) removes
it: a guest is started once.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..base.errors import MigrationFailed, MigrationRefused, StreamCorrupt
from ..guest.state import MAX_DEVICES, DeviceState, GuestShape, GuestState
from ..memory.guest import GuestMemory, Progress
from .pages import memory_hash
from .stream import MAX_CONTROL

DEFAULT_FOLDER = Path("/var/lib/pyvhostvdpa")
MAGIC = b"vdpa-gst"
VERSION = 1
_HEAD = struct.Struct("<8sIIQ")
_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """A guest without its memory."""

    shape: GuestShape
    guest: GuestState
    devices: tuple[DeviceState, ...]


def check_room(folder: Path, size: int) -> None:
    """Make ``folder`` and raise :class:`~pyvhostvdpa.MigrationRefused` if a guest of ``size`` does not fit."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        room = os.statvfs(folder)
    except OSError as e:
        raise MigrationRefused(
            f"no place to save a guest: {folder}: {e.strerror}",
            hint="vhost-vdpa send and receive take another folder with --state DIR",
        ) from e
    free = room.f_bavail * room.f_frsize
    if free < size:
        raise MigrationRefused(
            f"{folder} has {free >> 20} MiB free; a guest whose stream breaks at the hand-over is saved there, "
            f"and takes {size >> 20} MiB",
            hint="vhost-vdpa send and receive take another folder with --state DIR",
        )


def save(folder: Path, role: str, saved: SavedGuest, memory: GuestMemory) -> Path:
    """Write a stopped guest to a file in ``folder`` and return its path; MigrationFailed if that cannot be done."""
    path = folder / f"guest-{saved.shape.id.hex()[:12]}-{role}.saved"
    half = path.with_suffix(".half")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            _write(file, saved, memory)
            file.flush()
            os.fsync(file.fileno())
        half.rename(path)
    except OSError as e:
        with suppress(OSError):
            half.unlink()
        raise MigrationFailed(f"the guest could not be saved to {path}: {e.strerror}") from e
    return path


def _write(file: BinaryIO, saved: SavedGuest, memory: GuestMemory) -> None:
    file.write(_HEAD.pack(MAGIC, VERSION, len(saved.devices), memory_hash(memory)))
    for section in (saved.shape.encode(), saved.guest.encode(), *(device.encode() for device in saved.devices)):
        file.write(_LENGTH.pack(len(section)) + section)
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


def load(path: Path, progress: Progress = lambda done: None) -> tuple[SavedGuest, GuestMemory]:
    """Return the guest in a file, and its memory, which is the caller's to close.

    Raises :class:`~pyvhostvdpa.MigrationRefused` if there is no such
    file, :class:`~pyvhostvdpa.StreamCorrupt` if it is none of ours or
    damaged, :class:`~pyvhostvdpa.MissingFeature` without the memory.
    """
    try:
        with path.open("rb") as file:
            return _load(file, path, progress)
    except OSError as e:
        raise MigrationRefused(f"{path}: {e.strerror}", hint="ls -l *.saved") from e


def _load(file: BinaryIO, path: Path, progress: Progress) -> tuple[SavedGuest, GuestMemory]:
    magic, version, count, digest = _HEAD.unpack(_exactly(file, _HEAD.size, path))
    if magic != MAGIC or version != VERSION or count > MAX_DEVICES:
        raise StreamCorrupt(f"{path} is no saved guest of version {VERSION}")
    shape = GuestShape.decode(_section(file, path))
    guest = GuestState.decode(_section(file, path))
    devices = tuple(DeviceState.decode(_section(file, path)) for _ in range(count))
    if len(devices) != len(shape.devices):
        raise StreamCorrupt(f"{path}: state of {len(devices)} devices, the guest has {len(shape.devices)}")
    memory = GuestMemory(shape.memory, progress)  # type: ignore[arg-type]
    try:
        _fill(file, memory, path)
        if memory_hash(memory) != digest:
            raise StreamCorrupt(f"{path} is damaged: the hash of its memory differs")
    except BaseException:
        memory.close()
        raise
    return SavedGuest(shape, guest, devices), memory


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


def _section(file: BinaryIO, path: Path) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size, path))
    if length > MAX_CONTROL:
        raise StreamCorrupt(f"{path}: a section of {length} bytes")
    return _exactly(file, length, path)
