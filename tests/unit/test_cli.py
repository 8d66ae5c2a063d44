"""The command line where there is no device."""

from __future__ import annotations

import argparse
import json

import pytest

from pyvhostvdpa.cli import main
from pyvhostvdpa.cli.table import table
from pyvhostvdpa.cli.units import seconds, size


@pytest.mark.parametrize(("text", "value"), [("1G", 1 << 30), ("512M", 512 << 20), ("2GiB", 2 << 30), ("4096", 4096)])
def test_sizes_are_read_as_people_write_them(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "1.0001k", "lots"])
def test_size_option_with_an_invalid_value_is_reported(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        size(text)


@pytest.mark.parametrize("text", ["0", "-3", "nan", "soon"])
def test_time_option_with_an_invalid_value_is_reported(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a"):
        seconds(text)


def test_tables_align_numbers_to_the_right() -> None:
    assert table(["name", "n"], [["a", "1"], ["bcdef", "1,000"]]) == "name       n\na          1\nbcdef  1,000"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/vhost-vdpa-missing", "/etc/passwd"])
def test_path_that_is_not_a_device_is_refused_unopened(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", path, path]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"vhost-vdpa: {path}: ")
    assert "next: vhost-vdpa list" in captured.err


def test_list_prints_json_where_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": "pyvhostvdpa/list/1", "devices": []}


def test_wrong_usage_is_status_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["migrate", "only-one"])
    assert stopped.value.code == 2
