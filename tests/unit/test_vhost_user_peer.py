"""Two servers of one migration: the destination is ready when the guest comes, or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from served_double import PAIRS
from test_vhost_user_server import Rig
from vhost_front_end import MEMORY, FrontEnd, MiB
from waiting import wait_for

from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.device.net import State
from pyvhostvdpa.migration.endpoint import Address, Listener
from pyvhostvdpa.vhost_user import server as module
from pyvhostvdpa.vhost_user.coming import MemoryFile
from pyvhostvdpa.vhost_user.features import LOG_ALL
from pyvhostvdpa.vhost_user.messages import MessageRefused
from pyvhostvdpa.vhost_user.peer import describe, find_files, parse
from pyvhostvdpa.vhost_user.server import Peering

HOLDER = """
import os, sys
fds = [os.memfd_create(name) for name in sys.argv[2:]]
for fd in fds:
    os.ftruncate(fd, int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Rig, Rig]]:
    """A source that knows a destination, and the destination."""
    address = Address.parse(f"unix:{tmp_path}/peer")
    with ExitStack() as stack:
        destination = Rig(tmp_path / "destination.sock", peering=Peering(listener=Listener(address)))
        stack.callback(destination.close)
        source = Rig(tmp_path / "source.sock", peering=Peering(to=address))
        stack.callback(source.close)
        yield source, destination


def migrating(source: Rig, pairs: int = 1) -> FrontEnd:
    front = source.front()
    front.connect()
    front.start(pairs)
    os.close(front.start_logging(2 * pairs))
    return front


def waiting(destination: Rig) -> FrontEnd:
    front = destination.front()
    front.connect()
    front.memory = os.memfd_create("guest")
    os.ftruncate(front.memory, MEMORY)
    return front


def give(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Have the destination find this file: both front-ends are in this process."""
    monkeypatch.setattr(module, "find_files", lambda pid, files: [os.dup(memory)])


@pytest.mark.parametrize("pairs", [1, PAIRS])
def test_destination_is_mapped_and_suspended_before_the_guest_comes(
    two: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    source, destination = two
    there = waiting(destination)
    give(monkeypatch, there.memory)
    here = migrating(source, pairs)
    source.event("peer-ready")
    assert destination.event("prepared")["bytes"] == MEMORY - MiB + (640 << 10)
    names = destination.device.names()
    assert names[-3:] == ["add_memory", "map_memory", "stand_by"]
    here.stop(2 * pairs)
    destination.device.forget()
    there.start(pairs)
    assert [name for name in destination.device.names() if name != "check"] == ["start"]
    assert destination.device.state is State.PASSTHROUGH
    assert len(destination.device.regions) == 2
    here.close()
    there.close()


def test_destination_that_found_the_wrong_file_maps_the_right_one(
    two: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = two
    there = waiting(destination)
    other = os.memfd_create("other")
    os.ftruncate(other, MEMORY)
    give(monkeypatch, other)
    here = migrating(source)
    source.event("peer-ready")
    destination.device.forget()
    there.start()
    assert destination.device.state is State.PASSTHROUGH
    assert {"remove_memory", "add_memory"} <= set(destination.device.names())
    right = os.fstat(there.memory).st_ino
    assert {region.file[1] for region in destination.backend.memory.regions} == {right}
    assert set(destination.device.regions) == {0, MiB}
    here.close()
    there.close()
    os.close(other)


def test_destination_without_a_front_end_is_asked_again_until_it_has_one(
    two: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvhostvdpa.vhost_user.peer.RETRY", 0.05)
    source, destination = two
    here = migrating(source)
    assert "no front-end" in source.event("peer-not-ready")["said"]
    there = waiting(destination)
    give(monkeypatch, there.memory)
    source.event("peer-ready")
    here.close()
    there.close()


def test_a_cancelled_migration_leaves_the_destination_for_another_guest(
    two: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = two
    there = waiting(destination)
    give(monkeypatch, there.memory)
    here = migrating(source)
    source.event("peer-ready")
    here.stop_logging()
    there.close()
    wait_for(lambda: destination.status()["front_end"] is None)
    assert not destination.device.regions
    there = waiting(destination)
    there.start()
    assert destination.device.state is State.PASSTHROUGH
    here.close()
    there.close()


def test_a_device_that_refuses_the_coming_guest_has_none_of_its_memory(
    two: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = two
    there = waiting(destination)
    give(monkeypatch, there.memory)
    destination.device.fails["stand_by"] = MissingFeature("too many queues")
    here = migrating(source)
    assert "too many queues" in source.event("peer-not-ready")["said"]
    source.event("peer-ready")
    here.close()
    there.close()


def message() -> dict[str, Any]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, MiB)
    try:
        found: dict[str, Any] = json.loads(describe(1 << 32, 1, [], {(0, 1): fd}, [], None))
    finally:
        os.close(fd)
    found["regions"] = [{"gpa": 0, "size": MiB, "offset": 0, "file": 0}]
    found["rings"] = [{"index": 0, "num": 256, "desc": 0, "avail": 4096, "used": 8192}]
    return found


def test_a_message_is_read_back() -> None:
    guest = parse(json.dumps(message()).encode())
    assert guest.files == (MemoryFile("/memfd:guest", MiB),)
    assert guest.rings[0].queue(7).kick == 7


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: b"x",
        lambda m: b"[]",
        lambda m: json.dumps(m | {"schema": "other"}).encode(),
        lambda m: json.dumps(m | {"features": -1}).encode(),
        lambda m: json.dumps(m | {"pairs": 0}).encode(),
        lambda m: json.dumps(m | {"files": []}).encode(),
        lambda m: json.dumps(m | {"files": [{"name": 3, "size": 1}]}).encode(),
        lambda m: json.dumps(m | {"regions": [{"gpa": 0, "size": 1, "offset": 0, "file": 1}]}).encode(),
        lambda m: json.dumps(m | {"rings": [{"index": 0}]}).encode(),
        lambda m: json.dumps(m | {"rings": [3]}).encode(),
        lambda m: json.dumps(m | {"control": {"mac": "x"}}).encode(),
    ],
)
def test_a_message_that_is_not_one_is_refused(edit: Callable[[dict[str, Any]], bytes]) -> None:
    with pytest.raises(MessageRefused):
        parse(edit(message()))


def test_memory_files_of_a_process_are_found_by_name_and_size() -> None:
    words = [sys.executable, "-c", HOLDER, str(MiB), "first", "second"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        wanted = [MemoryFile("/memfd:second", MiB), MemoryFile("/memfd:first", MiB)]
        found = find_files(process.pid, wanted)
        assert [os.readlink(f"/proc/self/fd/{fd}").split()[0] for fd in found] == ["/memfd:second", "/memfd:first"]
        for fd in found:
            os.close(fd)
        with pytest.raises(MissingFeature, match="has no memory file"):
            find_files(process.pid, [*wanted, MemoryFile("/memfd:third", MiB)])
        process.kill()
    with pytest.raises(MissingFeature, match="cannot be seen"):
        find_files(process.pid, wanted)


def test_parsed_features_never_have_the_log_bit() -> None:
    assert not parse(json.dumps(message()).encode()).features & LOG_ALL
