"""Files of saved guests: they appear whole, cannot be replaced by other users, and one process at a time has one."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import MigrationFailed, MigrationRefused
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.shape import GuestShape
from pyvhostvdpa.guest.synthetic import KINDS, SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration import folder as folders
from pyvhostvdpa.migration import saved as saving
from pyvhostvdpa.migration.folder import Claim, Draft, claimed
from pyvhostvdpa.migration.saved import SavedGuest, check_room, load, save, save_held

SIZE = 4 << 20
NOBODY = 65534


@pytest.fixture
def guest() -> Iterator[SyntheticGuest]:
    guest = SyntheticGuest(GuestMemory([(DEFAULT_GPA, SIZE)]))
    guest.add(GuestNic(guest.memory, NicOptions(ring_size=16)), None)
    yield guest
    guest.close()


def saved(guest: SyntheticGuest, number: bytes = bytes(16)) -> SavedGuest:
    own, devices = guest.state()
    return SavedGuest(GuestShape(number, "here", ((DEFAULT_GPA, SIZE),), guest.shapes(), False), own, tuple(devices))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "guest-abc-source.saved"
    path.write_bytes(b"guest")
    return path


def in_child(action: Callable[[], None], user: int | None = None) -> int:
    """Fork, and do something there; its process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if user is not None and os.geteuid() == 0:
                os.setuid(user)
            action()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- claims ---------------------------------------------------------------------------


def test_a_claim_excludes_a_second_one_and_names_the_process(path: Path) -> None:
    with Claim(path), pytest.raises(MigrationRefused, match=f"in use: process {os.getpid()} ") as refused:
        Claim(path)
    assert refused.value.hint == f"ps -fp {os.getpid()}"


def test_a_file_of_any_suffix_is_claimed_once(tmp_path: Path) -> None:
    """A rename onto itself always succeeds: it claims nothing."""
    path = tmp_path / "guest-abc-source.taken"
    path.write_bytes(b"x")
    with claimed(path), pytest.raises(MigrationRefused, match="in use"), claimed(path):
        pass
    assert not path.exists()


def test_a_claim_that_ends_badly_leaves_the_file_under_its_name(path: Path) -> None:
    with pytest.raises(KeyError), claimed(path):
        raise KeyError
    assert path.read_bytes() == b"guest"
    Claim(path).close()


def test_a_claim_of_a_killed_process_ends_with_it(path: Path) -> None:
    def hold() -> None:
        claim = Claim(path)
        os.write(ready, b"x")
        signal.pause()
        claim.close()

    told, ready = os.pipe()
    pid = in_child(hold)
    os.read(told, 1)
    with pytest.raises(MigrationRefused, match=f"process {pid} "):
        Claim(path)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    assert path.exists()
    Claim(path).close()
    os.close(told)
    os.close(ready)


def test_a_file_that_was_removed_meanwhile_is_not_claimed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def after_another_taker(fd: int, operation: int) -> None:
        path.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_another_taker)
    with pytest.raises(MigrationRefused, match="has just started the guest"):
        Claim(path)


def test_a_file_that_was_exchanged_meanwhile_is_not_claimed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def after_another_taker(fd: int, operation: int) -> None:
        path.unlink()
        path.write_bytes(b"another guest")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_another_taker)
    with pytest.raises(MigrationRefused, match="has just started the guest"):
        Claim(path)


def test_a_claim_through_a_symlink_removes_the_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    with claimed(link):
        pass
    assert not path.exists()


def test_a_file_that_could_not_be_removed_is_not_claimed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MigrationRefused, match="would be started again"):
        Claim(path)


def test_a_missing_file_is_refused_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(MigrationRefused, match="No such file") as refused:
        Claim(tmp_path / "none")
    assert refused.value.hint == f"ls -l {tmp_path}"


def test_four_claimants_that_are_killed_at_random_start_a_guest_exactly_once(tmp_path: Path) -> None:
    """The guest "runs" when its line is written; a process that dies before that leaves the file to the others."""
    chance = random.Random(int(os.environ.get("PYVHOSTVDPA_SEED", "7")))
    for number in range(60):
        path, journal = tmp_path / f"guest-{number}.saved", tmp_path / f"journal-{number}"
        path.write_bytes(b"guest")
        journal.touch()

        def start(path: Path = path, journal: Path = journal) -> None:
            with Claim(path) as claim:
                time.sleep(0.002)
                with journal.open("a") as file:
                    file.write(f"{os.getpid()}\n")
                claim.remove()

        killed = 0
        while path.exists():
            before = len(journal.read_text().split())
            takers = [in_child(start) for _ in range(4)]
            time.sleep(chance.uniform(0, 0.006))
            victims = chance.sample(takers, chance.randrange(3)) if killed < 20 else []
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            winners = [pid for pid in takers if ended(pid) == 0]
            assert len(winners) <= 1
            started = [int(pid) for pid in journal.read_text().split()[before:]]
            # a guest may be started again only if the process that ran it is dead
            assert [pid for pid in started if pid not in victims] == [pid for pid in winners if pid not in victims]
            assert not winners or not path.exists()
        assert not list(tmp_path.glob("guest-*"))


# -- files that appear -----------------------------------------------------------------


def test_a_saved_guest_cannot_be_claimed_while_it_is_held(guest: SyntheticGuest, tmp_path: Path) -> None:
    with save_held(tmp_path, "source", saved(guest), guest.memory) as held:
        assert list(tmp_path.iterdir()) == [held.path]
        with pytest.raises(MigrationRefused, match="in use"):
            Claim(held.path)
    Claim(held.path).close()


def test_a_symlink_in_the_folder_is_not_followed(guest: SyntheticGuest, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("guest-000000000000-source.half", "guest-000000000000-source.saved"):
        (tmp_path / name).symlink_to(victim)
    path = save(tmp_path, "source", saved(guest), guest.memory)
    assert victim.read_bytes() == b"precious"
    assert not path.is_symlink()
    load(path, KINDS)[1].close()


def test_a_second_guest_of_the_same_number_replaces_none(guest: SyntheticGuest, tmp_path: Path) -> None:
    first = save(tmp_path, "destination", saved(guest), guest.memory)
    content = first.read_bytes()
    guest.memory.regions[0].memory.buffer[-1] = 1
    second = save(tmp_path, "destination", saved(guest), guest.memory)
    assert (first.name, second.name) == (
        "guest-000000000000-destination.saved",
        "guest-000000000000-destination-2.saved",
    )
    assert first.read_bytes() == content


def test_a_folder_without_hard_links_serves_as_well(
    guest: SyntheticGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    paths = [save(tmp_path, "source", saved(guest), guest.memory) for _ in range(2)]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    load(paths[1], KINDS)[1].close()


def test_the_folder_is_written_out_after_the_file_has_its_name(
    guest: SyntheticGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, link = os.fsync, os.link

    def synced(fd: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def linked(source: Path, target: Path) -> None:
        events.append("name")
        link(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    save(tmp_path, "source", saved(guest), guest.memory)
    assert events == ["file", "name", "folder"]


def test_a_relative_folder_gives_a_path_that_works_from_anywhere(
    guest: SyntheticGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert save(Path("."), "source", saved(guest), guest.memory).parent == tmp_path


# -- what a killed process leaves -----------------------------------------------------------


def test_a_process_killed_while_saving_leaves_nothing_for_long(
    guest: SyntheticGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def until_killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(saving, "_write", until_killed)
    state = saved(guest)

    def save_it() -> None:
        save(tmp_path, "source", state, guest.memory)

    assert ended(in_child(save_it)) == -signal.SIGKILL
    [half] = tmp_path.iterdir()
    assert half.suffix == ".half"
    check_room(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with Draft(tmp_path) as draft:
        check_room(tmp_path, 1)
        assert draft.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_removed_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock
    seen: list[Path] = []

    def after_a_cleaner(fd: int, operation: int) -> None:
        if not seen:
            [path] = tmp_path.glob("*.half")
            path.unlink()
            seen.append(path)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_a_cleaner)
    with Draft(tmp_path) as draft:
        assert draft.path.exists()
        assert draft.path != seen[0]


def test_cleaning_follows_no_symlink_and_waits_for_no_pipe(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "a.half").symlink_to(victim)
    os.mkfifo(tmp_path / "b.half")
    (tmp_path / "c.half").mkdir()
    folders.clean(tmp_path)
    assert victim.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.half", "b.half", "c.half", "victim"]


# -- folders that are refused before anything is written -----------------------------------------


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that all users can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_folder_that_cannot_be_written_is_refused_by_check_room(readable: Path) -> None:
    def check() -> None:
        with pytest.raises(MigrationRefused, match=r"no place to save a guest: .*Permission denied"):
            check_room(readable, 1)

    assert ended(in_child(check, NOBODY)) == 0


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(MigrationRefused, match="other users: they could exchange a saved guest") as refused:
        check_room(tmp_path, 1)
    assert f"chmod go-w {tmp_path}" in refused.value.hint


def test_a_folder_where_others_cannot_rename_is_allowed(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    check_room(tmp_path, 1)


def test_failed_save_leaves_no_file_and_names_its_path(
    guest: SyntheticGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_write", full)
    with pytest.raises(MigrationFailed, match=r"could not be saved to .*-source.saved: No space left"):
        save(tmp_path, "source", saved(guest), guest.memory)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_written_through_a_link_of_its_random_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvhostvdpa.migration.folder.secrets.token_hex", lambda size: "guessed")
    other = tmp_path / "other"
    other.write_text("of another user")
    (tmp_path / "guessed.half").symlink_to(other)
    with pytest.raises(FileExistsError):
        Draft(tmp_path)
    assert other.read_text() == "of another user"
