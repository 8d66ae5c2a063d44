"""Threads that are kept from the rings without being ended: the guest's CPUs, the thread_c, and words that can wait."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator

import pytest
from test_nic import Loopback

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.guest.writer import GuestWriter
from pyvhostvdpa.memory.guest import DEFAULT_GPA, PAGE_SIZE, GuestMemory
from pyvhostvdpa.migration.later import Later
from pyvhostvdpa.trace.recorder import Trace


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(DEFAULT_GPA, 1 << 20)]) as memory:
        yield memory


def until(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.001)


def test_paused_guest_touches_no_memory_and_continues_where_it_was(memory: GuestMemory) -> None:
    nic = GuestNic(memory, NicOptions(ring_size=16))
    [pair] = nic.pairs
    device, traffic = Loopback(memory, pair), Traffic(nic)
    try:
        for _ in range(20):
            traffic.run()
            sent = pair.c.sent
            until(lambda sent=sent: pair.c.sent > sent or device.take())
            traffic.pause()
            assert not traffic.running
            threads = threading.active_count()
            device.take()
            while device.held:
                device.deliver(device.held.pop(0))
            # a sleeping thread is notified, and must keep out anyway
            os.eventfd_write(pair.rx.call, 1)
            still = bytes(memory.regions[0].memory.buffer), pair.c.received
            time.sleep(0.01)
            assert (bytes(memory.regions[0].memory.buffer), pair.c.received) == still
            assert threading.active_count() == threads
            received = pair.c.received
            traffic.run()
            until(lambda received=received: pair.c.received > received)
        assert not traffic.dead
    finally:
        traffic.end()
        nic.close()
    assert pair.c.corrupted == pair.c.duplicated == 0


def test_a_frame_that_is_about_to_go_is_waited_for(memory: GuestMemory) -> None:
    """Nothing is in flight when sending is stopped, but the driver has decided before that to send a frame."""
    nic = GuestNic(memory, NicOptions(ring_size=16))
    [pair], traffic, answers = nic.pairs, Traffic(nic), list[bool]()
    pair.c.inside = 1
    thread = threading.Thread(target=lambda: answers.append(traffic.stop_sending(30)))
    thread.start()
    until(lambda: not pair.c.sending)
    time.sleep(0.05)
    early = list(answers)
    pair.c.sent += 1
    pair.c.inside = 0
    time.sleep(0.05)
    early += answers
    pair.c.received += 1
    thread.join(10)
    nic.close()
    assert early == []
    assert answers == [True]


def test_a_pair_has_one_thread_and_another_traffic_has_to_wait_for_its_end(memory: GuestMemory) -> None:
    """A paused thread would run again with the other's, and two drivers on one ring corrupt it."""
    nic = GuestNic(memory, NicOptions(ring_size=16))
    first, second = Traffic(nic), Traffic(nic)
    try:
        first.run()
        first.pause()
        with pytest.raises(RuntimeError, match="guest-nic-1 has a thread already"):
            second.run()
        first.end()
        second.run()
        assert second.dead == []
    finally:
        second.end()
        nic.close()


def test_threads_are_there_before_the_guest_runs_and_end_with_it(memory: GuestMemory) -> None:
    nic = GuestNic(memory, NicOptions(pairs=2, ring_size=16))
    before = threading.active_count()
    traffic = Traffic(nic)
    traffic.make_ready()
    assert threading.active_count() == before + 2
    assert not traffic.running
    time.sleep(0.01)
    assert [pair.c.sent for pair in nic.pairs] == [0, 0]
    traffic.run()
    assert threading.active_count() == before + 2
    until(lambda: all(pair.c.sent for pair in nic.pairs))
    traffic.end()
    assert threading.active_count() == before
    traffic.run()
    until(lambda: threading.active_count() == before + 2)
    nic.close()
    assert threading.active_count() == before


def test_closing_a_nic_waits_for_its_threads_wherever_they_are(memory: GuestMemory) -> None:
    """A thread that was asked to end may still look at eventfds and guest memory, which are gone afterwards."""
    before = threading.active_count()
    for paused in (False, True) * 50:
        nic = GuestNic(memory, NicOptions(ring_size=16))
        traffic = Traffic(nic)
        traffic.run()
        if paused:
            traffic.pause()
        nic.close()
        assert threading.active_count() == before


def test_a_paused_cpu_is_between_two_pages(memory: GuestMemory) -> None:
    writer = GuestWriter(memory, DEFAULT_GPA, 64, 1 << 20)
    for _ in range(20):
        writer.run()
        until(lambda written=int(writer.c.written): writer.c.written > written + 10)
        writer.pause()
        still = bytes(memory.regions[0].memory.buffer[: 64 * PAGE_SIZE]), writer.c.written
        assert writer.bad_pages() == 0
        time.sleep(0.003)
        assert (bytes(memory.regions[0].memory.buffer[: 64 * PAGE_SIZE]), writer.c.written) == still
    writer.close()


def test_a_thread_is_stopped_while_it_sleeps_without_being_woken() -> None:
    wake, epoll = os.eventfd(0, os.EFD_NONBLOCK), select.epoll()
    epoll.register(wake, select.EPOLLIN)
    thread_c = ffi.new("struct svq_thread *", {"wake": wake, "epoll": epoll.fileno(), "config_call": -1})
    thread = threading.Thread(target=lib.svq_thread_serve, args=(thread_c,))
    thread.start()
    until(lambda: thread_c.sleeps)
    rounds = thread_c.rounds
    lib.svq_threads_stop(ffi.new("struct svq_thread *[]", [thread_c]), 1)
    os.eventfd_write(wake, 1)
    time.sleep(0.01)
    assert thread_c.rounds == rounds
    assert thread.is_alive()
    lib.svq_thread_end(thread_c)
    thread.join(10)
    assert not thread.is_alive()
    os.close(wake)
    epoll.close()


def test_a_thread_that_is_at_work_ends_whenever_it_is_asked_to() -> None:
    """It is asked to keep out and to end at once: a thread about to wait for the gate must not miss the second."""
    wake, epoll = os.eventfd(0, os.EFD_NONBLOCK), select.epoll()
    epoll.register(wake, select.EPOLLIN)
    for _ in range(300):
        busy = {"wake": wake, "epoll": epoll.fileno(), "config_call": -1, "busy_poll": 1 << 50}
        thread_c = ffi.new("struct svq_thread *", busy)
        thread = threading.Thread(target=lib.svq_thread_serve, args=(thread_c,), daemon=True)
        thread.start()
        # no sleep here: then both are on a CPU
        while not thread_c.rounds:
            pass
        lib.svq_thread_end(thread_c)
        thread.join(5)
        try:
            assert not thread.is_alive()
        finally:
            lib.svq_thread_end(thread_c)
            thread.join(10)
    os.close(wake)
    epoll.close()


def test_closed_gate_lets_no_thread_in(memory: GuestMemory) -> None:
    thread_c = ffi.new("struct svq_thread *", {"wake": -1, "epoll": -1, "stop": 1})
    lib.svq_thread_run(thread_c, time.monotonic_ns() + 10_000_000)
    assert (thread_c.rounds, thread_c.inside) == (0, 0)
    nic = GuestNic(memory, NicOptions(ring_size=16))
    pair = nic.pairs[0].c
    # a thread that looks at its rings takes that element, and says whether it wants interrupts
    pair.stop, pair.tx.used.idx, pair.tx.avail.flags = 1, 1, 1
    lib.nic_run(pair, time.monotonic_ns() + 10_000_000)
    assert (pair.tx_used, pair.tx.avail.flags, pair.ring_errors, pair.inside) == (0, 1, 0, 0)
    nic.close()


def test_a_gate_that_is_closed_for_good_stays_so() -> None:
    """Stopping a thread that has ended must not make its thread wait until the gate is opened."""
    thread_c = ffi.new("struct svq_thread *", {"wake": -1, "epoll": -1})
    lib.svq_thread_end(thread_c)
    ended = thread_c.stop
    lib.svq_threads_stop(ffi.new("struct svq_thread *[]", [thread_c]), 1)
    assert thread_c.stop == ended != 1
    lib.svq_thread_serve(thread_c)


def test_words_are_written_in_order_a_moment_later_and_all_of_them_in_the_end() -> None:
    said: list[str] = []
    with Later() as later:
        for number in range(100):
            later(lambda number=number: said.append(str(number)))  # type: ignore[misc]
        assert not said
        until(lambda: len(said) == 100)
        later(lambda: said.append("flushed"))
        later.flush()
        assert said[-1] == "flushed"
        later(lambda: said.append("closed"))
    assert said == [*map(str, range(100)), "flushed", "closed"]
    later(lambda: said.append("at once"))
    assert said[-1] == "at once"


def test_events_that_are_made_later_stand_where_they_were() -> None:
    trace = Trace()
    device = trace.device("a")
    device.record(10, 20, "first", {}, 0)
    made: list[int] = []

    def make() -> list[tuple[int, int, str, dict[str, int | str], int | None]]:
        made.append(1)
        return [(12, 15, "inside", {"n": 1}, 0), (22, 25, "behind", {}, -5)]

    with device.in_phase("gap"):
        device.record_later(make)
    device.record(30, 40, "last", {}, 0)
    assert not made
    assert [(e.event, e.phase) for e in trace.events] == [
        ("inside", "gap"),
        ("first", ""),
        ("behind", "gap"),
        ("last", ""),
    ]
    assert len(made) == 1
    assert len(trace.events) == 4


def test_a_trace_that_records_nothing_makes_nothing_later() -> None:
    trace = Trace(0)
    trace.device("a").record_later(lambda: pytest.fail("made"))
    assert trace.events == []
