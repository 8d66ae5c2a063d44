# SPDX-License-Identifier: MIT
"""What is left behind: after close, after kill -9, after a fork."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

from ....base.uapi import BackendFeature, IotlbType, Status, names
from ....memory.pinned import pinned_bytes
from ..bench import Bench
from ..process import die_with_parent
from ..rule import Broken, CannotTell, Group, demand
from ..work import running, work

GROUP = Group("left", "what is left after close and kill -9")
rule = GROUP.rule
_RELEASE = "drivers/vhost/vdpa.c:vhost_vdpa_release and vhost_vdpa_cleanup"


def _works_again(bench: Bench) -> str:
    """Open the device again, demand that it is reset, and that it works."""
    bench.reopen()
    status = bench.c.get_status()
    demand(status == 0, f"status {names(status)} after another open")
    bench.prepare()
    job = work(bench).start()
    return job.works(2, "after another open")


@rule("close_running", "Closed while it runs, it is reset, and works after another open", _RELEASE)
def close_running(bench: Bench) -> str:
    running(bench).works()
    return _works_again(bench)


@rule("close_loaded", "Closed with work under way, it is reset, and works after another open", _RELEASE)
def close_loaded(bench: Bench) -> str:
    job = running(bench)
    job.give(16)
    return _works_again(bench)


@rule("close_suspended", "Closed while suspended, it is reset, and works after another open", _RELEASE)
def close_suspended(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    running(bench).works()
    bench.c.suspend()
    return _works_again(bench)


@rule(
    "close_in_a_batch",
    "A batch that was open at close is gone after another open",
    "drivers/vhost/vdpa.c:vhost_vdpa_reset (in_batch)",
)
def close_in_a_batch(bench: Bench) -> str:
    bench.needs_second_space()
    bench.own()
    bench.message(IotlbType.BATCH_BEGIN, 0)
    bench.reopen()
    bench.own()
    bench.update(bench.arena().allocate(4096), 1)
    return "another address space can be mapped"


@rule("nothing_written", "After close nothing is written to memory that was mapped", _RELEASE)
def nothing_written(bench: Bench) -> str:
    job = running(bench)
    job.works()
    job.give(8)
    bench.c.close()
    job.offer(2)
    before = bench.arena().all.read()
    job.kick()
    job.rests("closed")
    demand(bench.arena().all.read() == before, "memory changed after close")
    return "memory stays as it was"


@rule(
    "unpinned",
    "After close nothing is pinned any more",
    "drivers/vhost/vdpa.c:vhost_vdpa_remove_as and vhost_vdpa_pa_unmap",
)
def unpinned(bench: Bench) -> str:
    bench.needs_pinning()
    before = pinned_bytes()
    running(bench).works()
    during = pinned_bytes() - before
    bench.c.close()
    after = pinned_bytes() - before
    demand(during > 0, "nothing was pinned while it ran")
    demand(after == 0, f"{after} bytes are pinned after close")
    return f"{during} bytes while it ran, 0 after close"


@rule("maps_gone", "After close nothing is mapped any more", _RELEASE)
def maps_gone(bench: Bench) -> str:
    bench.own()
    bench.map()
    bench.reopen()
    bench.own()
    bench.map()
    return "the same range can be mapped again"


@rule("bases_gone", "After close the bases are 0 again", _RELEASE)
def bases_gone(bench: Bench) -> str:
    running(bench).works(5)
    bench.reopen()
    bench.own()
    bench.negotiate()
    got = [bench.base(i) for i in bench.facts.queues]
    demand(not any(got), f"bases {got}")
    return "0"


def _another_process(act: Callable[[], None]) -> int:
    """Fork a process that does something and then waits to be killed; return its id once it has done it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            act()
            os.write(writing, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    done = os.read(reading, 1)
    os.close(reading)
    if not done:
        os.waitpid(child, 0)
        raise CannotTell("the other process failed")
    return child


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@rule("killed", "Killed while it drives the device, a process leaves it reset and usable", _RELEASE)
def killed(bench: Bench) -> str:
    bench.c.close()

    def drive() -> None:
        inner = Bench(bench.path, bench.facts, bench.opener)
        job = running(inner)
        job.works()
        job.give(8)

    child = _another_process(drive)
    try:
        free = bench.errno_of(lambda: bench.opener(bench.path, bench.trace).close())
        demand(free == errno.EBUSY, "the device was free while another process drove it")
    finally:
        _kill(child)
    return f"after kill -9: {_works_again(bench)}"


@rule("killed_suspended", "Killed while the device is suspended, a process leaves it reset and usable", _RELEASE)
def killed_suspended(bench: Bench) -> str:
    bench.needs(BackendFeature.SUSPEND)
    bench.c.close()

    def drive() -> None:
        inner = Bench(bench.path, bench.facts, bench.opener)
        running(inner).works()
        inner.c.suspend()

    _kill(_another_process(drive))
    return f"after kill -9: {_works_again(bench)}"


@rule(
    "other_process",
    "A process that inherited the device is not its owner",
    "drivers/vhost/vhost.c:vhost_dev_check_owner",
)
def other_process(bench: Bench) -> str:
    bench.own()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        number = bench.errno_of(lambda: bench.c.set_vring_num(0, 2))
        os.write(writing, bytes([number]))
        os._exit(0)
    os.close(writing)
    told = os.read(reading, 1)
    os.close(reading)
    os.waitpid(child, 0)
    demand(told == bytes([errno.EPERM]), f"SET_VRING_NUM in a forked process: {os.strerror(told[0] if told else 0)}")
    return "EPERM in a forked process"


@rule(
    "held_by_a_copy",
    "As long as a copy of the descriptor is open the device stays as it is",
    "fs/file_table.c:__fput; drivers/vhost/vdpa.c:vhost_vdpa_release",
)
def held_by_a_copy(bench: Bench) -> str:
    job = running(bench)
    job.works()
    copy = os.dup(bench.c.fileno())
    bench.c.close()
    try:
        job.give(2)
        if len(job.wait(2, 1.0)) != 2:
            raise Broken("it stopped when one of two descriptors was closed")
        busy = bench.errno_of(lambda: bench.opener(bench.path, bench.trace).close())
        demand(busy == errno.EBUSY, "it could be opened while a copy of the descriptor is open")
    finally:
        os.close(copy)
    return _works_again(bench)


@rule("opened_often", "It can be opened and closed again and again", _RELEASE, deadline=25)
def opened_often(bench: Bench) -> str:
    for i in range(25):
        bench.reopen()
        demand(bench.c.get_status() == Status(0), f"open {i + 1}: the status is not 0")
    return _works_again(bench)


@rule("started_often", "It can be opened, started and closed again and again", _RELEASE, deadline=30)
def started_often(bench: Bench) -> str:
    for _ in range(6):
        _works_again(bench)
    return "6 times"
