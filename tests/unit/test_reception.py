"""A listener that strangers come to: an honest source gets its turn, and nothing of the others is left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import MigrationRefused, StreamCorrupt
from pyvhostvdpa.guest.shape import DeviceShape, GuestShape
from pyvhostvdpa.guest.synthetic import KINDS
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.migration import alive, endpoint, reception, session
from pyvhostvdpa.migration.alive import AliveLimit
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.destination import receive_shape
from pyvhostvdpa.migration.endpoint import Address, Inherited, Listener, NoPeer, connect
from pyvhostvdpa.migration.reception import Reception
from pyvhostvdpa.migration.stream import HEADER, MAGIC, VERSION, Channel, Frame, words

SHAPE = GuestShape(bytes(16), "honest", ((DEFAULT_GPA, 1 << 20),), (DeviceShape(1 << 32, 1, 64, None),), False)
PREAMBLE = struct.pack("<8sII", MAGIC, VERSION, 0)
SOON = 5.0
"""Seconds: much less than any patience, much more than a busy machine needs."""


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return Address.parse(f"unix:{tmp_path}/socket")


@pytest.fixture
def here(address: Address) -> Iterator[Reception]:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with Listener(address) as listener, Reception(listener, receive_shape, stall=1.0) as it:
        yield it
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


@contextlib.contextmanager
def stranger(address: Address, data: bytes = b"") -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address.path)
        sock.sendall(data)
        yield sock


def honest(address: Address) -> Channel:
    channel = connect(address)
    channel.send_frame(Frame.SHAPE, SHAPE.encode())
    return channel


def first(here: Reception, said: list[str] | None = None) -> Channel:
    """The first that brings a guest; ``said`` gets why others were refused."""
    while True:
        try:
            channel, shape = here.next()
        except MigrationRefused as e:
            if said is not None:
                said.append(str(e))
        else:
            assert shape == SHAPE
            return channel


@pytest.mark.parametrize("data", [b"", PREAMBLE[:3], PREAMBLE + HEADER.pack(Frame.SHAPE, 0, 1 << 20, 0) + bytes(99)])
def test_strangers_that_send_little_keep_no_source_out(here: Reception, address: Address, data: bytes) -> None:
    with contextlib.ExitStack() as strangers:
        for _ in range(60):
            strangers.enter_context(stranger(address, data))
        begin = time.monotonic()
        with honest(address) as source, first(here) as channel:
            assert time.monotonic() - begin < SOON
            channel.send_frame(Frame.ACCEPT)
            assert source.expect(Frame.ACCEPT, seconds=SOON)[0] is Frame.ACCEPT


def test_check_whether_a_process_listens_is_not_reported(here: Reception, address: Address) -> None:
    """`send` does so before it starts its guest, and the user would read that a source was refused."""
    for _ in range(3):
        endpoint.check_listening(address)
    with stranger(address, PREAMBLE[:3]):
        pass
    with honest(address):
        said: list[str] = []
        with first(here, said):
            assert len(said) == 1


def test_more_strangers_than_handshakes_end_the_oldest(
    here: Reception, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "MAX_HANDSHAKES", 4)
    with contextlib.ExitStack() as strangers:
        socks = [strangers.enter_context(stranger(address)) for _ in range(12)]
        said: list[str] = []
        with honest(address), first(here, said):
            pass
        while not any("ended for another" in text for text in said):
            # the source may be through before the threads of those that were ended
            with pytest.raises(MigrationRefused) as refused:
                here.next()
            said.append(str(refused.value))
        socks[0].settimeout(SOON)
        assert socks[0].recv(64) in (b"", PREAMBLE)


def test_a_peer_that_trickles_has_one_deadline_for_its_whole_handshake(
    here: Reception, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "ENTRY_SECONDS", 0.5)
    begin = time.monotonic()
    with stranger(address, PREAMBLE) as sock:
        data = iter(HEADER.pack(Frame.SHAPE, 0, 1 << 20, 0) + bytes(1 << 20))
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            trickle(sock, data)
        assert time.monotonic() - begin < SOON
        with pytest.raises(NoPeer, match="took too long for the handshake"):
            refused(here)


def trickle(sock: socket.socket, data: Iterator[int]) -> None:
    for byte in data:
        sock.sendall(bytes([byte]))
        time.sleep(0.01)


def refused(here: Reception) -> None:
    try:
        here.next()
    except NoPeer:
        raise
    except MigrationRefused as e:
        raise NoPeer(str(e)) from e


def test_alive_frame_in_place_of_a_handshake_is_refused(here: Reception, address: Address) -> None:
    with connect(address) as source:
        source.send_text(Frame.ALIVE, "still here")
        with pytest.raises(MigrationRefused, match="a ALIVE frame where SHAPE"):
            here.next()
        assert "ALIVE" in words(source.expect(Frame.REFUSE, seconds=SOON)[1])
    with honest(address), first(here):
        pass


def test_deadline_of_the_handshake_ends_with_it(here: Reception, address: Address) -> None:
    with honest(address):
        channel, _ = here.next()
        with channel:
            assert (channel.deadline, channel.cancel) == (None, -1)


def test_sources_beyond_those_that_may_wait_are_refused_with_the_reason(
    here: Reception, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "MAX_WAITING", 1)
    with honest(address) as one, first(here):
        with honest(address):
            while here._waiting == 0:
                time.sleep(0.01)
            with honest(address) as third:
                assert "are waiting here already" in words(third.expect(Frame.REFUSE, seconds=SOON)[1])
        assert not one.readable()


def test_source_that_waits_when_the_guest_arrives_is_refused_with_the_reason(address: Address) -> None:
    with Listener(address) as listener, contextlib.ExitStack() as stack:
        here = Reception(listener, receive_shape, stall=1.0)
        source = stack.enter_context(honest(address))
        while here._waiting == 0:
            time.sleep(0.01)
        here.close()
        assert "has received another guest" in words(source.expect(Frame.REFUSE, seconds=SOON)[1])


def test_a_listener_without_descriptors_continues_when_there_are_some(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Listener(address) as listener:
        accept, failures = listener.accept_socket, iter([24, 23, 12])

        def fails_first() -> socket.socket:
            for number in failures:
                raise OSError(number, os.strerror(number))
            return accept()

        monkeypatch.setattr(listener, "accept_socket", fails_first)
        with Reception(listener, receive_shape, stall=1.0) as here, honest(address):
            for word in ("Too many open files", "Too many open files in system", "Cannot allocate memory"):
                with pytest.raises(NoPeer, match=word):
                    here.next()
            here.next()[0].close()


# -- the command's loop ------------------------------------------------------------------------


class Fitting:
    """In a destination's place: refuses the first guests."""

    refusals = 2

    def __init__(self, paths: object, channel: Channel, *_: object) -> None:
        self.channel = channel

    def run(self) -> str:
        if Fitting.refusals:
            Fitting.refusals -= 1
            raise MigrationRefused("it does not fit")
        return "arrived"


@pytest.fixture
def receiving(monkeypatch: pytest.MonkeyPatch) -> tuple[session.Receiving, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(session, "check_devices", lambda paths: None)
    monkeypatch.setattr(session, "Destination", Fitting)
    monkeypatch.setattr(session.Receiving, "_live", lambda self, arrived: arrived)
    monkeypatch.setattr(Fitting, "refusals", 2)
    return session.Receiving(["/dev/none"], tell=said.append, kinds=KINDS), said


def test_a_guest_that_does_not_fit_ends_no_listener(
    receiving: tuple[session.Receiving, list[str]], address: Address
) -> None:
    command, said = receiving
    with contextlib.ExitStack() as sources:

        def come() -> None:
            for _ in range(3):
                sources.enter_context(honest(address))

        with Listener(address) as listener:
            thread = threading.Thread(target=come)
            thread.start()
            assert command.receive(listener) == "arrived"  # type: ignore[comparison-overlap]
            thread.join()
    assert [text for text in said if text.startswith("refused")] == ["refused: it does not fit"] * 2


def test_listener_needs_no_more_descriptors_for_each_source(
    receiving: tuple[session.Receiving, list[str]], address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Cancel] = []

    def make() -> Cancel:
        if made:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(Cancel())
        return made[0]

    monkeypatch.setattr(session, "Cancel", make)
    test_a_guest_that_does_not_fit_ends_no_listener(receiving, address)


def test_an_inherited_stream_that_was_refused_has_no_next(receiving: tuple[session.Receiving, list[str]]) -> None:
    near, far = socket.socketpair()
    with far, Inherited(near.detach()) as stream:
        far.sendall(PREAMBLE)
        with pytest.raises(MigrationRefused, match="it does not fit"):
            receiving[0].receive(stream)


# -- the peer of a Unix socket -------------------------------------------------------------------


def as_another_user(action: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setuid(65534)
            status = action()
        finally:
            os._exit(status)
    return pid


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def public() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@needs_root
def test_a_source_of_another_user_is_refused(public: Path) -> None:
    address = Address.parse(f"unix:{public}/socket")

    def source() -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SOON)
            sock.connect(address.path)
            return 0 if sock.recv(64) == b"" else 2

    with Listener(address) as listener, Reception(listener, receive_shape) as here:
        os.chmod(address.path, 0o666)
        pid = as_another_user(source)
        with pytest.raises(NoPeer, match=f"process {pid} at the other end belongs to user 65534"):
            here.next()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@needs_root
def test_a_destination_of_another_user_gets_no_guest(public: Path) -> None:
    address = Address.parse(f"unix:{public}/socket")
    told, ready = os.pipe()

    def impostor() -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(address.path)
            sock.listen()
            os.write(ready, b"x")
            sock.settimeout(SOON)
            with sock.accept()[0] as peer:
                return 0 if peer.recv(64) == b"" else 2

    pid = as_another_user(impostor)
    os.read(told, 1)
    with pytest.raises(NoPeer, match="belongs to user 65534"):
        connect(address)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(told)
    os.close(ready)


# -- the socket's file --------------------------------------------------------------------------


def test_file_that_is_not_a_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"precious")
    with pytest.raises(MigrationRefused, match="cannot listen"):
        Listener(Address.parse(f"unix:{path}"))
    assert path.read_bytes() == b"precious"


def test_a_listener_removes_no_socket_of_another(address: Address) -> None:
    with Listener(address):
        os.unlink(address.path)
        other = Listener(address)
    assert os.path.exists(address.path)
    other.close()
    assert not os.path.exists(address.path)


# -- ALIVE ------------------------------------------------------------------------------------------


def flood(limit: AliveLimit) -> None:
    for _ in range(alive.BURST):
        limit.count()


def test_a_flood_of_alive_is_refused() -> None:
    limit = AliveLimit()
    flood(limit)
    with pytest.raises(StreamCorrupt, match="ALIVE frames within"):
        flood(limit)


def test_source_that_sends_only_alive_for_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, begin = AliveLimit(), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: begin + alive.SECONDS - 1)
    limit.count()
    monkeypatch.setattr(time, "monotonic", lambda: begin + alive.SECONDS + 1)
    with pytest.raises(StreamCorrupt, match="nothing but ALIVE"):
        limit.count()
    limit.progress()
    limit.count()


def test_a_tls_handshake_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Junk that looks like the begin of a record, byte by byte."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    near, far = socket.socketpair()
    with near, far:

        def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" + bytes(500):
                    far.send(bytes([byte]))
                    time.sleep(0.01)

        thread = threading.Thread(target=trickle)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(NoPeer, match="no answer within"):
            endpoint._with_tls(near, context, True, "", -1, begin + 0.5)
        assert time.monotonic() - begin < SOON
        far.shutdown(socket.SHUT_RDWR)
        thread.join()
