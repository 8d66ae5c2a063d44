"""Which parts `tools/lab test` runs, and in which VM."""

import contextlib
from types import SimpleNamespace

import pytest

from labkit import testing
from labkit.errors import EXIT_TIMEOUT, LabError
from labkit.session import Request
from labkit.testing import ICOUNT, KERNEL, PARTS, SECOND_KERNEL, SMOKE, Run, Selection


def test_without_arguments_every_part_runs():
    assert Selection([]).parts == list(PARTS)
    assert ICOUNT in PARTS


def test_a_path_selects_its_part():
    selection = Selection(["tests/icount/test_costs.py", "-x"])
    assert selection.parts == [ICOUNT]
    assert selection.pytest(ICOUNT, "/r")[3:5] == ["tests/icount/test_costs.py", "-x"]
    assert selection.pytest(ICOUNT, "/r")[-1] == "--junitxml=/r/icount.xml"


def test_a_path_elsewhere_is_refused():
    with pytest.raises(LabError, match="tests/soak"):
        Selection(["tests/soak/migrate.py"])


class Recorder:
    """A session that remembers what it was asked to run."""

    def __init__(self, cache):
        self.cache, self.requests = cache, []
        self.progress = SimpleNamespace(say=lambda text: None)

    def set_up(self, wanted, _command):
        return SimpleNamespace(release=f"{wanted}.5+deb13-amd64")

    def using(self):
        return contextlib.nullcontext()

    def run(self, request, _command):
        self.requests.append(request)
        return 0


def test_virtual_time_is_for_its_part_alone(cache):
    session = Recorder(cache)
    run = Run(session, Request(), [])
    run._in_vm(["a"])
    run._in_virtual_time(["b"])
    assert [(request.command, request.icount) for request in session.requests] == [(["a"], False), (["b"], True)]


def kernels(cache, monkeypatch, wanted, *arguments):
    """The VMs of a whole run, as (kernel, whether it is for the second kernel's tests)."""
    monkeypatch.setattr(testing, "CHECKS", ())
    monkeypatch.setattr(Run, "_in_tree", lambda run, argv: 0)
    cache.create()
    session = Recorder(cache)
    Run(session, Request(kernel=wanted), arguments).execute()
    return [(request.kernel, SMOKE in request.command) for request in session.requests]


def test_a_second_kernel_gets_the_tests_marked_for_it(cache, monkeypatch):
    assert kernels(cache, monkeypatch, "6.12") == [("6.12", False), (SECOND_KERNEL, True), ("6.12", False)]


def test_none_if_it_is_the_first(cache, monkeypatch):
    assert kernels(cache, monkeypatch, SECOND_KERNEL) == [(SECOND_KERNEL, False)] * 2


def test_none_for_tests_that_were_chosen(cache, monkeypatch):
    assert kernels(cache, monkeypatch, "6.12", KERNEL) == [("6.12", False)]


def test_its_report_is_a_file_of_its_own():
    selection = Selection([])
    assert selection.pytest(KERNEL, "/r")[-1] == "--junitxml=/r/kernel.xml"
    assert selection.pytest(KERNEL, "/r", SMOKE)[3:6] == [KERNEL, "-m", SMOKE]
    assert selection.pytest(KERNEL, "/r", SMOKE)[-1] == "--junitxml=/r/smoke.xml"


def test_a_part_that_never_ends_is_stopped(cache):
    cache.root.mkdir(parents=True, exist_ok=True)
    session = Recorder(cache)
    session.environment = SimpleNamespace(ready=False)
    session.tree = SimpleNamespace(chroot=lambda **_: SimpleNamespace(argv=list))
    run = Run(session, Request(timeout=0.1), [])
    with pytest.raises(LabError, match="sleep ran longer") as raised:
        run._in_tree(["sleep", "60"])
    assert raised.value.status == EXIT_TIMEOUT
