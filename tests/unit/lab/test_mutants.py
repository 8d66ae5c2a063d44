"""`tools/lab soak mutants`: its list, and what it makes of what pytest says."""

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import time
from pathlib import Path

import pytest

from labkit import cli, mutants
from labkit.errors import LabError
from labkit.mutants import Mutant, Result
from pyvhostvdpa.probe.check.rule import NET, select
from pyvhostvdpa.probe.check.rules import catalogue

PROJECT = Path(__file__).resolve().parents[3]
ENTRY = """[[mutant]]
name = "{name}"
file = "code.c"
old = "{old}"
new = "b"
kind = "{kind}"
tests = ["tests/unit/test_x.py", "-k", "some"]
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "code.c").write_text("a\nx\nx\n")
    (tmp_path / mutants.FOLDER).mkdir(parents=True)

    def write(*entries, file="some.toml"):
        (tmp_path / mutants.FOLDER / file).write_text("\n".join(entries))
        return tmp_path

    return write


def entry(name="one", old="a", kind="unit"):
    return ENTRY.format(name=name, old=old, kind=kind)


def test_every_mutant_of_the_project_fits_its_file_and_its_tests_are_there():
    found = mutants.load(PROJECT)
    assert len(found) >= 120
    for mutant in found:
        assert mutant.old != mutant.new, mutant.name
        paths = [word for word in mutant.tests if word.startswith("tests/")]
        assert paths or mutant.check, mutant.name
        for path in paths:
            folder = {"unit": "tests/unit", "lab": "tests/kernel"}[mutant.kind]
            assert path.startswith(folder), mutant.name
            assert (PROJECT / path.partition("::")[0]).exists(), mutant.name


def test_rules_in_the_list_are_rules_of_check():
    """check refuses a pattern that no rule fits, and then nothing was tried."""
    for mutant in mutants.load(PROJECT):
        for pattern in mutant.check:
            assert select(catalogue(NET), [pattern]), f"{mutant.name}: {pattern}"


def test_what_the_list_gives_check_is_caught_but_for_what_it_explains():
    tried = [mutant for mutant in mutants.load(PROJECT) if mutant.check]
    faults = [mutant for mutant in tried if not mutant.unseen.startswith("equivalent: ")]
    assert len(faults) >= 60
    assert sum(not mutant.unseen for mutant in faults) >= 0.9 * len(faults)
    assert {mutant.kind for mutant in tried} == {"lab"}


def test_names_of_tests_in_the_list_are_names_of_tests():
    """A selection that fits no test would let every mutant live."""
    for mutant in mutants.load(PROJECT):
        words = list(mutant.tests)
        if "-k" not in words:
            continue
        text = "".join((PROJECT / word).read_text() for word in words if word.startswith("tests/"))
        for name in words[words.index("-k") + 1].split(" or "):
            assert all(part in text for part in name.split(" and ")), f"{mutant.name}: {name}"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry(old="missing")], "occurs 0 times"),
        ([entry(old="x")], "occurs 2 times"),
        ([entry(kind="somewhere")], "it needs a kind"),
        ([entry(), entry(old="a")], "same name: one"),
        ([entry().replace("new =", "other =")], "unexpected keyword"),
        ([entry().replace("tests =", "check =")], "tries tools/vdpa_hwsim alone"),
        ([entry().partition("tests =")[0]], "tests or rules of check"),
    ],
)
def test_bad_list_is_refused_before_anything_is_built(project, entries, said):
    with pytest.raises(LabError) as caught:
        mutants.load(project(*entries))
    assert said in f"{caught.value.what} {caught.value.why}"


def test_mutants_are_selected_by_name_or_file(project):
    folder = project(entry("one"), entry("two"))
    assert [mutant.name for mutant in mutants.load(folder, "two")] == ["two"]
    assert [mutant.name for mutant in mutants.load(folder, "code.c")] == ["one", "two"]
    assert [mutant.name for mutant in mutants.load(folder, "nothing,one")] == ["one"]
    assert mutants.load(folder, "nothing") == []


def test_change_is_made_in_the_copy_alone(project, tmp_path):
    [mutant] = mutants.load(project(entry()))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "code.c").write_text((tmp_path / "code.c").read_text())
    mutant.apply(copy)
    assert (copy / "code.c").read_text() == "b\nx\nx\n"
    assert (tmp_path / "code.c").read_text() == "a\nx\nx\n"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (0, "survived"),
        (1, "killed"),
        (124, "killed"),
        (-11, "killed"),
        (139, "killed"),
        (2, "broken"),
        (4, "broken"),
        (5, "broken"),
    ],
)
def test_only_a_test_that_fails_hangs_or_crashes_kills(status, verdict):
    assert mutants._verdict(status, "why")[0] == verdict


def test_survivors_are_listed_with_the_reason():
    def of(name, survives=""):
        return Mutant(name, "f.c", "a", "b", "lab", ["tests/x.py"], survives)

    results = [
        Result(of("noticed"), "killed"),
        Result(of("alive"), "survived"),
        Result(of("same"), "survived"),
        Result(of("bad"), "broken", "it does not compile"),
    ]
    results[2].mutant = of("same", "nothing can notice it")
    text = mutants.render(results).splitlines()
    assert text[0] == "1 of 4 mutants were noticed"
    assert text[1:] == [
        "survived  alive  f.c: no test of tests/x.py fails",
        "survived  same  f.c: nothing can notice it",
        "broken    bad  f.c: it does not compile",
    ]
    assert [result.good for result in results] == [True, False, True, False]


def test_rules_are_what_a_mutant_without_tests_is_tried_with():
    both = Mutant("both", "f.c", "a", "b", "lab", ["tests/x.py"], "", ["suspend.*"], "nothing says so")
    assert (both.rules, both.reason) == ((), "")
    alone = dataclasses.replace(both, tests=())
    assert (alone.rules, alone.reason) == (["suspend.*"], "nothing says so")
    assert Result(alone, "survived").good
    unexplained = Result(dataclasses.replace(alone, unseen=""), "survived")
    assert not unexplained.good
    assert mutants.render([unexplained]).splitlines()[1] == "survived  both  f.c: no rule of suspend.* fails"


class Session:
    """Stands for VMs: what each comes to, as lines of the file of results and perhaps an error."""

    def __init__(self, *boots):
        self.boots, self.plans, self.said = list(boots), [], []
        self.progress = self

    def say(self, text):
        self.said.append(text)

    def run(self, request, _):
        plan, results = (Path(word) for word in request.command[-2:])
        self.plans.append([step["name"] for step in json.loads(plan.read_text())])
        lines, error = self.boots.pop(0)
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if error:
            raise error


def test_mutant_that_ends_the_vm_is_noticed_and_the_rest_continue_in_another(tmp_path):
    run = mutants.Run.__new__(mutants.Run)
    run.session = Session(
        ([{"name": "one"}, {"name": "one", "status": 1}, {"name": "two"}], LabError("the VM's kernel panicked")),
        ([{"name": "three"}, {"name": "three", "status": 0}], None),
    )
    run.folder, run.request = tmp_path, cli.request(cli.parse(["soak", "mutants"]), ())
    plan = [{"name": name} for name in ("one", "two", "three")]
    assert run._boot(plan) == {"one": 1, "two": 124}
    assert run._boot(plan[2:]) == {"three": 0}
    assert run.session.plans == [["one", "two", "three"], ["three"]]


def without_device(tmp_path, monkeypatch, statuses):
    """A run whose calls of pytest end as a table says: by the mutant's name, `none` without a change."""
    run = mutants.Run.__new__(mutants.Run)
    run.session, run.folder, run.results, run.running = Session(), tmp_path, [], set()
    run.session.environment = type("Environment", (), {"site": tmp_path})
    monkeypatch.setattr(mutants.Run, "_copy", lambda _, mutant: tmp_path / (mutant.name if mutant else "none") / "copy")
    monkeypatch.setattr(mutants.Run, "_site", lambda *_: tmp_path)
    called = []

    def pytest_(_, tests, copy, site, name):
        called.append(tuple(tests))
        return statuses[copy.parent.name], tmp_path / name

    monkeypatch.setattr(mutants.Run, "_pytest", pytest_)
    return run, called


def test_tests_that_fail_without_a_change_kill_nothing(tmp_path, monkeypatch):
    run, called = without_device(tmp_path, monkeypatch, {"none": 1, "one": 1})
    with pytest.raises(LabError, match="fail without any change"):
        run._without_device([Mutant("one", "f.c", "a", "b", "unit", ["tests/x.py"])])
    assert run.results == []
    assert called == [("tests/x.py",)]


def test_mutants_without_a_device_are_reported_in_their_order(tmp_path, monkeypatch):
    run, called = without_device(tmp_path, monkeypatch, {"none": 0, "one": 1, "two": 0, "three": 1})
    names = ("one", "two", "three")
    run._without_device([Mutant(name, "f.c", "a", "b", "unit", [f"tests/{name}.py"]) for name in names])
    assert [(result.mutant.name, result.verdict) for result in run.results] == [
        ("one", "killed"),
        ("two", "survived"),
        ("three", "killed"),
    ]
    assert called[0] == ("tests/one.py", "tests/three.py", "tests/two.py")


def test_running_processes_are_ended_when_the_list_is_interrupted(tmp_path, monkeypatch):
    run, _ = without_device(tmp_path, monkeypatch, {})
    begin = time.monotonic()
    child = subprocess.Popen(["sleep", "60"])
    run.running.add(child)
    with contextlib.suppress(KeyboardInterrupt), run._workers() as pool:
        pool.submit(child.wait)
        raise KeyboardInterrupt
    assert child.wait(30) < 0
    assert time.monotonic() - begin < 30


def test_every_test_of_the_list_runs_once_without_a_change():
    def of(*tests):
        return Mutant("name", "f.c", "a", "b", "unit", tests)

    chosen = [of("tests/a.py"), of("tests/a.py::one"), of("tests/b.py::two"), of("tests/c.py", "-k", "x")]
    assert mutants.selections(chosen) == [["tests/a.py", "tests/b.py::two"], ["tests/c.py", "-k", "x"]]
    assert mutants.selections(chosen[3:]) == [["tests/c.py", "-k", "x"]]


def test_baseline_is_every_file_that_a_mutant_is_tried_with():
    """No file at all would be pytest's default, which is every test that there is."""

    def of(*tests):
        return Mutant("name", "f.c", "a", "b", "lab", tests)

    chosen = [of("tests/kernel/b.py", "-k", "some"), of("tests/kernel/a.py::test_one"), of("tests/kernel/b.py")]
    assert mutants._union(chosen) == ["tests/kernel/a.py", "tests/kernel/b.py"]
    assert mutants._union(mutants.load(PROJECT)) != []


@pytest.fixture
def in_vm(tmp_path, monkeypatch):
    """The program that runs in the VM, with a plan of two steps and a module that always loads."""
    spec = importlib.util.spec_from_file_location("in_vm", mutants.IN_VM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "load", lambda module: True)
    monkeypatch.setattr(program, "SYSRQ", tmp_path / "sysrq")
    (tmp_path / "plan").write_text(json.dumps([{"name": name, "module": "", "tests": []} for name in ("one", "two")]))
    (tmp_path / "results").touch()
    return program


def results_in(folder):
    return [json.loads(line) for line in (folder / "results").read_text().splitlines()]


def test_mutant_that_is_stuck_in_the_kernel_is_recorded_and_ends_the_vm(in_vm, tmp_path, monkeypatch):
    def stuck(step):
        if step["name"] == "two":
            raise in_vm.StuckError
        return 1

    monkeypatch.setattr(in_vm, "attempt", stuck)
    in_vm.main(tmp_path / "plan", tmp_path / "results")
    assert [line for line in results_in(tmp_path) if "status" in line] == [
        {"name": "one", "status": 1},
        {"name": "two", "status": 124},
    ]
    assert (tmp_path / "sysrq").read_text() == "b"


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ({"counts": {"fail": 0}, "rules": [{"id": "a.b", "verdict": "pass", "detail": ""}]}, 0, 0),
        ({"counts": {"fail": 1}, "rules": [{"id": "a.b", "verdict": "fail", "detail": "moved"}]}, 1, 1),
        (None, 1, 2),
        (None, 124, 124),
    ],
)
def test_only_a_rule_that_fails_or_hangs_is_check_noticing(in_vm, capfd, output, status, said):
    """An error of check itself has no verdicts: then nothing was tried."""
    text = json.dumps(output) if output else ""
    assert in_vm._told(["sh", "-c", f"echo '{text}'; exit {status}"]) == said
    assert ("a.b: moved" in capfd.readouterr().out) == (said == 1)


@pytest.mark.parametrize(("of_check", "tests", "said"), [(1, ["tests/x.py"], 1), (0, [], 0)])
def test_check_comes_before_the_tests_of_a_step(in_vm, monkeypatch, of_check, tests, said):
    tried = []
    monkeypatch.setattr(in_vm, "check", lambda rules: tried.append(rules) or of_check)
    assert in_vm.attempt({"name": "one", "tests": tests, "check": ["maps.*"]}) == said
    assert tried == [["maps.*"]]
