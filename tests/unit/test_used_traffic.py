"""Traffic over many switches, in each way to shadow, on a model of a device: only a lack of buffers loses frames."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from loop_device import LoopDoor, build
from procedure_rig import PROCEDURES, Rig

from pyvhostvdpa import State
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.device.shadowing import USED
from pyvhostvdpa.guest.nic import FRAME_BUFFER
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import PAGE_SIZE

SWITCHES = int(os.environ.get("PYVHOSTVDPA_TRAFFIC_SWITCHES", "20"))
WAYS = [name for name in PROCEDURES if name.startswith(("direct,", "in place,")) or name in ("direct", "in place")]


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("a C compiler, which builds the model device, is not installed")
    LoopDoor.library = build(tmp_path_factory.mktemp("loop"))


@contextmanager
def traffic(name: str, **options: int) -> Iterator[tuple[Rig, Traffic, LoopDoor]]:
    make, advertised = PROCEDURES[name]
    it = Rig(make, advertised, True, LoopDoor, 64, name.endswith(f", {USED}"))
    door = it.door
    assert isinstance(door, LoopDoor)
    [region] = it.memory.regions
    door.give(region.gpa, it.memory.hva(region.gpa, region.size), region.size)
    for option, value in options.items():
        setattr(door.loop, option, value)
    made = Traffic(it.nic)
    try:
        yield it, made, door
    finally:
        made.pause()
        made.end()
        it.close()


def receives(it: Rig, door: LoopDoor, frames: int) -> None:
    goals = [pair.counts().received + frames for pair in it.nic.pairs]
    deadline = time.monotonic() + 20
    while not all(pair.counts().received >= goal for pair, goal in zip(it.nic.pairs, goals, strict=True)):
        it.procedure.check()
        assert time.monotonic() < deadline, f"{it.nic.counts()}, {door.loop.dropped} dropped, {it.procedure.state}"
        time.sleep(0.0005)


def switch(it: Rig, mode: State) -> None:
    it.stop(mode)
    it.start(mode)


@pytest.mark.parametrize("simple", [0, 1], ids=["device", "device like vdpa_sim"])
@pytest.mark.parametrize("base_avail", [False, True], ids=["base is the used index", "base is the avail index"])
@pytest.mark.parametrize("name", WAYS)
def test_switches_under_traffic_lose_nothing(
    name: str, base_avail: bool, simple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With descriptors held at each suspend, of a device that keeps order."""
    monkeypatch.setattr(LoopDoor, "base_avail", base_avail)
    with traffic(name, ahead=16, simple=simple) as (it, guest, door):
        it.start(State.PASSTHROUGH)
        guest.run()
        for number in range(SWITCHES):
            receives(it, door, 40)
            switch(it, State.PASSTHROUGH if number % 2 else State.SHADOW)
        receives(it, door, 40)
        assert guest.stop_sending(20.0), f"{it.nic.counts()}, {door.loop.dropped} dropped"
        counts = it.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted, counts.reordered) == (0, 0, 0, 0)
        assert (door.loop.dropped, door.loop.faults) == (0, 0)


@pytest.mark.parametrize("base_avail", [False, True], ids=["base is the used index", "base is the avail index"])
@pytest.mark.parametrize("name", WAYS)
def test_a_device_out_of_order_loses_nothing_while_it_is_shadowed(
    name: str, base_avail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its receive queues, and in its transmit queues where these are relayed too."""
    monkeypatch.setattr(LoopDoor, "base_avail", base_avail)
    with traffic(name, ahead=16) as (it, guest, door):
        it.start(State.PASSTHROUGH)
        guest.run()
        for _ in range(SWITCHES // 2):
            receives(it, door, 20)
            it.stop(State.SHADOW)
            door.loop.reorder = 1 if name.endswith(f", {USED}") else 2
            it.start(State.SHADOW)
            receives(it, door, 40)
            it.stop(State.PASSTHROUGH)
            door.loop.reorder = 0
            it.start(State.PASSTHROUGH)
        receives(it, door, 20)
        assert guest.stop_sending(20.0), f"{it.nic.counts()}, {door.loop.dropped} dropped"
        counts = it.nic.counts()
        assert (counts.lost, counts.duplicated, counts.corrupted) == (0, 0, 0)
        assert (door.loop.dropped, door.loop.faults) == (0, 0)


def pages(gpa: int, size: int) -> set[int]:
    return set(range(gpa & -PAGE_SIZE, gpa + size, PAGE_SIZE))


def device_writes(it: Rig) -> tuple[set[int], set[int]]:
    """The pages of what a device writes, and with them those of what a stop writes."""
    written: set[int] = set()
    returned: set[int] = set()
    for pair in it.nic.pairs:
        written |= pages(pair.c.rx_gpa, pair.rx.num * FRAME_BUFFER)
        for queue in pair.queues:
            written |= pages(*queue.parts[2])
            returned |= pages(*queue.parts[1])
    return written, written | returned


@pytest.mark.parametrize("reorder", [0, 1], ids=["in order", "out of order"])
@pytest.mark.parametrize("name", WAYS)
def test_every_page_that_a_device_changed_while_shadowed_is_dirty(name: str, reorder: int) -> None:
    """And no other, whatever it held at the stop."""
    with traffic(name, ahead=16, reorder=reorder) as (it, guest, door):
        written, may_be = device_writes(it)
        for _ in range(SWITCHES // 2):
            before = {page: ffi.buffer(ffi.cast("char *", it.memory.hva(page)), PAGE_SIZE)[:] for page in written}
            it.memory.start_dirty_log()
            it.start(State.SHADOW)
            guest.run()
            receives(it, door, 40)
            guest.pause()
            it.stop()
            dirty = set(it.memory.dirty_pages())
            changed = {
                page
                for page in written
                if ffi.buffer(ffi.cast("char *", it.memory.hva(page)), PAGE_SIZE)[:] != before[page]
            }
            assert changed, "nothing came"
            assert not changed - dirty
            assert not dirty - may_be
            it.memory.stop_dirty_log()


@pytest.mark.parametrize("name", ["direct, used", "in place, used"])
def test_a_guest_that_sends_too_much_loses_only_frames_that_the_device_dropped(name: str) -> None:
    """It sends at once, and posts buffers through the relay, which is kept from them for a while."""
    with traffic(name) as (it, guest, door):
        for pair in it.nic.pairs:
            pair.c.window = 16 * pair.rx.num
        it.start(State.SHADOW)
        guest.run()
        receives(it, door, 40)
        with it.procedure._data_threads_paused():
            goals = [pair.c.received + 2 * pair.rx.num for pair in it.nic.pairs]
            deadline = time.monotonic() + 20
            while not all(pair.c.sent > goal for pair, goal in zip(it.nic.pairs, goals, strict=True)):
                assert time.monotonic() < deadline, it.nic.counts()
                time.sleep(0.0005)
        guest.stop_sending(1.0)
        counts = it.nic.counts()
        assert counts.lost == door.loop.dropped > 0
        assert (counts.duplicated, counts.corrupted, door.loop.faults) == (0, 0, 0)
