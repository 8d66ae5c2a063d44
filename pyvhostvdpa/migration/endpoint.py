# SPDX-License-Identifier: MIT
"""Where the two sides of a migration meet: a Unix socket, TCP with TLS, or a stream that is open already.

Between hosts both sides show a certificate, and each takes only those of the
authority it was given. A guest's memory has no business on a wire in plain.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import stat
import struct
import time
from dataclasses import dataclass

from ..base.closing import Closing
from ..base.errors import MigrationCancelled, MigrationRefused, StreamBroken
from .stream import HANDSHAKE_SECONDS, STALL_SECONDS, Channel, read_out, tls_trouble

_TEXT = "unix:PATH or tcp:HOST:PORT"
_INHERITED = "fd"
_LEAVE_SECONDS = 1.0
_NO_HURRY = 1e6
_BACKLOG = 128
_CREDENTIALS = struct.Struct("iII")
"""struct ucred: process, user, group."""
START_SECONDS = 120.0
"""How long a destination that is started for one migration may take until it speaks."""


class NoPeer(MigrationRefused):
    """The peer does not speak the migration protocol."""


class Looked(NoPeer):
    """The peer closed without a message: it only checked for a listener (:func:`check_listening`)."""


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket's ``path``, or a TCP ``host`` and ``port``."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return what ``unix:PATH`` or ``tcp:HOST:PORT`` means; :class:`~pyvhostvdpa.MigrationRefused`."""
        kind, _, rest = text.partition(":")
        host, _, port = rest.rpartition(":")
        if kind == "unix" and rest:
            return cls(path=rest)
        if kind == "tcp" and host and port.isdecimal() and 0 < int(port) < 1 << 16:
            return cls(host=host.removeprefix("[").removesuffix("]"), port=int(port))
        raise MigrationRefused(f"{text!r} is not a valid address", hint=_TEXT)

    @property
    def local(self) -> bool:
        """Whether it stays on this machine, by a socket of the file system."""
        return bool(self.path)

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.local else f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: this side's certificate and key, and the authority that the other side's must be of."""

    cert: str
    key: str
    ca: str

    def context(self, server: bool) -> ssl.SSLContext:
        """Return the context of one side; TLS 1.3, certificates on both sides."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        for what, path in (("certificate", self.cert), ("key", self.key), ("authority", self.ca)):
            _check_readable(what, path)
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as e:
            raise _unusable(f"the certificate {self.cert} with the key {self.key}, not a pair in PEM: {e}") from e
        try:
            context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as e:
            raise _unusable(f"the authority {self.ca}, which is not a certificate in PEM: {e}") from e
        return context


def _check_readable(what: str, path: str) -> None:
    """Raise for a file that cannot be read: OpenSSL would not say which one it was."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as e:
        raise _unusable(f"the {what} {path}: {e.strerror}") from e


def _unusable(why: str) -> MigrationRefused:
    how = "vhost-vdpa help migration shows how to make the files with openssl"
    return MigrationRefused(f"TLS: cannot use {why}", hint=how)


def check_security(address: Address, tls: Tls | None, plain: bool) -> None:
    """Raise :class:`~pyvhostvdpa.MigrationRefused` for TCP without TLS, unless ``plain`` allows it."""
    if not address.local and tls is None and not plain:
        raise MigrationRefused(
            f"{address} without TLS would show the guest's memory to the network",
            hint="vhost-vdpa send and receive take --tls-cert FILE --tls-key FILE --tls-ca FILE; or --insecure-plain",
        )


def _check_peer(sock: socket.socket) -> None:
    """Raise :class:`NoPeer` if the process at the other end of a Unix socket is another user's, and not root's.

    unix(7), SO_PEERCRED: the user as of connect(2) or listen(2). A folder that all users can write may hold a socket
    of any of them.
    """
    if sock.family != socket.AF_UNIX:
        return
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in (0, os.geteuid()):
        raise NoPeer(
            f"process {pid} at the other end belongs to user {uid}, this one to user {os.geteuid()}",
            hint=f"ps -fp {pid}; and unix:PATH in a folder that only its owner can write, such as /run",
        )


def _await_word(sock: socket.socket, cancel: int, deadline: float) -> None:
    """Wait until the peer has sent something, or for the deadline; :class:`Looked` if it closes before that."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if cancel >= 0:
        poll.register(cancel, select.POLLIN)
    ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
    if cancel in ready:
        raise MigrationCancelled("cancelled")
    try:
        closed = bool(ready) and not sock.recv(1, socket.MSG_PEEK)
    except ConnectionError:
        closed = True
    if closed:
        raise Looked("the other side closed the connection without a word")


def _secured(
    sock: socket.socket, tls: Tls | None, server: bool, name: str, cancel: int = -1, deadline: float | None = None
) -> socket.socket:
    """Return the socket, with TLS if wanted; closed on a failure, which is :class:`NoPeer` if it is the peer's."""
    end = time.monotonic() + HANDSHAKE_SECONDS if deadline is None else deadline
    try:
        _check_peer(sock)
        if server:
            _await_word(sock, cancel, end)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is None:
            return sock
        return _with_tls(sock, tls.context(server), server, name, cancel, end)
    except OSError as e:
        sock.close()
        raise NoPeer(f"the other side has gone again: {e.strerror or e}") from e
    except BaseException:
        sock.close()
        raise


def _with_tls(
    sock: socket.socket, context: ssl.SSLContext, server: bool, name: str, cancel: int, deadline: float
) -> ssl.SSLSocket:
    began = time.monotonic()
    try:
        secured = context.wrap_socket(
            sock, server_side=server, server_hostname=None if server else name, do_handshake_on_connect=False
        )
    except OSError as e:
        # the peer has gone again
        raise NoPeer(tls_trouble(e)) from e
    with contextlib.ExitStack() as unless_secured:
        unless_secured.callback(secured.close)
        secured.setblocking(False)
        try:
            _shake_hands(secured, cancel, deadline)
        except TimeoutError as e:
            raise NoPeer(f"TLS: no answer within {deadline - began:.0f} s") from e
        except OSError as e:
            # the other side gets to read why
            read_out(secured, _LEAVE_SECONDS)
            raise NoPeer(tls_trouble(e), hint="vhost-vdpa help migration") from e
        unless_secured.pop_all()
    return secured


def _shake_hands(secured: ssl.SSLSocket, cancel: int, deadline: float) -> None:
    """Do the handshake of TLS; TimeoutError at the deadline, however often the peer sends a byte."""
    while True:
        try:
            secured.do_handshake()
        except ssl.SSLWantReadError:
            events = select.POLLIN
        except ssl.SSLWantWriteError:
            events = select.POLLOUT
        else:
            return
        poll = select.poll()
        poll.register(secured, events)
        if cancel >= 0:
            poll.register(cancel, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if cancel in ready:
            raise MigrationCancelled("cancelled")
        if not ready or time.monotonic() > deadline:
            raise TimeoutError


def connect(address: Address, tls: Tls | None = None, cancel: int = -1, stall: float = STALL_SECONDS) -> Channel:
    """Return a greeted channel to a listening destination; :class:`~pyvhostvdpa.MigrationRefused` if none."""
    sock = _dial(address)
    return _greeted(Channel(_secured(sock, tls, False, address.host or "localhost", cancel), cancel, stall))


def check_listening(address: Address) -> None:
    """Raise :class:`~pyvhostvdpa.MigrationRefused` if nothing listens at an address now.

    Connects and hangs up, which the destination takes no notice of.
    """
    _dial(address).close()


def _dial(address: Address) -> socket.socket:
    try:
        if not address.local:
            return socket.create_connection((address.host, address.port), HANDSHAKE_SECONDS)
        sock = socket.socket(socket.AF_UNIX)
        try:
            # a listener that does not accept may have a full queue
            sock.settimeout(HANDSHAKE_SECONDS)
            sock.connect(address.path)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as e:
        raise MigrationRefused(
            f"{address}: {e.strerror or e}", hint=f"on the destination: vhost-vdpa receive DEV --listen {address}"
        ) from e


def _greeted(channel: Channel, seconds: float = HANDSHAKE_SECONDS, deadline: float | None = None) -> Channel:
    channel.deadline = deadline
    try:
        channel.greet(seconds)
    except (StreamBroken, MigrationRefused) as e:
        channel.close()
        raise NoPeer(str(e), hint=e.hint) from e
    except BaseException:
        channel.close()
        raise
    return channel


def _remove_stale(path: str) -> None:
    """Remove the socket of a listener that was killed, and nothing else."""
    try:
        # connect(2) answers ECONNREFUSED for any file that is not a socket
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(HANDSHAKE_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            # no such file, or not a socket: binding will show
            return


class Inherited(Closing):
    """In a listener's place: the one stream, a connected Unix socket, that the parent process gave it."""

    def __init__(self, fd: int) -> None:
        self.address = f"{_INHERITED}:{fd}"
        try:
            self._sock: socket.socket | None = socket.socket(fileno=fd)
        except OSError as e:
            raise MigrationRefused(f"{self.address} is not a stream: {e.strerror or e}") from e

    @staticmethod
    def parse(text: str) -> int | None:
        """Return the N of ``fd:N``, None for another address."""
        kind, _, rest = text.partition(":")
        return int(rest) if kind == _INHERITED and rest.isdecimal() else None

    def accept(self, cancel: int = -1, stall: float = STALL_SECONDS) -> Channel:
        """Return a greeted channel, once the other side begins; MigrationRefused the second time."""
        sock, self._sock = self._sock, None
        if sock is None:
            raise MigrationRefused(f"{self.address}: the stream that was given has ended")
        return _greeted(Channel(sock, cancel, stall), _NO_HURRY)

    def close(self) -> None:
        """Close the stream unless it was accepted. Idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def greet_started(sock: socket.socket, cancel: int = -1) -> Channel:
    """Return a greeted channel to a process that was just started with the other end of ``sock``.

    Raises :class:`NoPeer` if it ends or says nothing within :data:`START_SECONDS`.
    """
    return _greeted(Channel(sock, cancel), START_SECONDS)


class Listener(Closing):
    """A socket that sources connect to. A Unix socket is for its owner alone, and goes with it."""

    def __init__(self, address: Address, tls: Tls | None = None) -> None:
        self.address, self._tls = address, tls
        if tls is not None:
            # raise for bad files now, not when the first peer connects
            tls.context(server=True)
        try:
            self._sock = self._bind()
        except OSError as e:
            hint = "--listen with a free address that this user may use (ss -tlnx shows those in use)"
            raise MigrationRefused(f"cannot listen on {address}: {e.strerror or e}", hint=hint) from e

    def _bind(self) -> socket.socket:
        if not self.address.local:
            return socket.create_server(
                (self.address.host, self.address.port),
                family=socket.AF_INET6 if ":" in self.address.host else socket.AF_INET,
                backlog=_BACKLOG,
            )
        sock = socket.socket(socket.AF_UNIX)
        _remove_stale(self.address.path)
        try:
            mask = os.umask(0o177)
            try:
                sock.bind(self.address.path)
            finally:
                os.umask(mask)
            self._made = os.lstat(self.address.path)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock

    def fileno(self) -> int:
        """Return the listening socket's descriptor."""
        return self._sock.fileno()

    def accept_socket(self) -> socket.socket:
        """Return the next connection as it is, for :meth:`admit`; BlockingIOError without one yet, OSError."""
        self._sock.setblocking(False)
        sock, _ = self._sock.accept()
        return sock

    def admit(
        self, sock: socket.socket, cancel: int = -1, stall: float = STALL_SECONDS, deadline: float | None = None
    ) -> Channel:
        """Return a greeted channel to the peer, with a ``deadline`` (time.monotonic()) for all of its handshake.

        Raises :class:`NoPeer` for a process of another user, or one that
        shows no right certificate or speaks something else; the socket is closed then.
        """
        secured = _secured(sock, self._tls, True, "", cancel, deadline)
        return _greeted(Channel(secured, cancel, stall), deadline=deadline)

    def accept(self, cancel: int = -1, stall: float = STALL_SECONDS) -> Channel:
        """Wait for a source and return a greeted channel to it; raises what :meth:`admit` does.

        It serves one connection at a time: :class:`~pyvhostvdpa.migration.reception.Reception` does many.
        """
        self._sock.setblocking(True)
        sock, _ = self._sock.accept()
        return self.admit(sock, cancel, stall)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._sock.fileno() >= 0:
            self._sock.close()
            if self.address.local:
                self._remove()

    def _remove(self) -> None:
        """Remove the socket, unless another listener has put its own there."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self.address.path), self._made):
                os.unlink(self.address.path)
