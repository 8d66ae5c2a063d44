"""The same done to several devices at once."""

from __future__ import annotations

import threading

import pytest

from pyvhostvdpa.device.together import together


def test_together_runs_all_calls_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=10)
    together([lambda: barrier.wait() and None] * 3)  # type: ignore[func-returns-value]


def test_an_error_of_one_keeps_no_other_from_its_end() -> None:
    done: list[int] = []

    def act(number: int) -> None:
        if number in (0, 2):
            raise ValueError(f"number {number}")
        done.append(number)

    with pytest.raises(ValueError, match="number 0") as raised:
        together([lambda number=number: act(number) for number in range(4)])  # type: ignore[misc]
    assert sorted(done) == [1, 3]
    assert raised.value.__notes__ == ["also: number 2"]


def test_together_runs_a_single_call_without_a_thread() -> None:
    names: list[str] = []
    together([lambda: names.append(threading.current_thread().name)])
    assert names == [threading.current_thread().name]


def test_no_more_threads_than_allowed_do_all_of_it() -> None:
    done: list[tuple[int, str]] = []

    def act(number: int) -> None:
        done.append((number, threading.current_thread().name))

    together([lambda number=number: act(number) for number in range(7)], at_most=2)  # type: ignore[misc]
    assert sorted(number for number, _ in done) == list(range(7))
    assert len({name for _, name in done}) == 2


def test_threads_that_cannot_be_started_leave_no_action_out(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name != "device-0":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    together([lambda number=number: done.append(number) for number in range(3)])  # type: ignore[misc]
    assert sorted(done) == [0, 1, 2]
