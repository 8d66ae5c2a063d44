"""Where the output of commands in VMs goes."""

import os

from labkit.errors import EXIT_PIPE, LabError
from labkit.vm import Sink


def writer(descriptor: int) -> Sink:
    """Return a sink that writes all it gets to a file descriptor, at once."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except BrokenPipeError as error:
            raise LabError("nobody reads the command's output any more", status=EXIT_PIPE) from error

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
