"""Recordings of what goes wrong: processes that are killed, fork or compete, devices that go, and very many calls."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hwsim
import pytest
from hw_guest import HwGuest
from tracing import mounted

from pyvhostvdpa import State, Trace, VhostVdpa
from pyvhostvdpa.base.uapi import BackendFeature, IotlbType
from pyvhostvdpa.chardev.burst import PreparedMessages
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.net.features import CONTROL, SUPPORTED
from pyvhostvdpa.trace import live
from pyvhostvdpa.trace.recorder import Event
from pyvhostvdpa.trace.summary import summarize
from pyvhostvdpa.trace.tracefs import Instance
from pyvhostvdpa.trace.watch import CALLER

MANY = 100_000


@pytest.fixture(autouse=True)
def tracefs() -> Iterator[None]:
    with mounted():
        yield


def program(text: str, *arguments: str) -> subprocess.Popen[str]:
    """Python in a process of its own; it says a line when it is ready."""
    source = "import os, sys, time\nfrom pyvhostvdpa import VhostVdpa\n" + textwrap.dedent(text)
    argv = [sys.executable, "-c", source, *arguments]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.wait(60)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()


HOLD = """
device = VhostVdpa(sys.argv[1])
device.set_owner()
print("ready", flush=True)
sys.stdin.readline()
"""


def names(events: list[Event], device: str) -> list[str]:
    return [event.event for event in events if event.device == device]


def test_killed_process_ends_with_a_close(devices: tuple[str, str]) -> None:
    with live.Watch() as watch:
        process = program(HOLD, devices[0])
        process.kill()
        end(process)
        watch.stop()
    assert names(watch.trace.events, devices[0]) == ["open", "VHOST_SET_OWNER", "close"]
    assert watch.trace.events[0].fields["pid"] == process.pid
    assert watch.lost == 0


def test_device_that_is_deleted_while_it_is_open_is_followed_to_its_close() -> None:
    sim = hwsim.add("goes")
    with live.Watch() as watch:
        process = program(HOLD, sim.chardev)
        deleting = subprocess.Popen(["vdpa", "dev", "del", sim.name])
        time.sleep(1)
        process.kill()
        end(process)
        assert deleting.wait(60) == 0
        watch.stop()
    assert names(watch.trace.events, sim.chardev) == ["open", "VHOST_SET_OWNER", "close"]
    assert watch.lost == 0


COUNT = """
device = VhostVdpa(sys.argv[1])
device.set_owner()
print("ready", flush=True)
sys.stdin.readline()
for index in range(int(sys.argv[2])):
    device.set_vring_base(index % 2, index)
device.close()
"""


def test_calls_of_two_concurrent_processes_are_recorded_separately(devices: tuple[str, str]) -> None:
    with live.Watch() as watch:
        processes = [program(COUNT, device, "500") for device in devices]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            end(process)
        watch.stop()
    for device, process in zip(devices, processes, strict=True):
        of_device = [event for event in watch.trace.events if event.device == device]
        bases = [event.fields["num"] for event in of_device if event.event == "VHOST_SET_VRING_BASE"]
        assert bases == list(range(500))
        assert of_device[0].fields["pid"] == process.pid
        assert all(a.t_end <= b.t_begin for a, b in itertools.pairwise(of_device))
    assert watch.lost == 0


def test_calls_of_a_forked_child_are_named_as_its(devices: tuple[str, str]) -> None:
    fork = """
    device = VhostVdpa(sys.argv[1])
    device.set_owner()
    if not os.fork():
        device.get_status()
        os._exit(0)
    os.wait()
    device.get_features()
    print("ready", flush=True)
    """
    with live.Watch() as watch:
        process = program(fork, devices[0])
        end(process)
        watch.stop()
    found = [(event.event, event.fields.get("pid")) for event in watch.trace.events]
    child = found[2][1]
    assert found == [
        ("open", process.pid),
        ("VHOST_SET_OWNER", None),
        (CALLER, child),
        ("VHOST_VDPA_GET_STATUS", None),
        (CALLER, process.pid),
        ("VHOST_GET_FEATURES", None),
        ("close", None),
    ]
    assert child != process.pid


def test_only_the_process_and_the_device_asked_for_are_recorded(devices: tuple[str, str]) -> None:
    first, second = program(HOLD, devices[0]), program(HOLD, devices[1])
    with live.Watch(pids=[first.pid]) as by_pid:
        first.kill()
        second.kill()
        end(first)
        end(second)
        by_pid.stop()
    assert [(event.device, event.event) for event in by_pid.trace.events if event.result is not None] == [
        (devices[0], "close")
    ]
    with live.Watch(devices=[devices[1]]) as by_device:
        for device in devices:
            process = program(HOLD, device)
            process.kill()
            end(process)
        by_device.stop()
    assert {event.device for event in by_device.trace.events} == {devices[1]}


def test_32_queues_are_recorded_call_for_call() -> None:
    sim = hwsim.add("wide", 16)
    guest = None
    try:
        with live.Watch() as watch:
            guest = HwGuest(sim, 16, SUPPORTED | CONTROL, BackendFeature(0), procedure="direct")
            guest.start()
            guest.device.stop()
            guest.start(State.SHADOW)
            guest.device.stop()
            guest.close()
            watch.stop()
        own = [e for e in guest.device.trace._trace.events if e.result is not None and e.event != "open"]
        seen = [e for e in watch.trace.events if e.event != "open"]
        assert [(e.event, e.fields, e.result) for e in seen] == [(e.event, e.fields, e.result) for e in own]
        assert len(seen) > 300
        (migration,) = summarize(watch.trace).found.migrations
        assert migration.switch is not None
        assert len(migration.switch[1].queues) == 33
        assert watch.lost == 0
    finally:
        hwsim.remove(sim.name)


def send_many(path: str, count: int) -> None:
    """One map and its unmap, again and again, in one batch, from C."""
    memory = mmap.mmap(-1, 0x1000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    page = IotlbMessage(IotlbType.UPDATE, 0, 0x1000, 0x1000, address, 3)
    gone = IotlbMessage(IotlbType.INVALIDATE, 0, 0x1000, 0x1000)
    with VhostVdpa(path, Trace(0)) as door:
        door.set_owner()
        door.write_iotlb([IotlbMessage(IotlbType.BATCH_BEGIN, 0)])
        burst = PreparedMessages(1000)
        for _ in range(500):
            burst.add(page)
            burst.add(gone)
        for _ in range(count // 1000):
            burst.send(door)
        door.write_iotlb([IotlbMessage(IotlbType.BATCH_END, 0)])


def recorded(watch: live.Watch) -> int:
    return sum(event.event in ("IOTLB_UPDATE", "IOTLB_INVALIDATE") for event in watch.trace.events)


def unreported(watch: live.Watch, sent: int) -> int:
    """Messages that are neither recorded nor counted as lost; each is three records, the last may be half there."""
    return max(0, sent - recorded(watch) - (watch.lost + 3) // 3)


def test_100000_messages_are_recorded_or_counted_as_lost(devices: tuple[str, str]) -> None:
    """Whether any is lost depends on which is faster, the sender in C or the reader."""
    with live.Watch() as watch:
        begin = time.monotonic()
        send_many(devices[0], MANY)
        sent = time.monotonic()
        watch.stop()
        print(f"{MANY:,} messages in {sent - begin:.1f} s, put together {time.monotonic() - sent:.1f} s later")
    print(f"{recorded(watch):,} recorded, {watch.lost:,} records lost")
    assert recorded(watch) > 0
    assert unreported(watch, MANY) == 0


def test_records_that_do_not_fit_are_counted(devices: tuple[str, str]) -> None:
    """With the reader asleep, and a buffer too small for that."""
    with live.Watch(instance=Instance(kib=64), period=3600) as watch:
        send_many(devices[0], 10_000)
        watch.stop()
    assert 0 < recorded(watch) < 10_000
    assert unreported(watch, 10_000) == 0
    assert summarize(watch.trace).to_dict()["lost_events"] == watch.lost


WATCH = [sys.executable, "-m", "pyvhostvdpa", "watch"]


def test_command_records_a_command_to_its_end(devices: tuple[str, str], tmp_path: Path) -> None:
    # the recording has the lowest priority, the recorded command does not
    nice = "print(os.sched_getscheduler(0), os.nice(0)); sys.stdout.flush(); sys.exit(7)"
    text = HOLD.replace("sys.stdin.readline()", nice)
    source = "import os, sys, time\nfrom pyvhostvdpa import VhostVdpa\n" + text
    argv = [*WATCH, "--json", "--trace", str(tmp_path / "r.jsonl"), "--report", str(tmp_path / "page"), "--"]
    done = subprocess.run(
        [*argv, sys.executable, "-c", source, devices[0]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "pyvhostvdpa/watch/1"
    assert found["lost_events"] == 0
    assert [(d["device"], d["ioctls"]) for d in found["devices"]] == [(devices[0], 1)]
    assert "ready" in done.stderr
    assert "\n0 0\n" in done.stderr
    assert "opened by python3" in done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "pyvhostvdpa", "report", "--json", str(tmp_path / "r.jsonl")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(again.stdout)["devices"] == found["devices"]
    assert (tmp_path / "page" / "index.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_recording_with_its_summary(devices: tuple[str, str], number: signal.Signals) -> None:
    process = subprocess.Popen(WATCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "until Ctrl-C" in process.stderr.readline()
    VhostVdpa(devices[0]).close()
    time.sleep(0.3)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "vhost-vdpa-0" in out
    assert f"({os.getpid()})" in out


def refused(*before: str, **options: Any) -> str:
    done = subprocess.run([*before, *WATCH, "--for", "1"], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


def test_watch_without_root_or_tracefs_prints_the_reason_and_the_next_command() -> None:
    assert refused(user=65534, cwd="/") == (
        "vhost-vdpa: recording other processes' calls needs root: only root may use tracefs\n"
        "  next: the same command as root (sudo)\n"
    )
    unmount = 'umount -l /sys/kernel/debug 2>/dev/null; umount -l /sys/kernel/tracing; exec "$@"'
    assert refused("unshare", "--mount", "sh", "-c", unmount, "sh") == (
        "vhost-vdpa: tracefs is not mounted\n  next: mount -t tracefs nodev /sys/kernel/tracing\n"
    )
