"""`tools/lab soak mutants`: one-line changes that tests have to notice.

The changes are data, tests/mutants/*.toml. Each is made in a copy of the project, never in the checkout; what the
copy gives (a module, the installed package) is tested without a device, or in one VM for all of them.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from labkit import devices, uml_tests, vm
from labkit.cache import remove
from labkit.environment import INSIDE, PACKAGE, Environment
from labkit.errors import EXIT_TIMEOUT, LabError
from labkit.extension import Extension
from labkit.kernel import Kernel, build_modules
from labkit.modules import own_sources
from labkit.progress import Progress, seconds
from labkit.session import PROJECT, Request, Session
from labkit.uml_home import MACHINE as UML

NAME = "mutants"
SUMMARY = "One-line changes of the code, each of which a test has to notice."
FOLDER = "tests/mutants"
MODULE = "tools/vdpa_hwsim"
KINDS = ("unit", "lab")
IN_VM = Path(__file__).with_name("guest") / "mutants.py"
UNIT_LIMIT_S = 600.0
VM_LIMIT_S = 6 * 3600.0
UML_LIMIT_S = 420.0
"""For one mutant under User Mode Linux: it has one CPU, so that beside a kernel that loops nothing else runs."""
KILLED, SURVIVED, BROKEN = "killed", "survived", "broken"
# What pytest's exit status says of a mutant: tests failed, or did not end.
VERDICTS = {0: SURVIVED, 1: KILLED, EXIT_TIMEOUT: KILLED}
NO_TESTS = 5
SHELL_SIGNALS = 128
"""What a shell adds to the number of the signal that ended a command."""
BASELINE = "no change"


@dataclass(frozen=True)
class Mutant:
    """One change: a text that occurs once in a file, what replaces it, and the tests that have to notice.

    `kind` is where they run: "unit" without a device, "lab" in a VM. `survives` is why no test can notice, if so.
    `check` are the rules of `vhost-vdpa check` that have to notice a change of the module, where there are no tests
    or with --by-check; `unseen` is why none of them can.
    """

    name: str
    file: str
    old: str
    new: str
    kind: str
    tests: Sequence[str] = ()
    survives: str = ""
    check: Sequence[str] = ()
    unseen: str = ""

    @property
    def of_module(self) -> bool:
        """Whether it changes the kernel module."""
        return self.file.startswith(f"{MODULE}/")

    @property
    def rules(self) -> Sequence[str]:
        """The rules that it is tried with."""
        return () if self.tests else self.check

    @property
    def reason(self) -> str:
        """Why nothing that it is tried with can notice it; "" if something has to."""
        return self.survives if self.tests else self.unseen

    def apply(self, folder: Path) -> None:
        """Make the change in a copy of the project."""
        path = folder / self.file
        path.write_text(_replaced(self, path.read_text()))


@dataclass
class Result:
    """What became of a mutant."""

    mutant: Mutant
    verdict: str
    why: str = ""

    @property
    def good(self) -> bool:
        """Whether a test noticed, or the list says why none can."""
        return self.verdict == KILLED or (self.verdict == SURVIVED and bool(self.mutant.reason))


def load(project: Path, only: str = "") -> list[Mutant]:
    """Read all mutants of a project, or those whose name or file has a part of `only` in it, which commas separate.

    LabError for a bad list.
    """
    found: list[Mutant] = []
    for path in sorted((project / FOLDER).glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            mutant = _read(path, entry)
            _replaced(mutant, (project / mutant.file).read_text())
            found.append(mutant)
    names = [mutant.name for mutant in found]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise LabError(f"two mutants have the same name: {', '.join(double)}", "", f"less {FOLDER}/*.toml")
    texts = only.split(",")
    return [mutant for mutant in found if any(text in mutant.name or text in mutant.file for text in texts)]


def _read(path: Path, entry: dict[str, object]) -> Mutant:
    try:
        mutant = Mutant(**entry)  # type: ignore[arg-type]
    except TypeError as error:
        raise LabError(f"{path.name}: {entry.get('name', entry)}: {error}", "", f"less {path}") from error
    if mutant.kind not in KINDS or not (mutant.tests or mutant.check):
        raise LabError(
            f"{path.name}: {mutant.name}: it needs a kind ({', '.join(KINDS)}), and tests or rules of check",
            "",
            f"less {path}",
        )
    if mutant.check and not mutant.of_module:
        raise LabError(f"{path.name}: {mutant.name}: check tries {MODULE} alone", "", f"less {path}")
    return mutant


def _replaced(mutant: Mutant, text: str) -> str:
    if text.count(mutant.old) != 1:
        raise LabError(
            f"mutant {mutant.name!r}: its text occurs {text.count(mutant.old)} times in {mutant.file}",
            f"It has to occur once: {mutant.old!r}",
            f"less {FOLDER}/*.toml",
        )
    return text.replace(mutant.old, mutant.new)


class Run:
    """One run of mutants."""

    def __init__(self, session: Session, request: Request, mutants: Sequence[Mutant]) -> None:
        self.session = session
        self.request = request
        self.mutants = mutants
        self.folder = session.cache.mutants
        self.modules = self.folder / "modules"
        self.results: list[Result] = []
        self.quiet = Progress(quiet=True)
        """For builds that run at the same time."""
        self.extension = Extension(session.tree, self.quiet, self.folder / "extension")
        self.running: set[subprocess.Popen[bytes]] = set()

    def execute(self) -> int:
        """Make all mutants and test them; print what became of each; return 0 if every one was noticed."""
        begin = time.monotonic()
        chosen = self.session.set_up(self.request.kernel, "soak")
        with self.session.using():
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if path != self.modules:
                    remove(path)
            without_device = [mutant for mutant in self.mutants if mutant.kind == "unit"]
            if without_device:
                self._without_device(without_device)
            in_vm = [mutant for mutant in self.mutants if mutant.kind == "lab"]
            if in_vm:
                self._in_vm(chosen, in_vm)
        print(f"{render(self.results)}\nin {seconds(time.monotonic() - begin)}", flush=True)
        return 0 if all(result.good for result in self.results) else 1

    def _note(self, mutant: Mutant, verdict: str, why: str = "") -> None:
        self.results.append(Result(mutant, verdict, why))
        self.session.progress.say(f"{verdict}: {mutant.name}{f' ({why})' if why else ''}")

    # -- without a device ------------------------------------------------------

    def _without_device(self, mutants: Sequence[Mutant]) -> None:
        """Try them beside each other, one on each processor, after their tests without any change."""
        with self._workers() as pool:
            copy = self._copy(None)
            site = self.session.environment.site
            names = [f"mutant-none-{number}" for number in range(len(selections(mutants)))]
            tried = pool.map(lambda tests, name: self._pytest(tests, copy, site, name), selections(mutants), names)
            for tests, (status, log) in zip(selections(mutants), tried, strict=True):
                if status:
                    raise LabError(
                        "the tests fail without any change",
                        f"pytest {' '.join(tests)} ended with status {status}.",
                        f"less {log}",
                    )
            self.session.progress.say("without any change all their tests pass")
            self._compile(copy, mutants)
            remove(copy.parent)
            for mutant, outcome in zip(mutants, pool.map(self._unit, mutants), strict=True):
                self._note(mutant, *outcome)

    def _compile(self, copy: Path, mutants: Sequence[Mutant]) -> None:
        if any(_one_unit(mutant) for mutant in mutants) and not self.extension.kept.exists():
            self.extension.compile(copy)

    def _unit(self, mutant: Mutant) -> tuple[str, str]:
        copy = self._copy(mutant)
        try:
            site = self._site(mutant, copy)
        except LabError as error:
            return BROKEN, error.what
        status, log = self._pytest(mutant.tests, copy, site, f"mutant-{mutant.name}")
        remove(copy.parent)
        return _verdict(status, f"pytest ended with status {status}: {log}")

    def _pytest(self, tests: Sequence[str], copy: Path, site: Path, name: str) -> tuple[int, Path]:
        """Run tests of a copy of the project with an installed package; pytest's exit status, and its output."""
        chroot = self.session.tree.chroot(
            binds={copy: str(PROJECT), site: INSIDE}, environment=vm.default_environment(), folder=str(PROJECT)
        )
        argv = ["setpriv", "--pdeathsig", "KILL", *chroot.argv(_pytest(tests))]
        log = self.folder / f"{name}.log"
        with (
            log.open("wb") as sink,
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink) as child,
        ):
            self.running.add(child)
            try:
                return child.wait(UNIT_LIMIT_S), log
            except subprocess.TimeoutExpired:
                child.kill()
                return EXIT_TIMEOUT, log
            finally:
                self.running.discard(child)

    @contextmanager
    def _workers(self) -> Iterator[ThreadPoolExecutor]:
        """One for each processor; when something goes wrong, or the user interrupts, what they do is ended."""
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(self.running):
                child.kill()
            raise
        finally:
            pool.shutdown()

    def _copy(self, mutant: Mutant | None) -> Path:
        """Return a copy of the project with the change made, or with none."""
        copy = self.folder / (mutant.name if mutant is not None else "none") / "project"
        ignored = shutil.ignore_patterns(".git", "__pycache__", "*.so", "build", ".*_cache")
        shutil.copytree(PROJECT, copy, ignore=ignored, symlinks=True)
        if mutant is not None:
            mutant.apply(copy)
        return copy

    def _site(self, mutant: Mutant, copy: Path) -> Path:
        """Return the package as installed from the copy; it is built only for a change of what is compiled."""
        site, installed = copy.parent / "site", self.session.environment.site
        if mutant.file.startswith(f"{PACKAGE}/"):
            shutil.copytree(installed, site, symlinks=True)
            shutil.copyfile(copy / mutant.file, site / mutant.file)
        elif _one_unit(mutant) and self.extension.kept.exists():
            shutil.copytree(installed, site, symlinks=True)
            self.extension.install(copy, site)
        elif mutant.file.startswith("cdefs/"):
            changed = Environment(self.session.cache, self.session.tree, copy, self.quiet)
            changed.install(copy.parent, copy.parent / "build.log")
        else:
            return installed
        return site

    # -- in a VM ---------------------------------------------------------------

    def _in_vm(self, chosen: Kernel, mutants: Sequence[Mutant]) -> None:
        """Test them in one VM; one that ends the VM is noticed by that, and the rest continue in another.

        Where nothing runs beside a kernel that loops, each of them gets a machine, which is soon there.
        """
        build = self._module_build(chosen)
        by_name: dict[str, Mutant] = {}
        steps = self._steps(mutants, build, by_name)
        for plan in ([step] for step in steps) if self.request.machine == UML else [list(steps)]:
            self._work_off(plan, by_name)
        build.forget_others()

    def _steps(
        self, mutants: Sequence[Mutant], build: "ModuleBuild", by_name: dict[str, Mutant]
    ) -> Iterator[dict[str, object]]:
        """Yield the tests without a change, then what is to be tried; each is built when its turn comes."""
        unchanged = str(build.built())
        rules = sorted({rule for mutant in mutants for rule in mutant.rules})
        yield {"name": BASELINE, "module": unchanged, "tests": _union(mutants), "check": rules}
        for mutant in mutants:
            try:
                step = self._prepare(mutant, build, unchanged)
            except LabError as error:
                self._note(mutant, BROKEN, error.what)
                continue
            by_name[mutant.name] = mutant
            yield step

    def _work_off(self, plan: Sequence[dict[str, object]], by_name: Mapping[str, Mutant]) -> None:
        while plan:
            done = self._boot(plan)
            for name, status in done.items():
                if name != BASELINE:
                    self._note(by_name[name], *_verdict(status, f"pytest ended with status {status}"))
                elif status:
                    raise LabError("the tests fail without any change", "Their output is above.", "tools/lab test")
            plan = [step for step in plan if step["name"] not in done]
            if plan and not done:
                raise LabError("no mutant could be tried in the VM", "Its output is above.", "tools/lab status")

    def _module_build(self, chosen: Kernel) -> "ModuleBuild":
        session, tree = self.session, self.session.tree
        folder = self.folder / "build"
        if self.request.machine == UML:
            mine, builder = session.uml(self.request, chosen), session.uml_builder()
            return ModuleBuild(f"uml {mine.folder.name}", partial(builder.make_modules, mine), folder, self.modules)
        against = (chosen.headers, chosen.symbols, chosen.release)
        return ModuleBuild(chosen.release, partial(build_modules, tree, against), folder, self.modules)

    def _prepare(self, mutant: Mutant, build: "ModuleBuild", unchanged: str) -> dict[str, object]:
        step: dict[str, object] = {"name": mutant.name, "module": unchanged}
        step |= {"tests": list(mutant.tests), "check": list(mutant.rules)}
        if mutant.of_module:
            return step | {"module": str(build.built(mutant))}
        copy = self._copy(mutant)
        return step | {"site": str(self._site(mutant, copy))}

    def _boot(self, plan: Sequence[dict[str, object]]) -> dict[str, int]:
        """Run steps in a VM; return pytest's status of those that were tried, by name."""
        alone = self.request.machine == UML
        if alone:
            plan = [
                {**step, "tests": [*cast(list[str], step["tests"]), *uml_tests.without()]} if step["tests"] else step
                for step in plan
            ]
        paths = {name: self.folder / f"{name}.json" for name in ("plan", "results")}
        paths["plan"].write_text(json.dumps(list(plan)))
        paths["results"].write_text("")
        request = replace(
            self.request,
            command=["python3", str(IN_VM), str(paths["plan"]), str(paths["results"])],
            devices=self.request.devices or ("vdpa_sim_net:2", "vdpa_hwsim:0"),
            shares=[self.folder],
            timeout=self.request.timeout or (UML_LIMIT_S if alone and plan[0]["name"] != BASELINE else VM_LIMIT_S),
        )
        trouble = ""
        try:
            self.session.run(request, "soak")
        except LabError as error:
            trouble = error.what
            self.session.progress.say(error.render())
        lines = [json.loads(line) for line in paths["results"].read_text().splitlines()]
        done = {line["name"]: line["status"] for line in lines if "status" in line}
        begun = [line["name"] for line in lines if "status" not in line and line["name"] not in done]
        if trouble and begun and begun[-1] != BASELINE:
            self.session.progress.say(f"{begun[-1]}: {trouble}")
            done[begun[-1]] = EXIT_TIMEOUT
        return done


class ModuleBuild:
    """A folder in which the module is built again and again, each time with another change; the results are kept."""

    def __init__(self, kernel: str, make: Callable[[Path], None], folder: Path, kept: Path) -> None:
        self.kernel, self.make, self.kept = kernel, make, kept
        self.folder = folder / "vdpa_hwsim"
        self.sources = own_sources("vdpa_hwsim", PROJECT / MODULE)
        self.used: set[Path] = set()
        self.kept.mkdir(exist_ok=True)

    def built(self, mutant: Mutant | None = None) -> Path:
        """Return the module as built with one change, or with none."""
        texts = {path.name: path.read_text() for path in self.sources}
        if mutant is not None:
            name = Path(mutant.file).name
            texts[name] = _replaced(mutant, texts[name])
        digest = hashlib.sha256(repr((self.kernel, sorted(texts.items()))).encode()).hexdigest()[:16]
        target = self.kept / f"{digest}.ko"
        self.used.add(target)
        if not target.exists():
            self._write(texts)
            self.make(self.folder)
            partial = target.with_suffix(".partial")
            shutil.copyfile(self.folder / "vdpa_hwsim.ko", partial)
            partial.rename(target)
        return target

    def _write(self, texts: Mapping[str, str]) -> None:
        """Write the sources; those that are the same keep their age, so that only what changed is compiled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = self.folder / name
            if not path.exists() or path.read_text() != text:
                path.write_text(text)

    def forget_others(self) -> None:
        """Remove modules of other sources."""
        for path in self.kept.iterdir():
            if path not in self.used:
                path.unlink()


def selections(mutants: Sequence[Mutant]) -> list[list[str]]:
    """Return what to call pytest with so that every test of these mutants runs once: `-k` is for a call as a whole."""
    plain = sorted({word for mutant in mutants if "-k" not in mutant.tests for word in mutant.tests})
    files = {word for word in plain if "::" not in word}
    together = [word for word in plain if word in files or word.partition("::")[0] not in files]
    others = sorted({tuple(mutant.tests) for mutant in mutants if "-k" in mutant.tests})
    return [*([together] if together else []), *(list(words) for words in others)]


def _one_unit(mutant: Mutant) -> bool:
    """Return whether a change is one of a C file of the package, of which nothing else is made."""
    return mutant.file.startswith("cdefs/") and mutant.file.endswith(".c")


def _pytest(tests: Sequence[str]) -> list[str]:
    return ["python3", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]


def _union(mutants: Sequence[Mutant]) -> list[str]:
    """Return the files of all tests that mutants are tried with: without a change they have to pass."""
    words = {word.partition("::")[0] for mutant in mutants for word in mutant.tests}
    return sorted(word for word in words if word.startswith("tests/"))


def _verdict(status: int, why: str) -> tuple[str, str]:
    # a change of C that makes the tests crash is noticed as well; pytest itself knows 0 to 5
    crashed = status < 0 or status > SHELL_SIGNALS
    verdict = KILLED if crashed else VERDICTS.get(status, BROKEN)
    if status == EXIT_TIMEOUT:
        why = "the tests did not end"
    if status == NO_TESTS:
        why = "no test of it can run here"
    return verdict, why if verdict == BROKEN or status == EXIT_TIMEOUT else ""


def render(results: Sequence[Result]) -> str:
    """Return what became of all mutants, the killed ones as a number."""
    killed = [result for result in results if result.verdict == KILLED]
    lines = [f"{len(killed)} of {len(results)} mutants were noticed"]
    for verdict in (SURVIVED, BROKEN):
        for result in results:
            if result.verdict == verdict:
                why = result.mutant.reason or result.why or _unnoticed(result.mutant)
                lines.append(f"{verdict:<9} {result.mutant.name}  {result.mutant.file}: {why}")
    return "\n".join(lines)


def _unnoticed(mutant: Mutant) -> str:
    if mutant.rules:
        return f"no rule of {' '.join(mutant.rules)} fails"
    return f"no test of {' '.join(mutant.tests)} fails"


def run(session: Session, request: Request, only: str = "", by_check: bool = False) -> int:
    """Run the mutants that `only` selects; with `by_check` those that name rules of check, by these rules alone."""
    mutants = load(PROJECT, only)
    if by_check:
        mutants = [replace(mutant, tests=()) for mutant in mutants if mutant.check]
    if not mutants:
        raise LabError(f"no mutant has {only!r} in its name or file", "", f"grep name {FOLDER}/*.toml")
    devices.parse(request.devices)
    return Run(session, request, mutants).execute()
