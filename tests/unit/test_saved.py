"""A stopped guest in a file: all of it comes back, or there is a clear error."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import MigrationFailed, MigrationRefused, StreamCorrupt
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.shape import GuestShape
from pyvhostvdpa.guest.state import GuestState
from pyvhostvdpa.guest.synthetic import KINDS, SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, Gpa, GuestMemory
from pyvhostvdpa.migration.pages import memory_hash
from pyvhostvdpa.migration.saved import SavedGuest, check_room, load, read_sections, save

SIZE = 4 << 20
LAYOUT = ((DEFAULT_GPA, SIZE), (Gpa(1 << 33), 12288))


@pytest.fixture
def guest() -> Iterator[SyntheticGuest]:
    memory = GuestMemory(LAYOUT)
    guest = SyntheticGuest(memory)
    guest.add(GuestNic(memory, NicOptions(ring_size=16)), None)
    memory.regions[0].memory.buffer[3_000_000:3_500_000] = os.urandom(500_000)
    memory.regions[1].memory.buffer[12287] = 7
    yield guest
    guest.close()


def saved(guest: SyntheticGuest) -> SavedGuest:
    own, devices = guest.state()
    return SavedGuest(GuestShape(bytes(16), "here", LAYOUT, guest.shapes(), False), own, tuple(devices))


def test_a_guest_comes_back_whole(guest: SyntheticGuest, tmp_path: Path) -> None:
    was = saved(guest)
    path = save(tmp_path, "source", was, guest.memory)
    assert path.name == "guest-000000000000-source.saved"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [path.name]
    found, memory = load(path, KINDS)
    with memory:
        assert found == was
        for theirs, ours in zip(memory.regions, guest.memory.regions, strict=True):
            assert theirs.gpa == ours.gpa
            assert bytes(theirs.memory.buffer) == bytes(ours.memory.buffer)


def test_zeros_take_no_room(guest: SyntheticGuest, tmp_path: Path) -> None:
    path = save(tmp_path, "source", saved(guest), guest.memory)
    assert path.stat().st_size > SIZE
    assert path.stat().st_blocks * 512 < SIZE


def test_a_damaged_byte_of_memory_is_found(guest: SyntheticGuest, tmp_path: Path) -> None:
    path = save(tmp_path, "source", saved(guest), guest.memory)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StreamCorrupt, match="the hash of its memory differs"):
        load(path, KINDS)


@pytest.mark.parametrize("cut", [0, 10, 30, 60, 3000, 1 << 20])
def test_a_truncated_file_is_refused(guest: SyntheticGuest, tmp_path: Path, cut: int) -> None:
    path = save(tmp_path, "source", saved(guest), guest.memory)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(StreamCorrupt):
        load(path, KINDS)


def test_load_of_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(StreamCorrupt, match="is not a saved guest of version 1 or 2"):
        load(path, KINDS)


def test_no_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MigrationRefused, match="No such file"):
        load(tmp_path / "none", KINDS)


def test_missing_room_is_reported_before_saving(tmp_path: Path) -> None:
    with pytest.raises(MigrationRefused, match="MiB free") as refused:
        check_room(tmp_path / "new", 1 << 60)
    assert "--state DIR" in refused.value.hint


def test_a_file_that_cannot_be_written_is_reported(guest: SyntheticGuest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MigrationFailed, match="could not be saved"):
        save(tmp_path / "file", "source", saved(guest), guest.memory)


def test_a_guest_without_devices_state_is_refused(guest: SyntheticGuest, tmp_path: Path) -> None:
    whole = saved(guest)
    path = save(tmp_path, "source", SavedGuest(whole.shape, GuestState(0), ()), guest.memory)
    with pytest.raises(StreamCorrupt, match="0 devices, the SHAPE section has 1"):
        load(path, KINDS)


# -- checksums: version 2 ---------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[SyntheticGuest]:
    memory = GuestMemory([(DEFAULT_GPA, 1 << 18)])
    guest = SyntheticGuest(memory)
    guest.add(GuestNic(memory, NicOptions(ring_size=16)), None)
    yield guest
    guest.close()


def saved_small(guest: SyntheticGuest) -> SavedGuest:
    own, devices = guest.state()
    shape = GuestShape(bytes(range(16)), "here", ((DEFAULT_GPA, 1 << 18),), guest.shapes(), False)
    return SavedGuest(shape, own, tuple(devices))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_saved_file_with_one_flipped_bit_is_refused(small: SyntheticGuest, tmp_path: Path) -> None:
    """A bit of each byte before memory, but of few in the bitmap of sequence numbers; and some of memory."""
    path = save(tmp_path, "source", saved_small(small), small.memory)
    data = path.read_bytes()
    state = len(data) - small.memory.size
    places = [at for at in range(state) if at < state - 8400 or at > state - 100 or at % 97 == 0]
    for number, at in enumerate([*places, state, state + 4097, len(data) - 1]):
        path.write_bytes(flipped(data, 8 * at + number % 8))
        with pytest.raises(StreamCorrupt):
            load(path, KINDS)


def test_every_flipped_bit_of_saved_state_is_refused(small: SyntheticGuest, tmp_path: Path) -> None:
    path = save(tmp_path, "source", saved_small(small), small.memory)
    state = path.read_bytes()[: -small.memory.size]
    assert read_sections(io.BytesIO(state), path, KINDS)[0] == saved_small_of(path)
    # the hash of memory is part of the head, whose checksum covers it
    for bit in range(8 * len(state)):
        with pytest.raises(StreamCorrupt):
            read_sections(io.BytesIO(flipped(state, bit)), path, KINDS)


def saved_small_of(path: Path) -> SavedGuest:
    saved, memory = load(path, KINDS)
    memory.close()
    return saved


def test_saved_file_with_bytes_after_its_end_is_refused(small: SyntheticGuest, tmp_path: Path) -> None:
    path = save(tmp_path, "source", saved_small(small), small.memory)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StreamCorrupt, match="bytes after its memory"):
        load(path, KINDS)


def test_saved_file_of_version_1_is_read_with_a_warning(
    small: SyntheticGuest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guest = saved_small(small)
    path = tmp_path / "old.saved"
    data = struct.pack("<8sIIQ", b"vdpa-gst", 1, 1, memory_hash(small.memory))
    for section in (guest.shape.encode(), guest.guest.encode(), guest.devices[0].encode()):
        data += struct.pack("<I", len(section)) + section
    path.write_bytes(data + bytes(small.memory.regions[0].memory.buffer))
    with caplog.at_level(logging.WARNING):
        found, memory = load(path, KINDS)
    memory.close()
    assert found == guest
    assert "format version 1" in caplog.text
    assert "unchecked" in caplog.text


def test_saved_file_of_the_current_version_is_read_without_a_warning(
    small: SyntheticGuest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "source", saved_small(small), small.memory)
    assert path.read_bytes()[8:12] == b"\2\0\0\0"
    load(path, KINDS)[1].close()
    assert not caplog.text


def test_saved_state_that_does_not_match_its_shape_is_refused(small: SyntheticGuest, tmp_path: Path) -> None:
    whole = saved_small(small)
    other = dataclasses.replace(whole.shape, devices=(dataclasses.replace(whole.shape.devices[0], ring_size=32),))
    path = save(tmp_path, "source", dataclasses.replace(whole, shape=other), small.memory)
    with pytest.raises(StreamCorrupt, match="ring_size 16 here, 32 there"):
        load(path, KINDS)
