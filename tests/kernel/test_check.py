"""`vhost-vdpa check` on real devices: no fail that is not a real one, every fault that is switched on caught."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hwsim
import lab
import pytest
from check_table import CAUGHT, FAULTS, NOTICED

from pyvhostvdpa.chardev.door import VhostVdpa
from pyvhostvdpa.net.control import MAC_ADDR_SET, Class, command
from pyvhostvdpa.probe.check.bench import Bench
from pyvhostvdpa.probe.check.engine import Check, check
from pyvhostvdpa.probe.check.known import KNOWN
from pyvhostvdpa.probe.check.rule import NET, Rule, Verdict, select
from pyvhostvdpa.probe.check.rules import catalogue
from pyvhostvdpa.probe.check.work import controlled

SECONDS = 120
"""What a full check may take, in software emulation."""
EVERYTHING = sum(1 << bit for bit in (2, 15, 18, 20, 21, 27, 28, 29))
"""Features that vdpa_hwsim has on request: with them almost every rule is tried."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["vhost-vdpa", "check", *arguments], capture_output=True, text=True, check=False)


def told(found: Check) -> list[str]:
    return [f"{result.rule.id}: {result.detail}" for result in found.failed]


def full(path: str, may_write: bool = False) -> Check:
    found = check(path, catalogue(), may_write=may_write)
    print("counts", {v.value: found.count(v) for v in Verdict}, f"{found.seconds:.1f} s")
    for result in found.results:
        if result.verdict not in (Verdict.PASS, Verdict.NOT_OFFERED):
            print(result.verdict.value, result.rule.id, result.detail)
    return found


@pytest.fixture
def sim() -> Iterator[hwsim.HwSim]:
    made = hwsim.add("hw0", pairs=2, extra_features=EVERYTHING, doorbell_us=500)
    yield made
    hwsim.remove(made.name)


# -- what is left afterwards -----------------------------------------------------------


def test_address_that_a_killed_rule_had_set_is_put_back(sim: hwsim.HwSim) -> None:
    def sets_and_hangs(bench: Bench) -> str:
        controlled(bench)[1].accepts(command(Class.MAC, MAC_ADDR_SET, bytes.fromhex("525491000001")), "MAC_ADDR_SET")
        time.sleep(60)
        return ""

    with VhostVdpa(sim.chardev) as c:
        before = c.get_config(0, 6)
    found = check(sim.chardev, [Rule("test.hangs", "It hangs", "nowhere", sets_and_hangs, NET, 2.0)])
    assert "did not end" in found.results[0].detail
    assert found.address_left == ""
    with VhostVdpa(sim.chardev) as c:
        assert c.get_config(0, 6) == before


# -- parents without a switch -----------------------------------------------------------


@pytest.mark.smoke
def test_vdpa_sim_net_breaks_what_is_known_and_nothing_else(devices: tuple[str, str]) -> None:
    found = full(devices[0])
    assert told(found) == []
    assert found.seconds < SECONDS
    assert found.log_unread == ""
    assert {r.rule.id for r in found.results if r.verdict is Verdict.KNOWN} <= {f.rule for f in KNOWN}


@pytest.mark.smoke
def test_vdpa_hwsim_breaks_nothing(sim: hwsim.HwSim) -> None:
    found = full(sim.chardev)
    assert told(found) == []
    assert found.seconds < SECONDS
    assert found.count(Verdict.PASS) > 250


def test_a_disk_breaks_what_is_known_and_nothing_else() -> None:
    lab.command("modprobe", "vdpa_sim_blk")
    lab.command("vdpa", "dev", "add", "name", "disk0", "mgmtdev", "vdpasim_blk")
    try:
        found = full(lab.chardev("disk0"), may_write=True)
        assert told(found) == []
        assert found.seconds < SECONDS
        tried = {r.rule.id: r.verdict for r in found.results if r.rule.group == "block"}
        assert tried["block.write"] is Verdict.PASS
    finally:
        lab.command("vdpa", "dev", "del", "disk0")
        lab.command("modprobe", "-r", "vdpa_sim_blk")


def test_check_writes_nothing_to_a_disk_without_permission() -> None:
    lab.command("modprobe", "vdpa_sim_blk")
    lab.command("vdpa", "dev", "add", "name", "disk0", "mgmtdev", "vdpasim_blk")
    try:
        found = check(lab.chardev("disk0"), select(catalogue(), ["block.write*"]))
        assert {result.verdict for result in found.results} <= {Verdict.UNKNOWN, Verdict.NOT_OFFERED}
    finally:
        lab.command("vdpa", "dev", "del", "disk0")
        lab.command("modprobe", "-r", "vdpa_sim_blk")


# -- what makes each rule fail ------------------------------------------------------------

EVERY_DAY = (
    "keep_base", "keep_asid", "keep_ready", "keep_status", "keep_ctrl", "no_config_call", "cvq_ok", "cvq_err",
    "corrupt_frame", "short_len", "num_buffers", "messages_taken", "suspend_refused", "call_refused", "kick_kept",
)  # fmt: skip
"""One or two faults of each kind. All of them take ten minutes:
`tools/lab test --env CHECK_EVERY_FAULT=1 tests/kernel/test_check.py`."""


@pytest.mark.parametrize("name", CAUGHT if os.environ.get("CHECK_EVERY_FAULT") else EVERY_DAY)
def test_fault_is_caught_by_its_rules(sim: hwsim.HwSim, name: str) -> None:
    breaker = FAULTS[name]
    # a device that does nothing lets every rule wait
    rules = [dataclasses.replace(rule, deadline=8.0) for rule in select(catalogue(NET), CAUGHT[name])]
    opener = breaker.opener if breaker.door else VhostVdpa
    if breaker.switch:
        sim.write(f"fault/{breaker.switch}", 1)
    found = check(sim.chardev, rules, opener=opener)
    missed = [f"{r.rule.id}: {r.verdict.value}, {r.detail}" for r in found.results if r.verdict is not Verdict.FAIL]
    assert missed == []


@pytest.mark.parametrize("name", NOTICED)
def test_legal_behaviour_is_seen_and_does_not_fail(sim: hwsim.HwSim, name: str) -> None:
    sim.write(f"fault/{FAULTS[name].switch}", 1)
    found = check(sim.chardev, select(catalogue(NET), NOTICED[name]))
    assert [(r.rule.id, r.verdict) for r in found.results] == [(rule, Verdict.UNKNOWN) for rule in NOTICED[name]]


# -- the command --------------------------------------------------------------------------


@pytest.mark.smoke
def test_check_command_prints_and_counts_verdicts(devices: tuple[str, str]) -> None:
    done = run("vdpa0", "--only", "status", "identity.device_id")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vdpa0 (vdpa_sim): 16 of 16 rules pass")
    told_json = json.loads(run("vdpa0", "--only", "status", "--json").stdout)
    assert told_json["schema"] == "pyvhostvdpa/check/1"
    assert told_json["device"]["parent"] == "vdpa_sim"
    assert told_json["counts"]["pass"] == len(told_json["rules"]) == 15
    assert any("VHOST_VDPA_SET_STATUS" in call for call in told_json["rules"][0]["tried"])


def test_a_device_in_use_is_refused_with_its_holder(devices: tuple[str, str]) -> None:
    with VhostVdpa(devices[0]):
        done = run("vdpa0")
    assert done.returncode == 1
    assert f"held by pid {os.getpid()}" in done.stderr


def test_a_fail_comes_with_a_script_that_shows_it(sim: hwsim.HwSim, tmp_path: Path) -> None:
    sim.write("fault/wake_by_status", 1)
    done = run(sim.name, "--only", "suspend.driver_ok_again", "--script", str(tmp_path))
    assert done.returncode == 1
    assert "FAIL  suspend.driver_ok_again" in done.stdout
    path = tmp_path / "suspend_driver_ok_again.py"
    shown = subprocess.run([sys.executable, str(path), sim.chardev], capture_output=True, text=True, check=False)
    assert shown.returncode == 1, shown.stderr
    assert "broken: DRIVER_OK written again while suspended" in shown.stdout
    sim.write("fault/wake_by_status", 0)
    shown = subprocess.run([sys.executable, str(path), sim.chardev], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout
    assert "kept:" in shown.stdout


def test_a_device_that_hangs_ends_its_rule_alone(sim: hwsim.HwSim) -> None:
    sim.write("cost/suspend_ns", 4_000_000_000)
    rules = [dataclasses.replace(rule, deadline=2.0) for rule in select(catalogue(), ["suspend.twice"])]
    found = check(sim.chardev, [*rules, *select(catalogue(), ["status.acknowledge"])])
    assert [result.verdict for result in found.results] == [Verdict.FAIL, Verdict.PASS]
    assert "did not end within 2 s" in found.results[0].detail
