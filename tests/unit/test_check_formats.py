"""What came of a check, as text, JSON, TAP and JUnit's XML, and the scripts for what failed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

import pytest
from door_double import OFFERED, DoorDouble

import pyvhostvdpa
from pyvhostvdpa.chardev.door import VhostVdpa
from pyvhostvdpa.cli import check as command
from pyvhostvdpa.cli import main
from pyvhostvdpa.probe.check.engine import Check, Interrupted
from pyvhostvdpa.probe.check.facts import Facts, ask
from pyvhostvdpa.probe.check.formats import SCHEMA, junit, tap, to_dict
from pyvhostvdpa.probe.check.rule import BLOCK, NET, Result, Rule, Verdict
from pyvhostvdpa.probe.check.rules import catalogue
from pyvhostvdpa.probe.check.script import file_name, script

PATH = "/dev/vhost-vdpa-double"
RULES = {rule.id: rule for rule in catalogue()}
Capture = pytest.CaptureFixture[str]


def facts() -> Facts:
    return ask(PATH, lambda path, trace: cast(VhostVdpa, DoorDouble(OFFERED)))


def result(name: str, verdict: Verdict, detail: str = "seen", fault: str = "") -> Result:
    return Result(RULES[name], verdict, detail, 0.25, ("open", "VHOST_SET_OWNER"), fault)


@pytest.fixture
def found() -> Check:
    return Check(
        facts(),
        [
            result("status.failed", Verdict.PASS),
            result("iotlb.update", Verdict.FAIL, 'it said <"no"> & left #1\x07'),
            result("suspend.stops", Verdict.KNOWN, "moved", "some.c:function"),
            result("queues.doorbell", Verdict.NOT_OFFERED, "no page"),
            result("mq.set", Verdict.UNKNOWN, "one pair"),
        ],
        12.5,
    )


def test_json_has_the_promised_fields(found: Check) -> None:
    told = json.loads(json.dumps(to_dict(found)))
    assert told["schema"] == SCHEMA == "pyvhostvdpa/check/1"
    assert told["counts"] == {"pass": 1, "fail": 1, "known": 1, "not_offered": 1, "unknown": 1}
    assert told["device"]["chardev"] == PATH
    assert {"parent", "kernel", "virtio_id", "features", "backend_features"} <= told["device"].keys()
    first = told["rules"][0]
    assert {"id", "group", "verdict", "detail", "source", "sentence", "tried", "seconds", "known_fault"} == first.keys()
    assert (first["id"], first["group"], first["verdict"]) == ("status.failed", "status", "pass")
    assert told["rules"][2]["known_fault"] == "some.c:function"


def test_tap_is_what_the_kernels_selftests_print(found: Check) -> None:
    lines = tap(found).splitlines()
    assert lines[:3] == ["TAP version 14", "1..5", "ok 1 - status.failed"]
    assert "not ok 2 - iotlb.update" in lines
    assert any(line.startswith("  message: ") for line in lines)
    assert "not ok 3 - suspend.stops # TODO known: some.c:function" in lines
    assert "ok 4 - queues.doorbell # SKIP not offered: no page" in lines
    assert "ok 5 - mq.set # SKIP cannot be determined here: one pair" in lines


def test_junit_can_be_parsed(found: Check) -> None:
    root = ElementTree.fromstring(junit(found).encode())
    assert (root.get("tests"), root.get("failures")) == ("5", "1")
    cases = {case.get("name"): case for case in root.iter("testcase")}
    failure = cases["iotlb.update"].find("failure")
    assert failure is not None
    assert '<"no">' in (failure.get("message") or "")
    assert cases["status.failed"].find("failure") is None
    for name in ("suspend.stops", "queues.doorbell", "mq.set"):
        assert cases[name].find("skipped") is not None


def test_text_begins_with_the_answer(found: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = command._text(found)
    assert text.splitlines()[0].endswith("1 of 5 rules pass, 1 FAIL, 1 known to fail, 1 not offered, 1 unknown (12 s).")
    failure = text.split("\n\n")[1]
    assert failure.startswith("FAIL  iotlb.update")
    assert RULES["iotlb.update"].source in failure
    assert "--only iotlb.update" in failure
    assert "some.c:function" in text
    assert "one pair" in text


def test_text_fits_the_terminal(found: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = [line for line in command._text(found).splitlines() if len(line) > 80]
    # a command to copy stays whole
    assert [line for line in long if not line.lstrip().startswith(("next:", "vhost-vdpa"))] == []


def test_unread_log_is_reported(found: Check) -> None:
    found.log_unread = "/dev/kmsg: Operation not permitted"
    assert "Operation not permitted" in command._text(found)
    assert to_dict(found)["kernel_log"] == "/dev/kmsg: Operation not permitted"


# -- the command ---------------------------------------------------------------------------


def test_check_lists_all_rules_without_a_device(capsys: Capture) -> None:
    assert main(["check", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in RULES)
    assert said.rstrip().endswith(f"{len(RULES)} rules")


def test_the_list_as_json(capsys: Capture) -> None:
    assert main(["check", "--list", "--json", "--only", "iotlb"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "pyvhostvdpa/check/rules/1"
    assert {rule["group"] for rule in told["rules"]} == {"iotlb"}


def test_a_rule_that_does_not_exist_is_refused(capsys: Capture) -> None:
    assert main(["check", "--list", "--only", "iotlb.nothing"]) == 1
    said = capsys.readouterr().err
    assert "no rule is called 'iotlb.nothing'" in said
    assert "vhost-vdpa check --list" in said


def test_check_does_not_open_a_path_that_is_not_a_device(capsys: Capture) -> None:
    assert main(["check", "/dev/null"]) == 1
    assert "not a vhost-vdpa character device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verdict", "status"), [(Verdict.PASS, 0), (Verdict.KNOWN, 0), (Verdict.UNKNOWN, 0), (Verdict.FAIL, 1)]
)
def test_exit_status_shows_whether_a_rule_failed(
    verdict: Verdict, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("check_path", "check_served"):
        monkeypatch.setattr(command, name, lambda path: None)
    monkeypatch.setattr(command, "check", lambda *rest: Check(facts(), [result("iotlb.update", verdict)], 0.1))
    assert main(["check", PATH, "--script", str(tmp_path / "out")]) == status
    scripts = os.listdir(tmp_path / "out")
    assert scripts == (["iotlb_update.py"] if status else [])
    capsys.readouterr()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Check:
    """What the command finds, without a device: one rule that failed."""
    found = Check(facts(), [result("iotlb.update", Verdict.FAIL)], 0.1)
    for name in ("check_path", "check_served"):
        monkeypatch.setattr(command, name, lambda path: None)
    monkeypatch.setattr(command, "check", lambda *rest: found)
    return found


def test_an_interrupted_check_prints_what_it_found(
    checked: Check, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    checked.left = 7

    def interrupted(*rest: object) -> Check:
        raise Interrupted(checked)

    monkeypatch.setattr(command, "check", interrupted)
    assert main(["check", PATH]) == 130
    said = capsys.readouterr()
    assert "Interrupted: 7 rules were not tried." in " ".join(said.out.split("\n\n")[0].split())
    assert "interrupted" in said.err
    assert main(["check", PATH, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["not_tried"] == 7
    assert main(["check", PATH, "--tap"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "1..8"
    assert lines[-1] == "Bail out! interrupted"


def test_an_interrupted_check_without_a_result_prints_none(
    checked: Check, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(*rest: object) -> Check:
        raise Interrupted(Check(facts(), left=8))

    monkeypatch.setattr(command, "check", interrupted)
    assert main(["check", PATH]) == 130
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_made_is_refused_before_the_device_is_opened(
    checked: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(command, "check", lambda *rest: opened.append(rest))
    (tmp_path / "file").write_text("")
    assert main(["check", PATH, "--script", str(tmp_path / "file")]) == 1
    assert "--script" in capsys.readouterr().err
    assert opened == []


def test_a_full_disk_does_not_cost_the_result(
    checked: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["check", PATH, "--script", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "FAIL  iotlb.update" in said.out
    assert "No space left on device: not every script was written" in said.err


def test_scripts_are_written_though_nobody_reads_the_result(
    checked: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def gone(found: Check) -> str:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(command, "_text", gone)
    main(["check", PATH, "--script", str(tmp_path)])
    assert os.listdir(tmp_path) == ["iotlb_update.py"]


def test_help_has_the_exit_status_and_the_list_how_many_rules_a_device_gets(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "exit status: 0 no rule failed" in said
    assert "130 interrupted" in said
    assert main(["check", "--list"]) == 0
    assert f"for a network device {len(catalogue(NET))}, for a disk {len(catalogue(BLOCK))}" in capsys.readouterr().out


# -- scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_script_of_any_rule_compiles(rule: Rule) -> None:
    text = script(Result(rule, Verdict.FAIL, 'said """no""" \\ and more'), PATH, "vdpa0 (vdpa_sim)")
    compiled = compile(text, file_name(Result(rule, Verdict.FAIL, "")), "exec")
    space = {"__name__": "a_script"}
    exec(compiled, space)
    assert callable(space["main"])
    assert "GROUP" not in space
    assert len(text.splitlines()) < 220


def test_a_script_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "iotlb_update.py"
    path.write_text(script(result("iotlb.update", Verdict.FAIL), "/dev/null", "vdpa0"))
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(pyvhostvdpa.__file__).parents[1])},
    )
    assert done.returncode == 1
    assert "not a vhost-vdpa character device" in done.stderr
