"""The report over all parts of a test run."""

import pytest

from labkit import report
from labkit.errors import LabError
from labkit.report import Case, Part
from labkit.testing import KERNEL, PARTS, UNIT, Selection

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.unit.test_a" name="test_good" time="0.5"/>
<testcase classname="tests.unit.test_a" name="test_bad" time="1.5">
<failure message="m">assert 1 == 2</failure></testcase>
<testcase classname="tests.unit.test_a" name="test_broken" time="0"><error message="set-up failed"/></testcase>
<testcase classname="tests.unit.test_a" name="test_out" time="0"><skipped message="no time"/></testcase>
</testsuite></testsuites>"""


def test_report_sums_all_parts(tmp_path):
    path = tmp_path / "unit.xml"
    path.write_text(JUNIT)
    parts = [
        Part("set-up", 2.0),
        Part("unit", 3.0, report.read_junit(path)),
        Part("vm", 9.0, [Case("x", "passed", 4.0)]),
    ]
    text = report.render(parts)
    assert text.splitlines()[-1] == "2 passed, 2 failed, 1 skipped"
    assert "assert 1 == 2" in text
    assert "set-up failed" in text
    assert text.index("4.00 s  x") < text.index("1.50 s")


def test_the_ten_slowest_tests():
    parts = [Part(name, cases=[Case(f"{name}{n}", "passed", n) for n in range(1, 9)]) for name in ("here", "there")]
    slowest = report.render(parts).partition("slowest tests\n")[2].splitlines()
    assert [line.split()[0] for line in slowest[: slowest.index("")]] == [
        f"{n:.2f}" for n in (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
    ]


def test_columns_stay_below_their_heads():
    head, *rows = report.render(
        [Part("short", 2.0), Part("a name that is longer than all others", 3000.0)]
    ).splitlines()[1:4]
    assert {len(line) for line in (head, *rows)} == {len(head)}


@pytest.mark.parametrize(
    ("results", "expected"), [(["passed"], True), (["passed", "skipped"], False), (["failed"], False), ([], False)]
)
def test_a_skip_is_not_clean(results, expected):
    assert report.clean([Part("p", cases=[Case("x", result) for result in results])]) is expected


def test_selection_without_arguments_is_everything():
    selection = Selection([])
    assert selection.parts == list(PARTS)
    assert selection.whole


def test_a_path_selects_its_part():
    selection = Selection(["tests/kernel/test_a.py::test_b", "-x"])
    assert selection.parts == [KERNEL]
    assert selection.pytest(KERNEL, "/r")[3:5] == ["tests/kernel/test_a.py::test_b", "-x"]


def test_options_go_to_every_part():
    selection = Selection(["-k", "migrate"])
    assert selection.parts == list(PARTS)
    assert selection.pytest(UNIT, "/r")[3:6] == ["tests/unit", "-k", "migrate"]


def test_path_outside_the_test_folders_is_refused():
    with pytest.raises(LabError, match="is in none of"):
        Selection(["tests/other"])
