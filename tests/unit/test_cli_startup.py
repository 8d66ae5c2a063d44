"""What a command loads, and how many instructions that takes: the small ones start as quickly as argparse does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import pyvhostvdpa

START = "import sys; from pyvhostvdpa.cli import main; sys.exit(main(sys.argv[1:]))"
BASELINE = "import argparse, json"
# doctor looks at the machine as well: every process, PCI device and module; and runs 'vdpa' where there is one
BUDGET = {"--help": 1.6, "--version": 1.6, "list": 1.6, "doctor": 1.5}
SLOW = {
    "dataclasses",
    "inspect",
    "typing",
    "subprocess",
    "logging",
    "shutil",
    "psutil",
    "ctypes",
    "cffi",
    "gzip",
    "pathlib",
}
LOADED = """
import sys
from pyvhostvdpa.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As of an installed package, whose modules are compiled."""
    cache = tmp_path_factory.mktemp("compiled")
    where = str(Path(pyvhostvdpa.__path__[0]).parent)
    return {**os.environ, "PYTHONPATH": where, "PYTHONPYCACHEPREFIX": str(cache), "PYTHONDONTWRITEBYTECODE": ""}


def run(argv: Sequence[str], environment: dict[str, str]) -> str:
    return subprocess.run(argv, env=environment, cwd="/", capture_output=True, text=True, check=False).stderr


def instructions(script: str, words: Sequence[str], environment: dict[str, str]) -> int:
    argv = [sys.executable, "-c", script, *words]
    # compiles
    run(argv, environment)
    # doctor's status depends on the machine
    said = run(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *argv], environment)
    collected = re.search(r"Collected : (\d+)", said)
    assert collected, said
    return int(collected[1])


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind, which counts instructions, is not installed")
def test_small_commands_start_in_few_instructions(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = instructions(BASELINE, (), environment)
    found = {command: instructions(START, [command], environment) / baseline for command in BUDGET}
    with capsys.disabled():
        print("\ninstructions, of importing argparse and json: " + ", ".join(f"{c} {n:.2f}" for c, n in found.items()))
    assert {command: ratio for command, ratio in found.items() if ratio > BUDGET[command]} == {}


@pytest.mark.parametrize("command", ["--help", "--version", "list", "doctor", "dev show", "help migrate"])
def test_a_small_command_loads_nothing_slow(command: str, environment: dict[str, str]) -> None:
    loaded = set(run([sys.executable, "-c", LOADED, *command.split()], environment).split())
    assert "pyvhostvdpa.cli.commands" in loaded
    if not command.startswith("help"):
        # site-packages may load some of these by itself
        before = set(
            run([sys.executable, "-c", "import sys; print(*sys.modules, file=sys.stderr)"], environment).split()
        )
        assert loaded & SLOW - before == set()
    assert not {name for name in loaded if name.startswith(("pyvhostvdpa.bench.", "pyvhostvdpa.probe."))} or (
        command == "help migrate"
    )


@pytest.mark.parametrize("name", [name for name in pyvhostvdpa.__all__ if not name.startswith("_")])
def test_a_public_name_loads_when_it_is_used(name: str, environment: dict[str, str]) -> None:
    count = "print(len([m for m in sys.modules if m.startswith('pyvhostvdpa')]), file=sys.stderr)"
    script = f"import pyvhostvdpa, sys; {count}; pyvhostvdpa.{name}"
    assert run([sys.executable, "-c", script], environment).split() == ["1"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Migrate'"):
        _ = pyvhostvdpa.Migrate  # type: ignore[attr-defined]
    assert set(pyvhostvdpa.__all__) <= set(dir(pyvhostvdpa))
    assert pyvhostvdpa.memory.GuestMemory is pyvhostvdpa.GuestMemory


def test_former_public_name_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"pyvhostvdpa\.Options is called MigrationOptions now"):
        former = pyvhostvdpa.Options  # type: ignore[attr-defined]
    assert former is pyvhostvdpa.MigrationOptions
    assert "Options" not in pyvhostvdpa.__all__


def test_public_names_cover_what_users_import() -> None:
    from pyvhostvdpa import (  # noqa: PLC0415
        DEFAULT_GPA,
        DeviceNeedsReset,
        MigrationEnded,
        MigrationFailed,
        MigrationReport,
        ReceivedReport,
        SentReport,
    )

    assert issubclass(MigrationFailed, MigrationEnded)
    assert issubclass(DeviceNeedsReset, pyvhostvdpa.VhostVdpaError)
    assert DEFAULT_GPA == 1 << 30
    assert all(hasattr(kind, "to_dict") for kind in (MigrationReport, SentReport, ReceivedReport))
