"""`tools/lab ladder`: a VM that the ladder fits in, its options passed on."""

from pathlib import Path

import pytest

from labkit import cli, ladder


def test_every_option_but_the_labs_own_is_passed_on():
    options = cli.parse(["ladder", "--json", "--kernel", "6.1", "--rows", "batch", "--pairs=4"])
    assert options.kernel == "6.1"
    assert options.rest == ["--json", "--rows", "batch", "--pairs=4"]
    asked = ladder.request(options.rest, options.kernel, None)
    assert asked.command == ["vhost-vdpa", "ladder", "--json", "--rows", "batch", "--pairs=4"]
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
