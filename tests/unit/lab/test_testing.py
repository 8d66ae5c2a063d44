"""Which parts `tools/lab test` runs, and in which VM."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from labkit import testing
from labkit.errors import EXIT_TIMEOUT, LabError
from labkit.report import Part
from labkit.session import Request
from labkit.testing import ICOUNT, INSTALL, KERNEL, PARTS, SECOND_KERNEL, SMOKE, Run, Selection


def test_without_arguments_every_part_runs():
    assert Selection([]).parts == list(PARTS)
    assert ICOUNT in PARTS


def test_a_path_selects_its_part():
    selection = Selection(["tests/icount/test_costs.py", "-x"])
    assert selection.parts == [ICOUNT]
    assert selection.pytest(ICOUNT, "/r")[3:5] == ["tests/icount/test_costs.py", "-x"]
    assert selection.pytest(ICOUNT, "/r")[-1] == "--junitxml=/r/icount.xml"


def test_install_selects_nothing_else():
    assert (Selection([INSTALL]).parts, Selection([INSTALL]).install) == ([], True)
    assert not Selection([KERNEL]).install
    assert Selection([]).install


def test_path_outside_the_test_folders_is_refused():
    with pytest.raises(LabError, match="tests/soak"):
        Selection(["tests/soak/migrate.py"])


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ([], True),
        (["tests/kernel/test_machines.py::test_guest_arrives_whole"], True),
        (["tests/kernel/test_door.py"], False),
        (["tests/unit"], False),
    ],
)
def test_virtual_machines_are_there_for_files_that_ask_for_them(arguments, needed):
    assert Selection(arguments).needs_vmm() is needed


class Recorder:
    """A session that remembers what it was asked to run."""

    def __init__(self, cache):
        self.cache, self.requests, self.live = cache, [], []
        self.progress = SimpleNamespace(say=lambda text: None)

    def set_up(self, wanted, _command):
        return SimpleNamespace(release=f"{wanted}.5+deb13-amd64")

    def using(self):
        return contextlib.nullcontext()

    def vmm(self):
        return SimpleNamespace(ensure=lambda: None)

    def run(self, request, _command, out=None, _err=None):
        self.requests.append(request)
        self.live.append(out is None)
        return 0


def test_virtual_time_is_for_its_part_alone(cache):
    session = Recorder(cache)
    run = Run(session, Request(), [])
    run._in_vm(["a"])
    run._in_virtual_time(["b"])
    assert [(request.command, request.icount) for request in session.requests] == [(["a"], False), (["b"], True)]


@pytest.fixture(params=[1, 2], ids=["one VM at a time", "two at a time"])
def room(request, monkeypatch):
    """How many VMs fit on the machine."""
    monkeypatch.setattr(testing.values, "side_by_side", lambda wanted, each: min(wanted, request.param))
    return request.param


def executed(cache, monkeypatch, wanted, *arguments):
    """The session of a run whose parts without a VM do nothing."""
    monkeypatch.setattr(testing, "CHECKS", ())
    monkeypatch.setattr(testing.install, "Trial", lambda session: SimpleNamespace(set_up=list, execute=list))
    monkeypatch.setattr(Run, "_in_tree", lambda run, argv: 0)
    cache.create()
    session = Recorder(cache)
    run = Run(session, Request(kernel=wanted), arguments)
    run.execute()
    session.parts = [part.name for part in run.parts]
    return session


def kernels(*arguments):
    """The VMs of such a run, as (kernel, whether it is for the second kernel's tests)."""
    return sorted((request.kernel, SMOKE in request.command) for request in executed(*arguments).requests)


def test_a_second_kernel_gets_the_tests_marked_for_it(cache, monkeypatch, room):
    assert kernels(cache, monkeypatch, "6.12") == [("6.12", False)] * (room + 1) + [(SECOND_KERNEL, True)]


def test_second_kernel_is_not_started_if_it_is_the_first(cache, monkeypatch, room):
    assert kernels(cache, monkeypatch, SECOND_KERNEL) == [(SECOND_KERNEL, False)] * (room + 1)


def test_second_kernel_is_not_started_for_chosen_tests(cache, monkeypatch, room):
    assert kernels(cache, monkeypatch, "6.12", f"{KERNEL}/test_door.py") == [("6.12", False)]


def test_each_part_has_its_own_title(cache, monkeypatch, room):
    titles = executed(cache, monkeypatch, "6.12").parts
    assert len(titles) == len(set(titles))
    assert f"{KERNEL} (VM, {SECOND_KERNEL}, {SMOKE})" in titles


def test_two_machines_share_all_files_and_one_is_live(cache, monkeypatch, room):
    session = executed(cache, monkeypatch, "6.12", KERNEL)
    claims = [request.environment.get(testing.CLAIMS_VARIABLE) for request in session.requests]
    reports = sorted(request.command[-1].rpartition("/")[2] for request in session.requests)
    if room == 1:
        assert (claims, reports, session.live) == ([None], ["kernel.xml"], [True])
    else:
        assert len(set(claims)) == 1
        assert Path(claims[0]).is_dir()
        assert reports == ["kernel-1.xml", "kernel-2.xml"]
        assert sorted(session.live) == [False, True]


def test_second_machine_does_not_wait_for_what_needs_none(cache, monkeypatch, room):
    """The first is busy with what runs in the tree: a second processor would be idle."""
    in_machine = threading.Event()
    seen = []
    monkeypatch.setattr(Run, "_in_vm", lambda run, argv, **_: in_machine.set() or 0)

    def in_the_tree(run):
        run.parts.append(Part("tree"))
        seen.append(in_machine.wait(10.0 if room == 2 else 0.2))

    monkeypatch.setattr(Run, "_checks", in_the_tree)
    executed(cache, monkeypatch, "6.12")
    assert seen == [room == 2]


def test_smoke_report_is_a_separate_file():
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
