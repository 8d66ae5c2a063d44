"""The wheel for arm64 under emulation: what is run there, and how the kernel learns of the emulator."""

import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from labkit import arm64, cli, emulator
from labkit.bare import ARM64, BARE, BUILDING, BareTree
from labkit.cache import Cache
from labkit.progress import Progress

PROJECT = arm64.PROJECT
UNIT = PROJECT / "tests" / "unit"


def matches(rule: str, head: bytes) -> bool:
    """Do as the kernel does: compare a program's first bytes with the magic, under the mask."""
    magic, mask = (bytes(int(byte, 16) for byte in re.findall(r"\\x(..)", field)) for field in rule.split(":")[4:6])
    assert len(magic) == len(mask)
    return len(head) >= len(magic) and all((a ^ b) & m == 0 for a, b, m in zip(head, magic, mask, strict=False))


def elf(machine: int, kind: int, bits: int = 2, order: int = 1) -> bytes:
    return b"\x7fELF" + bytes([bits, order, 1, 0]) + bytes(8) + struct.pack("<HH", kind, machine) + bytes(44)


def test_rule_is_for_programs_of_arm64_and_no_others():
    line = emulator.rule("name", Path("/cache/qemu-aarch64"))
    assert line.startswith(":name:M::")
    assert line.endswith(":/cache/qemu-aarch64:OCPF")
    assert "\n" not in line
    assert matches(line, elf(183, 2))
    assert matches(line, elf(183, 3))
    assert not matches(line, elf(62, 3))
    assert not matches(line, elf(183, 1))
    assert not matches(line, elf(183, 3, bits=1))
    assert not matches(line, elf(183, 3, order=2))
    assert not matches(line, b"#!/bin/sh\n" + bytes(60))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the lab runs on x86_64 only")
def test_rule_leaves_this_machines_programs_alone():
    assert not matches(emulator.rule("name", Path("/q")), Path(sys.executable).resolve().read_bytes()[:64])


def test_kernel_that_refuses_is_an_error_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "_KEEP", "echo 'no such filesystem' >&2; exit 1")
    cache = Cache(tmp_path)
    made = emulator.Emulator(cache, Progress(quiet=True), BareTree(cache, Progress(quiet=True), BUILDING))
    monkeypatch.setattr(emulator, "_CONTAINED", ())
    with pytest.raises(emulator.LabError, match="another architecture") as caught, made.registered():
        pass
    assert "no such filesystem" in caught.value.render()


def test_entry_is_taken_back_when_the_work_ends_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "_CONTAINED", ())
    monkeypatch.setattr(emulator, "_KEEP", emulator._KEEP.replace("mount -t binfmt_misc lab", ": "))
    cache = Cache(tmp_path)
    cache.mount_point.mkdir()
    made = emulator.Emulator(cache, Progress(quiet=True), BareTree(cache, Progress(quiet=True), BUILDING))

    def fail() -> None:
        said.append((cache.mount_point / "register").read_text())
        raise KeyError

    said: list[str] = []
    with pytest.raises(KeyError), made.registered():
        fail()
    name = said[0].split(":")[1]
    assert said == [emulator.rule(name, made.program)]
    assert (cache.mount_point / name).read_text() == "-1\n"


def test_tree_is_another_one_and_has_no_compiler():
    assert len({recipe.identity() for recipe in (*BARE, BUILDING, ARM64)}) == 4
    assert ARM64.architectures == ("arm64",)
    assert not {word for word in (*ARM64.packages, *ARM64.downloaded) if re.search("gcc|clang|dev$", word)}


def test_script_tries_what_pip_installed_without_an_index():
    script = arm64.script(arm64.selection(False, ""))
    assert "--no-index" in script
    assert "--exclude=./pyvhostvdpa" in script
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("there", [None, "cc", "clang"])
def test_script_ends_where_a_compiler_is(tmp_path, there):
    if there:
        (tmp_path / there).write_text("")
        (tmp_path / there).chmod(0o755)
    assert arm64._NO_COMPILER in arm64.script([]).splitlines()
    argv = ["/bin/sh", "-ec", f"{arm64._NO_COMPILER}\necho continued"]
    done = subprocess.run(argv, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode == 0, "continued" in done.stdout) == (there is None, there is None)


def test_selection_is_of_files_that_there_are():
    words = arm64.selection(False, "")
    assert all((PROJECT / word).is_file() for word in words if not word.startswith("-"))
    assert arm64.selection(True, "svq and not loop")[0] == "tests/unit"
    assert arm64.selection(True, "svq and not loop")[-2:] == ["-k", "svq and not loop"]


def test_tests_of_c_files_are_selected():
    """Of the files with a name of a file of cdefs, all."""
    sources = {path.stem for path in (PROJECT / "cdefs").glob("*.c")}
    named = {path.stem.removeprefix("test_") for path in UNIT.glob("test_*.py")}
    assert sources & named <= {*arm64.C_TESTS, "bench"}


def test_tests_that_the_emulator_cannot_run_exist_and_have_a_reason():
    for test, reason in arm64.EMULATORS.items():
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (PROJECT / path).read_text()
        assert reason.endswith(".")


def test_programs_are_named_by_the_variable_that_the_tests_read():
    text = (UNIT / "native_programs.py").read_text()
    assert f'"{arm64.NATIVE}"' in text
    assert arm64.INPUTS in (UNIT / "test_native.py").read_text()


def test_soaks_are_listed_with_it(capsys):
    assert cli.main(["soak"]) == 0
    assert f"\n{arm64.NAME} " in capsys.readouterr().out
