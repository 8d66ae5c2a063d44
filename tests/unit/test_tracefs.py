"""What a recording needs of tracefs, and what is in its way."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvhostvdpa.base.errors import MissingFeature, VhostVdpaError
from pyvhostvdpa.trace import tracefs
from pyvhostvdpa.trace.probes import PROBES
from pyvhostvdpa.trace.ringbuffer import Record


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with the files of a tracefs: for what is in the way, which no kernel here can be made to say."""
    (tmp_path / "events").mkdir()
    (tmp_path / "instances").mkdir()
    (tmp_path / "dynamic_events").write_text("")
    return tmp_path


def test_kernel_without_kprobes_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFeature, match="no kprobes"):
        tracefs.Tracefs(tmp_path)


def test_missing_mount_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefs, "_PLACES", ())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n")
    with pytest.raises(MissingFeature, match="not mounted") as caught:
        tracefs.find(mounts)
    assert caught.value.hint.startswith("mount -t tracefs")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingFeature, match="needs root"):
        tracefs.find(mounts)


def test_mount_is_found_wherever_it_is(fake: Path, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"nodev {fake} tracefs rw 0 0\n")
    assert tracefs.find(mounts) == fake


@pytest.mark.parametrize(
    ("lockdown", "words"), [("none integrity [confidentiality]\n", "lockdown"), ("[none] integrity\n", "CAP_SYS_ADMIN")]
)
def test_refused_probe_is_explained(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lockdown: str, words: str
) -> None:
    mode = tmp_path / "lockdown"
    mode.write_text(lockdown)
    monkeypatch.setattr(tracefs, "_LOCKDOWN", mode)
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def refuse(path: Path, line: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(tracefs, "_append", refuse)
    with pytest.raises(VhostVdpaError, match=words):
        tracefs.Tracefs(fake).define("g", PROBES[0])


def test_first_form_that_the_kernel_takes_is_used(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def take_registers(path: Path, line: str) -> None:
        asked.append(line)
        if "->" in line or line.startswith("f:"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(tracefs, "_append", take_registers)
    taken = tracefs.Tracefs(fake).define("g", next(probe for probe in PROBES if probe.name == "ioctl"))
    assert taken.startswith("p:g/ioctl vhost_vdpa_unlocked_ioctl file=$arg1:u64 name=$arg1:%pD cmd=$arg2:u32")
    assert len(asked) == 4


@pytest.mark.parametrize("words_at_the_end", [False, True])
def test_arguments_are_recorded_at_the_begin_where_the_end_has_none(
    fake: Path, monkeypatch: pytest.MonkeyPatch, words_at_the_end: bool
) -> None:
    """Linux 6.6 to 6.8 know fields by name, and no arguments of a function that returns."""

    defined: dict[str, str] = {}

    def take(path: Path, line: str) -> None:
        kind, _, name = line.split(maxsplit=1)[0].partition(":")
        if kind == "-":
            del defined[name]
        elif name.endswith("_end") and "a0=" in line and not words_at_the_end:
            raise OSError(errno.EINVAL, "Invalid argument")
        else:
            assert name not in defined
            defined[name] = line
        path.write_text("".join(defined.values()))

    monkeypatch.setattr(tracefs, "_append", take)
    forms = tracefs.Tracefs(fake).define_all("g", PROBES)
    assert {f"g/{name}": f"{form}\n" for name, form in forms.items()} == defined
    assert ("a3=" in forms["ioctl"], "a3=" in forms["ioctl_end"]) == (not words_at_the_end, words_at_the_end)
    assert "rdev=" in forms["ioctl"]


@pytest.mark.parametrize(
    ("symbols", "hint"),
    [("ffff t vhost_net_open\t[vhost_net]\n", "modprobe vhost_vdpa"), ("ffff t vhost_vdpa_open\t[x]\n", "error_log")],
)
def test_module_that_is_not_loaded_is_named(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symbols: str, hint: str
) -> None:
    (tmp_path / "kallsyms").write_text(symbols)
    monkeypatch.setattr(tracefs, "_SYMBOLS", tmp_path / "kallsyms")

    def refuse(path: Path, line: str) -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(tracefs, "_append", refuse)
    with pytest.raises(MissingFeature) as caught:
        tracefs.Tracefs(fake).define("g", PROBES[0])
    assert hint in caught.value.hint


def test_left_overs_of_ended_processes_only_are_removed(fake: Path) -> None:
    mine, gone, foreign = tracefs.name_of_this_process(), f"{tracefs.PREFIX}{os.getpid()}_1", "somebody"
    for name in (mine, gone, foreign):
        (fake / "instances" / name).mkdir()
    assert tracefs.Tracefs(fake).remove_abandoned() == [gone]
    assert sorted(os.listdir(fake / "instances")) == sorted([mine, foreign])


def test_second_recording_of_a_process_leaves_the_first_alone(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "instances" / tracefs.name_of_this_process()).mkdir()
    (fake / "dynamic_events").write_text(f"p:{tracefs.name_of_this_process()}/open vhost_vdpa_open\n")
    monkeypatch.setattr(tracefs, "_FTRACE", fake / "none")
    before = (fake / "dynamic_events").read_text()
    with pytest.raises(VhostVdpaError):
        tracefs.Instance(tracefs.Tracefs(fake))
    assert os.listdir(fake / "instances") == [tracefs.name_of_this_process()]
    assert (fake / "dynamic_events").read_text() == before


def test_recording_that_begins_meanwhile_is_not_a_left_over(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is not visible from here: it runs in another PID namespace."""
    theirs = f"{tracefs.PREFIX}{os.getpid()}_1"
    under_test = tracefs.Tracefs(fake)
    listed = os.listdir
    looks: list[Path] = []

    def begins(path: Path) -> list[str]:
        found = listed(path)
        looks.append(path)
        if len(looks) == 2:
            # right behind the last look at the instances
            (path / theirs).mkdir()
            (fake / "dynamic_events").write_text(f"p:{theirs}/open vhost_vdpa_open\n")
        return found

    monkeypatch.setattr(os, "listdir", begins)
    removed: list[str] = []
    monkeypatch.setattr(under_test, "undefine", removed.append)
    under_test.remove_abandoned()
    assert len(looks) == 2
    assert removed == []


def test_probes_of_an_instance_that_cannot_be_removed_stay(fake: Path) -> None:
    """It records, for a process that is not to be seen from here."""
    theirs = f"{tracefs.PREFIX}{os.getpid()}_1"
    (fake / "instances" / theirs / "in use").mkdir(parents=True)
    lines = f"p:{theirs}/open vhost_vdpa_open\n"
    (fake / "dynamic_events").write_text(lines)
    assert tracefs.Tracefs(fake).remove_abandoned() == []
    assert (fake / "dynamic_events").read_text() == lines


def test_buffer_that_is_full_keeps_what_it_has(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the monotonic clock, which is that of all other times."""

    mkdir = os.mkdir

    def make(folder: Path) -> None:
        mkdir(folder)
        # what the kernel makes with an instance
        for name in ("options", "events", f"events/{folder.name}"):
            mkdir(folder / name)

    monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setattr(tracefs, "_FTRACE", fake / "none")
    with tracefs.Instance(tracefs.Tracefs(fake), probes=()) as instance:
        folder = fake / "instances" / instance.name
        assert (folder / "options/overwrite").read_text() == "0"
        assert (folder / "trace_clock").read_text() == "mono"


def test_records_younger_than_the_horizon_wait_for_older_ones() -> None:
    """Each CPU has a buffer of its own, and is read at another moment."""
    instance = Unread()
    first, last, older = (Record(t, 1, "open", {}) for t in (90, 120, 110))
    assert instance.records(tracefs.Drained(100, [[last, first]])) == [first]  # type: ignore[list-item]
    assert instance.records(tracefs.Drained(115, [[older]])) == [older]  # type: ignore[list-item]
    assert instance.records(tracefs.Drained(115, []), everything=True) == [last]


class Unread(tracefs.Instance):
    """An instance whose pages are lists of records."""

    def __init__(self) -> None:
        self._kept, self._closed = [], True
        self._decoder = SimpleNamespace(page=iter)  # type: ignore[assignment]
