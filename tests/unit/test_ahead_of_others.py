"""Whoever holds a guest that stands still does not wait for the slices of other programs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from stub_migration import Rig
from test_crew import environment

from pyvhostvdpa.base.errors import MigrationFailed
from pyvhostvdpa.base.scheduling import AheadOfOthers
from pyvhostvdpa.migration.stream import Frame

NORMAL = os.SCHED_OTHER


def policy() -> int:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK


def may_be_ahead() -> bool:
    with AheadOfOthers() as ahead:
        ahead.begin()
        return policy() != NORMAL


AHEAD = os.SCHED_FIFO if may_be_ahead() else NORMAL
"""What a thread has in the pause, on this machine and with these rights."""


def test_threads_made_meanwhile_are_normal_and_the_end_is_as_before() -> None:
    seen: list[int] = []
    with AheadOfOthers() as ahead:
        ahead.begin()
        assert policy() == AHEAD
        thread = threading.Thread(target=lambda: seen.append(policy()))
        thread.start()
        thread.join()
        ahead.close()
        assert policy() == NORMAL
    assert seen == [NORMAL]


def test_process_that_loses_the_right_to_it_is_as_before_all_the_same() -> None:
    """As one that has it by RLIMIT_RTPRIO only, which may not take back that its threads begin as normal ones."""
    code = """
import os, resource
from pyvhostvdpa.base.scheduling import AheadOfOthers
with AheadOfOthers() as ahead:
    ahead.begin()
    if os.geteuid() == 0:
        os.setuid(65534)
    ahead.close()
print(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert said.stdout.split() == [str(NORMAL)]


@pytest.mark.parametrize(("own", "priority"), [(os.SCHED_FIFO, 50), (os.SCHED_RR, 1)], ids=["FIFO", "RR"])
def test_thread_that_is_ahead_anyway_stays_as_it_is(own: int, priority: int) -> None:
    seen = []

    def run() -> None:
        with suppress(PermissionError):
            os.sched_setscheduler(0, own, os.sched_param(priority))
        seen.append((os.sched_getscheduler(0), os.sched_getparam(0).sched_priority))
        with AheadOfOthers() as ahead:
            ahead.begin()
            seen.append((policy(), os.sched_getparam(0).sched_priority))
        seen.append((os.sched_getscheduler(0), os.sched_getparam(0).sched_priority))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert AHEAD == NORMAL or seen == [(own, priority)] * 3


def test_process_without_the_right_to_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*of: object) -> None:
        asked.append(of)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with AheadOfOthers() as ahead:
        ahead.begin()
    assert len(asked) == 1


@pytest.mark.parametrize("answers", [None, {Frame.GO: Frame.FAILED}], ids=["moved", "refused"])
def test_source_is_ahead_from_the_pause_to_the_end_of_the_hand_over(
    rig: Rig, answers: dict[Frame, Frame | None] | None
) -> None:
    at: dict[str, int] = {}

    def observe(phase: str) -> None:
        at[phase] = policy()

    with rig.source(answers, observer=observe) as (source, _):
        if answers is None:
            source.run()
        else:
            with pytest.raises(MigrationFailed):
                source.run()
    assert {phase: at[phase] for phase in ("memory", "state", "go")} == {"memory": NORMAL, "state": AHEAD, "go": AHEAD}
    assert policy() == NORMAL
