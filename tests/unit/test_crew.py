"""A stop or a start beside which something else is done: it is waited for, whatever comes in between."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_work import FIONREAD, JOBS, Pipes, nothing

import pyvhostvdpa
from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.device import work
from pyvhostvdpa.device.work import Crew

THREADS = "/proc/self/task"
LONG = 20_000
"""Requests of a job that takes milliseconds."""
REST = ("crew_make", "crew_threads", "crew_is_ahead", "crew_wait", "crew_end", "jobs_fine", "jobs_prepare")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("count", [1, JOBS])
def test_ctrl_c_as_the_jobs_begin_comes_when_they_are_done(
    monkeypatch: pytest.MonkeyPatch, count: int, begun: bool
) -> None:
    """Whoever hears of it finds devices that no thread is at work on."""

    def begin(*jobs: Any) -> None:
        if begun:
            lib.crew_begin(*jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "lib", SimpleNamespace(crew_begin=begin, **{name: getattr(lib, name) for name in REST}))
    calls: Any = ffi.new("struct prepared_call[]", LONG)
    with closing(Pipes(count)) as pipes:
        for call in calls:
            call.request, call.argument = FIONREAD, pipes.calls[0].argument
        works = [pipes.work(n, nothing, nothing) for n in range(count)]
        works[0].job.calls, works[0].job.count = calls, LONG
        with closing(Crew(works, beside=True)) as crew:
            crew.begin()
            with pytest.raises(KeyboardInterrupt):
                crew.do(nothing)
            assert [each.job.done for each in works] == [each.job.count for each in works]


def environment() -> dict[str, str]:
    """That of a process which finds the same package."""
    return {**os.environ, "PYTHONPATH": str(Path(pyvhostvdpa.__path__[0]).parent)}


def may_be_first() -> bool:
    """Whether this process may have threads of the real-time class."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, *before)
    return True


def test_threads_of_a_crew_do_not_wait_for_others_where_that_is_allowed() -> None:
    expected = os.SCHED_FIFO if may_be_first() else os.SCHED_OTHER
    with closing(Pipes(JOBS)) as pipes:
        before = set(os.listdir(THREADS))
        with closing(Crew([pipes.work(n, nothing, nothing) for n in range(JOBS)])):
            made = set(os.listdir(THREADS)) - before
            assert len(made) == JOBS - 1
            until = time.monotonic() + 10
            while (seen := {os.sched_getscheduler(int(each)) for each in made}) != {expected}:
                assert time.monotonic() < until, seen
                time.sleep(0.001)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("allowed", [False, True])
def test_crew_knows_whether_its_threads_run_ahead_of_others(allowed: bool) -> None:
    """In a process of its own: the right to it is given away for good."""
    code = f"""
import os, resource
from pyvhostvdpa._cdefs import ffi, lib
if not {allowed}:
    resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
    if os.geteuid() == 0:
        os.setuid(65534)
crew = lib.crew_make(2)
print(lib.crew_is_ahead(crew), lib.crew_is_ahead(ffi.NULL))
lib.crew_end(crew)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert said.stdout.split() == [str(int(allowed and may_be_first())), "0"]
