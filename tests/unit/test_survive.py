"""A guest outlives its reports: callbacks, counters and files that fail do not end it."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stub_migration import Rig

from pyvhostvdpa.base.errors import MigrationCancelled, MigrationFailed
from pyvhostvdpa.device.net import State
from pyvhostvdpa.host import mgmt
from pyvhostvdpa.migration import fence, rescue
from pyvhostvdpa.migration import source as source_module
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.report import Drops
from pyvhostvdpa.migration.source import SOURCE_PHASES
from pyvhostvdpa.migration.stream import Frame


def closed_stderr(text: str) -> None:
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def at(phase: str, action: Callable[[], None]) -> Callable[[str], None]:
    def observe(now: str) -> None:
        if now == phase:
            action()

    return observe


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_source_sends_the_guest(rig: Rig) -> None:
    with rig.source() as (source, other):
        sent = source.run()
    assert other.heard[-1] is Frame.GO
    assert rig.device.state is State.RESET
    assert not rig.runs
    assert (sent.switched, sent.halted) == ({"stub0"}, {"stub0"})


def test_source_with_failing_callbacks_sends_the_guest(rig: Rig) -> None:
    with rig.source(observer=closed_stderr, tell=closed_stderr) as (source, other):
        source.run()
    assert other.heard[-1] is Frame.GO


def test_observer_failing_at_running_while_the_answer_is_lost_saves_the_guest(rig: Rig) -> None:
    failing = at("running", lambda: closed_stderr(""))
    with (
        rig.source({Frame.GO: None}, observer=failing) as (source, _),
        pytest.raises(MigrationFailed, match="on one side only"),
    ):
        source.run()
    assert len(rig.files()) == 1


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError(), RuntimeError("thread")])
@pytest.mark.parametrize("call", ["stop", "start_shadow", "check"])
def test_any_failure_before_the_hand_over_lets_the_guest_continue(rig: Rig, call: str, error: Exception) -> None:
    rig.device.failures[call] = [error]
    with (
        rig.source() as (source, other),
        pytest.raises(MigrationFailed, match="the guest continues in passthrough on stub0"),
    ):
        source.run()
    assert rig.runs
    assert rig.device.state is State.PASSTHROUGH
    assert Frame.GO not in other.heard
    assert not rig.files()


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_source_that_cannot_be_started_again_saves_the_guest_whatever_failed(rig: Rig, error: Exception) -> None:
    rig.device.failures = {"start_shadow": [error], "start_passthrough": [error]}
    with (
        rig.source() as (source, _),
        pytest.raises(MigrationFailed, match="The guest is stopped and saved in") as failed,
    ):
        source.run()
    [path] = rig.files()
    assert failed.value.hint == f"vhost-vdpa send --resume {path} stub0"


def test_answer_lost_for_want_of_memory_saves_the_guest(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    # the file is held until the destination's time is over; a minute would prove no more than a second
    monkeypatch.setattr(source_module, "patience", lambda shape: 1.0)
    monkeypatch.setattr(fence, "MARGIN", 0.1)
    with rig.source() as (source, _):
        expect = source.channel.expect

        def fail(*kinds: Frame, seconds: float | None = None) -> tuple[Frame, bytes]:
            if Frame.RUNNING in kinds:
                raise MemoryError
            return expect(*kinds, seconds=seconds)

        held: list[Path] = []
        monkeypatch.setattr(source.channel, "expect", fail)
        monkeypatch.setattr("pyvhostvdpa.migration.source.hold", lambda fence, path, *rest: held.append(path))
        with pytest.raises(MigrationFailed, match="saved in"):
            source.run()
    assert rig.files() == held
    assert len(held) == 1


def test_guest_that_cannot_be_saved_keeps_its_process_until_there_is_room(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rescue, "RETRY_SECONDS", 0.02)
    rig.folder.rmdir()
    rig.folder.write_text("in the place of the folder")
    waited = threading.Event()

    def make_room() -> None:
        while "exists in this process only" not in caplog.text:
            time.sleep(0.01)
        waited.set()
        rig.folder.unlink()

    thread = threading.Thread(target=make_room)
    with rig.source({Frame.GO: None}) as (source, _):
        monkeypatch.setattr("pyvhostvdpa.migration.source.check_room", lambda folder, size: None)
        thread.start()
        with pytest.raises(MigrationFailed, match="saved in"):
            source.run()
    thread.join()
    assert waited.is_set()
    assert len(rig.files()) == 1
    assert f"free 1 MiB in {rig.folder}" in caplog.text
    assert f"kill -9 {os.getpid()} ends the process" in caplog.text
    assert caplog.text.count("exists in this process only") == 1


def test_guest_that_cannot_be_saved_for_want_of_descriptors_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(rescue, "RETRY_SECONDS", 0.0)
    failures: list[Exception] = [MigrationFailed("not saved"), OSError(errno.EMFILE, "Too many open files")]
    failures[0].__cause__ = OSError(errno.ENFILE, "Too many open files in system")

    def save() -> str:
        if failures:
            raise failures.pop(0)
        return "saved"

    assert rescue.rescue(save, tmp_path, 1 << 20) == "saved"
    assert caplog.text.count(f"prlimit --pid {os.getpid()} --nofile=") == 2


@pytest.mark.parametrize("phase", SOURCE_PHASES[:-1])
def test_interrupt_before_the_hand_over_cancels(rig: Rig, phase: str) -> None:
    with (
        rig.source(observer=at(phase, interrupt)) as (source, other),
        source._cancel.on_signals(),
        pytest.raises(MigrationCancelled, match="continues in passthrough on stub0"),
    ):
        source.run()
    assert rig.runs
    assert Frame.GO not in other.heard


def test_interrupts_between_go_and_running_are_too_late(rig: Rig) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    with rig.source(observer=at("running", twice)) as (source, other), source._cancel.on_signals():
        source.run()
    assert other.heard[-1] is Frame.GO


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: a job that a shell has put in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_before_the_hand_over_ends_the_program() -> None:
    with Cancel() as cancel, cancel.on_signals():
        interrupt()
        assert cancel.wanted
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_on_signals_in_another_thread_runs_without_signals() -> None:
    found: list[object] = []

    def use() -> None:
        try:
            with Cancel() as cancel, cancel.on_signals():
                cancel.set()
                found.append(cancel.wanted)
        except BaseException as e:
            found.append(e)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_drop_counters_that_cannot_be_read_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    told: list[str] = []
    monkeypatch.setattr(mgmt, "vendor_statistics", fail)
    drops = Drops("dev", [], told.append)
    assert drops.now() is None
    assert told == ["the drop counters of dev are unknown: OSError: [Errno 24] Too many open files"]


def test_guest_whose_time_passed_as_it_came_back_is_saved_and_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination may have saved it, and a user may have started it there; the stream is closed by then."""
    began = fence.now()
    seconds = [0.0]
    monkeypatch.setattr(fence, "now", lambda: began + seconds[0])
    start = rig.device.start_passthrough

    def slow(*arguments: object) -> None:
        start(*arguments)
        seconds[0] = 1e6

    monkeypatch.setattr(rig.device, "start_passthrough", slow)
    with rig.source({Frame.FINAL: Frame.ALIVE}) as (source, _), pytest.raises(MigrationFailed) as caught:
        source.run()
    [saved] = rig.files()
    assert f"saved in {saved}" in str(caught.value)
    assert f"if it runs there: rm {saved}" in caught.value.hint
    assert not rig.runs
