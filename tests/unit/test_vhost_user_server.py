"""The server of one device: who is let in, one front-end at a time, status, discarded memory, what is left behind."""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from leaks import nothing_left_behind
from served_double import ServedDouble
from vhost_front_end import FrontEnd, MiB, Refused, status_of
from waiting import wait_for

from pyvhostvdpa.base.errors import QueueBroken, VhostVdpaError
from pyvhostvdpa.device.net import State
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.vhost_user import notices
from pyvhostvdpa.vhost_user import server as module
from pyvhostvdpa.vhost_user.backend import Backend
from pyvhostvdpa.vhost_user.channel import Peer
from pyvhostvdpa.vhost_user.discard import HoleWatch, discarding_devices, discarding_words
from pyvhostvdpa.vhost_user.doors import Door, listen
from pyvhostvdpa.vhost_user.messages import Request
from pyvhostvdpa.vhost_user.options import BackendOptions
from pyvhostvdpa.vhost_user.server import Peering, Policy, Server


class Rig:
    """A server in a thread with a device double."""

    def __init__(
        self, path: Path, door: Door | None = None, policy: Policy | None = None, peering: Peering | None = None
    ) -> None:
        self.path = str(path)
        self.events: list[tuple[str, dict[str, Any]]] = []
        trace = Trace()
        self.device = ServedDouble(trace)
        self.memory = GuestMemory.empty()
        self.backend = Backend(self.device, self.memory, trace, BackendOptions(), self._report)
        status = listen(f"{self.path}.status")
        self.server = Server(self.backend, door or Door(listen(self.path)), policy or Policy(), status, peering)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def _report(self, event: str, fields: Any) -> None:
        self.events.append((event, dict(fields)))

    def front(self) -> FrontEnd:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(self.path)
        return FrontEnd(connection)

    def started(self, file: int = -1) -> FrontEnd:
        """A front-end that has started the device, with its memory in a file that is given."""
        front = self.front()
        front.connect()
        if file >= 0:
            front.memory = file
            os.ftruncate(file, 4 * MiB)
        front.start()
        return front

    def status(self) -> dict[str, Any]:
        return status_of(self.path, 10)

    def event(self, name: str) -> dict[str, Any]:
        return wait_for(lambda: next((fields for each, fields in self.events if each == name), None))

    def close(self) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.server.close()
        self.backend.close()
        self.memory.close()


@contextmanager
def rig(tmp_path: Path, **options: Any) -> Iterator[Rig]:
    with nothing_left_behind(), closing(Rig(tmp_path / "net.sock", **options)) as made:
        yield made
    assert not list(tmp_path.iterdir()), "sockets are left behind"


def test_the_socket_is_its_owners_alone(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        for path in (r.path, f"{r.path}.status"):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_socket_of_a_process_that_ended_is_replaced_one_that_lives_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listen(path).close()
    with listen(path), pytest.raises(VhostVdpaError, match="another process listens"):
        listen(path)
    with pytest.raises(VhostVdpaError, match="No such file"):
        listen(str(tmp_path / "nowhere" / "s"))
    with pytest.raises(VhostVdpaError, match="there is no user"):
        listen(str(tmp_path / "t"), "nobody-has-this-name")


def test_front_ends_come_and_go(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        for sessions in (1, 2, 3):
            front = r.started()
            found = r.status()
            assert (found["sessions"], found["state"]) == (sessions, "passthrough")
            assert found["front_end"]["pid"] == os.getpid()
            front.close()
            wait_for(lambda: r.status()["front_end"] is None)
            assert r.device.state is State.RESET


def test_a_second_front_end_is_turned_away_and_the_first_goes_on(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        first = r.front()
        first.connect()
        second = r.front()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            second.connect()
        second.close()
        first.start()
        assert "already" in r.event("refused-front-end")["why"]
        first.close()


def test_a_front_end_of_another_user_is_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvhostvdpa.vhost_user.channel.peer_of", lambda _: Peer(os.getpid(), 65534, 65534))
    with rig(tmp_path) as r:
        front = r.front()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            front.connect()
        front.close()
        assert "uid 65534" in r.event("refused-front-end")["why"]
    with rig(tmp_path, policy=Policy(frozenset({65534}))) as r:
        front = r.front()
        front.connect()
        front.close()


def test_a_front_end_with_a_balloon_is_turned_away_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "discarding_devices", lambda _: ["virtio-balloon-pci"])
    with rig(tmp_path) as r:
        front = r.front()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            front.connect()
        front.close()
        assert "memballoon" in r.event("refused-front-end")["hint"]
    with rig(tmp_path, policy=Policy(allow_discard=True)) as r:
        front = r.front()
        front.connect()
        front.close()


def test_memory_that_is_discarded_is_noticed_within_a_second_and_mapped_again(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        front = r.front()
        front.connect()
        front.memory = os.memfd_create("guest")
        os.ftruncate(front.memory, 4 * MiB)
        os.posix_fallocate(front.memory, 0, 4 * MiB)
        front.start()
        r.device.forget()
        begin = time.monotonic()
        punch(front.memory, 2 * MiB, 64 << 10)
        assert r.event("memory-discarded")["bytes"] == 64 << 10
        assert time.monotonic() - begin < 1
        wait_for(lambda: r.device.state is State.PASSTHROUGH and "start" in r.device.names())
        calls = [name for name in r.device.names() if name != "check"]
        assert calls == ["stop", "remove_memory", "add_memory", "start"]
        front.close()


def named_file() -> int:
    """Return a file of guest memory whose changes every kernel reports, as QEMU's memory-backend-file has them."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        return os.dup(file.fileno())


def test_a_server_sleeps_while_traffic_flows_until_memory_is_discarded_or_the_device_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK", 0.02)
    with rig(tmp_path) as r:
        looks: list[float] = []
        before = r.backend.look_for_holes
        monkeypatch.setattr(r.backend, "look_for_holes", lambda: (looks.append(time.monotonic()), before()))
        front = r.started(named_file())
        wait_for(lambda: not r.backend.needs_ticks)
        time.sleep(0.1)
        looked = len(looks)
        time.sleep(0.4)
        assert len(looks) == looked
        punch(front.memory, 2 * MiB, 64 << 10)
        assert r.event("memory-discarded")["bytes"] == 64 << 10
        # the device was started again, and needs its interrupt once more
        r.device.config_call = -1
        wait_for(lambda: r.device.config_call >= 0 and not r.backend.needs_ticks)
        r.device.fails["check"] = QueueBroken("the device failed")
        time.sleep(0.1)
        assert not r.backend.failed
        os.eventfd_write(r.device.config_call, 1)
        assert r.event("device-failed")["what"] == "check"
        front.close()


def test_messages_of_a_guest_that_moves_do_not_wait_for_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(tmp_path) as r:
        ticks: list[float] = []
        before = r.backend.tick
        monkeypatch.setattr(r.backend, "tick", lambda: (ticks.append(time.monotonic()), before()))
        front = r.front()
        front.connect()
        begin = time.monotonic()
        front.start()
        for _ in range(30):
            front.barrier()
        assert len(ticks) <= 1 + (time.monotonic() - begin) / module.TICK
        # and they are not put off: a log without exact marks is filled at each
        os.close(front.start_logging())
        seen = len(ticks)
        deadline = time.monotonic() + 3.2 * module.TICK
        while time.monotonic() < deadline:
            front.barrier()
            time.sleep(0.01)
        assert len(ticks) - seen >= 3
        front.close()


def test_a_server_rests_while_a_front_end_is_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "discarding_devices", lambda _: ["virtio-balloon-pci"])
    with rig(tmp_path) as r:
        rounds: list[float] = []
        before = r.server._tick
        monkeypatch.setattr(r.server, "_tick", lambda: (rounds.append(time.monotonic()), before()))
        front = r.front()
        assert r.event("refused-front-end")
        time.sleep(1.5)
        assert len(rounds) <= 8
        front.close()


def test_a_balloon_that_inflates_is_not_looked_at_page_by_page(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        front = r.started(named_file())
        wait_for(lambda: not r.backend.needs_ticks)
        begin = time.monotonic()
        for page in range(200):
            punch(front.memory, 2 * MiB + page * 4096, 4096)
            time.sleep(0.002)
        seconds = time.monotonic() - begin
        wait_for(lambda: r.backend.mapped.discarded >= 200 * 4096)
        # one at the begin, one at the end
        assert len([name for name, _ in r.events if name == "memory-discarded"]) <= 2 + seconds // module.TICK
        front.close()


def test_memory_that_is_not_shared_any_more_is_not_watched(tmp_path: Path) -> None:
    """A watch keeps the memory of a virtual machine that has ended."""
    with rig(tmp_path) as r:
        front = r.started(named_file())
        assert len(r.backend.notices) == 2
        front.close()
        wait_for(lambda: len(r.backend.notices) == 1)


def test_files_whose_changes_the_kernel_does_not_report_are_looked_at_periodically(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fd, named = os.memfd_create("guest"), named_file()
    for reports in (False, True):
        monkeypatch.setattr(notices, "reports_memfds", lambda reports=reports: reports)
        watch = HoleWatch()
        for files, expected in (({(0, 1): fd, (0, 2): named}, reports), ({(0, 2): named}, True)):
            watch.begin(files, {})
            assert not watch.notified
            watch.look(files)
            assert watch.notified is expected
        watch.forget_others({})
        assert not watch.notices.fds
    os.close(fd)
    os.close(named)


def test_reports_of_the_kernel_are_found_out_by_trying() -> None:
    notices.reports_memfds.cache_clear()
    fd = os.memfd_create("guest")
    os.ftruncate(fd, MiB)
    watch = notices.FileNotices()
    watch.watch([fd])
    punch(fd, 0, 4096)
    reported = bool(watch.fds) and readable_within(watch.fds[0], 0.1)
    assert reported is notices.reports_memfds() is bool(watch.fds)
    watch.close()
    os.close(fd)


def readable_within(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def punch(fd: int, offset: int, size: int) -> None:
    keep_size, punch_hole = 1, 2
    assert libc().fallocate(fd, keep_size | punch_hole, offset, size) == 0


def libc() -> Any:
    import ctypes  # noqa: PLC0415

    found = ctypes.CDLL(None, use_errno=True)
    found.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return found


def test_holes_are_seen_once_and_new_pages_are_not_holes() -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, MiB)
    watch = HoleWatch()
    watch.begin({(0, 1): fd}, {})
    os.pwrite(fd, bytes(64 << 10), 0)
    assert watch.look({(0, 1): fd}) == 0
    punch(fd, 0, 16 << 10)
    assert watch.look({(0, 1): fd}) == 16 << 10
    assert watch.look({(0, 1): fd}) == 0
    os.close(fd)


def test_holes_that_come_before_the_first_look_are_seen() -> None:
    """A balloon that goes on inflating while memory is mapped again over its first holes."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 4 * MiB)
    os.posix_fallocate(fd, MiB, 2 * MiB)
    punch(fd, MiB, 64 << 10)
    watch = HoleWatch()
    watch.begin({(0, 1): fd}, {(0, 1): [(2 * MiB, 3 * MiB), (MiB, 2 * MiB), (MiB, 2 * MiB)]})
    # the device's pins fill it, and as much is discarded elsewhere
    os.posix_fallocate(fd, MiB, 64 << 10)
    punch(fd, 2 * MiB, 64 << 10)
    assert watch.look({(0, 1): fd}) == 64 << 10
    assert watch.look({(0, 1): fd}) == 0
    os.close(fd)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-device", "virtio-balloon-pci,id=b"], ["virtio-balloon-pci"]),
        (["-device", '{"driver":"virtio-balloon-pci","free-page-reporting":true}'], ["virtio-balloon-pci"]),
        (["-device", "virtio-mem-pci,memdev=m"], ["virtio-mem-pci"]),
        (["-device", "virtio-net-pci,netdev=n", "-name", "virtio-balloon"], []),
        ([], []),
    ],
)
def test_devices_that_discard_are_found_on_a_command_line(words: list[str], found: list[str]) -> None:
    assert discarding_words(words) == found


def test_a_command_line_is_read_of_a_real_process() -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)", "-device", "virtio-balloon-pci"]
    with subprocess.Popen(sleeping) as process:
        wait_for(lambda: discarding_devices(process.pid) == ["virtio-balloon-pci"])
        process.kill()
    assert discarding_devices(process.pid) is None


def test_a_device_that_fails_is_reported_once_and_the_guests_error_eventfd_is_raised(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        front = r.started()
        error = os.eventfd(0, os.EFD_NONBLOCK)
        front.eventfd(Request.SET_VRING_ERR, 0, error)
        os.close(front.start_logging())
        r.device.fails["check"] = QueueBroken("virtqueue 0: invalid used ring")
        assert "invalid used ring" in r.event("device-failed")["error"]
        wait_for(lambda: readable(error))
        assert r.status()["failed"]
        os.close(error)
        front.close()


def readable(fd: int) -> bool:
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


def test_a_connected_socket_is_served_until_it_closes(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    r = Rig(tmp_path / "net.sock", door=Door(connected=ours))
    front = FrontEnd(theirs)
    front.connect()
    front.close()
    r.thread.join(10)
    assert not r.thread.is_alive()
    r.close()


def test_a_front_end_that_listens_is_connected_to_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.02)
    path = tmp_path / "qemu.sock"
    with rig(tmp_path, door=Door(connect_to=str(path))):
        time.sleep(0.1)
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.bind(str(path))
            qemu.listen()
            qemu.settimeout(10)
            for _ in range(2):
                connection, _ = qemu.accept()
                connection.settimeout(10)
                front = FrontEnd(connection)
                front.connect()
                front.start()
                front.close()
        path.unlink()


def test_a_server_that_is_stopped_resets_its_device(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        front = r.started()
        r.server.stop()
        r.thread.join(10)
        assert r.device.state is State.RESET
        assert not r.device.regions
        front.close()


def test_a_front_end_that_stops_in_a_message_holds_up_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvhostvdpa.vhost_user.server.DEADLINE", 0.1)
    with rig(tmp_path) as r:
        front = r.front()
        front.raw(b"\1\0")
        assert "finish a message" in r.event("disconnected")["why"]
        front.close()
        front = r.front()
        front.connect()
        with pytest.raises(Refused):
            front.set(Request.SET_VRING_NUM, struct.pack("=II", 0, 3))
        front.close()
