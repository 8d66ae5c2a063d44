"""The unit tests on bare trees: what is run there is what CONTRIBUTING says."""

import subprocess

import pytest

from labkit import cli, plain
from labkit.bare import BARE
from labkit.errors import LabError

PROJECT = plain.PROJECT
PAGE = (PROJECT / plain.PAGE).read_text()


def test_commands_are_those_of_contributing():
    install, run = plain.commands(PAGE)
    assert install.startswith("apt install ")
    assert run.endswith("pytest tests/unit")
    assert "pip install '.[dev]'" in run
    script = plain.script(PAGE)
    assert install in script
    assert run in script.splitlines()
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_packages_of_contributing_are_downloaded_with_each_tree():
    for recipe in BARE:
        assert {*plain.commands(PAGE)[0].split()[2:]} <= {*recipe.downloaded}


def test_page_without_the_commands_is_an_error():
    with pytest.raises(LabError, match="does not say how"):
        plain.commands("# Contributing\n")


def test_soaks_are_listed_with_it(capsys):
    assert cli.main(["soak"]) == 0
    assert f"\n{plain.NAME} " in capsys.readouterr().out


def test_outcome_is_pytests_last_line():
    assert plain.Outcome(BARE[0], 0, "…\n3 passed in 1.00s\n\n").last_line == "3 passed in 1.00s"
    assert plain.Outcome(BARE[0], 1, "").last_line == ""
