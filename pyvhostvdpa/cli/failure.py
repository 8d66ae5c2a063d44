# SPDX-License-Identifier: MIT
"""Where an error leaves the program: as a sentence, the next command and an exit status.

This module is loaded before anything else of the package and loads nothing
that a Python process has not loaded anyway: it also has to explain a process
that cannot load a module any more.
"""

from __future__ import annotations

import errno
import os
import sys

from ..base.errors import MigrationCancelled, VhostVdpaError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "vhost-vdpa"
FAILED = 1
INTERRUPTED = 130

_TRANSLITERATED = {
    "…": "...",
    "±": "+-",
    "→": "->",
    "µ": "u",
    "·": "-",
    "²": "^2",
    "×": "x",  # noqa: RUF001
    "≥": ">=",
    "≤": "<=",
}
_CONTROL = {code: "?" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"}
"""Characters that would control a terminal: names of devices, processes and files may have them."""
_TRANSLITERATE = "vhost-vdpa-transliterate"
_AGAIN_SECONDS = 0.02
_NO_MORE_THREADS = "can't start new thread"


class OutputClosed(VhostVdpaError):
    """The program was started without a standard output."""


def report(text: str | None = None) -> None:
    """Print on standard error; without a text, write out what was printed there.

    Whatever is wrong with that must not end a command, which may have a guest.
    """
    try:
        # in one piece: several threads may report at once
        if text is not None:
            sys.stderr.write(f"{text.translate(_CONTROL)}\n")
        sys.stderr.flush()
    except OSError:
        # what its buffer still holds would fail again when Python ends, with a status of its own
        _to_nowhere(2)
    except (ValueError, AttributeError):
        return


class _Output:
    """Standard output without control characters, which remembers the first error of writing to it.

    Some callers swallow that error.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text.translate(_CONTROL)))
        except (OSError, ValueError) as e:
            self.error = self.error or e
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as e:
            self.error = self.error or e
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Streams:
    """The standard streams while a command runs: open, able to print any character, watched for errors."""

    def __enter__(self) -> Streams:
        # a descriptor below 3 that is closed would be taken by the first file that is opened, such as a device
        closed = [fd for fd in (0, 1, 2) if not _is_open(fd)]
        for _ in closed:
            os.open(os.devnull, os.O_RDWR)
        if sys.stderr is None:
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
        for stream in (sys.stdout, sys.stderr):
            _transliterate(stream)
        self._nowhere = 1 in closed or sys.stdout is None
        self._before = sys.stdout
        self._output = _Output(sys.stdout)
        sys.stdout = self._output
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        sys.stdout = self._before
        # also what others than report() printed, such as wrong usage
        report()

    def _unraisable(self, what: Any) -> None:
        """Let no Ctrl-C be lost that Python cannot raise: in a destructor, or behind any import (importlib's locks)."""
        if not issubclass(what.exc_type, KeyboardInterrupt):
            self._hook(what)
            return
        import _thread  # noqa: PLC0415

        try:
            _thread.start_new_thread(_interrupt_again, ())
        except RuntimeError:
            # without another thread: it is lost, which is shown
            self._hook(what)

    def check(self) -> None:
        """Raise :class:`OutputClosed` if there is no standard output."""
        if self._nowhere:
            raise OutputClosed("standard output is closed: there is nowhere to print to", hint="redirect it: > FILE")

    def lost(self, error: BaseException) -> bool:
        """Whether an error is one of writing to standard output, which :meth:`finish` explains."""
        return self._output.error is error

    def finish(self, status: int) -> int:
        """Write out what was printed; the exit status, which is another one if that failed at any time."""
        if self._nowhere:
            return status
        try:
            self._output.flush()
        except (OSError, ValueError) as e:
            # the first error says more than that of writing the rest
            return _output_failed(self._output.error or e)
        return status if self._output.error is None else _output_failed(self._output.error)


def _interrupt_again() -> None:
    """In another thread: interrupt once more when the main one has left what could not raise it."""
    import signal  # noqa: PLC0415
    import time  # noqa: PLC0415

    time.sleep(_AGAIN_SECONDS)
    os.kill(os.getpid(), signal.SIGINT)


def _to_nowhere(fd: int) -> None:
    """Let a standard stream's descriptor lead to /dev/null."""
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
    except OSError:
        return
    os.dup2(sink, fd)
    os.close(sink)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _transliterate(stream: object) -> None:
    """Let a stream that cannot take all characters print others in their place."""
    encoding = str(getattr(stream, "encoding", None) or "utf-8")
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None or encoding.lower().replace("-", "").startswith("utf"):
        return
    import codecs  # noqa: PLC0415

    codecs.register_error(_TRANSLITERATE, _replace)
    reconfigure(errors=_TRANSLITERATE)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_TRANSLITERATED.get(each, "?") for each in text), error.end


def _output_failed(error: Exception) -> int:
    """Say that standard output failed, unless its reader has gone, which is the reader's choice."""
    # Python flushes again at its end, which then has to succeed
    _to_nowhere(1)
    if not isinstance(error, BrokenPipeError):
        why = getattr(error, "strerror", None) or str(error)
        _say(f"standard output: {why}: the result is lost or incomplete", "redirect it to a place that has room")
    return FAILED


def explain(error: BaseException) -> int | None:
    """Print an error as a sentence and a hint; its exit status, None for a mistake in the program itself."""
    if sys.flags.dev_mode:
        return None
    if isinstance(error, KeyboardInterrupt):
        return _interrupted()
    interrupted = isinstance(error, MigrationCancelled) or _followed_an_interrupt(error)
    if isinstance(error, VhostVdpaError):
        # a kernel error about this process's limits is explained by them
        cause = _by_limits(error)
        _say(str(error), error.hint or (cause[1] if cause else ""))
        return INTERRUPTED if interrupted else FAILED
    if interrupted:
        status = _interrupted()
        report(f"{PROGRAM}: and on the way out: {type(error).__name__}: {error}")
        return status
    told = _by_limits(error)
    if told is None and isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        told = f"{what}{error.strerror or error}", _FILE_HINTS.get(error.errno or 0, f"{PROGRAM} doctor")
    if told is None and isinstance(error, ImportError):
        told = f"a part of this program cannot be loaded: {error}", "install it again, with what it needs: pip install"
    if told is None:
        return None
    _say(*told)
    return FAILED


def _followed_an_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C is what an error goes back to.

    What is cut short anywhere may fail on its way out, and CPython 3.11 makes a RuntimeError of an interrupt in
    ``__set_name__`` (Objects/typeobject.c: type_new_set_names).
    """
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if isinstance(each, KeyboardInterrupt):
            return True
        if each is not None and not any(each is other for other in seen):
            seen.append(each)
            waiting += [each.__cause__, each.__context__]
    return False


_FILE_HINTS = {
    errno.ENOSPC: "free space there, or name a file on another file system",
    errno.EDQUOT: "free space there, or name a file on another file system",
    errno.EROFS: "name a file on another file system",
    errno.EACCES: "run as root, or name a file that this user may use",
    errno.EPERM: "run as root",
    errno.ENOENT: "look at the path: a folder of it may be missing",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "look at the path: a part of it is not a folder",
}


def _interrupted() -> int:
    import signal  # noqa: PLC0415

    # everything was closed on the way here; a second Ctrl-C must not
    # print a traceback over the result
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    door = getattr(sys.modules.get("pyvhostvdpa.chardev.door"), "VhostVdpa", None)
    opened = getattr(door, "any_opened", False)
    report(f"{PROGRAM}: interrupted; " + ("the devices were reset and closed" if opened else "no device was opened"))
    return INTERRUPTED


def _say(what: str, hint: str = "") -> None:
    report(f"{PROGRAM}: {what}" + (f"\n  next: {hint}" if hint else ""))


def _by_limits(error: BaseException) -> tuple[str, str] | None:
    """Return what an error says about the limits of this process or machine, None if it does not."""
    number, text = getattr(error, "errno", None), str(error)
    loading = isinstance(error, ImportError)
    if number == errno.EMFILE or (loading and os.strerror(errno.EMFILE) in text):
        most = _limit("RLIMIT_NOFILE")
        allowed = "" if most is None else f": the limit is {most} (RLIMIT_NOFILE)"
        return f"this process may not open more files{allowed}", "ulimit -n 1024, then the same command again"
    if number == errno.ENFILE:
        return "this machine may not open more files", "sysctl -w fs.file-max=N with a higher N"
    no_memory = isinstance(error, MemoryError) or number == errno.ENOMEM
    cannot_load = loading and ("failed to map segment" in text or os.strerror(errno.ENOMEM) in text)
    # CPython 3.13 loses a MemoryError on its way in some places
    lost = isinstance(error, SystemError) and _limit("RLIMIT_AS") is not None
    if no_memory or cannot_load or lost or (isinstance(error, RuntimeError) and _NO_MORE_THREADS in text):
        most = _limit("RLIMIT_AS")
        if most is None:
            return f"not enough memory: {text or 'all of it is in use'}", "free memory, or use a smaller guest"
        allowed = f"this process may have {most >> 20} MiB of address space (RLIMIT_AS)"
        return f"not enough memory: {allowed}", "ulimit -v unlimited, then the same command again"
    if number == errno.EAGAIN and isinstance(error, BlockingIOError):
        return "no further process or thread may be started", "ulimit -u shows the limit; end other processes"
    return None


def _limit(name: str) -> int | None:
    """Return a limit of this process; None if unlimited, or if it cannot be read any more."""
    try:
        import resource  # noqa: PLC0415
    except (ImportError, OSError, MemoryError):
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else int(soft)
