"""Ctrl-C at any line: what leaves is the interrupt, not an error that it caused on the way out."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from door_double import OFFERED, DoorDouble

import pyvhostvdpa
from pyvhostvdpa.base.errors import MigrationFailed
from pyvhostvdpa.chardev.door import VhostVdpa
from pyvhostvdpa.cli import failure
from pyvhostvdpa.device.net import VdpaNetDevice
from pyvhostvdpa.guest.synthetic import GuestOptions
from pyvhostvdpa.host import command
from pyvhostvdpa.migration import cancel, session
from pyvhostvdpa.migration.source import SendOptions

PACKAGE = Path(pyvhostvdpa.__path__[0])
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
STEP = 101
"""Lines from one interrupt to the next where there are thousands; a prime number."""


class Interrupt:
    """Raises KeyboardInterrupt before the line with a number, counted in the files below a path."""

    def __init__(self, at: int, below: str, armed: bool = True) -> None:
        self._left, self._below, self.armed = at, below, armed
        self.where = ""

    def __call__(self, action: Callable[[], Any]) -> BaseException | None:
        """Do something; what it raised."""
        before = sys.gettrace()
        sys.settrace(self._frame)
        try:
            action()
        except BaseException as e:
            return e
        finally:
            sys.settrace(before)
        return None

    def _frame(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self._below) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and self.armed:
            self._left -= 1
            if self._left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def at_each_line(below: str, step: int = 1) -> Iterator[Interrupt]:
    """Interrupts at one line after the other, until one comes behind the end."""
    at = 1
    while True:
        interrupt = Interrupt(at, below)
        yield interrupt
        if not interrupt.where:
            return
        at += step


def test_a_program_that_is_run_is_interrupted_at_any_line() -> None:
    count = 0
    for interrupt in at_each_line(command.__file__):
        error = interrupt(lambda: command.outcome(["true"], 10.0))
        if interrupt.where:
            assert isinstance(error, KeyboardInterrupt), f"{interrupt.where}: {error!r}"
            count += 1
    assert count > 20


def test_a_descriptor_closed_at_an_interrupt_is_not_closed_again() -> None:
    for interrupt in at_each_line(cancel.__file__):
        made = cancel.Cancel()
        fd = made.fileno()
        interrupt(made.close)
        try:
            # the next file gets the number, if it is free
            other = os.eventfd(0)
            made.close()
            os.fstat(other)
        finally:
            for each in {fd, other}:
                try:
                    os.close(each)
                except OSError:
                    assert each != other


def test_a_descriptor_is_forgotten_before_it_is_closed() -> None:
    """os.close(self.x) with self.x = -1 behind it closes twice if Ctrl-C comes in between."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            closed = {
                ast.unparse(call.args[0]): call.lineno
                for call in ast.walk(function)
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "os.close"
            }
            later = [
                (ast.unparse(target), node.lineno)
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                for whole in node.targets
                for target in (whole.elts if isinstance(whole, ast.Tuple) else [whole])
            ]
            found += [f"{path.name}:{line} {name}" for name, line in later if line > closed.get(name, line)]
    assert found == []


def test_a_device_whose_opening_is_interrupted_is_closed(doors: list[DoorDouble]) -> None:
    opened = 0
    for interrupt in at_each_line(str(PACKAGE), 7):
        doors.append(DoorDouble(OFFERED))
        error = interrupt(lambda: VdpaNetDevice("/dev/vhost-vdpa-double"))
        door = doors.pop()
        if error is None:
            door.close()
            continue
        assert isinstance(error, KeyboardInterrupt), f"{interrupt.where}: {error!r}"
        opened += bool(door.calls)
        assert door.closed or not door.calls, interrupt.where
    assert opened > 20


class _Enough(BaseException):
    """The guest runs: what comes then listens to signals."""


def test_starting_a_guest_is_interrupted_at_any_line(doors: list[DoorDouble], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "check_devices", lambda paths: None)
    at, ends = 1, 0
    while not ends:
        interrupt = Interrupt(at, str(PACKAGE), armed=False)

        def observe(phase: str, interrupt: Interrupt = interrupt) -> None:
            interrupt.armed = phase == "start" or (interrupt.armed and phase != "connect")
            if phase == "connect":
                raise _Enough

        doors.append(DoorDouble(OFFERED))
        sending = session.Sending(
            ["/dev/vhost-vdpa-double"],
            lambda cancel: pytest.fail("it connects"),
            GuestOptions(8 << 20, ring_size=64),
            SendOptions(),
            0.01,
            observer=observe,
        )
        error = interrupt(sending.run)
        ends = isinstance(error, _Enough)
        assert ends or isinstance(error, KeyboardInterrupt), f"{interrupt.where}: {error!r}"
        doors.pop().close()
        at += STEP
    assert at > 2000


# -- how it is told ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Interrupts are ignored once one was told."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def ended(error: Callable[[], BaseException]) -> BaseException:
    """Return an error that comes up while Ctrl-C is on its way."""
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise error()
    except BaseException as e:
        return e


def test_an_error_on_the_way_out_of_an_interrupt_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert failure.explain(ended(lambda: OSError(9, "Bad file descriptor"))) == 130
    said = capsys.readouterr().err
    assert said.startswith("vhost-vdpa: interrupted; ")
    assert "on the way out: OSError: [Errno 9] Bad file descriptor" in said


def test_an_interrupt_that_python_made_another_error_of_is_status_130() -> None:
    class Named:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, RuntimeError)) as caught:
        type("Made", (), {"named": Named()})
    assert failure.explain(caught.value) == 130


def test_an_explained_error_that_follows_an_interrupt_keeps_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    error = ended(lambda: MigrationFailed("the guest is saved in F", hint="vhost-vdpa receive --take F vdpa0"))
    assert failure.explain(error) == 130
    said = capsys.readouterr().err
    assert "the guest is saved in F\n  next: vhost-vdpa receive --take F vdpa0" in said


def test_an_error_of_its_own_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("a")
    error.__context__ = other = ValueError("b")
    other.__context__ = error
    assert failure.explain(error) is None


LOSES = """
import signal, sys, time, weakref
from pyvhostvdpa.cli import commands, main

# a shell's background job is started with SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

class Lock:
    pass

def interrupted(_):
    raise KeyboardInterrupt

def run(arguments):
    lock = Lock()
    watching = weakref.ref(lock, interrupted)
    del lock
    time.sleep(20)
    return 0

commands.run = run
sys.exit(main([]))
"""
"""A weak reference's callback, as importlib has one behind each import, which cannot raise."""


def test_an_interrupt_where_python_cannot_raise_it_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", LOSES], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "vhost-vdpa: interrupted; no device was opened\n")


def test_the_message_of_an_interrupt_reports_whether_a_device_was_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for opened, words in ((False, "no device was opened"), (True, "the devices were reset and closed")):
        monkeypatch.setattr(VhostVdpa, "any_opened", opened)
        assert failure.explain(KeyboardInterrupt()) == 130
        assert words in capsys.readouterr().err
