"""The jobs of a crew: devices work side by side, and what they did is finished in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ring_model import BASE, Model, Segment

from pyvhostvdpa import VhostVdpaError
from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.scheduling import AheadOfOthers
from pyvhostvdpa.device import work
from pyvhostvdpa.device.work import Crew, Work
from pyvhostvdpa.migration.paused import Prepared
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.virtqueue.rings import GuestRings

FIONREAD = 0x541B
NS_GET_USERNS, NS_GET_NSTYPE = 0xB701, 0xB703
JOBS = 5


class Pipes:
    """A job for each of some pipes: how many bytes it holds."""

    def __init__(self, count: int) -> None:
        self.ends = [os.pipe() for _ in range(count)]
        self.answers = [ffi.new("int *") for _ in range(count)]
        self.calls = [ffi.new("struct prepared_call *") for _ in range(count)]
        for number, ((_, end), call, answer) in enumerate(zip(self.ends, self.calls, self.answers, strict=True)):
            os.write(end, bytes(number + 1))
            call.request, call.argument = FIONREAD, int(ffi.cast("uintptr_t", answer))

    def work(self, number: int, begin: Callable[[], None], finish: Callable[[], None]) -> Work:
        work = Work(begin, finish)
        work.job.fd, work.job.calls, work.job.count = self.ends[number][0], self.calls[number], 1
        return work

    def close(self) -> None:
        for ends in self.ends:
            for end in ends:
                os.close(end)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    made = Pipes(JOBS)
    yield made
    made.close()


def nothing() -> None: ...


def test_every_job_is_done_and_then_finished_in_order(pipes: Pipes) -> None:
    order: list[str] = []
    works = [
        pipes.work(n, lambda n=n: order.append(f"begin {n}"), lambda n=n: order.append(f"finish {n}"))  # type: ignore[misc]
        for n in range(JOBS)
    ]
    with Crew(works) as crew:
        crew.begin()
        assert [answer[0] for answer in pipes.answers] == [0] * JOBS
        assert crew.do()
        assert [answer[0] for answer in pipes.answers] == [1, 2, 3, 4, 5]
        crew.finish()
    assert order == [f"{what} {n}" for what in ("begin", "finish") for n in range(JOBS)]
    assert all(0 < work.job.begin <= work.job.end for work in works)


def test_crew_finishes_all_other_works_if_some_fail(pipes: Pipes) -> None:
    """A begin that raises, a call that is refused, a finish that raises; the first in the devices' order is raised."""
    finished: list[int] = []

    def fail(number: int) -> None:
        raise ValueError(f"number {number}")

    works = [pipes.work(n, nothing, lambda n=n: finished.append(n)) for n in range(JOBS)]  # type: ignore[misc]
    works[1].begin = lambda: fail(1)
    works[3].finish = lambda: fail(3)
    works[4].job.calls.request = 0xAF00
    with Crew(works) as crew:
        crew.begin()
        assert not crew.do()
        with pytest.raises(ValueError, match="number 1") as raised:
            crew.finish()
    assert raised.value.__notes__ == ["also: number 3"]
    assert finished == [0, 2, 4]
    assert [answer[0] for answer in pipes.answers] == [1, 0, 3, 4, 0]
    assert works[4].job.done == 0


def within(seconds: float, run: Callable[[], None]) -> None:
    """Have it run in a thread, so that what never ends is a failure; what it raises is raised."""
    raised: list[BaseException] = []

    def catch() -> None:
        try:
            run()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=catch, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it did not end within {seconds:g} s"
    for error in raised:
        raise error


@pytest.mark.parametrize("threads", [0, 1, JOBS])
def test_a_crew_does_each_job_of_each_round_once(threads: int) -> None:
    """However late a thread is for a round. Each request makes a descriptor, so that one too many is seen."""
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    crew, before = lib.crew_make(threads), len(os.listdir("/proc/self/fd"))
    jobs: Any = ffi.new("struct device_job[]", JOBS)
    # others behind it, so that a thread is at one job when the next comes to it
    calls = [ffi.new("struct prepared_call[20]") for _ in range(JOBS)]
    for each in calls:
        each[0].request = NS_GET_USERNS
        for call in each[1:20]:
            call.request = NS_GET_NSTYPE

    def rounds() -> None:
        for number in range(3000):
            count = 2 + number % (JOBS - 1)
            for job, call in zip(jobs[0:count], calls, strict=False):
                job.fd, job.calls, job.count, job.done = namespace, call, 20, 0
            lib.crew_run(crew, jobs, count)
            assert [jobs[n].done for n in range(count)] == [20] * count
            assert lib.jobs_fine(jobs, count)
            for call in calls[:count]:
                os.close(call[0].result)

    try:
        within(60, rounds)
        assert len(os.listdir("/proc/self/fd")) == before
        lib.crew_end(crew)
    finally:
        os.close(namespace)


def test_a_crew_waits_for_the_last_of_its_jobs(pipes: Pipes) -> None:
    """Also if that takes longer than the caller's own."""
    many, few = ffi.new("struct prepared_call[4000]"), ffi.new("struct prepared_call[10]")
    for call in (*many, *few):
        call.request, call.argument = FIONREAD, pipes.calls[0].argument
    jobs: Any = ffi.new("struct device_job[]", 3)
    crew = lib.crew_make(2)

    def rounds() -> None:
        for number in range(60):
            for place in range(3):
                longest = place == number % 3
                jobs[place].fd, jobs[place].done = pipes.ends[0][0], 0
                jobs[place].calls, jobs[place].count = (many, 4000) if longest else (few, 10)
            lib.crew_run(crew, jobs, 3)
            assert [job.done for job in jobs] == [job.count for job in jobs]

    within(60, rounds)
    lib.crew_end(crew)


def test_the_jobs_of_a_crew_are_under_way_at_the_same_time() -> None:
    """Each waits for a relay that is at work, until this test has it leave."""
    relays = [ffi.new("struct svq_thread *", {"inside": 1, "wake": -1, "epoll": -1}) for _ in range(2)]
    lists = [ffi.new("struct svq_thread *[]", [relay]) for relay in relays]
    jobs: Any = ffi.new("struct device_job[]", [{"threads": each, "thread_count": 1} for each in lists])
    crew = lib.crew_make(1)
    thread = threading.Thread(target=lib.crew_run, args=(crew, jobs, 2), daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while not all(relay.stop for relay in relays) and time.monotonic() < end:
        time.sleep(0.001)
    waiting = [bool(relay.stop) for relay in relays]
    end = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < end:
        for relay in relays:
            # the closed gate keeps it outside, and it notifies the thread that waits for that
            lib.svq_thread_run(relay, 0)
        thread.join(0.01)
    assert waiting == [True, True]
    assert not thread.is_alive()
    lib.crew_end(crew)


@pytest.mark.parametrize("request_", [FIONREAD, 0xAF00])
def test_queues_change_owner_only_after_every_call_was_made(pipes: Pipes, request_: int) -> None:
    """A device that could not be suspended continues, and so does the thread that serves its queues."""
    relay = ffi.new("struct svq_thread *", {"wake": -1, "epoll": -1})
    relays, left = ffi.new("struct svq_thread *[]", [relay]), ffi.new("uint16_t[1]", [0xFFFF])
    model = Model()
    model.describe(0, [Segment(BASE + 0x40000, 64)])
    model.publish(0)
    model.forward()
    shadows = ffi.new("struct svq *[]", [model.svq.c])
    job = pipes.work(0, nothing, nothing).job
    pipes.calls[0].request = request_
    job.threads, job.thread_count, job.shadows, job.shadow_count, job.left = relays, 1, shadows, 1, left
    lib.jobs_run(job, 1)
    made = request_ == FIONREAD
    assert (job.done, bool(relay.stop)) == (made, made)
    # the next owner of the queue must find the chain in flight again
    assert left[0] == (0 if made else 0xFFFF)
    model.close()


def tasks() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def test_threads_of_a_crew_take_no_signals_and_end_with_it() -> None:
    before = tasks()
    crew = lib.crew_make(2)
    made = tasks() - before
    assert len(made) == 2
    for task in made:
        status = Path(f"/proc/self/task/{task}/status").read_text()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
            assert blocked & 1 << number - 1, number
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    lib.crew_end(crew)
    assert not made & tasks()


@pytest.mark.parametrize(("done", "broken", "fine"), [(2, 0, True), (1, 0, False), (2, lib.SVQ_BAD_USED_IDX, False)])
def test_jobs_are_fine_if_each_was_done_and_no_queue_is_broken(done: int, broken: int, fine: bool) -> None:
    queues = [ffi.new("struct svq *"), ffi.new("struct svq *", {"broken": broken})]
    shadows = ffi.new("struct svq *[]", queues)
    good = {"count": 2, "done": 2}
    jobs = ffi.new("struct device_job[]", [good, {**good, "done": done, "shadows": shadows, "shadow_count": 2}])
    assert bool(lib.jobs_fine(jobs, 2)) is fine
    assert lib.jobs_fine(jobs, 1)


def test_a_crew_without_threads_does_well_without() -> None:
    before = threading.active_count()
    with Crew([Work(nothing, nothing)]) as crew:
        crew.begin()
        assert crew.do()
        crew.finish()
    assert threading.active_count() == before


def test_prepared_works_finish_later_with_the_jobs_that_were_done(pipes: Pipes) -> None:
    done: list[tuple[int, str]] = []
    devices: list[Any] = [SimpleNamespace(trace=Trace().device(str(number))) for number in range(JOBS)]
    works: list[Work] = []
    for number in range(JOBS):
        work = pipes.work(number, nothing, nothing)
        work.finish = lambda n=number: done.append((int(works[n].job.done), devices[n].trace.phase))  # type: ignore[misc]
        works.append(work)
    with Prepared(devices, "dt2.stop", works, lambda number: pytest.fail("one by one")) as prepared:
        prepared.begin()
        prepared.do()
        assert done == []
        prepared.finish()
        prepared.finish()
    assert done == [(1, "dt2.stop")] * JOBS


def test_devices_of_which_one_cannot_prepare_are_done_one_by_one(pipes: Pipes) -> None:
    done: list[int] = []
    devices: list[Any] = [SimpleNamespace(trace=Trace().device(str(number))) for number in range(2)]
    with Prepared(devices, "dt2.stop", [pipes.work(0, nothing, nothing), None], done.append) as prepared:
        prepared.begin()
        prepared.do()
        prepared.finish()
    assert sorted(done) == [0, 1]
    assert pipes.answers[0][0] == 0


@contextmanager
def cpus_at_most(count: int) -> Iterator[None]:
    """This thread, and those that it makes, have so many CPUs at most."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


CREW = ("crew_make", "crew_threads", "crew_begin", "crew_wait", "crew_run", "crew_end", "jobs_fine", "jobs_prepare")


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("count", [1, JOBS])
def test_without_threads_something_else_is_done_behind_the_jobs(
    pipes: Pipes, count: int, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: getattr(lib, name) for name in (*CREW, "crew_is_ahead")} | {"crew_make": lambda threads: ffi.NULL}
    monkeypatch.setattr(work, "lib", SimpleNamespace(**own))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    done = []
    works = [pipes.work(n, lambda: None, lambda: None) for n in range(count)]
    with closing(Crew(works, beside=True)) as crew:
        crew.begin()
        assert crew.do(lambda: done.append([int(answer[0]) for answer in pipes.answers[:count]]))
    assert done == [[n + 1 for n in range(count)]]


@pytest.mark.parametrize(("own", "priority"), [(os.SCHED_FIFO, 50), (os.SCHED_RR, 1)], ids=["FIFO", "RR"])
def test_on_one_cpu_jobs_of_a_thread_that_is_ahead_anyway_begin_in_front_of_something_else(
    pipes: Pipes, own: int, priority: int
) -> None:
    done: list[list[int]] = []

    def run() -> None:
        with suppress(PermissionError):
            os.sched_setscheduler(0, own, os.sched_param(priority))
        works = [pipes.work(n, lambda: None, lambda: None) for n in range(JOBS)]
        with cpus_at_most(1), closing(Crew(works, beside=True)) as crew:
            crew.begin()
            assert crew.do(lambda: done.append([int(answer[0]) for answer in pipes.answers]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [[n + 1 for n in range(JOBS)]]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("count", [1, JOBS])
def test_on_one_cpu_jobs_begin_in_front_of_something_else(
    pipes: Pipes, count: int, allowed: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done behind them where their threads may not run ahead of others."""
    if not allowed:
        own = SimpleNamespace(crew_is_ahead=lambda crew: 0, **{name: getattr(lib, name) for name in CREW})
        monkeypatch.setattr(work, "lib", own)
    done = []
    works = [pipes.work(n, lambda: None, lambda: None) for n in range(count)]
    with cpus_at_most(1), closing(Crew(works, beside=True)) as crew, AheadOfOthers() as first:
        crew.begin()
        if ahead:
            first.begin()
        assert crew.do(lambda: done.append([int(answer[0]) for answer in pipes.answers[:count]]))
    assert done == [[n + 1 for n in range(count)]]


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("count", [1, JOBS])
def test_something_else_is_done_beside_the_jobs(
    pipes: Pipes, count: int, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    done = []
    works = [pipes.work(n, lambda: None, lambda: None) for n in range(count)]
    with closing(Crew(works, beside=True)) as crew:
        crew.begin()
        assert crew.do(lambda: done.append([int(answer[0]) for answer in pipes.answers[:count]]))
        ahead = bool(lib.crew_is_ahead(crew._c))
    assert len(done) == 1
    assert cpus > 1 or ahead or done == [[n + 1 for n in range(count)]]
    assert [int(answer[0]) for answer in pipes.answers[:count]] == [n + 1 for n in range(count)]


@pytest.mark.parametrize("count", [1, JOBS])
def test_error_beside_the_jobs_comes_when_they_are_done(pipes: Pipes, count: int) -> None:
    def fail() -> None:
        raise VhostVdpaError("no scan")

    finished: list[int] = []
    works = [pipes.work(n, lambda: None, partial(finished.append, n)) for n in range(count)]
    devices = [SimpleNamespace(trace=Trace().device("")) for _ in range(count)]
    prepared = Prepared(devices, "", works, lambda number: None, beside=True)  # type: ignore[arg-type]
    with prepared, pytest.raises(VhostVdpaError, match="no scan"):
        prepared.do(fail)
    assert finished == list(range(count))
    assert [int(answer[0]) for answer in pipes.answers[:count]] == [n + 1 for n in range(count)]


def passed_job(pipes: Pipes, passed: Model, base: int) -> tuple[Any, list[Any]]:
    """A job whose device has worked on one ring itself, and reports a base; what C reaches by pointers is kept."""
    relay = ffi.new("struct svq_thread *", {"wake": -1, "epoll": -1})
    kept: list[Any] = [relay, ffi.new("struct svq_thread *[]", [relay]), ffi.new("uint32_t *", base)]
    rings = GuestRings([passed.queue], passed.memory)
    rings.remember()
    job = pipes.work(0, nothing, nothing).job
    job.threads, job.thread_count = kept[1], 1
    rings.fill_stop(job, [kept[2]])
    return job, [*kept, rings]


@pytest.mark.parametrize(("base", "held"), [(1, 1), (2, 1), (0, 0), (3, 0)])
def test_a_ring_that_the_device_worked_on_itself_is_marked_and_its_base_looked_at(
    pipes: Pipes, base: int, held: int
) -> None:
    m = Model()
    job, kept = passed_job(pipes, m, base)
    for head in (0, 1):
        m.publish(head)
    m.ring.used.ring[0].id, m.ring.used.idx = 0, 1
    lib.jobs_run(job, 1)
    assert (job.in_order, job.held, bool(kept[0].stop)) == (1, held, True)
    assert bool(lib.jobs_fine(job, 1)) is bool(held)
    used, size = m.queue.parts[2]
    assert set(m.memory.dirty_pages()) == {gpa & ~0xFFF for gpa in range(used, used + size)}
    m.close()


def test_a_device_out_of_order_keeps_its_queues(pipes: Pipes) -> None:
    m = Model()
    job, kept = passed_job(pipes, m, 1)
    for head in (0, 1):
        m.publish(head)
    m.ring.used.ring[0].id, m.ring.used.idx = 1, 1
    lib.jobs_run(job, 1)
    assert (job.done, job.in_order, bool(kept[0].stop)) == (1, 0, False)
    assert not lib.jobs_fine(job, 1)
    assert m.memory.dirty_pages() == []
    m.close()
