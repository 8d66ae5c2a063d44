"""vdpa_hwsim's sources: which function calls which, and what is read once."""

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "tools" / "vdpa_hwsim"
SHARED = {"hwsim.h", "compat.h"}
DEFINITION = re.compile(r"^(?!static)[a-z][\w\s\*]*?\b(hwsim_\w+)(?:\([^;]*?\)\n\{|\[\w*\] = \{| = \{)", re.MULTILINE)


def code(path: Path) -> str:
    """A file without its comments."""
    return re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


SOURCES = {path.stem: code(path) for path in sorted(FOLDER.glob("*.c"))}
OWNER = {name: stem for stem, text in SOURCES.items() for name in DEFINITION.findall(text)}


def calls(stem: str) -> set[str]:
    names = set(re.findall(r"\bhwsim_\w+", SOURCES[stem]))
    return {OWNER[name] for name in names & OWNER.keys()} - {stem}


def includes(stem: str) -> set[str]:
    names = re.findall(r'^#include "(\w+)\.h"', SOURCES[stem], re.MULTILINE)
    return {name for name in names if f"{name}.h" not in SHARED}


def test_every_file_is_found_with_what_it_defines():
    assert {"hwsim_set_map", "hwsim_receive", "hwsim_ops", "hwsim_fault", "hwsim_op_names"} <= OWNER.keys()
    kbuild = (FOLDER / "Kbuild").read_text()
    assert set(re.findall(r"(\w+)\.o\b", kbuild.replace("vdpa_hwsim.o", ""))) == set(SOURCES)


def test_no_file_calls_one_that_calls_it():
    try:
        list(TopologicalSorter({stem: calls(stem) for stem in SOURCES}).static_order())
    except CycleError as e:
        pytest.fail(f"a circle: {' -> '.join(e.args[1])}")


@pytest.mark.parametrize("stem", SOURCES)
def test_a_file_includes_the_headers_of_what_it_calls_and_no_other(stem):
    own = {stem} if (FOLDER / f"{stem}.h").exists() else set()
    assert includes(stem) == calls(stem) | own


def test_headers_include_the_common_one_only():
    for path in FOLDER.glob("*.h"):
        if path.name not in SHARED:
            assert re.findall(r'#include "(.*)"', path.read_text()) == ["hwsim.h"], path.name


def test_parameters_are_read_in_one_place_under_their_lock():
    """What sysfs may change meanwhile: read twice, a device is made of two answers."""
    text = SOURCES["main"]
    begin = text.index("kernel_param_lock(THIS_MODULE);")
    end = text.index("kernel_param_unlock(THIS_MODULE);")
    declared = text.index("#define HWSIM_FEATURES")
    for name in ("defaults", "cost_profile", "extra_features"):
        uses = [found.start() for found in re.finditer(rf"\b{name}\b", text) if found.start() > declared]
        assert uses, name
        assert all(begin < use < end for use in uses), name
    for stem in SOURCES.keys() - {"main"}:
        assert "THIS_MODULE" not in SOURCES[stem] or stem == "debugfs"
