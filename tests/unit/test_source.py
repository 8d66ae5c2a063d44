"""What a source does at the stop, and with each answer of the other side."""

from __future__ import annotations

import errno
from dataclasses import replace
from types import SimpleNamespace

import pytest
from stub_migration import Rig, StubDevice

from pyvhostvdpa.base.errors import MigrationFailed, MigrationRefused
from pyvhostvdpa.device.net import State
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.migration import source as source_module
from pyvhostvdpa.migration.stream import Frame


def content(memory: GuestMemory) -> bytes:
    return b"".join(bytes(region.memory.buffer) for region in memory.regions)


def test_guest_is_paused_before_its_device_is_stopped_for_good(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[bool] = []
    stop = StubDevice.stop

    def look(device: StubDevice, then: State | None = None) -> None:
        running.append(any(traffic.running for traffic in rig.guest.traffic))
        stop(device, then)

    monkeypatch.setattr(StubDevice, "stop", look)
    with rig.source() as (source, _):
        source.run()
    assert running == [True, False]


def test_page_written_by_the_last_stop_arrives(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StubDevice.stop
    [region] = rig.guest.memory.regions

    def write(device: StubDevice, then: State | None = None) -> None:
        if device.state is State.SHADOW:
            with region.memory.buffer as buffer:
                buffer[-8:] = b"republsh"
        stop(device, then)

    monkeypatch.setattr(StubDevice, "stop", write)
    with rig.source() as (source, other):
        source.run()
        assert content(other.memory) == content(rig.guest.memory)


@pytest.mark.parametrize("theirs", [b"", b"another.", b"longer than one"])
def test_memory_that_differs_lets_the_guest_continue(rig: Rig, theirs: bytes) -> None:
    with rig.source() as (source, other):
        other.hash = theirs
        source.options = replace(source.options, hashed=True)
        with pytest.raises(MigrationFailed, match=r"memory at the destination differs.*the guest continues"):
            source.run()
    assert Frame.GO not in other.heard
    assert rig.runs


def test_refused_guest_continues_and_sends_no_memory(rig: Rig) -> None:
    with rig.source({Frame.SHAPE: Frame.REFUSE}) as (source, other), pytest.raises(MigrationRefused):
        source.run()
    assert Frame.ROUND not in other.heard
    assert rig.device.calls == []
    assert rig.runs


@pytest.mark.parametrize("at", [Frame.FINAL, Frame.GO])
def test_destination_that_reports_its_failure_lets_the_guest_continue(rig: Rig, at: Frame) -> None:
    with (
        rig.source({at: Frame.FAILED}) as (source, _),
        pytest.raises(MigrationFailed, match=r"so it was told.*the guest continues in passthrough"),
    ):
        source.run()
    assert rig.runs
    assert not rig.files()


def test_device_that_failed_to_stop_is_halted_before_the_guest_continues(rig: Rig) -> None:
    rig.device.failures["stop"] = [OSError(errno.EIO, "Input/output error")]
    with rig.source() as (source, _), pytest.raises(MigrationFailed, match="the guest continues"):
        source.run()
    assert rig.device.calls[-2:] == ["halt", "start_passthrough"]


def test_guest_whose_device_cannot_be_started_again_is_paused(rig: Rig) -> None:
    error = OSError(errno.EIO, "Input/output error")
    rig.device.failures = {"start_shadow": [error], "start_passthrough": [error]}
    with rig.source() as (source, _), pytest.raises(MigrationFailed, match="saved in"):
        source.run()
    assert not any(traffic.running for traffic in rig.guest.traffic)


def test_source_that_was_stopped_for_too_long_saves_its_guest(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = SimpleNamespace(left=0.0, passed=True)
    monkeypatch.setattr(source_module, "Fence", lambda seconds, margins: passed)
    with (
        rig.source({Frame.FINAL: None}) as (source, _),
        pytest.raises(MigrationFailed, match="so late after the destination was ready"),
    ):
        source.run()
    assert not rig.runs
    assert len(rig.files()) == 1
    assert "start_passthrough" not in rig.device.calls, "its device is not started for a guest that may run elsewhere"
