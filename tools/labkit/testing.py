"""`tools/lab test`: checks and tests without a device in the tree, tests on the device in a VM, one report."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from labkit import archive, devices, in_tree, install, lanes, output, report, uml_tests, values
from labkit.cache import remove
from labkit.errors import EXIT_TIMEOUT, LabError
from labkit.progress import seconds
from labkit.report import Case, Part
from labkit.session import PROJECT, Request, Session
from labkit.uml_home import MACHINE as UML

UNIT, BENCHMARKS, KERNEL, ICOUNT = "tests/unit", "tests/benchmarks", "tests/kernel", "tests/icount"
PARTS = (UNIT, BENCHMARKS, KERNEL, ICOUNT)
INSTALL = "install"
# Another kernel for the tests with this mark: the module's sources and the user API have to fit both.
SECOND_KERNEL, SMOKE = "7.2", "smoke"
CHECKS = (
    ("ruff check", ("ruff", "check", "--no-cache", ".")),
    ("ruff format", ("ruff", "format", "--check", "--no-cache", ".")),
    ("mypy", ("mypy", "--cache-dir=/lab/mypy")),
)
NO_TESTS = 5
VMM_MARK = "# lab: --vmm"
LIMIT_S = 3600.0
# What needs no device takes minutes. A thread that a failed test left behind would keep its process for ever.
TREE_LIMIT_S = 1200.0
DEVICES = (devices.DEFAULT, "vdpa_hwsim:0")
KEPT_RESULTS = 5
# Several VMs take the files of tests/kernel one by one; its conftest.py makes a claim by a folder in this one.
CLAIMS, CLAIMS_VARIABLE = "claims", "PYVHOSTVDPA_CLAIMS"


class Selection:
    """Which parts a user's arguments for pytest concern."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.install = INSTALL in arguments or not arguments
        alone = list(arguments) == [INSTALL]
        arguments = [word for word in arguments if word != INSTALL]
        paths = [word for word in arguments if word.startswith("tests") and not word.startswith("-")]
        self.other = [word for word in arguments if word not in paths]
        self.paths = {part: [word for word in paths if word.startswith(part)] for part in PARTS}
        self.whole = not arguments and not alone
        self.parts = [part for part in PARTS if not alone and (not paths or self.paths[part])]
        stray = [word for word in paths if not word.startswith(PARTS)]
        if stray:
            raise LabError(f"{stray[0]} is in none of {', '.join(PARTS)}", "", f"tools/lab test {KERNEL}")

    def needs_vmm(self) -> bool:
        """Return whether a selected file asks for virtual machines, by a line `# lab: --vmm`."""
        named = [path for part in (KERNEL, ICOUNT) if part in self.parts for path in self.paths[part] or [part]]
        paths = [PROJECT / path.partition("::")[0] for path in named]
        files = [file for path in paths for file in (path.glob("test_*.py") if path.is_dir() else [path])]
        return any(VMM_MARK in file.read_text().splitlines() for file in files if file.is_file())

    def pytest(self, part: str, results: str, mark: str = "", report: str = "") -> list[str]:
        """Return pytest's command line for a part, or for those of its tests that have a mark.

        Its JUnit file is named after the part, the mark, or ``report``.
        """
        argv = ["python3", "-m", "pytest", *(self.paths[part] or [part]), *self.other, *(["-m", mark] if mark else [])]
        name = report or mark or Path(part).name
        return [*argv, "-p", "no:cacheprovider", f"--junitxml={results}/{name}.xml"]

    def is_all_of(self, part: str) -> bool:
        """Return whether every test of a part was chosen."""
        return part in self.parts and not self.other and self.paths[part] in ([], [part])


class Run:
    """One run of the tests."""

    def __init__(self, session: Session, request: Request, arguments: Sequence[str]) -> None:
        self.session = session
        self.request = request
        self.home = "User Mode Linux" if request.machine == UML else "VM"
        self.selection = Selection(uml_tests.arguments(arguments) if request.machine == UML else arguments)
        self.results = session.cache.results / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.parts: list[Part] = []
        self.vmm = request.vmm or self.selection.needs_vmm()

    def execute(self) -> int:
        """Run all parts, print the report, return the exit status."""
        begin = time.monotonic()
        chosen = self.session.set_up(self.request.kernel, "test")
        trial = install.Trial(self.session) if self.selection.install else None
        if trial:
            trial.set_up()
        second = self.selection.whole and not archive.fits(chosen.release, SECOND_KERNEL)
        if second:
            self.session.set_up(SECOND_KERNEL, "test")
        if self.vmm:
            self.session.vmm().ensure()
        self.parts.append(Part("set-up", time.monotonic() - begin))
        self.results.mkdir(parents=True)
        for old in sorted(self.session.cache.results.iterdir())[:-KEPT_RESULTS]:
            remove(old)
        with self.session.using():
            self._on_first_kernel(self._in_the_tree(trial))
            if BENCHMARKS in self.selection.parts:
                self._part(BENCHMARKS, f"{BENCHMARKS} (no device)", self._in_tree)
            self._at_the_end(second)
        print(report.render(self.parts), flush=True)
        return 0 if report.clean(self.parts) else 1

    def _in_the_tree(self, trial: install.Trial | None) -> Iterator[Callable[[], None]]:
        """What needs no VM, and no processor to itself."""
        if self.selection.whole:
            yield self._checks
        if trial:
            yield partial(self._install, trial)
        if UNIT in self.selection.parts:
            yield partial(self._part, UNIT, f"{UNIT} (no device)", self._in_tree)

    def _on_first_kernel(self, before: Iterable[Callable[[], None]]) -> None:
        """Run the tests on devices; where two VMs fit, one of them waits until what needs no VM is done."""
        jobs: list[lanes.Job] = []
        if KERNEL in self.selection.parts:
            count = self._side_by_side() if self.selection.is_all_of(KERNEL) else 1
            jobs = [self._shared(number, count) for number in range(1, count + 1)] if count > 1 else [self._kernel]

        def first(sink: output.Sink | None) -> None:
            for step in before:
                step()
            for job in jobs[:1]:
                job(sink)

        self._beside([first, *jobs[1:]])

    def _at_the_end(self, second: bool) -> None:
        """Run the tests of the second kernel and of virtual time."""
        last: list[lanes.Job] = []
        if second:
            last.append(self._second)
        if ICOUNT in self.selection.parts:
            last.append(self._icount)
        side_by_side = self._side_by_side()
        for begin in range(0, len(last), side_by_side):
            self._beside(last[begin : begin + side_by_side])

    def _side_by_side(self) -> int:
        return values.side_by_side(2, self.request.memory)

    def _beside(self, jobs: Sequence[lanes.Job]) -> None:
        lanes.beside(jobs, output.writer(1))

    def _kernel(self, sink: output.Sink | None) -> None:
        self._part(KERNEL, f"{KERNEL} ({self.home})", partial(self._in_vm, sink=sink))

    def _second(self, sink: output.Sink | None) -> None:
        title = f"{KERNEL} (VM, {SECOND_KERNEL}, {SMOKE})"
        self._part(KERNEL, title, partial(self._in_second_kernel, sink=sink), SMOKE)

    def _icount(self, sink: output.Sink | None) -> None:
        self._part(ICOUNT, f"{ICOUNT} (VM, virtual time)", partial(self._in_virtual_time, sink=sink))

    def _shared(self, number: int, count: int) -> lanes.Job:
        """Return the part of one of several VMs, which take file by file."""
        claims = self.results / CLAIMS
        claims.mkdir(exist_ok=True)
        title = f"{KERNEL} ({self.home} {number} of {count})"
        environment = {CLAIMS_VARIABLE: str(claims)}

        def job(sink: output.Sink | None) -> None:
            execute = partial(self._in_vm, sink=sink, environment=environment)
            self._part(KERNEL, title, execute, report_name=f"kernel-{number}")

        return job

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

    def _install(self, trial: install.Trial) -> None:
        part = Part("install (bare Debian 12 and 13)")
        self.parts.append(part)
        self.session.progress.say(f"{part.name} …")
        begin = time.monotonic()
        part.cases += trial.execute()
        part.seconds = time.monotonic() - begin
        self.session.progress.say(f"{part.name}: done, {seconds(part.seconds)}")

    def _part(
        self, name: str, title: str, execute: Callable[[Sequence[str]], int], mark: str = "", report_name: str = ""
    ) -> None:
        part = Part(title)
        self.parts.append(part)
        self.session.progress.say(f"{title} …")
        begin = time.monotonic()
        trouble = ""
        if not (PROJECT / name).is_dir():
            trouble = f"there is no folder {name}"
        else:
            try:
                status = execute(self.selection.pytest(name, str(self.results), mark, report_name))
            except LabError as error:
                status, trouble = error.status, error.render()
            path = self.results / f"{report_name or mark or Path(name).name}.xml"
            if path.exists():
                part.cases = report.read_junit(path)
            if not trouble and not self._explained(status, part):
                trouble = f"pytest ended with status {status}; its output is above"
        part.seconds = time.monotonic() - begin
        if trouble:
            part.cases.append(Case(f"{title} as a whole", "failed", message=trouble))
        self.session.progress.say(f"{title}: done, {seconds(part.seconds)}")

    def _explained(self, status: int, part: Part) -> bool:
        """Return whether the tests read from the JUnit file account for pytest's exit status."""
        if status == NO_TESTS:
            return bool(self.selection.other)
        return status == 0 or (status == 1 and part.count("failed") > 0)

    def _in_tree(self, argv: Sequence[str]) -> int:
        scratch = self.session.cache.root / "mypy"
        scratch.mkdir(exist_ok=True)
        return in_tree.run(
            self.session,
            argv,
            self.request.timeout or TREE_LIMIT_S,
            "tools/lab test --timeout S",
            environment={**_tool_settings(), **self.request.environment},
            binds={self.results: str(self.results), scratch: "/lab/mypy"},
        )

    def _in_virtual_time(self, argv: Sequence[str], sink: output.Sink | None = None) -> int:
        return self._in_vm(argv, icount=True, sink=sink)

    def _in_second_kernel(self, argv: Sequence[str], sink: output.Sink | None = None) -> int:
        return self._in_vm(argv, kernel=SECOND_KERNEL, sink=sink)

    def _in_vm(
        self,
        argv: Sequence[str],
        icount: bool = False,
        kernel: str = "",
        sink: output.Sink | None = None,
        environment: Mapping[str, str] = {},
    ) -> int:
        request = replace(
            self.request,
            kernel=kernel or self.request.kernel,
            vmm=self.vmm and not kernel,
            icount=icount or self.request.icount,
            command=argv,
            devices=self.request.devices or DEVICES,
            shares=[self.results],
            timeout=self.request.timeout or LIMIT_S,
            environment={**_tool_settings(), **environment, **self.request.environment},
        )
        try:
            return self.session.run(request, "test", sink, sink)
        except LabError as error:
            if error.status == EXIT_TIMEOUT:
                raise LabError(error.what, error.why, "tools/lab test --timeout S", error.status) from error
            raise


def _tool_settings() -> dict[str, str]:
    return {"HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis"}
