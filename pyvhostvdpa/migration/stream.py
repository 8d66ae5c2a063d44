# SPDX-License-Identifier: MIT
"""The stream between the two sides of a migration: frames, checked before they are believed.

Both sides begin with a preamble that names the protocol and its version.
After it come frames: a head of 24 bytes (type, count, length, checksum of
what follows), then ``length`` bytes. Types below 0x100 are control frames of
at most 1 MiB; guest memory has types of its own
(:mod:`pyvhostvdpa.migration.pages`).
"""

from __future__ import annotations

import enum
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from .._cdefs import lib
from ..base.closing import Closing
from ..base.errors import MigrationCancelled, MigrationRefused, StreamBroken, StreamCorrupt
from .cancel import check_cancelled
from .pages import PAGES, ZERO, FrameHeader, stream_sum

T = TypeVar("T")

MAGIC = b"vdpa-mig"
VERSION = 3
_PREAMBLE = struct.Struct("<8sII")
HEADER = struct.Struct("<IIQQ")

MAX_CONTROL = 1 << 20
MAX_MEMORY = 8 << 20
_MAX_TEXT = 4096

HANDSHAKE_SECONDS = 10.0
"""How long the other side may take for each answer until it is known to speak the protocol."""
STALL_SECONDS = 30.0
"""How long a stream may stall before it counts as broken."""
_LAST_WORDS_SECONDS = 2.0
_AHEAD = 1 << 16
"""Bytes that are read ahead at most."""


class Frame(enum.IntEnum):
    """Control frames, and the side that sends them."""

    SHAPE = 1
    """Source: what the guest needs."""
    ALIVE = 2
    """Either: still at work, with words of what it does."""
    ACCEPT = 3
    """Destination: memory is there and mapped, the devices fit."""
    REFUSE = 4
    """Destination: no, and why."""
    ROUND = 5
    """Source: a round of memory begins; count is its number, the payload the bytes to come (u64)."""
    GUEST = lib.FRAME_GUEST
    """Source: state of the guest."""
    DEVICE = 7
    """Source: state of device number count."""
    FINAL = lib.FRAME_FINAL
    """Source: nothing follows but GO."""
    READY = lib.FRAME_READY
    """Destination: everything is loaded; the payload is the hash of guest memory, or empty."""
    GO = lib.FRAME_GO
    """Source: the guest is yours. The payload is the source's clock (i64, ns)."""
    RUNNING = 11
    """Destination: the guest runs here."""
    FAILED = 12
    """Destination: it has failed, and the guest is not here."""
    CANCEL = 13
    """Source: it has cancelled, and keeps the guest."""
    STAND_BY = 14
    """Source: what is known of device number count while the guest runs, so that the destination can be ready."""
    REST = lib.FRAME_REST
    """Source: the state of device number count, in DEVICE's place: what STAND_BY lacked."""


_KNOWN = {int(kind): kind for kind in Frame}
_EMPTY_SUM = stream_sum(b"")


class Channel(Closing):
    """One end of a stream on a connected socket, which it owns.

    ``cancel`` is a descriptor that becomes readable when the user cancels, -1
    for none: whatever waits then raises
    :class:`~pyvhostvdpa.MigrationCancelled`. ``stall`` is in seconds.
    Everything that waits raises :class:`~pyvhostvdpa.StreamBroken`
    once the other side is gone or silent.
    """

    def __init__(self, sock: socket.socket, cancel: int = -1, stall: float = STALL_SECONDS) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.cancel = cancel
        self.stall = stall
        self.deadline: float | None = None
        """When all waits have to be over, by time.monotonic(); a peer that sends occasionally does not extend it."""
        self.local = sock.family == socket.AF_UNIX
        """Whether the other end is on this machine, so that the stream ends only if that end is closed."""
        self._plain = not isinstance(sock, ssl.SSLSocket)
        self._ahead = bytearray()
        """What was read ahead."""
        self._polls: dict[tuple[int, int], select.poll] = {}
        self.torn = False
        """Whether a frame was left in its middle, so that no other may follow."""

    @property
    def raw(self) -> bool:
        """Whether the socket's bytes are the stream's: C may read and write it."""
        return self._plain and not self._ahead

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._sock.close()
        # its number may be another file's from now on
        self._polls.clear()

    # -- bytes ------------------------------------------------------------------

    def check(self) -> None:
        """Raise :class:`~pyvhostvdpa.MigrationCancelled` if the user cancelled; waits do so themselves."""
        if self.cancel >= 0:
            check_cancelled(self.cancel)

    def _wait(self, events: int, seconds: float) -> None:
        if self._sock.fileno() < 0:
            raise StreamBroken("the stream is closed on this side")
        if self.deadline is not None:
            seconds = min(seconds, max(0.0, self.deadline - time.monotonic()))
        ready = [fd for fd, _ in self._poll(events, self.cancel).poll(seconds * 1000)]
        if self.cancel in ready:
            raise MigrationCancelled("cancelled")
        if not ready and self.deadline is not None:
            raise StreamBroken("the other side took too long for the handshake")
        if not ready:
            raise StreamBroken(f"the other side did nothing for {seconds:g} s")

    def _poll(self, events: int, cancel: int = -1) -> select.poll:
        """Return what waits for the socket and for ``cancel``; made once, since a paused guest waits for it too."""
        key = events, cancel
        poll = self._polls.get(key)
        if poll is None:
            poll = self._polls[key] = select.poll()
            poll.register(self._sock, events)
            if cancel >= 0:
                poll.register(cancel, select.POLLIN)
        return poll

    def _repeat(self, action: Callable[[], T], events: int, seconds: float) -> T:
        """Do ``action`` as soon as the socket lets it."""
        while True:
            try:
                return action()
            except BlockingIOError:
                self._wait(events, seconds)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, seconds)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, seconds)
            except ssl.SSLError as e:
                raise StreamBroken(tls_trouble(e)) from e
            except OSError as e:
                raise StreamBroken(f"the stream broke: {os.strerror(e.errno or 0)}") from e

    def send(self, buffer: bytes | bytearray | memoryview) -> None:
        """Send all of ``buffer``."""
        view = memoryview(buffer).cast("B")
        while view:
            part = view
            # a TLS record that waits leaves with whatever is sent next
            self.torn = self.torn or not self._plain
            view = view[self._repeat(lambda: self._sock.send(part), select.POLLOUT, self.stall) :]  # noqa: B023
            self.torn = bool(view)

    def send_rest(self, buffer: bytes | bytearray | memoryview, sent: int) -> None:
        """Send what is left of ``buffer``, of which C has sent ``sent`` bytes."""
        self.torn = self.torn or 0 < sent < len(buffer)
        self.send(memoryview(buffer)[sent:])

    def receive_into(self, buffer: bytearray | memoryview, seconds: float | None = None) -> None:
        """Fill ``buffer``; its first byte may take ``seconds``."""
        view = memoryview(buffer).cast("B")
        patience = self.stall if seconds is None else seconds
        if self._ahead:
            count = min(len(view), len(self._ahead))
            view[:count] = self._ahead[:count]
            del self._ahead[:count]
            view = view[count:]
        while view:
            part = view
            count = self._repeat(lambda: self._sock.recv_into(part), select.POLLIN, patience)  # noqa: B023
            if not count:
                raise StreamBroken("the other side closed the stream")
            view, patience = view[count:], self.stall

    def _next_bytes(self, size: int, seconds: float | None = None) -> bytes:
        """Return the next ``size`` bytes; see :meth:`receive_into`."""
        if len(self._ahead) >= size:
            taken = bytes(self._ahead[:size])
            del self._ahead[:size]
            return taken
        data = bytearray(size)
        self.receive_into(data, seconds)
        return bytes(data)

    def read_ahead(self) -> None:
        """Read what has arrived, so that frames which came together are read together; nothing if there is nothing."""
        room = _AHEAD - len(self._ahead)
        if room <= 0:
            # of a peer that sends more than belongs there no more is kept
            return
        # an error of the stream is raised by the next read
        with suppress(OSError):
            self._ahead += self._sock.recv(room)

    def readable(self, seconds: float = 0.0) -> bool:
        """Whether something, or the end, can be read within ``seconds``; a channel that was closed has come to it."""
        if self._ahead or self._sock.fileno() < 0:
            return True
        if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            return True
        return bool(self._poll(select.POLLIN).poll(seconds * 1000))

    # -- the beginning ------------------------------------------------------------

    def greet(self, seconds: float = HANDSHAKE_SECONDS) -> None:
        """Exchange preambles; :class:`~pyvhostvdpa.MigrationRefused` if the other side speaks something else."""
        theirs = bytearray(_PREAMBLE.size)
        try:
            self.send(_PREAMBLE.pack(MAGIC, VERSION, 0))
            self.receive_into(theirs, seconds)
        except StreamBroken as e:
            raise MigrationRefused(f"no migration stream: {e}", hint="vhost-vdpa help migration") from e
        magic, version, reserved = _PREAMBLE.unpack(theirs)
        if magic != MAGIC or (reserved and version == VERSION):
            raise MigrationRefused(
                f"no migration stream: the other side began with {bytes(theirs).hex(' ')}",
                hint="one side runs vhost-vdpa receive, the other vhost-vdpa send, both with TLS or both without",
            )
        if version != VERSION:
            raise MigrationRefused(
                f"the other side speaks version {version} of the migration stream, this one version {VERSION}",
                hint="install the same version of pyvhostvdpa on both sides",
            )

    # -- frames --------------------------------------------------------------------

    def send_frame(self, kind: Frame, payload: bytes = b"", count: int = 0) -> None:
        """Send a control frame."""
        self.send(encoded(kind, payload, count))

    def send_frames(self, *frames: tuple[Frame, bytes, int]) -> None:
        """Send control frames, each with its payload and count, in one piece: one wake-up of the other side."""
        self.send(b"".join(encoded(kind, payload, count) for kind, payload, count in frames))

    def send_text(self, kind: Frame, text: str) -> None:
        """Send a control frame of words."""
        self.send_frame(kind, text.encode()[:_MAX_TEXT])

    def receive_header(self, seconds: float | None = None) -> FrameHeader:
        """Return the head of the next frame; :class:`~pyvhostvdpa.StreamCorrupt` if there is no such frame."""
        header = FrameHeader(*HEADER.unpack(self._next_bytes(HEADER.size, seconds)))
        if header.type in (PAGES, ZERO):
            limit = MAX_MEMORY
        elif header.type in _KNOWN:
            limit = MAX_CONTROL
        else:
            raise StreamCorrupt(f"unknown frame type {header.type:#x}")
        if header.length > limit:
            raise StreamCorrupt(f"a frame of type {header.type:#x} with {header.length} bytes, {limit} are possible")
        return header

    def receive_payload(self, header: FrameHeader) -> bytes:
        """Return what a control frame holds; :class:`~pyvhostvdpa.StreamCorrupt` if its checksum differs."""
        payload = self._next_bytes(header.length) if header.length else b""
        if (stream_sum(payload) if payload else _EMPTY_SUM) != header.sum:
            raise StreamCorrupt(f"{Frame(header.type).name} frame: its checksum differs from what arrived")
        return payload

    def expect(self, *kinds: Frame, seconds: float | None = None) -> tuple[Frame, bytes]:
        """Receive one of these frames; any other is :class:`~pyvhostvdpa.StreamCorrupt`."""
        if self.raw:
            # an answer has still to come: to look for it first would only take time
            try:
                self._wait(select.POLLIN, self.stall if seconds is None else seconds)
            except MigrationCancelled:
                # what is here came first: it may be GO, and then it is too late to cancel
                if not self.readable():
                    raise
        header = self.receive_header(seconds)
        if header.type not in kinds:
            name = Frame(header.type).name if header.type in _KNOWN else "memory"
            raise StreamCorrupt(f"a {name} frame where {' or '.join(kind.name for kind in kinds)} belongs")
        return _KNOWN[header.type], self.receive_payload(header)

    def last_words(self) -> str:
        """Return what the other side said before it broke the stream, "" for nothing."""
        end = time.monotonic() + _LAST_WORDS_SECONDS
        self.cancel = -1
        try:
            while self.readable(max(0.0, end - time.monotonic())):
                kind, payload = self.expect(*Frame)
                if kind in (Frame.REFUSE, Frame.FAILED, Frame.CANCEL):
                    return words(payload)
        except (StreamBroken, StreamCorrupt):
            return ""
        return ""

    def finish(self, seconds: float = _LAST_WORDS_SECONDS) -> None:
        """Shut down sending, and let the other side read the last message; :func:`read_out`."""
        read_out(self._sock, seconds)


def encoded(kind: Frame, payload: bytes, count: int) -> bytes:
    """Return a control frame as it goes over the stream."""
    if len(payload) > MAX_CONTROL:
        raise MigrationRefused(f"{kind.name} of {len(payload)} bytes; a control frame takes {MAX_CONTROL}")
    return HEADER.pack(kind, count, len(payload), stream_sum(payload) if payload else _EMPTY_SUM) + payload


def read_out(sock: socket.socket, seconds: float) -> None:
    """Say that nothing more comes, and read on until the other side has closed, for so long at most.

    A socket closed with unread bytes would discard the last message before the
    other side read it.
    """
    end, rest = time.monotonic() + seconds, bytearray(1 << 16)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        sock.shutdown(socket.SHUT_WR)
        while (left := end - time.monotonic()) > 0 and poll.poll(left * 1000):
            if not socket.socket.recv_into(sock, rest):
                return
    except OSError:
        # it is gone already: nothing is left to be read
        return


def words(payload: bytes) -> str:
    """Return a frame's words, printable; they are the other side's."""
    return "".join(c if c.isprintable() else "?" for c in payload[:_MAX_TEXT].decode(errors="replace"))


_TLS = {
    "CERTIFICATE_VERIFY_FAILED": "the other side's certificate is not of the authority that --tls-ca names",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side showed no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate (--tls-cert, --tls-key)",
    "TLSV1_ALERT_UNKNOWN_CA": "the other side does not know the authority of this side's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the other side does not accept this side's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this side's certificate has expired",
    "WRONG_VERSION_NUMBER": "the other side does not speak TLS",
    "HTTP_REQUEST": "the other side does not speak TLS",
    "UNSUPPORTED_PROTOCOL": "the other side does not speak TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side does not speak TLS 1.3",
}


def tls_trouble(error: OSError) -> str:
    """Return what went wrong in TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: the other side's certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        return "TLS: the other side closed the connection"
    reason = str(getattr(error, "reason", None) or error)
    return f"TLS: {_TLS.get(reason, reason)}"
