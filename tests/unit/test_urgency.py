# SPDX-License-Identifier: MIT
"""When the thread that serves a front-end goes first, and for how long at most."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhostvdpa.vhost_user import urgency
from pyvhostvdpa.vhost_user.server import Server
from pyvhostvdpa.vhost_user.urgency import BUDGET, SHARE, Urgency


class Clocks:
    """What the module asks for the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.used = 5.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.used


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(urgency, "time", clocks)
    return clocks


@pytest.fixture
def it(clocks: Clocks) -> Iterator[Urgency]:
    with Urgency() as it:
        yield it


def test_a_thread_goes_first_as_long_as_a_guest_moves(it: Urgency) -> None:
    it.look(False)
    assert not it.urgent
    it.look(True)
    it.look(True)
    assert it.urgent
    it.look(False)
    assert not it.urgent


def test_it_goes_first_for_no_more_than_its_budget(it: Urgency, clocks: Clocks) -> None:
    it.look(True)
    clocks.used += 0.9 * BUDGET
    it.look(True)
    assert it.urgent
    clocks.used += 0.1 * BUDGET
    it.count()
    assert not it.urgent
    it.look(True)
    assert not it.urgent


def test_what_is_done_beside_messages_counts(it: Urgency, clocks: Clocks) -> None:
    it.look(True)
    clocks.used += BUDGET
    it.count()
    assert not it.urgent


def test_a_front_end_that_begins_anew_has_what_is_left(it: Urgency, clocks: Clocks) -> None:
    for _ in range(9):
        it.look(True)
        assert it.urgent
        clocks.used += 0.1 * BUDGET
        it.look(False)
        assert not it.urgent
    it.look(True)
    clocks.used += 0.1 * BUDGET
    it.look(True)
    assert not it.urgent


def test_what_was_used_comes_back_slowly(it: Urgency, clocks: Clocks) -> None:
    it.look(True)
    clocks.used += BUDGET
    it.look(True)
    clocks.now += 0.99 * 0.1 * BUDGET / SHARE
    it.look(True)
    assert not it.urgent
    clocks.now += 0.02 * 0.1 * BUDGET / SHARE
    it.look(True)
    assert it.urgent
    clocks.used += 0.11 * BUDGET
    it.look(True)
    assert not it.urgent


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 20), st.floats(0, 1)), max_size=60))
def test_no_front_end_has_more_than_its_share(steps: list[tuple[bool, float, float]]) -> None:
    """Each message takes wall time and no less of it than of the CPU; mapping is not done first, so it is short."""
    clocks = Clocks()
    begin, first, longest = clocks.now, 0.0, 0.0
    with pytest.MonkeyPatch.context() as patched, Urgency() as it:
        patched.setattr(urgency, "time", clocks)
        for moves, rest, used in steps:
            clocks.now += rest + used
            clocks.used += used
            if it.urgent:
                first += used
                longest = max(longest, used)
            it.count()
            it.look(moves)
    assert first <= BUDGET + longest + SHARE * (clocks.now - begin) + 1e-6


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_the_thread_has_another_policy_meanwhile_and_its_own_afterwards() -> None:
    before = os.sched_getscheduler(0)
    with Urgency() as it:
        it.look(True)
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
        it.look(False)
        assert os.sched_getscheduler(0) == before


LEAVES: dict[str, tuple[dict[str, bool], bool]] = {
    "a guest that runs": ({"running": True}, False),
    "a guest that leaves": ({"running": True, "wanted": True}, True),
    "one that has been stopped": ({"wanted": True}, True),
    "one that comes": ({"awaits": True}, True),
    "one that came": ({"running": True, "awaits": True}, False),
    "nothing": ({}, False),
}


def of(running: bool = False, wanted: bool = False, awaits: bool = False) -> Any:
    log = SimpleNamespace(wanted=wanted)
    return SimpleNamespace(running=running, dirty_log=log, awaits_guest=awaits)


@pytest.mark.parametrize("case", LEAVES)
def test_it_is_urgent_from_the_log_start_and_from_what_is_known_of_a_guest_that_comes(case: str) -> None:
    state, expected = LEAVES[case]
    with Urgency() as it:
        server: Any = SimpleNamespace(backend=of(**state), _urgency=it)
        Server._hurry(server)
        assert it.urgent is expected


def test_it_stays_urgent_until_the_guest_that_comes_runs() -> None:
    """Its memory is claimed, and then there are some twenty messages yet."""
    with Urgency() as it:
        server: Any = SimpleNamespace(backend=of(awaits=True), _urgency=it)
        Server._hurry(server)
        server.backend = of()
        Server._hurry(server)
        assert it.urgent
        server.backend = of(running=True)
        Server._hurry(server)
        assert not it.urgent
