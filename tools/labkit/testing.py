"""`tools/lab test`: checks and tests without a device in the tree, tests on the device in a VM, one report."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from labkit import archive, devices, report, vm
from labkit.cache import remove
from labkit.environment import INSIDE
from labkit.errors import EXIT_TIMEOUT, LabError
from labkit.progress import seconds
from labkit.report import Case, Part
from labkit.session import PROJECT, Request, Session

UNIT, BENCHMARKS, KERNEL, ICOUNT = "tests/unit", "tests/benchmarks", "tests/kernel", "tests/icount"
PARTS = (UNIT, BENCHMARKS, KERNEL, ICOUNT)
# Another kernel for the tests with this mark: the module's sources and the user API have to fit both.
SECOND_KERNEL, SMOKE = "7.2", "smoke"
CHECKS = (
    ("ruff check", ("ruff", "check", "--no-cache", ".")),
    ("ruff format", ("ruff", "format", "--check", "--no-cache", ".")),
    ("mypy", ("mypy", "--cache-dir=/lab/mypy")),
)
NO_TESTS = 5
LIMIT_S = 3600.0
# What needs no device takes minutes. A thread that a failed test left behind would keep its process for ever.
TREE_LIMIT_S = 1200.0
DEVICES = (devices.DEFAULT, "vdpa_hwsim:0")
KEPT_RESULTS = 5


class Selection:
    """Which parts a user's arguments for pytest concern."""

    def __init__(self, arguments: Sequence[str]) -> None:
        paths = [word for word in arguments if word.startswith("tests") and not word.startswith("-")]
        self.other = [word for word in arguments if word not in paths]
        self.paths = {part: [word for word in paths if word.startswith(part)] for part in PARTS}
        self.whole = not arguments
        self.parts = [part for part in PARTS if not paths or self.paths[part]]
        stray = [word for word in paths if not word.startswith(PARTS)]
        if stray:
            raise LabError(f"{stray[0]} is in none of {', '.join(PARTS)}", "", f"tools/lab test {KERNEL}")

    def pytest(self, part: str, results: str, mark: str = "") -> list[str]:
        """Return pytest's command line for a part, or for those of its tests that have a mark."""
        argv = ["python3", "-m", "pytest", *(self.paths[part] or [part]), *self.other, *(["-m", mark] if mark else [])]
        return [*argv, "-p", "no:cacheprovider", f"--junitxml={results}/{mark or Path(part).name}.xml"]


class Run:
    """One run of the tests."""

    def __init__(self, session: Session, request: Request, arguments: Sequence[str]) -> None:
        self.session = session
        self.request = request
        self.selection = Selection(arguments)
        self.results = session.cache.results / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.parts: list[Part] = []

    def execute(self) -> int:
        """Run all parts, print the report, return the exit status."""
        begin = time.monotonic()
        chosen = self.session.set_up(self.request.kernel, "test")
        second = self.selection.whole and not archive.fits(chosen.release, SECOND_KERNEL)
        if second:
            self.session.set_up(SECOND_KERNEL, "test")
        self.parts.append(Part("set-up", time.monotonic() - begin))
        self.results.mkdir(parents=True)
        for old in sorted(self.session.cache.results.iterdir())[:-KEPT_RESULTS]:
            remove(old)
        with self.session.using():
            if self.selection.whole:
                self._checks()
            for part in (UNIT, BENCHMARKS):
                if part in self.selection.parts:
                    self._part(part, f"{part} (no device)", self._in_tree)
            if KERNEL in self.selection.parts:
                self._part(KERNEL, f"{KERNEL} (VM)", self._in_vm)
            if second:
                self._part(KERNEL, f"{KERNEL} (VM, {SECOND_KERNEL}, {SMOKE})", self._in_second_kernel, SMOKE)
            if ICOUNT in self.selection.parts:
                self._part(ICOUNT, f"{ICOUNT} (VM, virtual time)", self._in_virtual_time)
        print(report.render(self.parts), flush=True)
        return 0 if report.clean(self.parts) else 1

    def _checks(self) -> None:
        part = Part("checks")
        self.parts.append(part)
        for name, argv in CHECKS:
            self.session.progress.say(f"{name} …")
            begin = time.monotonic()
            status = self._in_tree(argv)
            taken = time.monotonic() - begin
            part.seconds += taken
            message = "" if status == 0 else f"ended with status {status}; its output is above"
            part.cases.append(Case(name, "failed" if status else "passed", taken, message))

    def _part(self, name: str, title: str, execute: Callable[[Sequence[str]], int], mark: str = "") -> None:
        part = Part(title)
        self.parts.append(part)
        self.session.progress.say(f"{title} …")
        begin = time.monotonic()
        trouble = ""
        if not (PROJECT / name).is_dir():
            trouble = f"there is no folder {name}"
        else:
            try:
                status = execute(self.selection.pytest(name, str(self.results), mark))
            except LabError as error:
                status, trouble = error.status, error.render()
            path = self.results / f"{mark or Path(name).name}.xml"
            if path.exists():
                part.cases = report.read_junit(path)
            if not trouble and not self._explained(status, part):
                trouble = f"pytest ended with status {status}; its output is above"
        part.seconds = time.monotonic() - begin
        if trouble:
            part.cases.append(Case(f"{title} as a whole", "failed", message=trouble))
        self.session.progress.say(f"{title}: done, {seconds(part.seconds)}")

    def _explained(self, status: int, part: Part) -> bool:
        """Tell whether the tests read from the JUnit file account for pytest's exit status."""
        if status == NO_TESTS:
            return bool(self.selection.other)
        return status == 0 or (status == 1 and part.count("failed") > 0)

    def _in_tree(self, argv: Sequence[str]) -> int:
        environment = self.session.environment
        scratch = self.session.cache.root / "mypy"
        scratch.mkdir(exist_ok=True)
        binds = {PROJECT: str(PROJECT), self.results: str(self.results), scratch: "/lab/mypy"}
        if environment.ready:
            binds[environment.site] = INSIDE
        chroot = self.session.tree.chroot(
            binds=binds,
            environment={**vm.default_environment(), **_tool_settings(), **self.request.environment},
            folder=str(PROJECT),
        )
        sys.stdout.flush()
        limit = self.request.timeout or TREE_LIMIT_S
        command = ["setpriv", "--pdeathsig", "KILL", *chroot.argv(argv)]
        try:
            return subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=limit).returncode
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"time-out: {argv[0]} ran longer than {limit:g} s and was stopped",
                "its last words are above; a process does not end before its last thread",
                "tools/lab test --timeout S",
                EXIT_TIMEOUT,
            ) from error

    def _in_virtual_time(self, argv: Sequence[str]) -> int:
        return self._in_vm(argv, icount=True)

    def _in_second_kernel(self, argv: Sequence[str]) -> int:
        return self._in_vm(argv, kernel=SECOND_KERNEL)

    def _in_vm(self, argv: Sequence[str], icount: bool = False, kernel: str = "") -> int:
        request = replace(
            self.request,
            kernel=kernel or self.request.kernel,
            icount=icount or self.request.icount,
            command=argv,
            devices=self.request.devices or DEVICES,
            shares=[self.results],
            timeout=self.request.timeout or LIMIT_S,
            environment={**_tool_settings(), **self.request.environment},
        )
        try:
            return self.session.run(request, "test")
        except LabError as error:
            if error.status == EXIT_TIMEOUT:
                raise LabError(error.what, error.why, "tools/lab test --timeout S", error.status) from error
            raise


def _tool_settings() -> dict[str, str]:
    return {"HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis"}
