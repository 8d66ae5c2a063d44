# SPDX-License-Identifier: MIT
"""Messages over a Unix socket: whole ones or none, with their descriptors, and never for longer than a deadline."""

from __future__ import annotations

import array
import select
import socket
import struct
import time
from dataclasses import dataclass

from ..base.closing import Closing
from ..base.errors import VhostVdpaError
from ..base.eventfds import close_all
from .messages import HEADER, MAX_FDS, MessageHeader, ProtocolError, parse_header

DEADLINE = 10.0
"""Seconds that a front-end may take for the rest of a message it has begun, and for taking a reply."""

_ROOM = socket.CMSG_SPACE((MAX_FDS + 1) * array.array("i").itemsize)
"""One descriptor more than allowed, to detect too many."""


class FrontEndGone(VhostVdpaError):
    """The front-end closed the connection, or stopped reading or writing in the middle of a message."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Return the process that connected. It may have passed the socket on since."""
    size = struct.calcsize("3i")
    return Peer(*struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)))


class MessageChannel(Closing):
    """One connection to a front-end; it owns the socket."""

    def __init__(self, connection: socket.socket, deadline: float = DEADLINE) -> None:
        self._socket = connection
        self._deadline = deadline
        connection.setblocking(False)
        self.peer = peer_of(connection)

    def fileno(self) -> int:
        """The socket, to wait for the next message."""
        return self._socket.fileno()

    def receive(self) -> tuple[MessageHeader, bytes, list[int]]:
        """Return the next message: header, payload, descriptors. The caller owns the descriptors.

        Raises :class:`FrontEndGone`, and :class:`~pyvhostvdpa.vhost_user.messages.ProtocolError` for anything but a
        message; no descriptor is left open then.
        """
        data, fds = self._first()
        try:
            until = time.monotonic() + self._deadline
            if len(data) < HEADER.size:
                data += self._exactly(HEADER.size - len(data), until)
            header = parse_header(data)
            return header, self._exactly(header.size, until) if header.size else b"", fds
        except BaseException:
            close_all(fds)
            raise

    def _first(self) -> tuple[bytes, list[int]]:
        """Return what has come of a header, with the descriptors: they come with its first byte."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(HEADER.size, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise FrontEndGone("the socket was reported readable and is not") from None
        except OSError as e:
            raise FrontEndGone(f"the connection broke: {e.strerror}") from e
        fds = _descriptors(ancillary) if ancillary else []
        if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
            close_all(fds)
            raise ProtocolError(f"a message came with more than {MAX_FDS} file descriptors")
        if not data:
            close_all(fds)
            raise FrontEndGone("the front-end closed the connection")
        return data, fds

    def _exactly(self, size: int, until: float) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self._socket.recv(size - len(data))
            except BlockingIOError:
                self._wait(until, reading=True)
                continue
            except OSError as e:
                raise FrontEndGone(f"the connection broke: {e.strerror}") from e
            if not more:
                raise FrontEndGone("the front-end closed the connection in the middle of a message")
            data += more
        return data

    def send(self, data: bytes) -> None:
        """Send a reply; :class:`FrontEndGone` if the front-end does not take it in time."""
        until = time.monotonic() + self._deadline
        while data:
            try:
                data = data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(until, reading=False)
            except OSError as e:
                raise FrontEndGone(f"the connection broke: {e.strerror}") from e

    def _wait(self, until: float, reading: bool) -> None:
        left = until - time.monotonic()
        if left <= 0 or not wait_for(self._socket, reading, left):
            what = "finish a message" if reading else "read a reply"
            raise FrontEndGone(f"the front-end did not {what} within {self._deadline:g} s")

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()


def wait_for(connection: socket.socket, reading: bool, seconds: float) -> bool:
    """Whether a socket becomes readable, or writable, in time."""
    poll = select.poll()
    poll.register(connection, select.POLLIN if reading else select.POLLOUT)
    return bool(poll.poll(max(0, int(seconds * 1000)) + 1))


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


class Descriptors:
    """Descriptors of one message that were not taken yet."""

    def __init__(self, fds: tuple[int, ...]) -> None:
        self._fds = list(fds)

    @property
    def first(self) -> int:
        """The first, which stays the message's."""
        return self._fds[0]

    def pop(self) -> int:
        """Return the first; it is the caller's."""
        return self._fds.pop(0)

    def close(self) -> None:
        """Close the others."""
        fds, self._fds = self._fds, []
        close_all(fds)
