# SPDX-License-Identifier: MIT
"""Configuration interrupts."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager

from ....base.uapi import Status
from ..bench import PATIENCE_S, REST_S, Bench
from ..queue import Desc
from ..rule import CannotTell, Group, demand
from ..work import running

GROUP = Group("config_irq", "configuration interrupts")
rule = GROUP.rule
_SET = "drivers/vhost/vdpa.c:vhost_vdpa_set_config_call"
_NOTICE = "virtio 1.3, 2.3 and 2.5"


@contextmanager
def _eventfd(bench: Bench) -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        bench.c.set_config_call(fd)
        yield fd
    finally:
        os.close(fd)


def _raised(fd: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(seconds * 1000):
        return False
    os.eventfd_read(fd)
    return True


def _spoil(bench: Bench) -> None:
    """Make the device set NEEDS_RESET, if it does such a thing."""
    job = running(bench)
    job.main.write(0, [Desc(bench.iova, 64)])
    job.main.publish(job.main.num)
    job.kick()
    if not bench.status_becomes(Status.NEEDS_RESET, 0.3):
        raise CannotTell("a head beyond the ring does not make the device set NEEDS_RESET")


@rule("eventfd", "An eventfd is taken, and none as well", _SET)
def eventfd(bench: Bench) -> str:
    with _eventfd(bench):
        bench.c.set_config_call(-1)
    return "set and unset"


@rule("bad_eventfd", "A descriptor that is not an eventfd is refused", _SET)
def bad_eventfd(bench: Bench) -> str:
    bench.refused(lambda: bench.c.set_config_call(9999), [errno.EBADF], "a closed descriptor")
    reading, writing = os.pipe()
    try:
        return bench.refused(lambda: bench.c.set_config_call(reading), [errno.EINVAL], "a pipe")
    finally:
        os.close(reading)
        os.close(writing)


@rule("none_unasked", "None comes while the configuration stays what it is", _NOTICE)
def none_unasked(bench: Bench) -> str:
    with _eventfd(bench) as fd:
        job = running(bench)
        job.works(3)
        before = bench.c.get_config(0, bench.facts.config_size)
        came = _raised(fd, REST_S)
        after = bench.c.get_config(0, bench.facts.config_size)
        demand(not came or before != after, "a configuration interrupt, and nothing changed")
        bench.c.set_config_call(-1)
    return "none"


@rule("needs_reset", "A device that sets NEEDS_RESET sends a configuration interrupt", "virtio 1.3, 2.1.2")
def needs_reset(bench: Bench) -> str:
    with _eventfd(bench) as fd:
        _spoil(bench)
        demand(_raised(fd, PATIENCE_S), "NEEDS_RESET is set, no configuration interrupt came")
        bench.c.set_config_call(-1)
    return "NEEDS_RESET, and an interrupt"


@rule("unset_rests", "An unbound configuration eventfd is not raised", _SET)
def unset_rests(bench: Bench) -> str:
    with _eventfd(bench) as fd:
        bench.c.set_config_call(-1)
        _spoil(bench)
        demand(not _raised(fd, REST_S), "an eventfd that was taken away was raised")
    return "not raised"


@rule("none_after_reset", "None comes after a reset", "virtio 1.3, 2.4.1")
def none_after_reset(bench: Bench) -> str:
    with _eventfd(bench) as fd:
        running(bench).works()
        bench.reset()
        _raised(fd, 0)
        demand(not _raised(fd, REST_S), "a configuration interrupt after a reset")
        bench.c.set_config_call(-1)
    return "none"


@rule("replaced", "Another eventfd takes the place of the old one", _SET)
def replaced(bench: Bench) -> str:
    with _eventfd(bench) as old, _eventfd(bench) as fresh:
        _spoil(bench)
        demand(_raised(fresh, PATIENCE_S), "the new eventfd was not raised")
        demand(not _raised(old, REST_S), "the old eventfd was raised")
        bench.c.set_config_call(-1)
    return "the new one alone"
