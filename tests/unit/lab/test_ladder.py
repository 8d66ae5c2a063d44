"""`tools/lab ladder`: a VM that the ladder fits in, its options passed on."""

from pathlib import Path

import pytest

from labkit import cli, ladder
from labkit.errors import LabError


def test_every_option_but_the_labs_own_is_passed_on():
    own = ["--json", "--rows", "batch", "--pairs=4", "--devices", "4"]
    options = cli.parse(["ladder", "--kernel", "6.1", *own])
    assert options.kernel == "6.1"
    assert options.rest == own
    asked = ladder.request(options.rest, options.kernel, None)
    assert asked.command == ["vhost-vdpa", "ladder", *own]
    assert asked.icount
    assert asked.devices == ("vdpa_hwsim:0",)


@pytest.mark.parametrize(
    ("given", "megabytes"),
    [
        ((), 1024 + 1536),
        (("--memory", "256M"), 256 + 1536),
        (("--memory=2GiB",), 2048 + 1536),
        (("--memory", "nonsense"), 1024 + 1536),
    ],
)
def test_the_vm_has_room_for_the_guests_memory(given, megabytes):
    assert ladder.request(given, "6.12", None).memory == f"{megabytes}M"


@pytest.mark.parametrize("form", [["--report", "out"], ["--report=out"]])
def test_the_reports_folder_is_the_hosts(form, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ladder.request(form, "6.12", None)
    assert (tmp_path / "out").is_dir()
    assert asked.shares == [tmp_path / "out"]
    assert str(tmp_path / "out") in " ".join(asked.command)


@pytest.mark.parametrize("form", [["--with", "QEMU=a.jsonl", "b.jsonl"], ["--with=QEMU=a.jsonl", "--with=b.jsonl"]])
def test_recordings_have_the_path_that_the_vm_has(form, tmp_path: Path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LabError, match="no files but those in"):
        ladder.request(form, "6.12", None)
    monkeypatch.setattr(ladder, "PROJECT", tmp_path)
    words = [word.removeprefix("--with=") for word in ladder.request([*form, "--rows", "batch"], "6.12", None).command]
    assert [word for word in words if "jsonl" in word] == [f"QEMU={tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert words[-2:] == ["--rows", "batch"]


def test_recording_that_is_not_there_is_refused_before_a_vm_boots():
    with pytest.raises(LabError, match="no such file"):
        ladder.request(["--with", "QEMU=nowhere.jsonl"], "6.12", None)
