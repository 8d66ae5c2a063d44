"""What wakes a server, and what does not: changes of guest memory's files, a device that failed."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from test_vhost_user_server import Rig, named_file, punch, readable_within, rig
from vhost_front_end import MiB
from waiting import wait_for

from pyvhostvdpa.base.errors import QueueBroken
from pyvhostvdpa.net.control import Rx
from pyvhostvdpa.vhost_user import notices
from pyvhostvdpa.vhost_user import server as module
from pyvhostvdpa.vhost_user.filters import RxFilter


def test_a_control_command_without_an_answer_is_a_failure_of_the_device(tmp_path: Path) -> None:
    """A device that does not answer raises no interrupt either."""
    with rig(tmp_path) as r:
        front = r.started()
        wait_for(lambda: r.device.config_call >= 0)
        r.device.answer = 1
        r.device.fails["check"] = QueueBroken("the device did not answer 1 control commands within 10 s")
        r.server._filter_changed(RxFilter(b"\x52\x54\0\0\0\1", (), (), False, False, dict.fromkeys(Rx, False)))
        assert r.event("filter")["refused"]
        assert "did not answer" in r.event("device-failed")["error"]
        front.close()


def rounds_within(r: Rig, seconds: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the loop of a server runs."""
    rounds: list[float] = []
    before = r.server._tick
    monkeypatch.setattr(r.server, "_tick", lambda: (rounds.append(time.monotonic()), before()))
    time.sleep(seconds)
    return len(rounds)


def test_a_server_without_a_guest_sleeps_also_if_the_device_raises_its_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that comes or goes raises it as well."""
    monkeypatch.setattr(module, "TICK", 0.02)
    with rig(tmp_path) as r:
        front = r.started()
        wait_for(lambda: r.device.config_call >= 0)
        front.close()
        wait_for(lambda: r.status()["front_end"] is None)
        os.eventfd_write(r.device.config_call, 1)
        assert rounds_within(r, 0.4, monkeypatch) <= 2


def test_a_server_sleeps_while_memory_is_discarded_that_its_device_does_not_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK", 0.02)
    with rig(tmp_path) as r:
        r.device.target.iotlb.limits.pinned = False
        front = r.front()
        front.connect()
        front.memory = named_file()
        os.ftruncate(front.memory, 4 * MiB)
        front.start()
        wait_for(lambda: not r.backend.needs_ticks)
        punch(front.memory, 2 * MiB, 64 << 10)
        assert rounds_within(r, 0.4, monkeypatch) <= 2
        front.close()


@pytest.mark.parametrize("missing", ["memfd_create", "readlink"])
def test_memory_is_taken_where_its_file_cannot_be_watched(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit on open files, and without /proc: it is looked at periodically."""

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    fd = os.memfd_create("guest")
    watch = notices.FileNotices()
    with monkeypatch.context() as patch:
        notices.reports_memfds.cache_clear()
        if missing == "readlink":
            patch.setattr(notices, "reports_memfds", lambda: False)
        patch.setattr(os, missing, fail)
        watch.watch([fd])
        assert not watch.fds
    # what was not found out is tried again
    watch.watch([fd])
    assert bool(watch.fds) is notices.reports_memfds()
    watch.close()
    os.close(fd)


def test_files_are_watched_while_others_come_and_go_with_one_descriptor() -> None:
    """To close one takes the kernel some 10 ms, and a guest that starts has a message for each region."""
    files = [named_file() for _ in range(3)]
    for fd in files:
        os.ftruncate(fd, MiB)
    watch = notices.FileNotices()
    watch.watch(files[:1])
    # the same one, not another of its number
    descriptor = os.dup(watch.fds[0])
    for some in (files[:2], files, files[1:], [files[1], files[1]]):
        watch.watch(some)
        watch.drain()
        for fd in files:
            punch(fd, 0, 4096)
            assert readable_within(descriptor, 0) is (fd in some)
            watch.drain()
    info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    assert info.count("inotify wd:") == 1
    watch.watch(())
    assert not watch.fds
    for fd in [descriptor, *files]:
        os.close(fd)
