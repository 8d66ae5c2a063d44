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
_TRANSLITERATE = "vhost-vdpa-transliterate"
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
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        # what its buffer still holds would fail again when Python ends, with a status of its own
        _to_nowhere(2)
    except (ValueError, AttributeError):
        return


class _Output:
    """Standard output that remembers the first error of writing to it, which some callers swallow."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
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
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._before
        # also what others than report() printed, such as wrong usage
        report()

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
    if isinstance(error, VhostVdpaError):
        # a kernel error about this process's limits is explained by them
        cause = _by_limits(error)
        _say(str(error), error.hint or (cause[1] if cause else ""))
        return INTERRUPTED if isinstance(error, MigrationCancelled) else FAILED
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


_FILE_HINTS = {
    errno.ENOSPC: "free space there, or name a file elsewhere",
    errno.EDQUOT: "free space there, or name a file elsewhere",
    errno.EROFS: "name a file elsewhere",
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
    opened = "pyvhostvdpa.chardev.door" in sys.modules
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
            return f"there is not enough memory: {text or 'none was left'}", "free memory, or use a smaller guest"
        allowed = f"this process may have {most >> 20} MiB of address space (RLIMIT_AS)"
        return f"there is not enough memory: {allowed}", "ulimit -v unlimited, then the same command again"
    if number == errno.EAGAIN and isinstance(error, BlockingIOError):
        return "no further process or thread may be started", "ulimit -u shows the limit; end other processes"
    return None


def _limit(name: str) -> int | None:
    """Return a limit of this process; None if there is none, or if it cannot be learnt any more."""
    try:
        import resource  # noqa: PLC0415
    except (ImportError, OSError, MemoryError):
        return None
    soft = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else int(soft)
