"""QEMU's monitor: commands with their answers, and the events that come in between.

`qemu.qmp` from PyPI does more, by asyncio, whose import alone takes longer under emulation than all commands of a move.
"""

import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class QmpError(Exception):
    """QEMU refused a command, or its monitor is gone."""


@dataclass(frozen=True)
class QmpEvent:
    """An event of QEMU; `at_ns` is its own time stamp as CLOCK_MONOTONIC, ns."""

    name: str
    at_ns: int
    data: dict[str, Any]


class Qmp:
    """One monitor, by a connected Unix socket."""

    def __init__(
        self,
        path: str,
        patience: float = 60.0,
        alive: Callable[[], bool] = lambda: True,
        reads: Callable[[], bool] = lambda: False,
    ) -> None:
        self._buffer = b""
        self.events: list[QmpEvent] = []
        self._socket = connect(path, patience, alive, reads)
        self._read(patience)
        self.command("qmp_capabilities")

    def close(self) -> None:
        """Close the connection; QEMU keeps running."""
        self._socket.close()

    def command(self, name: str, timeout: float = 300.0, /, **arguments: Any) -> Any:
        """Run a command and return its answer; an underscore in an argument's name stands for a hyphen."""
        request: dict[str, Any] = {"execute": name.replace("_", "-") if name != "qmp_capabilities" else name}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._socket.sendall(json.dumps(request).encode())
        while True:
            message = self._read(timeout)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{request['execute']}: {message['error']['desc']}")

    def poll(self, seconds: float) -> None:
        """Take the events that come within so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._read(left)
            except TimeoutError:
                return

    def find(self, name: str, **data: Any) -> QmpEvent | None:
        """Return the first event with this name and these values, among those that have come."""
        for event in self.events:
            if event.name == name and all(event.data.get(key) == value for key, value in data.items()):
                return event
        return None

    def _read(self, timeout: float) -> dict[str, Any]:
        """Return the next message; an event is kept as well."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise TimeoutError(f"QEMU's monitor said nothing for {timeout:g} s") from None
            if not data:
                raise QmpError("QEMU closed its monitor")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            stamp = message["timestamp"]
            real = stamp["seconds"] * 1_000_000_000 + stamp["microseconds"] * 1000
            offset = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - time.clock_gettime_ns(time.CLOCK_REALTIME)
            self.events.append(QmpEvent(message["event"], real + offset, message.get("data", {})))
        return message


def connect(
    path: str, patience: float, alive: Callable[[], bool], reads: Callable[[], bool] = lambda: False
) -> socket.socket:
    """Connect to a Unix socket that is about to be there.

    While ``reads`` is true, nothing is used up of the patience: in virtual time, which stands for nothing, minutes pass
    until a disk has answered.
    """
    looked = time.monotonic()
    while True:
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(path)
        except OSError as error:
            end.close()
            if not alive():
                raise QmpError("QEMU ended before it opened its monitor") from error
            now = time.monotonic()
            if not reads():
                patience -= now - looked
            looked = now
            if patience < 0:
                raise QmpError(f"{path} cannot be connected to: {os.strerror(error.errno or 0)}") from error
            time.sleep(0.05)
        else:
            return end


class Console:
    """The guest's serial console: lines of JSON come out of it, commands go in."""

    def __init__(self, path: str, patience: float = 60.0, alive: Callable[[], bool] = lambda: True) -> None:
        self._socket = connect(path, patience, alive)
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._buffer = b""
        self.other: list[str] = []
        """What the guest's kernel printed."""
        self.reports: list[dict[str, Any]] = []

    def close(self) -> None:
        """Close both."""
        self._selector.close()
        self._socket.close()

    def send(self, command: str) -> None:
        """Give the guest's program a command."""
        self._socket.sendall(command.encode() + b"\n")

    def poll(self, seconds: float = 0.0) -> None:
        """Take what has come, waiting for the first of it."""
        while self._selector.select(seconds):
            data = self._socket.recv(1 << 16)
            if not data:
                return
            self._buffer += data
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace").strip())
            seconds = 0.0

    def _take(self, line: str) -> None:
        if line.startswith("{"):
            try:
                self.reports.append(json.loads(line))
                return
            except ValueError:
                pass
        if line:
            self.other.append(line)
