"""What a front-end, a peer or a moment must not do to a server: end it, exhaust it, hold it up, or lose a page."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import pytest
from served_double import Call, ServedDouble
from session_rig import OLD, marks_of_all, number, refuse_a_stop, rig, running, state, transfer
from test_vhost_user_server import punch
from test_vhost_user_server import rig as server_rig
from vhost_front_end import LAYOUT, MEMORY, MiB, Refused
from waiting import wait_for

from pyvhostvdpa._cdefs import lib
from pyvhostvdpa.base.errors import MissingFeature, OutOfOrder, QueueBroken, VhostVdpaError
from pyvhostvdpa.device.net import State
from pyvhostvdpa.device.procedure.served import raise_eventfd
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.migration.endpoint import Address, Listener
from pyvhostvdpa.net.control import ControlModel
from pyvhostvdpa.net.features import SUPPORTED
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.vhost_user import peer as peers
from pyvhostvdpa.vhost_user import session
from pyvhostvdpa.vhost_user.backend import Backend
from pyvhostvdpa.vhost_user.coming import ComingGuest, ComingRegion, ComingRing, MemoryFile, check
from pyvhostvdpa.vhost_user.doors import Door, listen
from pyvhostvdpa.vhost_user.mapped import DeviceMemory
from pyvhostvdpa.vhost_user.memory import FrontEndMemory, SharedRegion
from pyvhostvdpa.vhost_user.messages import MessageRefused, Request
from pyvhostvdpa.vhost_user.options import BackendOptions
from pyvhostvdpa.vhost_user.peer import Telling
from pyvhostvdpa.vhost_user.server import Peering, Server
from pyvhostvdpa.vhost_user.state import StateTransferThread, control_from_dict, control_to_dict
from pyvhostvdpa.vhost_user.timings import Timings

# -- what nobody else may lose ----------------------------------------------------------


def test_a_file_that_is_not_a_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_text("a guest's disk")
    with pytest.raises(VhostVdpaError, match="not a socket"):
        listen(str(path))
    assert path.read_text() == "a guest's disk"


def test_a_socket_with_a_relative_path_is_removed_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = Backend(ServedDouble(Trace()), GuestMemory.empty(), Trace(), BackendOptions(), lambda *_: None)
    Server(backend, Door(listen("net.sock")), None, listen("net.sock.status")).close()  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_socket_of_the_next_server_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    backend = Backend(ServedDouble(Trace()), GuestMemory.empty(), Trace(), BackendOptions(), lambda *_: None)
    server = Server(backend, Door(listen(str(path))), None)  # type: ignore[arg-type]
    path.unlink()
    other = listen(str(path))
    server.close()
    assert path.exists()
    other.close()


# -- what a front-end must not do ------------------------------------------------------------


def test_an_infinite_vlan_is_refused_like_any_other() -> None:
    control = control_to_dict(ControlModel(SUPPORTED))
    with pytest.raises(MessageRefused, match="control state"):
        control_from_dict(json.loads(json.dumps(control | {"vlans": [float("inf")]})))
    with running() as r:
        r.front.stop()
        saved, _ = transfer(r, load=False)
        broken = saved.replace(b'"vlans":[]', b'"vlans":[1e999]')
        assert broken != saved
        _, answer = transfer(r, load=True, data=broken)
        assert answer


def test_an_error_eventfd_that_takes_nothing_does_not_end_the_server(tmp_path: Path) -> None:
    with server_rig(tmp_path) as r:
        front = r.started()
        full = os.eventfd(0, os.EFD_CLOEXEC)
        os.eventfd_write(full, (1 << 64) - 2)
        null = os.open("/dev/null", os.O_RDONLY)
        front.eventfd(Request.SET_VRING_ERR, 0, null)
        front.eventfd(Request.SET_VRING_ERR, 1, full)
        r.backend.failed = "the device gave up"
        front.barrier()
        front.barrier()
        assert r.thread.is_alive()
        front.close()
        os.close(full)
        os.close(null)


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ERR])
def test_eventfds_that_are_replaced_again_and_again_are_not_collected(request_: Request) -> None:
    with rig() as r:
        r.front.connect()
        r.front.rings()
        r.front.barrier()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            r.front.eventfd(request_, 0, r.front.calls[0])
        r.front.barrier()
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_an_eventfd_that_is_full_holds_nobody_up() -> None:
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, (1 << 64) - 2)
    with rig() as r:
        r.front.connect()
        r.front.rings()
        for request in (Request.SET_VRING_CALL, Request.SET_VRING_KICK):
            os.set_blocking(full, True)
            r.front.eventfd(request, 0, full)
            r.front.barrier()
            assert not os.get_blocking(full)
    raise_eventfd(full)
    os.close(full)


def test_front_ends_that_are_turned_away_are_not_collected(tmp_path: Path) -> None:
    with server_rig(tmp_path) as r:
        first = r.front()
        first.connect()
        others = []
        for count in range(1, 31):
            others.append(r.front())
            wait_for(lambda: r.server.turned_away == count)  # noqa: B023
        assert len(r.server._turned_away) <= 9
        for each in others:
            each.close()
        first.close()


def test_a_state_in_a_file_is_not_read() -> None:
    with rig() as r:
        r.front.connect()
        fd = os.memfd_create("state")
        [answer] = struct.unpack("=Q", r.front.ask(Request.SET_DEVICE_STATE_FD, state(1, 0), [fd]))
        assert answer & 0xFF
        os.close(fd)


def test_a_descriptor_is_looked_at_without_asking_its_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in user space answers fstat(2) and fstatfs(2) when it likes."""

    def ask(*_: object) -> None:
        raise AssertionError("the file system was asked")

    fd = os.memfd_create("state")
    monkeypatch.setattr(os, "fstat", ask)
    with pytest.raises(MessageRefused, match="pipe"):
        StateTransferThread(fd, None)
    monkeypatch.undo()
    # its file system is tmpfs, which fstatfs(2) would have said; it is no memory
    folder = os.open("/dev/shm", os.O_RDONLY)
    assert lib.is_memory_file(folder) == 0
    os.close(folder)
    memory = os.memfd_create("guest")
    assert lib.is_memory_file(memory) == 1
    os.close(memory)


def test_a_pipe_is_known_without_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front-end that writes memory which never comes holds that lock, and F_GETPIPE_SZ would wait for it."""

    def ask(*_: object) -> None:
        raise AssertionError("the pipe was asked")

    reading, writing = os.pipe()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", ask)
        under_test = StateTransferThread(reading, None)
    os.close(writing)
    assert under_test.result() == b""


def test_a_file_that_is_called_like_a_pipe_is_none(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "pipe:[1]", os.O_RDWR | os.O_CREAT)
    with pytest.raises(MessageRefused, match="pipe"):
        StateTransferThread(fd, None)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_state_comes_through_a_pipe_or_a_socket(kind: str) -> None:
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        reading, writing = (each.detach() for each in socket.socketpair())
    under_test = StateTransferThread(reading, None)
    os.write(writing, b"state")
    os.close(writing)
    assert under_test.result() == b"state"


def test_memory_that_can_shrink_is_told_of_once() -> None:
    with running() as r:
        assert r.names().count("memory-not-sealed") == 1


def test_a_descriptor_that_is_missing_leaves_the_device_without_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ServedDouble(Trace())
    memory = FrontEndMemory()
    mapped = DeviceMemory(device, memory)
    fd = os.memfd_create("guest")
    os.ftruncate(fd, MiB)

    def refuse(_: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", refuse)
        with pytest.raises(OSError, match="Too many"):
            mapped.change((), [(SharedRegion(0, MiB, 0, 0, (1, 2)), fd)])
    assert not device.regions
    assert not memory.files
    os.close(fd)


# -- what a peer must not do ---------------------------------------------------------------------


def test_strangers_on_the_peer_channel_do_not_take_all_descriptors(tmp_path: Path) -> None:
    listener = Listener(Address.parse(f"unix:{tmp_path}/peer"))
    hearing = peers.Hearing(listener, lambda guest: "")
    strangers = []
    for _ in range(2 * peers.MAX_SOURCES):
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect(f"{tmp_path}/peer")
        hearing.accept()
        strangers.append(stranger)
    assert len([each for each in hearing._threads if each.is_alive()]) <= peers.MAX_SOURCES
    for each in strangers:
        each.close()
    hearing.close()


def test_a_cancelled_migration_does_not_wait_for_a_peer_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()

    def dial(*_: object) -> None:
        let_go.wait(10)
        raise MissingFeature("nobody there")

    monkeypatch.setattr(peers, "connect", dial)
    telling = Telling(Address.parse("tcp:192.0.2.1:1"), None, b"", lambda *_: None)
    began = time.monotonic()
    telling.stop()
    assert time.monotonic() - began < 1
    let_go.set()
    assert telling.join()


def test_what_was_announcing_a_guest_is_released_once_it_has_ended_though_no_front_end_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, dialled = threading.Event(), threading.Event()

    def dial(*_: object) -> None:
        dialled.set()
        let_go.wait(10)
        raise MissingFeature("nobody there")

    monkeypatch.setattr(peers, "connect", dial)
    with server_rig(tmp_path, peering=Peering(to=Address.parse("tcp:192.0.2.1:1"))) as r:
        front = r.started()
        os.close(front.start_logging())
        assert dialled.wait(10)
        front.close()
        r.event("disconnected")
        assert r.server._told
        let_go.set()
        wait_for(lambda: not r.server._told, 5.0)


@pytest.mark.parametrize(
    ("rings", "pairs", "memory"),
    [
        ([(0, 256), (4, 256)], 1, MEMORY),
        ([(0, 0), (1, 256)], 1, MEMORY),
        ([(0, 255), (1, 256)], 1, MEMORY),
        ([(0, 256)], 1, MEMORY),
        ([(0, 256), (1, 256)], 2, MEMORY),
        ([(0, 256), (1, 256)], 1, 2 * MEMORY),
    ],
    ids=["control queue", "no entries", "no power of two", "half a pair", "pairs without rings", "too much memory"],
)
def test_a_peer_cannot_have_what_a_front_end_could_not(rings: list[tuple[int, int]], pairs: int, memory: int) -> None:
    with rig(max_memory=MEMORY) as r:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, memory)
        there = tuple(ComingRing(n, num, n << 16, (n << 16) + 4096, (n << 16) + 32768) for n, num in rings)
        coming = ComingGuest(
            r.backend.offer.features & int(SUPPORTED),
            pairs,
            (MemoryFile("memfd:guest", memory),),
            (ComingRegion(0, memory, 0, 0),),
            there,
            None,
        )
        with pytest.raises(MessageRefused):
            r.backend.prepare(coming, [fd])
        assert not r.device.regions
        assert "stand_by" not in r.device.names()
        os.close(fd)


@pytest.mark.parametrize(
    "part", [{"desc": 8}, {"avail": 4097}, {"used": 32770}], ids=["descriptors", "avail ring", "used ring"]
)
def test_a_coming_guest_s_rings_are_aligned(part: dict[str, int]) -> None:
    whole = {"desc": 0, "avail": 4096, "used": 32768}
    rings = [ComingRing(0, 256, **whole), ComingRing(1, 256, **whole)]
    check(ComingGuest(0, 1, (), (), tuple(rings), None), 1)
    rings[1] = ComingRing(1, 256, **{**whole, **part})
    with pytest.raises(MessageRefused, match="ring 1 is not aligned"):
        check(ComingGuest(0, 1, (), (), tuple(rings), None), 1)


def test_as_many_regions_as_slots_and_no_more() -> None:
    memory = FrontEndMemory(slots=2)
    regions = [SharedRegion(n * MiB, MiB, n * MiB, 0, (0, n)) for n in range(3)]
    memory.check_together(regions[:2])
    with pytest.raises(MessageRefused, match="3 regions; at most 2"):
        memory.check_together(regions)


def test_what_begins_in_a_region_has_to_end_there() -> None:
    memory = FrontEndMemory()
    memory.add(SharedRegion(MiB, MiB, 16 * MiB, 0, (0, 0)))
    assert memory.locate(2 * MiB - 8, 8, guest=True) == memory.locate(17 * MiB - 8, 8, guest=False) == 2 * MiB - 8
    for size in (9, 1 << 40):
        with pytest.raises(MessageRefused, match="do not lie in one region"):
            memory.locate(2 * MiB - 8, size, guest=True)


def test_a_second_migration_prepares_anew_what_a_cancelled_one_had_prepared() -> None:
    with rig(control=True) as r:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, MEMORY)
        files, regions = (MemoryFile("memfd:guest", MEMORY),), (ComingRegion(0, MEMORY, 0, 0),)
        rings = tuple(ComingRing(n, 256, n << 16, (n << 16) + 4096, (n << 16) + 32768) for n in range(2))
        features = r.backend.offer.features & int(SUPPORTED)
        for mac in (b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"):
            r.backend.prepare(ComingGuest(features, 1, files, regions, rings, {"mac": mac}), [fd])
            assert r.backend.control_model is not None
            assert r.backend.control_model.mac == mac
        assert r.device.names().count("stand_by") == 2
        os.close(fd)


@pytest.mark.parametrize("announced", [0, 1, len(LAYOUT)])
def test_memory_is_mapped_like_anything_else_and_what_is_ready_starts_first(announced: int) -> None:
    with rig(control=True) as r:
        noted = r.device.calls
        r.backend.mapped.before_mapping = lambda: noted.append(Call("like anything else", None))
        r.front.connect()
        if announced:
            r.front.memory = os.memfd_create("guest")
            os.ftruncate(r.front.memory, MEMORY)
            regions = tuple(ComingRegion(gpa, size, offset, 0) for gpa, size, offset in LAYOUT[:announced])
            rings = tuple(ComingRing(n, 256, n << 16, (n << 16) + 4096, (n << 16) + 32768) for n in range(2))
            files = (MemoryFile("memfd:guest", MEMORY),)
            features = r.backend.offer.features & int(SUPPORTED)
            r.backend.prepare(ComingGuest(features, 1, files, regions, rings, None), [r.front.memory])
            names = r.device.names()
            assert names.index("like anything else") < names.index("add_memory") < names.index("stand_by")
            r.device.forget()
        r.front.start()
        names = r.device.names()
        assert "start" in names
        ready = announced == len(LAYOUT)
        assert ("like anything else" in names) is not ready
        if not ready:
            assert names.index("like anything else") < names.index("add_memory")
            assert names[names.index("start") - 1] == "like anything else"


# -- what the guest must not lose ---------------------------------------------------------------------


def test_bases_of_a_device_that_was_lost_are_where_its_queues_stand() -> None:
    with running() as r:
        r.device.fails["stop"] = QueueBroken("an invalid used ring")
        os.close(r.front.start_logging())
        assert r.backend.failed
        r.device.stopped_at = {0: 77, 1: 88}
        assert r.front.stop() == [77, 88]


def test_pages_between_a_start_and_its_log_are_not_lost_with_the_log_before() -> None:
    """A guest that reboots during a migration, with a front-end that has no STATUS: the device starts first."""
    with running(OLD) as r:
        os.close(r.front.start_logging())
        r.front.stop()
        # whoever migrates has read the log and dropped it
        r.front.start(share=False, log=True)
        assert r.device.state is State.SHADOW
        marked = marks_of_all(r)
        os.close(r.front.log())
        assert marked, "what went into the old log is never read"


def test_a_guest_that_starts_during_a_migration_runs_also_if_the_device_cannot_be_shadowed() -> None:
    with rig(OLD) as r:
        r.front.connect()
        r.front.acknowledge(r.front.offered, log=True)
        r.device.fails["start"] = MissingFeature("no room for shadow rings")
        r.front.start(log=True)
        assert r.device.state is State.PASSTHROUGH
        assert r.backend.dirty_log.inexact
        assert not r.backend.failed


def test_a_reset_marks_what_was_written_where_marks_are_not_exact() -> None:
    with running() as r:
        refuse_a_stop(r)
        os.close(r.front.start_logging())
        marked = marks_of_all(r)
        r.front.set(Request.RESET_DEVICE)
        r.front.barrier()
        assert marked


@pytest.mark.parametrize("size", [2 * MiB, 4 * MiB])
def test_a_hole_is_noticed_though_memory_comes_before_the_next_look(size: int) -> None:
    """Also in a file that has more than its regions, where the hole cannot be seen afterwards."""
    device = ServedDouble(Trace())
    memory = FrontEndMemory()
    mapped = DeviceMemory(device, memory)
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)
    key = (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
    mapped.change((), [(SharedRegion(0, MiB, 0, 0, key), fd)])
    assert not mapped.lost()
    punch(fd, 0, 64 << 10)
    mapped.change((), [(SharedRegion(MiB, MiB, MiB, MiB, key), fd)])
    assert mapped.lost() == 64 << 10
    assert not mapped.lost()
    mapped.drop()
    os.close(fd)


def test_a_hole_is_counted_once_however_often_memory_comes_before_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = ServedDouble(Trace())
    mapped = DeviceMemory(device, FrontEndMemory())
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 4 * MiB)
    key = (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
    # a device that gets a region has all of its pages allocated, and no other
    monkeypatch.setattr(device, "add_memory", lambda pieces: os.posix_fallocate(fd, pieces[0].offset, MiB))
    monkeypatch.setattr(device, "remove_memory", lambda places: None)
    for at in range(0, 4 * MiB, MiB):
        mapped.change((), [(SharedRegion(at, MiB, at, at, key), fd)])
        if not at:
            punch(fd, 0, 64 << 10)
    assert mapped.lost() == mapped.discarded == 64 << 10
    assert not mapped.lost()
    mapped.drop()
    os.close(fd)


def test_memory_is_not_watched_behind_a_change_that_failed_half_way() -> None:
    """A watch keeps the memory of a file that nobody else has any more."""
    device = ServedDouble(Trace())
    mapped = DeviceMemory(device, FrontEndMemory())
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.truncate(file.fileno(), 2 * MiB)
        key = (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino)
        regions = [SharedRegion(at, MiB, at, at, key) for at in (0, MiB)]
        mapped.change((), [(regions[0], file.fileno())])
        assert mapped.notices
        device.fails["add_memory"] = VhostVdpaError("no more entries")
        with pytest.raises(VhostVdpaError):
            mapped.change(regions[:1], [(regions[1], file.fileno())])
        assert not mapped.notices
        assert not mapped._holes.notices.fds, "the kernel has a watch on it"


def test_a_device_whose_queues_were_lost_is_not_started_again_over_a_hole() -> None:
    with running() as r:
        r.device.fails["stop"] = OutOfOrder("uses descriptors out of order")
        r.backend.mapped.lost = lambda: 4096  # type: ignore[method-assign]
        r.backend.look_for_holes()
        assert r.device.state is State.RESET
        assert "stop" in r.backend.failed


def test_pairs_that_the_device_was_not_started_with_are_not_asked_for() -> None:
    with rig(OLD) as r:
        r.front.connect()
        r.front.start(1)
        r.front.enable(2, True)
        r.front.enable(3, True)
        r.front.barrier()
        assert not r.device.commands


def test_what_a_stop_took_is_known_without_looking_at_every_event() -> None:
    """A server that has run for weeks has a long trace, and a guest waits for its answer."""

    class Events(list):  # type: ignore[type-arg]
        def __iter__(self) -> object:
            raise AssertionError("every event was looked at")

    trace = Trace()
    device = trace.device("/dev/vhost-vdpa-0")
    for _ in range(1000):
        device.record(1, 2, "VHOST_VDPA_GET_STATUS", {}, 0)
    trace.events = Events(trace.recorded)
    timings = Timings(trace, device)
    with timings.measured("stop_ms", "dt2.stop"):
        now = time.monotonic_ns()
        device.record(now, now + 3_000_000, "VHOST_VDPA_SUSPEND", {}, 0)
    assert timings.ms["stop_ms"] == 3


# -- what the front-end does to what it has given ------------------------------------------------------------


def test_logging_is_refused_if_the_device_cannot_take_the_log() -> None:
    """QEMU takes any answer to SET_LOG_BASE for a yes: only a refused LOG_ALL keeps it from migrating."""
    with running() as r:
        r.device.fails["set_log"] = MissingFeature("no thread can be started")
        with pytest.raises(Refused):
            r.front.log()
        with pytest.raises(Refused):
            r.front.acknowledge(log=True, ack=True)
        assert r.device.log is None
        assert not r.backend.dirty_log.wanted


def test_a_descriptor_that_cannot_be_used_is_not_kept() -> None:
    with running() as r:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            path = os.open("/", os.O_PATH)
            r.front.send(Request.SET_VRING_CALL, number(0), [path], flags=9)
            os.close(path)
            r.front.receive(Request.SET_VRING_CALL)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_state_that_cannot_be_saved_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MissingFeature("no configuration")

    monkeypatch.setattr(session, "save_state", fail)
    with running() as r:
        r.front.stop()
        before = len(os.listdir("/proc/self/fd"))
        reading, writing = os.pipe()
        for _ in range(20):
            r.front.ask(Request.SET_DEVICE_STATE_FD, state(0, 0), [writing])
        os.close(reading)
        os.close(writing)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_guest_whose_rings_were_gone_has_lost_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as r:
        monkeypatch.setattr(GuestMemory, "lost", 4096)
        r.backend.tick()
        assert "guest memory" in r.backend.failed
        assert r.device.state is State.RESET
