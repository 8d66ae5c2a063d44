"""`tools/lab soak arm64`: the wheel for arm64 on a bare Debian tree of that machine, under emulation.

The wheel and the programs of tests/native are built by a cross compiler. The tree has no compiler, and nothing in it
reaches a network. QEMU on x86 keeps x86's order of loads and stores: this finds what another instruction set, alignment
or the sign of a char breaks, and cannot find a barrier that is missing.
"""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from labkit.bare import ARM64, BareTree
from labkit.cache import building
from labkit.emulator import Emulator
from labkit.package import Packager
from labkit.plain import COPY, Outcome
from labkit.session import PROJECT, Session

NAME = "arm64"
SUMMARY = (
    "the wheel for arm64 on bare Debian 13 without a compiler, emulated: tests of what touches C, and the fuzzers."
)
LIMIT_S = 4 * 3600
MACHINE = "aarch64"
VENV = "/opt/vhost-vdpa"
NATIVE = "PYVHOSTVDPA_NATIVE"
INPUTS = "PYVHOSTVDPA_FUZZ_INPUTS"
C_TESTS = (
    *("available", "ctrl", "ctrl_driver", "descriptors", "dirty", "gap", "handover", "hostile_frames"),
    *(
        "hostile_state",
        "in_order",
        "iotlb",
        "lost_memory",
        "memory",
        "memory_changes",
        "native",
        "nic",
        "page_streams",
        "pages",
    ),
    *("prepared_calls", "reception", "replay", "state", "sum", "svq", "svq_marks", "svq_regions", "svq_schedules"),
    *("svq_thread", "translation", "uapi", "used_relay"),
)
"""Files of tests/unit that are run unless all are asked for: what touches C."""
_NO_UFFD = "QEMU has no userfaultfd, and shows no soft-dirty bits: nothing reports written pages."
EMULATORS = {
    "tests/unit/test_dirty.py::test_large_memory_is_scanned_in_parts_with_the_same_result": _NO_UFFD,
    "tests/unit/test_dirty.py::test_dirty_tracker_reports_a_written_page_once_even_in_huge_pages": _NO_UFFD,
    "tests/unit/test_memory.py::test_pages_of_a_shared_file_are_allocated_as_asked_for[True]": (
        "QEMU answers MADV_POPULATE_WRITE with success and populates nothing."
    ),
}
"""Tests that fail for a reason that is the emulator's, and which. Each of them passes on x86."""
_INPUTS = 150
"""Of each fuzzer: about a minute of the slowest, emulated."""
NEEDED = ("cffi", "ioctl-opt", "psutil")
"""What the wheel needs."""
_SANITIZER = (
    "a program with AddressSanitizer ends before main() in QEMU; the fuzzers have UBSan, which looks at alignment too."
)
_CROSS = (
    "CC=aarch64-linux-gnu-gcc python3 tests/unit/native_programs.py /lab/out -fno-sanitize=address -static-libubsan"
)
_NO_COMPILER = "for each in cc gcc clang; do if command -v $each; then echo 'the tree has a compiler'; exit 1; fi; done"
_NOT_COPIED = ("./.git", "./build", "./dist", "./pyvhostvdpa", "__pycache__", "*.so", "./.*_cache")


def selection(everything: bool, expression: str) -> list[str]:
    """Return pytest's arguments."""
    words = ["tests/unit"] if everything else [f"tests/unit/test_{name}.py" for name in C_TESTS]
    words += [f"--deselect={test}" for test in EMULATORS]
    return [*words, *(["-k", expression] if expression else [])]


def script(words: Sequence[str]) -> str:
    """Return what runs in the tree: the tests lie beside the package that pip installed, not beside its source."""
    without = shlex.join(f"--exclude={each}" for each in _NOT_COPIED)
    lines = [
        "set -e",
        f'test "$(uname -m)" = {MACHINE}',
        _NO_COMPILER,
        f"python3 -m venv --system-site-packages {VENV}",
        f"{VENV}/bin/pip install --quiet --no-index --find-links /lab/wheels /lab/dist/*_{MACHINE}.whl",
        f"{VENV}/bin/vhost-vdpa --version",
        f"mkdir {COPY} && tar -c -C /lab/project {without} . | tar -x -C {COPY} && cd {COPY}",
        f"ln -s {VENV}/lib/python3*/site-packages/pyvhostvdpa pyvhostvdpa",
        f"{VENV}/bin/python -m pytest -o faulthandler_timeout=300 --durations=10 {shlex.join(words)}",
    ]
    return "\n".join(lines)


class Trial:
    """The wheel, the programs, the tree, and what starts its programs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.packager = Packager(session, session.cache.bare / "dist")
        self.tree = BareTree(session.cache, session.progress, ARM64)
        self.emulator = Emulator(session.cache, session.progress, self.packager.tree)
        self.wheels = self.packager.tree.folder / "wheels-arm64"

    def execute(self, words: Sequence[str]) -> Outcome:
        """Build the wheel, make the tree, and run the tests there."""
        session = self.session
        self.packager.set_up()
        with session.cache.setting_up():
            self.emulator.ensure()
            if not self.wheels.exists():
                self._fetch()
        [wheel] = self.packager.wheels([MACHINE])
        with self.emulator.registered(), tempfile.TemporaryDirectory(dir=session.cache.bare, prefix="work-") as scratch:
            with session.cache.setting_up():
                self.tree.ensure()
            folders = {name: Path(scratch, name) for name in ("dist", "native")}
            for folder in folders.values():
                folder.mkdir()
            wheel.rename(folders["dist"] / wheel.name)
            self._build_programs(folders["native"])
            binds = {
                PROJECT: "/lab/project",
                self.wheels: "/lab/wheels",
                **{path: f"/lab/{n}" for n, path in folders.items()},
            }
            with session.using():
                return self._run(binds, words)

    def _fetch(self) -> None:
        """Fetch what pip would fetch on such a machine."""
        argv = ["python3", "-m", "pip", "download", "--only-binary=:all:", "--python-version=3.13"]
        argv += [f"--platform={each}_{MACHINE}" for each in ("manylinux2014", "manylinux_2_28", "manylinux_2_34")]
        argv += ["--disable-pip-version-check", "--no-cache-dir", "--dest", "/lab/wheels", *NEEDED]
        with building(self.wheels) as partial:
            chroot = self.packager.tree.chroot({partial: "/lab/wheels"}, {}, network=True)
            log = self.session.cache.log("arm64-wheels")
            self.session.progress.call("fetching wheels for arm64", chroot.argv(argv), log)

    def _build_programs(self, out: Path) -> None:
        chroot = self.packager.tree.chroot({PROJECT: "/lab/project", out: "/lab/out"}, {}, "/lab/project")
        log = self.session.cache.log("arm64-native")
        argv = chroot.argv(["sh", "-ec", _CROSS])
        self.session.progress.call("building the programs of tests/native for arm64", argv, log)

    def _run(self, binds: dict[Path, str], words: Sequence[str]) -> Outcome:
        environment = {NATIVE: "/lab/native", INPUTS: str(_INPUTS), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        chroot = self.tree.chroot(binds, environment)
        # no network there: what is needed was fetched before
        argv = ["timeout", "--kill-after=5", str(LIMIT_S), "unshare", "--net"]
        argv += chroot.argv(["sh", "-ec", script(words)])
        log = self.session.cache.log("arm64-tests")
        status, said = self.session.progress.attempt("running the tests", argv, log)
        return Outcome(ARM64, status, said)


def run(session: Session, everything: bool, expression: str) -> int:
    """Run the tests; print what pytest said, what was left out for the emulator's sake, and a line for the tree."""
    outcome = Trial(session).execute(selection(everything, expression))
    print(f"{outcome.said}\n")
    print(f"for the emulator's sake: {_SANITIZER}")
    for test, reason in EMULATORS.items():
        print(f"not run, for the emulator's sake: {test}: {reason}")
    print(f"{ARM64.title}: {outcome.last_line}", flush=True)
    return outcome.status and 1
