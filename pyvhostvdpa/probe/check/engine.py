# SPDX-License-Identifier: MIT
"""Runs rules one by one, each in a forked process with a deadline, on a freshly opened device.

A rule that hangs or crashes ends its own process. The kernel's log is read
around each. The process that runs the rules has the device open only to ask
what it is, before the first of them.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ...base import sysfs
from ...base.errors import DeviceBusy, KernelError, MapRejected, VhostVdpaError
from ...chardev.door import VhostVdpa
from ...host import mgmt
from ...trace.recorder import Event
from .bench import Bench
from .facts import Facts, Opener, ask
from .kernel_log import KernelLog, faults
from .known import known_fault
from .process import die_with_parent
from .rule import ANY, Broken, CannotTell, NotOffered, Result, Rule, Verdict
from .work import LOOPS, SENDS_AWAY, look_for_loop, put_address_back

END_S = 10.0
"""Seconds that a process gets to go away once it was killed: one that waits in the kernel cannot."""
_MANY_CALLS = 60
_LAST_WORDS = 400

Progress = Callable[[int, int, Rule], None]
"""Called before each rule: its number, how many there are, the rule."""


@dataclass(slots=True)
class Check:
    """What came of all rules on one device."""

    facts: Facts
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    log_unread: str = ""
    """Why the kernel's log could not be read; "" if it was."""
    address_left: str = ""
    """Why a network device does not have the MAC address that it had before; "" if it has."""
    left: int = 0
    """Rules that were not tried, since the check was interrupted."""

    def count(self, verdict: Verdict) -> int:
        """Return how many rules have this verdict."""
        return sum(result.verdict is verdict for result in self.results)

    @property
    def failed(self) -> list[Result]:
        """The rules that failed, without the known faults."""
        return [result for result in self.results if result.verdict is Verdict.FAIL]


class Interrupted(KeyboardInterrupt):
    """The check was interrupted; ``found`` is what came of the rules until then."""

    def __init__(self, found: Check) -> None:
        super().__init__("interrupted")
        self.found = found


def check(
    path: str,
    rules: Sequence[Rule],
    progress: Progress = lambda number, count, rule: None,
    may_write: bool = False,
    opener: Opener = VhostVdpa,
) -> Check:
    """Try ``rules`` on the device at ``path``, which is reset for each of them.

    ``may_write`` allows writing to a disk; ``opener`` opens the device.
    Raises :class:`~pyvhostvdpa.DeviceBusy` with the holder's name if another
    process has it open, :class:`~pyvhostvdpa.VhostVdpaError` if none of the rules is for its kind, and whatever
    keeps it from being asked what it is. Ctrl-C ends the process of the rule, and is raised as :class:`Interrupted`.
    """
    begin = time.monotonic()
    found = Check(_asked(path, opener))
    rules = [rule for rule in rules if rule.device in (ANY, found.facts.device_id)]
    if not rules:
        raise VhostVdpaError(f"none of these rules is for a device of this kind ({found.facts.kind})")
    log, stuck = KernelLog(), ""
    try:
        found.facts = replace(found.facts, loops=_loops(found.facts, opener))
        for number, rule in enumerate(rules, 1):
            progress(number, len(rules), rule)
            if stuck:
                found.results.append(Result(rule, Verdict.UNKNOWN, stuck))
                continue
            result, stuck = _guarded(rule, Job(found.facts, may_write, opener), log)
            found.results.append(result)
    except KeyboardInterrupt as e:
        found.left = len(rules) - len(found.results)
        raise Interrupted(found) from e
    finally:
        found.address_left = _address_left(found.facts, opener, stuck)
        found.seconds = time.monotonic() - begin
        found.log_unread = log.why
        log.close()
    return found


def _asked(path: str, opener: Opener) -> Facts:
    try:
        return ask(path, opener)
    except DeviceBusy as e:
        raise mgmt.busy(path) from e


def _loops(facts: Facts, opener: Opener) -> bool | None:
    """Return whether a network device sends frames back to itself; None if it is another kind, or sends none."""
    if not facts.is_net:
        return None
    told, _ = _in_a_process(Rule("device.loops", "", "", look_for_loop), Job(facts, False, opener))
    return {LOOPS: True, SENDS_AWAY: False}.get(str(told["detail"]))


def _address_left(facts: Facts, opener: Opener, stuck: str) -> str:
    """Put a network device's MAC address back, which a rule that was killed could not; return why it is another one."""
    if stuck or facts.mac is None:
        return ""
    told, _ = _in_a_process(Rule("device.mac", "", "", put_address_back), Job(facts, False, opener))
    return "" if told["verdict"] == Verdict.PASS.value else str(told["detail"])


@dataclass(frozen=True, slots=True)
class Job:
    """What a rule's process needs beside the rule."""

    facts: Facts
    may_write: bool
    opener: Opener


def _guarded(rule: Rule, job: Job, log: KernelLog) -> tuple[Result, str]:
    """Run a rule and judge it; the second is why no other rule can be tried any more, "" if one can."""
    log.lines()
    begin = time.monotonic()
    told, stuck = _in_a_process(rule, job)
    seconds = time.monotonic() - begin
    verdict, detail = Verdict(told["verdict"]), str(told["detail"])
    complaints = faults(log.lines())
    if complaints:
        verdict, detail = Verdict.FAIL, f"the kernel's log: {complaints[0]} ({detail})"
    result = Result(rule, verdict, detail, seconds, tuple(told["calls"]))
    fault = known_fault(job.facts.module, rule.id)
    if verdict is Verdict.FAIL and fault and not complaints:
        result = replace(result, verdict=Verdict.KNOWN, fault=fault.source)
    return result, stuck


def _in_a_process(rule: Rule, job: Job) -> tuple[dict[str, Any], str]:
    reading, writing = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_the_child(rule, job, writing)
    os.close(writing)
    try:
        words = _listen(reading, rule.deadline)
    except BaseException:
        _end(child)
        raise
    finally:
        os.close(reading)
    if words is None:
        where = sysfs.read(f"/proc/{child}/wchan") or "0"
        said = f"did not end within {rule.deadline:g} s" + (f", waiting in {where}" if where != "0" else "")
        if _end(child) is None:
            gone = f"the process of rule {rule.id} cannot be ended (it waits in {where}) and holds the device"
            return _told(Verdict.FAIL, f"{said}; it cannot be ended"), gone
        return _told(Verdict.FAIL, said), ""
    status = _end(child, kill=False)
    if status is None:
        gone = f"the process of rule {rule.id} does not end (it closes the device) and holds it"
        return _told(Verdict.FAIL, "closing the device did not end"), gone
    if not words:
        return _told(Verdict.FAIL, f"the process was ended by {_cause(status)}"), ""
    return dict(json.loads(words)), ""


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.waitstatus_to_exitcode(status)}"


def _listen(fd: int, seconds: float) -> bytes | None:
    """Return what is written until the other end is closed; None if that takes too long."""
    end, words = time.monotonic() + seconds, b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        if poller.poll(left * 1000):
            part = os.read(fd, 1 << 16)
            if not part:
                return words
            words += part
    return None


def _end(child: int, kill: bool = True) -> int | None:
    """Kill a process if asked, and wait for its end: its status, None if it does not go away."""
    if kill:
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + END_S
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.001)
    if not kill:
        os.kill(child, signal.SIGKILL)
    return None


def _be_the_child(rule: Rule, job: Job, writing: int) -> NoReturn:
    """Try one rule, write a line about it, and end without anything that belongs to the parent."""
    status = 0
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(BrokenPipeError):
            os.write(writing, json.dumps(attempt(rule, job)).encode())
    except BaseException:
        status = 1
    finally:
        os._exit(status)


def attempt(rule: Rule, job: Job) -> dict[str, Any]:
    """Try a rule in this process and return the result; the device is open for that long."""
    bench: Bench | None = None
    try:
        bench = Bench(job.facts.path, job.facts, job.opener, job.may_write)
        told = _told(Verdict.PASS, rule.act(bench))
    except NotOffered as e:
        told = _told(Verdict.NOT_OFFERED, str(e))
    except Broken as e:
        told = _told(Verdict.FAIL, str(e))
    except (CannotTell, MapRejected, DeviceBusy) as e:
        told = _told(Verdict.UNKNOWN, str(e))
    except KernelError as e:
        told = _told(Verdict.FAIL, f"refused: {e}")
    except VhostVdpaError as e:
        told = _told(Verdict.UNKNOWN, str(e))
    except Exception:
        told = _told(Verdict.UNKNOWN, f"the rule itself is wrong: {traceback.format_exc()[-_LAST_WORDS:]}")
    if bench is not None:
        told["calls"] = _calls(bench)
        with suppress(Exception):
            bench.close()
    return told


def _told(verdict: Verdict, detail: str) -> dict[str, Any]:
    return {"verdict": verdict.value, "detail": detail, "calls": []}


def _calls(bench: Bench) -> list[str]:
    """Return the calls that were made, as lines; of many, the first and the last."""
    lines = [line_of(event) for event in bench.trace.events]
    if len(lines) > _MANY_CALLS:
        half = _MANY_CALLS // 2
        lines = [*lines[:half], f"… {len(lines) - 2 * half} more …", *lines[-half:]]
    return lines


def line_of(event: Event) -> str:
    """Return one call and its result as a line."""
    result = "" if not event.result or event.result > 0 else f" = {os.strerror(-event.result)}"
    arguments = f" {event.arguments}" if event.arguments else ""
    return f"{event.event}{arguments}{result}"
