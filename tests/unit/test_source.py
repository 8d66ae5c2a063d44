"""What a source does at the stop, and with each answer of the other side."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_migration import Rig, StubDevice

from pyvhostvdpa.base.errors import MigrationFailed, MigrationRefused
from pyvhostvdpa.device.net import State
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.migration import source as source_module
from pyvhostvdpa.migration.stream import Frame


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def content(memory: GuestMemory) -> bytes:
    return b"".join(bytes(region.memory.buffer) for region in memory.regions)


def test_guest_stands_still_before_its_device_is_stopped_for_good(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_memory_that_differs_lets_the_guest_go_on(rig: Rig) -> None:
    with rig.source() as (source, other):
        source.options = replace(source.options, hashed=True)
        with pytest.raises(MigrationFailed, match=r"memory at the destination differs.*the guest goes on"):
            source.run()
    assert Frame.GO not in other.heard
    assert rig.runs


def test_refused_guest_goes_on_and_sends_no_memory(rig: Rig) -> None:
    with rig.source({Frame.SHAPE: Frame.REFUSE}) as (source, other), pytest.raises(MigrationRefused):
        source.run()
    assert Frame.ROUND not in other.heard
    assert rig.device.calls == []
    assert rig.runs


@pytest.mark.parametrize("at", [Frame.FINAL, Frame.GO])
def test_destination_that_failed_and_said_so_lets_the_guest_go_on(rig: Rig, at: Frame) -> None:
    with (
        rig.source({at: Frame.FAILED}) as (source, _),
        pytest.raises(MigrationFailed, match=r"so it was told.*the guest goes on in passthrough"),
    ):
        source.run()
    assert rig.runs
    assert not rig.files()


def test_device_that_failed_to_stop_is_halted_before_the_guest_goes_on(rig: Rig) -> None:
    rig.device.failures["stop"] = [OSError(errno.EIO, "Input/output error")]
    with rig.source() as (source, _), pytest.raises(MigrationFailed, match="the guest goes on"):
        source.run()
    assert rig.device.calls[-2:] == ["halt", "start_passthrough"]


def test_guest_whose_device_cannot_be_started_again_stands_still(rig: Rig) -> None:
    error = OSError(errno.EIO, "Input/output error")
    rig.device.failures = {"start_shadow": [error], "start_passthrough": [error]}
    with rig.source() as (source, _), pytest.raises(MigrationFailed, match="saved in"):
        source.run()
    assert not any(traffic.running for traffic in rig.guest.traffic)


def test_source_that_was_stopped_for_too_long_does_not_go_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = SimpleNamespace(left=0.0, passed=True)
    monkeypatch.setattr(source_module, "Fence", lambda seconds, margins: passed)
    with (
        rig.source({Frame.FINAL: None}) as (source, _),
        pytest.raises(MigrationFailed, match="so late after the destination was ready"),
    ):
        source.run()
    assert not rig.runs
    assert len(rig.files()) == 1
