"""The loop of a thread that serves shadow virtqueues: when it looks, when it sleeps, what ends it, what it reports."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ring_model import BASE, Model, Segment

from pyvhostvdpa._cdefs import ffi, lib

Make = Callable[..., Model]
DATA = BASE + 0x40000
MS = 1_000_000

FOREVER = (1 << 63) - 1


class Running:
    """A thread's loop, run by hand, for queues of models."""

    def __init__(self, *models: Model, busy_poll: int = 0, config_call: int = -1) -> None:
        self.models = models
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.array = ffi.new("struct svq *[]", [m.svq.c for m in models])
        self.epoll = select.epoll()
        self.epoll.register(self.wake, select.EPOLLIN | select.EPOLLET)
        self.c: Any = ffi.new(
            "struct svq_thread *",
            {
                "count": len(models),
                "queues": self.array,
                "wake": self.wake,
                "epoll": self.epoll.fileno(),
                "ticks": -1,
            },
        )
        self.c.busy_poll, self.c.config_call = busy_poll, config_call
        self.threads: list[threading.Thread] = []

    def run(self, milliseconds: float) -> int:
        return int(lib.svq_thread_run(self.c, time.monotonic_ns() + int(milliseconds * MS)))

    def look(self, sleeps: int = 1, milliseconds: float = 5) -> int:
        """Run it until it has looked and slept, however late this machine lets it begin."""
        slept = int(self.c.sleeps) + sleeps
        deadline = time.monotonic() + 10
        while True:
            broken = self.run(milliseconds)
            if self.c.sleeps >= slept:
                return broken
            assert time.monotonic() < deadline, "the thread does not sleep"

    def start(self, milliseconds: float) -> None:
        self.threads.append(threading.Thread(target=self.run, args=(milliseconds,)))
        self.threads[-1].start()

    def asleep(self, sleeps: int = 1) -> None:
        deadline = time.monotonic() + 10
        while self.c.sleeps < sleeps:
            assert time.monotonic() < deadline, "the thread does not sleep"
            time.sleep(0.001)
        time.sleep(0.01)

    def close(self) -> None:
        self.c.stop = 1
        os.eventfd_write(self.wake, 1)
        for thread in self.threads:
            thread.join()
        os.close(self.wake)
        self.epoll.close()


@pytest.fixture
def serving() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(*models: Model, **options: int) -> Running:
        made.append(Running(*models, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def give(m: Model, slot: int, writable: bool = False) -> None:
    m.describe(slot, [Segment(DATA + slot * 64, 64, writable)])
    m.publish(slot)


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_a_thread_looks_again_after_it_asked_for_notifications(model: Make, serving: Callable[..., Running]) -> None:
    """Otherwise what came just before it asked waits for a notification that never comes."""
    running = serving(model())
    for _ in range(5):
        os.eventfd_write(running.wake, 1)
        running.look(milliseconds=20)
    assert running.c.sleeps >= 5
    assert running.c.rounds >= 2 * running.c.sleeps


def test_notifications_are_asked_for_before_the_second_look(model: Make, serving: Callable[..., Running]) -> None:
    m = model()
    running = serving(m)
    running.start(10_000)
    running.asleep()
    assert m.ring.used.flags == 0
    assert m.svq.c.device.avail.flags == 0


def test_no_notifications_are_asked_for_while_a_thread_polls(model: Make, serving: Callable[..., Running]) -> None:
    m = model()
    running = serving(m, busy_poll=10_000 * MS)
    running.start(10_000)
    until(lambda: running.c.rounds > 10)
    assert m.ring.used.flags == lib.VRING_USED_F_NO_NOTIFY
    assert m.svq.c.device.avail.flags == lib.VRING_AVAIL_F_NO_INTERRUPT
    assert running.c.sleeps == 0


def test_a_sleeping_thread_is_woken_by_either_side(model: Make, serving: Callable[..., Running]) -> None:
    idle, m = model(), model()
    running = serving(idle, m)
    running.start(30_000)
    running.asleep()
    give(m, 3, True)
    before = time.monotonic()
    os.eventfd_write(m.queue.kick, 1)
    until(lambda: m.svq.c.forwarded == 1)
    [(head, _)] = m.fetch()
    running.asleep(2)
    m.complete(head, 5)
    os.eventfd_write(m.svq.call, 1)
    until(lambda: m.svq.c.returned == 1)
    assert time.monotonic() - before < 5
    assert m.used() == [(3, 5)]


def test_notifications_that_were_taken_do_not_wake_again(model: Make, serving: Callable[..., Running]) -> None:
    m = model()
    running = serving(m)
    os.eventfd_write(m.queue.kick, 1)
    os.eventfd_write(m.svq.call, 1)
    os.eventfd_write(running.wake, 1)
    running.run(100)
    assert running.c.sleeps <= 4


def test_the_device_s_used_elements_go_first(model: Make, serving: Callable[..., Running]) -> None:
    """They free the descriptors that the guest's next chains need."""
    m = model(num=2)
    for slot in range(2):
        give(m, slot)
    running = serving(m)
    assert m.forward() == 2
    for head, _ in m.fetch():
        m.complete(head)
    for slot in range(2):
        give(m, slot)
    running.look()
    assert m.svq.statistics()["stalls"] == 0
    assert m.svq.c.forwarded == 4


def test_rx_is_forwarded_before_tx(model: Make, serving: Callable[..., Running]) -> None:
    """Queues are served in array order: what the guest posted before it sent gets there first."""
    rx, tx = model(), model()
    give(rx, 0, True)
    give(tx, 0)
    # a kick that blocks, so that the thread waits behind the first queue
    look, full = os.pipe()
    fcntl.fcntl(full, fcntl.F_SETPIPE_SZ, 4096)
    os.write(full, bytes(4096))
    rx.svq.c.device_kick = full
    try:
        running = serving(rx, tx)
        running.start(10_000)
        until(lambda: rx.svq.c.device.avail.idx == 1)
        time.sleep(0.02)
        assert tx.svq.c.device.avail.idx == 0
        os.read(look, 4096)
        until(lambda: tx.svq.c.device.avail.idx == 1)
        running.close()
        running.threads.clear()
        running.wake = os.eventfd(0, os.EFD_NONBLOCK)
    finally:
        os.close(look)
        os.close(full)


def test_a_thread_ends_at_its_deadline_and_at_stop(model: Make, serving: Callable[..., Running]) -> None:
    running = serving(model(), busy_poll=10_000 * MS)
    before = time.monotonic()
    assert running.run(30) == 0
    assert 0.03 <= time.monotonic() - before < 5
    running.c.stop = 1
    before = time.monotonic()
    assert running.run(10_000) == 0
    assert time.monotonic() - before < 5


def test_a_thread_that_polls_ends_when_it_is_told_to(model: Make, serving: Callable[..., Running]) -> None:
    running = serving(model(), busy_poll=30_000 * MS)
    running.start(30_000)
    until(lambda: running.c.rounds > 10)
    running.c.stop = 1
    until(lambda: not running.threads[0].is_alive(), 10)


def test_busy_polling_lasts_as_long_as_it_was_asked_for(model: Make, serving: Callable[..., Running]) -> None:
    rounds = 0
    # a machine that is busy may leave a thread few rounds in this time
    for _ in range(20):
        running = serving(model(), busy_poll=50 * MS)
        before = time.monotonic()
        running.start(10_000)
        running.asleep()
        assert time.monotonic() - before >= 0.05
        assert running.c.sleeps == 1
        rounds = max(rounds, running.c.rounds)
        if rounds > 10:
            break
    assert rounds > 10


def polls_on(running: Running, work: Callable[[], object], moved: Callable[[], int]) -> bool:
    """Give work late in the time of polling; False if the thread slept before it came, as on a machine that is busy.

    Otherwise it has to sleep ``busy_poll`` after that work, and not before.
    """
    running.start(20_000)
    time.sleep(0.75 * running.c.busy_poll / 1e9)
    before = time.monotonic()
    work()
    until(lambda: moved() or running.c.sleeps)
    if not moved() or running.c.sleeps:
        return False
    running.asleep()
    assert time.monotonic() - before >= running.c.busy_poll / 1e9, "it slept before its time"
    return True


def test_busy_polling_begins_again_after_work(model: Make, serving: Callable[..., Running]) -> None:
    def once() -> bool:
        m = model()
        return polls_on(serving(m, busy_poll=200 * MS), lambda: give(m, 0), lambda: int(m.svq.c.forwarded))

    assert any(once() for _ in range(20)), "it sleeps before work comes"


def break_queue(m: Model) -> None:
    m.ring.avail.idx = (m.ring.avail.idx + m.num + 1) & 0xFFFF


def test_a_broken_queue_is_reported_once_and_the_others_continue(model: Make, serving: Callable[..., Running]) -> None:
    bad, good = model(), model()
    config = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
    try:
        running = serving(bad, good, config_call=config)
        assert running.look() == 0
        with pytest.raises(BlockingIOError):
            os.eventfd_read(config)
        break_queue(bad)
        give(good, 0)
        assert running.look() == 1
        assert (bad.svq.c.broken, good.svq.c.broken) == (lib.SVQ_BAD_AVAIL_IDX, lib.SVQ_OK)
        assert good.svq.c.forwarded == 1
        assert os.eventfd_read(config) == 1
        assert running.look() == 1
        with pytest.raises(BlockingIOError):
            os.eventfd_read(config)
        break_queue(good)
        assert running.look() == 2
        assert os.eventfd_read(config) == 1
    finally:
        os.close(config)


def test_a_queue_that_breaks_at_the_second_look_is_reported_before_the_sleep(
    model: Make, serving: Callable[..., Running]
) -> None:
    m = model()
    config = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        running = serving(m, config_call=config)
        running.start(30_000)
        running.asleep()
        break_queue(m)
        os.eventfd_write(m.queue.kick, 1)
        until(lambda: running.c.broken == 1)
        assert os.eventfd_read(config) == 1
    finally:
        running.close()
        running.threads.clear()
        running.wake = os.eventfd(0, os.EFD_NONBLOCK)
        os.close(config)


@pytest.mark.parametrize("which", ["guest_kick", "device_call"])
def test_an_eventfd_that_is_no_longer_one_breaks_its_queue_alone(
    model: Make, serving: Callable[..., Running], which: str
) -> None:
    bad, good = model(), model()
    running = serving(bad, good)
    closed = os.eventfd(0)
    os.close(closed)
    setattr(bad.svq.c, which, closed)
    assert running.look() == 1
    assert (bad.svq.c.broken, good.svq.c.broken) == (lib.SVQ_BAD_EVENTFD, lib.SVQ_OK)
    give(good, 0)
    os.eventfd_write(running.wake, 1)
    assert running.look() == 1
    assert good.svq.c.forwarded == 1


@pytest.mark.parametrize("which", ["guest_kick", "device_call"])
def test_an_eventfd_that_is_closed_while_a_thread_sleeps_is_noticed_within_seconds(
    model: Make, serving: Callable[..., Running], which: str
) -> None:
    bad, good = model(), model()
    running = serving(bad, good)
    running.c.ticks = lib.ticks_open()
    running.epoll.register(running.c.ticks, select.EPOLLIN | select.EPOLLET)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    setattr(bad.svq.c, which, other)
    running.start(30_000)
    running.asleep()
    os.close(other)
    until(lambda: bad.svq.c.broken, 10)
    assert (bad.svq.c.broken, good.svq.c.broken) == (lib.SVQ_BAD_EVENTFD, lib.SVQ_OK)
    give(good, 0)
    os.eventfd_write(good.queue.kick, 1)
    until(lambda: good.svq.c.forwarded == 1)
    running.close()
    running.threads.clear()
    os.close(running.c.ticks)
    running.wake, running.epoll = os.eventfd(0, os.EFD_NONBLOCK), select.epoll()


def test_what_nobody_tells_of_is_found_within_seconds_and_a_tick_without_work_is_none(
    model: Make, serving: Callable[..., Running]
) -> None:
    m = model()
    running = serving(m)
    running.c.ticks = lib.ticks_open()
    running.epoll.register(running.c.ticks, select.EPOLLIN | select.EPOLLET)
    # without a deadline, as a device's thread runs: one with a deadline looks each second anyhow
    running.threads.append(threading.Thread(target=lib.svq_thread_run, args=(running.c, FOREVER)))
    running.threads[-1].start()
    running.asleep()
    sleeps = running.c.sleeps
    time.sleep(1.5)
    assert running.c.sleeps == sleeps
    # without a kick
    give(m, 0)
    until(lambda: m.svq.c.forwarded == 1, 10)
    running.close()
    running.threads.clear()
    os.close(running.c.ticks)
    running.wake, running.epoll = os.eventfd(0, os.EFD_NONBLOCK), select.epoll()


def test_a_broken_queue_s_notifications_do_not_keep_a_thread_awake(
    model: Make, serving: Callable[..., Running]
) -> None:
    m = model()
    running = serving(m)
    running.look()
    break_queue(m)
    running.look()
    before = int(running.c.sleeps)
    os.eventfd_write(m.queue.kick, 1)
    running.run(50)
    assert running.c.sleeps - before <= 2
    assert os.eventfd_read(m.queue.kick) == 1, "nobody takes them any more"
    running.start(30_000)
    running.asleep(int(running.c.sleeps) + 1)
    asleep = int(running.c.sleeps)
    for eventfd in 10 * [m.queue.kick, m.svq.call]:
        os.eventfd_write(eventfd, 1)
        time.sleep(0.002)
    assert running.c.sleeps == asleep, "it was woken"


def test_a_broken_queue_is_reported_while_a_thread_polls(model: Make, serving: Callable[..., Running]) -> None:
    m = model()
    config = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        running = serving(m, busy_poll=60_000 * MS, config_call=config)
        running.start(20_000)
        until(lambda: running.c.rounds > 10)
        break_queue(m)
        until(lambda: running.c.broken == 1)
        assert os.eventfd_read(config) == 1
        assert running.c.sleeps == 0
    finally:
        running.close()
        running.threads.clear()
        running.wake = os.eventfd(0, os.EFD_NONBLOCK)
        os.close(config)


def test_busy_polling_begins_again_when_the_device_returns_something(
    model: Make, serving: Callable[..., Running]
) -> None:
    def once() -> bool:
        m = model()
        give(m, 0)
        m.forward()
        [(head, _)] = m.fetch()
        return polls_on(serving(m, busy_poll=200 * MS), lambda: m.complete(head), lambda: int(m.svq.c.returned))

    assert any(once() for _ in range(20)), "it sleeps before work comes"


class Scheduling(ctypes.Structure):
    """The struct sched_attr of sched_setattr(2)."""

    _fields_ = (
        *(("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64)),
        *(("nice", ctypes.c_int32), ("priority", ctypes.c_uint32)),
        *((name, ctypes.c_uint64) for name in ("runtime", "deadline", "period")),
    )


GETATTR, SETATTR = {"x86_64": (315, 314)}.get(platform.machine(), (275, 274))


def scheduling(tid: int) -> Scheduling:
    attr = Scheduling(size=ctypes.sizeof(Scheduling))
    assert ctypes.CDLL(None).syscall(GETATTR, tid, ctypes.byref(attr), attr.size, 0) == 0
    return attr


def served(before: Callable[[], object]) -> tuple[Scheduling, Scheduling]:
    """How a thread is scheduled that did something, and how it is once it serves queues."""
    epoll, wake = select.epoll(), os.eventfd(0, os.EFD_NONBLOCK)
    epoll.register(wake, select.EPOLLIN)
    thread_c = ffi.new("struct svq_thread *", {"wake": wake, "epoll": epoll.fileno(), "config_call": -1})
    first: list[Scheduling] = []

    def run() -> None:
        before()
        first.append(scheduling(0))
        lib.svq_thread_serve(thread_c)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: thread_c.sleeps)
    then = scheduling(thread.native_id or 0)
    lib.svq_thread_end(thread_c)
    thread.join()
    epoll.close()
    os.close(wake)
    return first[0], then


def test_a_serving_thread_takes_short_turns_where_the_kernel_has_them() -> None:
    def ask() -> None:
        attr = Scheduling(size=ctypes.sizeof(Scheduling), runtime=3_000_000)
        assert ctypes.CDLL(None).syscall(SETATTR, 0, ctypes.byref(attr), 0) == 0

    before, then = served(ask)
    has_them = before.runtime == 3_000_000
    assert then.runtime == (100_000 if has_them else before.runtime)
    assert (then.policy, then.nice, then.flags) == (before.policy, before.nice, before.flags) == (0, 0, 0)


def test_a_serving_thread_of_another_policy_keeps_it() -> None:
    before, then = served(lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)))
    assert before.policy == then.policy == os.SCHED_BATCH
    assert then.runtime == before.runtime
