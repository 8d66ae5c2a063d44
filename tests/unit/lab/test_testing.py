"""Which parts `tools/lab test` runs, and in which VM."""

import pytest

from labkit.errors import LabError
from labkit.session import Request
from labkit.testing import ICOUNT, PARTS, Run, Selection


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

    def run(self, request, _command):
        self.requests.append(request)
        return 0


def test_virtual_time_is_for_its_part_alone(cache):
    session = Recorder(cache)
    run = Run(session, Request(), [])
    run._in_vm(["a"])
    run._in_virtual_time(["b"])
    assert [(request.command, request.icount) for request in session.requests] == [(["a"], False), (["b"], True)]
