"""Where the output of commands in VMs goes, and the lab's own."""

import contextlib
import os
import sys
from collections.abc import Callable

from labkit.errors import EXIT_PIPE, LabError

Sink = Callable[[bytes], None]


def occupy_standard_files() -> None:
    """See to it that no file that is opened later becomes this process's standard input, output or error.

    One that was closed is a file that cannot be written to, so that a writer finds out.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
            if number:
                setattr(sys, name, os.fdopen(number, "w", closefd=False))


def say(text: str) -> None:
    """Print a line on standard error, if that can be written to: it is never a reason to fail."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def say_live(text: str) -> None:
    """Write a piece of a line that changes to standard error; as say()."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def forget_unwritten() -> None:
    """Drop what standard output and error did not take, so that the interpreter does not try it again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def writer(descriptor: int) -> Sink:
    """Return a sink that writes all it gets to a file descriptor, at once."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except BrokenPipeError as error:
            raise LabError("the reader of the command's output is gone", status=EXIT_PIPE) from error
        except OSError as error:
            raise LabError(
                f"the command's output cannot be written: {error.strerror}",
                f"It was to go to file descriptor {descriptor}; the VM was stopped.",
                "free some space, or send the output somewhere else",
            ) from error

    return write


class Prefixed:
    """A sink that puts a prefix before each line and hands on whole lines only."""

    def __init__(self, prefix: str, sink: Sink) -> None:
        self._prefix = prefix.encode()
        self._sink = sink
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        """Take some output."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self._sink(b"".join(self._prefix + line + b"\n" for line in lines))

    def flush(self) -> None:
        """Hand on a last line that has no end."""
        if self._rest:
            self._sink(self._prefix + self._rest + b"\n")
            self._rest = b""
