"""The conformance test's engine: verdicts, deadlines, crashes, the kernel's log, and the catalogue of rules."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import psutil
import pytest
from door_double import OFFERED, DoorDouble

from pyvhostvdpa.base.errors import DeviceBusy, KernelError, VhostVdpaError
from pyvhostvdpa.chardev.door import VhostVdpa
from pyvhostvdpa.probe.check import engine, known
from pyvhostvdpa.probe.check.bench import Bench
from pyvhostvdpa.probe.check.engine import Check, Interrupted, check
from pyvhostvdpa.probe.check.facts import ask
from pyvhostvdpa.probe.check.kernel_log import KernelLog, faults, text_of
from pyvhostvdpa.probe.check.known import KNOWN, KnownFault
from pyvhostvdpa.probe.check.rule import (
    BLOCK,
    NET,
    Broken,
    CannotTell,
    NotOffered,
    Result,
    Rule,
    Verdict,
    demand,
    select,
)
from pyvhostvdpa.probe.check.rules import all_groups, catalogue
from pyvhostvdpa.trace import Trace

PATH = "/dev/vhost-vdpa-double"
RULES = catalogue()


def opener(path: str, trace: Trace) -> VhostVdpa:
    return cast(VhostVdpa, DoorDouble(OFFERED))


def rule(act: Callable[[Bench], str], name: str = "it", deadline: float = 20.0, device: int | None = None) -> Rule:
    return Rule(f"test.{name}", "Something is so", "nowhere", act, device, deadline)


def tried(act: Callable[[Bench], str], deadline: float = 20.0) -> Result:
    [result] = check(PATH, [rule(act, deadline=deadline)], opener=opener).results
    return result


def raising(error: BaseException) -> Callable[[Bench], str]:
    def act(bench: Bench) -> str:
        raise error

    return act


@pytest.fixture(autouse=True)
def _no_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double moves no data: nothing is learned from waiting for a frame."""
    monkeypatch.setattr(engine, "_loops", lambda facts, opener: None)


# -- verdicts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Broken("moved"), Verdict.FAIL),
        (NotOffered("moved"), Verdict.NOT_OFFERED),
        (CannotTell("moved"), Verdict.UNKNOWN),
        (VhostVdpaError("moved"), Verdict.UNKNOWN),
        (KernelError(errno.EIO, "moved"), Verdict.FAIL),
        (ZeroDivisionError("moved"), Verdict.UNKNOWN),
    ],
)
def test_error_that_a_rule_raises_decides_its_verdict(error: Exception, verdict: Verdict) -> None:
    result = tried(raising(error))
    assert result.verdict is verdict
    assert "moved" in result.detail


def test_text_that_a_rule_returns_is_its_detail() -> None:
    result = tried(lambda bench: f"status {int(bench.c.get_status())}")
    assert (result.verdict, result.detail) == (Verdict.PASS, "status 0")
    assert result.seconds > 0


def test_mistake_in_a_rule_is_not_a_fault_of_the_device() -> None:
    result = tried(lambda bench: str(1 // 0))
    assert result.verdict is Verdict.UNKNOWN
    assert result.detail.startswith("the rule itself is wrong")


def test_a_rule_that_hangs_is_ended() -> None:
    begin = time.monotonic()
    found = check(PATH, [rule(lambda bench: str(time.sleep(60)), "slow", 0.3), rule(lambda bench: "ok")], opener=opener)
    assert [result.verdict for result in found.results] == [Verdict.FAIL, Verdict.PASS]
    assert "did not end within 0.3 s" in found.results[0].detail
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("act", "seen"),
    [
        (lambda bench: str(os.kill(os.getpid(), signal.SIGKILL)), "SIGKILL"),
        (lambda bench: str(os.kill(os.getpid(), signal.SIGTERM)), "SIGTERM"),
        (lambda bench: os._exit(3), "exit status 3"),
    ],
)
def test_a_rule_that_crashes_ends_nothing_but_itself(act: Callable[[Bench], str], seen: str) -> None:
    found = check(PATH, [rule(act, "crash"), rule(lambda bench: "ok")], opener=opener)
    assert [result.verdict for result in found.results] == [Verdict.FAIL, Verdict.PASS]
    assert seen in found.results[0].detail


def test_a_process_that_cannot_be_ended_stops_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []

    def never(child: int, kill: bool = True) -> None:
        children.append(child)

    monkeypatch.setattr(engine, "_end", never)
    rules = [rule(lambda bench: str(time.sleep(60)), "stuck", 0.2), rule(lambda bench: "ok", "next")]
    try:
        found = check(PATH, rules, opener=opener)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert [result.verdict for result in found.results] == [Verdict.FAIL, Verdict.UNKNOWN]
    assert "cannot be ended" in found.results[1].detail
    assert "test.stuck" in found.results[1].detail


def test_an_address_that_cannot_be_put_back_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "put_address_back", raising(Broken("it has another address")))
    assert check(PATH, [rule(lambda bench: "ok")], opener=opener).address_left == "it has another address"


def test_an_address_that_is_the_same_is_left_alone() -> None:
    found = check(PATH, [rule(lambda bench: "ok")], opener=opener)
    assert found.facts.mac is not None
    assert found.address_left == ""


def test_no_process_is_left_behind() -> None:
    # the process that runs all tests may have children of its own: as number 1 it gets every orphan
    before = psutil.Process().children()
    check(PATH, [rule(lambda bench: "ok"), rule(raising(Broken("x")), "x")], opener=opener)
    assert [child for child in psutil.Process().children() if child not in before] == []


def test_descriptors_are_closed_again() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    check(PATH, [rule(lambda bench: "ok")], opener=opener)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_result_lists_the_calls_that_were_made() -> None:
    def act(bench: Bench) -> str:
        bench.trace.device(PATH).record(0, 1, "VHOST_SET_OWNER", {}, 0)
        bench.trace.device(PATH).record(0, 1, "VHOST_VDPA_SUSPEND", {}, -errno.EIO)
        return "ok"

    assert tried(act).calls == ("VHOST_SET_OWNER", f"VHOST_VDPA_SUSPEND = {os.strerror(errno.EIO)}")


def test_result_of_many_calls_lists_the_first_and_the_last() -> None:
    def act(bench: Bench) -> str:
        for i in range(200):
            bench.trace.device(PATH).record(0, 1, "VHOST_GET_FEATURES", {"index": i}, 0)
        return "ok"

    calls = tried(act).calls
    assert len(calls) == 61
    assert calls[0].endswith("index=0")
    assert "140 more" in calls[30]
    assert calls[-1].endswith("index=199")


# -- which rules ------------------------------------------------------------------------


def test_rules_for_another_kind_of_device_are_left_out() -> None:
    rules = [rule(lambda bench: "ok", "net", device=NET), rule(lambda bench: "ok", "blk", device=BLOCK)]
    assert [result.rule.id for result in check(PATH, rules, opener=opener).results] == ["test.net"]
    with pytest.raises(VhostVdpaError, match="none of these rules"):
        check(PATH, rules[1:], opener=opener)


def test_rules_are_named_by_id_group_or_pattern() -> None:
    assert [r.id for r in select(RULES, ["iotlb.update"])] == ["iotlb.update"]
    assert {r.group for r in select(RULES, ["iotlb", "maps.*"])} == {"iotlb", "maps"}
    assert not [r for r in select(RULES, skip=["robust", "status.*"]) if r.group in ("robust", "status")]
    assert len(select(RULES)) == len(RULES)
    with pytest.raises(VhostVdpaError, match=r"no rule is called 'iotlb\.updat'"):
        select(RULES, ["iotlb.updat"])


def test_progress_is_reported_before_each_rule() -> None:
    told: list[tuple[int, int, str]] = []
    rules = [rule(lambda bench: "ok", "a"), rule(lambda bench: "ok", "b")]
    check(PATH, rules, lambda number, count, each: told.append((number, count, each.id)), opener=opener)
    assert told == [(1, 2, "test.a"), (2, 2, "test.b")]


def test_results_until_an_interruption_are_kept() -> None:
    def interrupt(number: int, count: int, each: Rule) -> None:
        if number == 2:
            raise KeyboardInterrupt

    rules = [rule(lambda bench: "ok", name) for name in ("a", "b", "c")]
    with pytest.raises(KeyboardInterrupt) as caught:
        check(PATH, rules, interrupt, opener=opener)
    assert isinstance(caught.value, Interrupted)
    assert [result.rule.id for result in caught.value.found.results] == ["test.a"]
    assert caught.value.found.left == 2
    assert caught.value.found.seconds > 0


def test_a_device_in_use_is_refused_with_its_holder() -> None:
    def busy(path: str, trace: Trace) -> VhostVdpa:
        raise DeviceBusy(errno.EBUSY, "open", path)

    with pytest.raises(DeviceBusy, match="held by"):
        check(PATH, [rule(lambda bench: "ok")], opener=busy)


# -- known faults and the kernel's log -----------------------------------------------------


def _judged(monkeypatch: pytest.MonkeyPatch, act: Callable[[Bench], str], lines: list[list[str]]) -> Result:
    class Log(KernelLog):
        def lines(self) -> list[str]:
            return lines.pop(0) if lines else []

    monkeypatch.setattr(engine, "KernelLog", Log)
    return tried(act)


def test_a_warning_in_the_kernels_log_makes_a_rule_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    warning = "WARNING: CPU: 0 PID: 1 at drivers/vhost/vdpa.c:1"
    result = _judged(monkeypatch, lambda bench: "all is well", [["of before"], [warning]])
    assert result.verdict is Verdict.FAIL
    assert warning in result.detail
    assert "all is well" in result.detail


def test_warning_that_was_logged_before_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        _judged(monkeypatch, lambda bench: "ok", [["Oops: 0000"], ["vhost-vdpa-0: no iotlb"]]).verdict is Verdict.PASS
    )


def test_known_fault_is_reported_as_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "KNOWN", (KnownFault("vdpa_sim", "test.it", "vdpa_sim.c:some_function"),))
    facts = ask(PATH, opener)

    def of(module: str) -> Result:
        monkeypatch.setattr(engine, "ask", lambda path, opener: replace(facts, module=module))
        return tried(raising(Broken("moved")))

    assert (of("vdpa_sim").verdict, of("vdpa_sim").fault) == (Verdict.KNOWN, "vdpa_sim.c:some_function")
    assert of("mlx5_vdpa").verdict is Verdict.FAIL


@pytest.mark.parametrize(
    "line",
    [
        "BUG: kernel NULL pointer dereference, address: 0",
        "WARNING: CPU: 1 PID: 77 at lib/refcount.c:28 refcount_warn_saturate",
        "Oops: general protection fault, probably for non-canonical address",
        "BUG: KASAN: slab-use-after-free in vhost_vdpa_map",
        "INFO: task vhost-vdpa:123 blocked for more than 120 seconds.",
        "kernel BUG at mm/slub.c:1",
    ],
)
def test_faults_of_the_kernel_are_recognised(line: str) -> None:
    assert faults(["a line", line]) == [line]


@pytest.mark.parametrize("line", ["vhost-vdpa-0: can't find and alloc asid 2", "vringh: bad descriptor", "a debugger"])
def test_other_lines_are_not_faults(line: str) -> None:
    assert faults([line]) == []


def test_records_of_the_log_are_read_as_text() -> None:
    assert text_of("4,1234,5678,-;WARNING: at x\n SUBSYSTEM=vdpa\n") == "WARNING: at x"


def test_log_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    log = KernelLog(str(tmp_path / "none"))
    assert "No such file" in log.why
    assert log.lines() == []
    log.close()


def test_known_faults_are_of_rules_that_exist() -> None:
    ids = {each.id for each in RULES}
    assert [fault.rule for fault in KNOWN if fault.rule not in ids] == []
    assert [fault for fault in KNOWN if not re.search(r"\.c:\w+", fault.source)] == []


# -- the catalogue ---------------------------------------------------------------------------


def test_catalogue_has_150_rules_for_each_device_kind() -> None:
    assert len(RULES) >= 150
    assert len(catalogue(NET)) >= 150
    assert len(catalogue(BLOCK)) >= 150


def test_ids_are_unique_and_belong_to_their_group() -> None:
    assert [id_ for id_, count in Counter(each.id for each in RULES).items() if count > 1] == []
    groups = all_groups()
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert group.title
        assert {each.group for each in group.rules} == {group.name}


@pytest.mark.parametrize("each", RULES, ids=lambda each: each.id)
def test_rule_has_a_sentence_and_a_source(each: Rule) -> None:
    assert re.fullmatch(r"[a-z_]+\.[a-z0-9_]+", each.id)
    assert each.sentence[0].isupper()
    assert not each.sentence.endswith(".")
    assert re.search(r"virtio 1\.3, \d|[\w/]+\.[ch]:\w+|vhost-vdpa\.c", each.source), each.source
    assert 0 < each.deadline <= 60
    assert each.device in (None, NET, BLOCK)


def test_sentences_are_unique_within_a_group() -> None:
    said = Counter((each.group, each.sentence) for each in RULES)
    assert [key for key, count in said.items() if count > 1] == []


def test_rules_touch_no_ring_by_themselves() -> None:
    """Rings are C's: a rule goes through Queue, which has no memory of the ring to hand out for writing."""
    for group in all_groups():
        act = group.rules[0].act
        source = inspect.getsource(sys.modules[getattr(act, "func", act).__module__])
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and node.attr == "write" and isinstance(node.value, ast.Attribute):
                assert node.value.attr != "ring", group.name


CORE = [
    *("identity.device_id", "identity.status_zero", "identity.vqs_count", "identity.vring_num", "identity.group_num"),
    *("status.acknowledge", "status.features_ok", "status.features_late", "status.zero_resets"),
    *("status.no_bit_cleared", "groups.below_number", "iotlb.update", "iotlb.overlap_same", "iotlb.adjacent"),
]
"""Rules that move no data: a double of the door keeps to them."""


@pytest.mark.parametrize("name", CORE)
def test_rules_that_move_no_data_run_on_a_double(name: str) -> None:
    [result] = check(PATH, select(RULES, [name]), opener=opener).results
    assert result.verdict in (Verdict.PASS, Verdict.UNKNOWN), result.detail
    assert not result.detail.startswith("the rule itself is wrong"), result.detail


def test_a_double_that_breaks_a_rule_is_caught() -> None:
    class Stubborn(DoorDouble):
        def get_status(self):  # type: ignore[no-untyped-def]
            return super().get_status() | 1

    found = check(
        PATH, select(RULES, ["identity.status_zero"]), opener=lambda path, trace: cast(VhostVdpa, Stubborn(OFFERED))
    )
    assert [result.detail for result in found.failed] == ["status 0x1 after opening"]


def test_demand_raises_what_was_seen() -> None:
    demand(True, "nothing")
    with pytest.raises(Broken, match="it moved"):
        demand([], "it moved")


def test_counts_add_up() -> None:
    rules = [rule(lambda bench: "ok", "a"), rule(raising(Broken("x")), "b"), rule(raising(NotOffered("x")), "c")]
    found: Check = check(PATH, rules, opener=opener)
    assert {verdict: found.count(verdict) for verdict in Verdict if found.count(verdict)} == {
        Verdict.PASS: 1,
        Verdict.FAIL: 1,
        Verdict.NOT_OFFERED: 1,
    }
    assert [result.rule.id for result in found.failed] == ["test.b"]
