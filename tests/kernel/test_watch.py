"""A recording from outside is what the door recorded itself: on real devices, with the kernel's own probes."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import hwsim
import pytest
from tracing import made, mounted

from pyvhostvdpa import GuestOptions, MigrationOptions, Trace, VhostVdpa, migrate
from pyvhostvdpa.base.uapi import IotlbType, MessageFormat
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.trace import live
from pyvhostvdpa.trace.downtime import DT1, DT2, milliseconds
from pyvhostvdpa.trace.infer import infer
from pyvhostvdpa.trace.probes import PROBES
from pyvhostvdpa.trace.recorder import Event
from pyvhostvdpa.trace.summary import summarize
from pyvhostvdpa.trace.tracefs import Instance, Tracefs
from pyvhostvdpa.trace.watch import CALLER


@pytest.fixture(autouse=True)
def tracefs() -> Iterator[None]:
    with mounted():
        yield


def calls(events: list[Event]) -> list[tuple[str, str, dict[str, int | str], int | None]]:
    """The calls among events, in order, as both sides know them."""
    chosen = sorted((e for e in events if e.result is not None), key=lambda e: (e.t_begin, e.t_end))
    return [(e.device, e.event, {} if e.event == "open" else dict(e.fields), e.result) for e in chosen]


def test_small_program_is_recorded_call_for_call(devices: tuple[str, str]) -> None:
    with live.Watch() as watch:
        print("\n".join(watch.forms.values()))
        trace, memory = Trace(), mmap.mmap(-1, 0x1000)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for path in devices:
            with VhostVdpa(path, trace) as door:
                door.set_owner()
                door.set_backend_features(door.get_backend_features())
                door.get_features()
                door.get_config(0, 6)
                door.get_iova_range()
                door.set_vring_addr(0, 0x1000, 0x2000, 0x3000)
                door.set_vring_kick(0, -1)
                with pytest.raises(Exception, match="ENOBUFS"):
                    door.set_vring_num(99, 256)
                page = IotlbMessage(IotlbType.UPDATE, 0, 0x1000, 0x1000, address, 3)
                with pytest.raises(Exception, match="EFAULT"):
                    door.write_iotlb([page, page])
                door.write_iotlb([IotlbMessage(IotlbType.INVALIDATE, 0, 0, 0x1000)], MessageFormat.V1)
                door.write_iotlb([IotlbMessage(IotlbType.BATCH_BEGIN, 1), IotlbMessage(IotlbType.BATCH_END, 1)])
        watch.stop()
    for mine, theirs in zip(trace.events, watch.trace.events, strict=True):
        print(mine, theirs)
    assert calls(watch.trace.events) == calls(trace.events)
    assert not watch.trace.dropped
    for ours, theirs in zip(trace.events, watch.trace.events, strict=True):
        assert ours.t_begin <= theirs.t_begin <= theirs.t_end <= ours.t_end
    opened = [event for event in watch.trace.events if event.event == "open"]
    assert {event.fields["pid"] for event in opened} == {os.getpid()}


@pytest.fixture(params=["vdpa_sim_net", "vdpa_hwsim"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Two devices of a kind."""
    if request.param == "vdpa_sim_net":
        yield request.getfixturevalue("devices")
        return
    sims = [hwsim.add(f"watched{number}") for number in range(2)]
    yield sims[0].chardev, sims[1].chardev
    for sim in sims:
        hwsim.remove(sim.name)


def phases_of(trace: Trace, device: str) -> list[tuple[str, str]]:
    """Each call on a device with its phase, in order."""
    chosen = [event for event in trace.events if event.device == device and event.result is not None]
    return [(event.event, event.phase) for event in sorted(chosen, key=lambda e: (e.t_begin, e.t_end))]


def test_migration_is_recorded_as_its_own_trace(pair: tuple[str, str]) -> None:
    trace = Trace()
    with live.Watch() as watch:
        migrate(*pair, MigrationOptions(GuestOptions(memory=64 << 20), seconds=3), trace=trace)
        watch.stop()
    theirs = calls([event for event in watch.trace.events if event.event != CALLER])
    for device in pair:
        assert [c for c in theirs if c[0] == device] == [c for c in calls(trace.events) if c[0] == device]
    assert not watch.trace.dropped
    found = summarize(watch.trace)
    bare = Trace()
    bare.events = [event._replace(phase="") for event in trace.events if event.result is not None]
    own_calls = infer(bare).trace
    for device in pair:
        assert phases_of(found.trace, device) == phases_of(own_calls, device)
    for phases in (DT1, DT2):
        # the clock is read inside the system call here, around it there; a busy machine may do something in between
        recorded, own = (milliseconds(each, pair[0], phases) for each in (found.trace, own_calls))
        assert recorded <= own
        assert recorded == pytest.approx(own, rel=0.05, abs=20)
    (migration,) = found.found.migrations
    assert migration.destination is not None
    assert (migration.source.device, migration.destination.device) == pair
    assert migration.stop_to_run_ms is not None


def test_probes_can_be_set_on_functions_without_type_information(devices: tuple[str, str]) -> None:
    """As on a kernel without BTF: forms by number only."""
    plain = tuple(
        replace(
            probe,
            forms=tuple(f for f in probe.forms if not any(x in f for x in ("->", "msg", "=asid", "(arg)", "=cmd:"))),
        )
        for probe in PROBES
    )
    plain = tuple(probe for probe in plain if probe.forms)
    trace = Trace()
    with live.Watch(instance=Instance(probes=plain)) as watch:
        print("\n".join(watch.forms.values()))
        with VhostVdpa(devices[0], trace) as door:
            door.get_features()
            door.set_owner()
            door.write_iotlb([IotlbMessage(IotlbType.BATCH_BEGIN, 0), IotlbMessage(IotlbType.BATCH_END, 0)])
        watch.stop()
    assert calls(watch.trace.events) == calls(trace.events)


def test_killed_recording_is_removed_by_the_next() -> None:
    program = (
        "import time; from pyvhostvdpa.trace.live import Watch; w = Watch(); print('up', flush=True); time.sleep(99)"
    )
    process = subprocess.Popen(["python3", "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert not Tracefs().remove_abandoned()
    process.kill()
    process.wait()
    process.stdout.close()
    left = made()
    assert len(left) > 10
    with live.Watch() as watch:
        watch.stop()
    assert not made()
