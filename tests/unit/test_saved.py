"""A stopped guest in a file: all of it comes back, or there is a clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import MigrationFailed, MigrationRefused, StreamCorrupt
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.state import GuestShape, GuestState
from pyvhostvdpa.guest.synthetic import Guest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, Gpa, GuestMemory
from pyvhostvdpa.migration.saved import SavedGuest, check_room, load, save

SIZE = 4 << 20
LAYOUT = ((DEFAULT_GPA, SIZE), (Gpa(1 << 33), 12288))


@pytest.fixture
def guest() -> Iterator[Guest]:
    memory = GuestMemory(LAYOUT)
    guest = Guest(memory)
    guest.add(GuestNic(memory, NicOptions(ring_size=16)), None)
    memory.regions[0].memory.buffer[3_000_000:3_500_000] = os.urandom(500_000)
    memory.regions[1].memory.buffer[12287] = 7
    yield guest
    guest.close()


def saved(guest: Guest) -> SavedGuest:
    own, devices = guest.state()
    return SavedGuest(GuestShape(bytes(16), "here", LAYOUT, guest.shapes(), False), own, tuple(devices))


def test_a_guest_comes_back_whole(guest: Guest, tmp_path: Path) -> None:
    was = saved(guest)
    path = save(tmp_path, "source", was, guest.memory)
    assert path.name == "guest-000000000000-source.saved"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [path.name]
    found, memory = load(path)
    with memory:
        assert found == was
        for theirs, ours in zip(memory.regions, guest.memory.regions, strict=True):
            assert theirs.gpa == ours.gpa
            assert bytes(theirs.memory.buffer) == bytes(ours.memory.buffer)


def test_zeros_take_no_room(guest: Guest, tmp_path: Path) -> None:
    path = save(tmp_path, "source", saved(guest), guest.memory)
    assert path.stat().st_size > SIZE
    assert path.stat().st_blocks * 512 < SIZE


def test_a_damaged_byte_of_memory_is_found(guest: Guest, tmp_path: Path) -> None:
    path = save(tmp_path, "source", saved(guest), guest.memory)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StreamCorrupt, match="the hash of its memory differs"):
        load(path)


@pytest.mark.parametrize("cut", [0, 10, 30, 60, 3000, 1 << 20])
def test_a_truncated_file_is_refused(guest: Guest, tmp_path: Path, cut: int) -> None:
    path = save(tmp_path, "source", saved(guest), guest.memory)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(StreamCorrupt):
        load(path)


def test_another_file_is_no_guest(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(StreamCorrupt, match="is no saved guest"):
        load(path)


def test_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(MigrationRefused, match="No such file"):
        load(tmp_path / "none")


def test_no_room_is_told_beforehand(tmp_path: Path) -> None:
    with pytest.raises(MigrationRefused, match="MiB free") as refused:
        check_room(tmp_path / "new", 1 << 60)
    assert "--state DIR" in refused.value.hint


def test_a_file_that_cannot_be_written_is_told(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MigrationFailed, match="could not be saved"):
        save(tmp_path / "file", "source", saved(guest), guest.memory)


def test_a_guest_without_devices_state_is_refused(guest: Guest, tmp_path: Path) -> None:
    whole = saved(guest)
    path = save(tmp_path, "source", SavedGuest(whole.shape, GuestState(0), ()), guest.memory)
    with pytest.raises(StreamCorrupt, match="state of 0 devices, the guest has 1"):
        load(path)
