"""The stream between two sides: frames arrive as they left, or there is a clear error."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvhostvdpa.base.errors import MigrationCancelled, MigrationRefused, StreamBroken, StreamCorrupt
from pyvhostvdpa.migration import stream
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.endpoint import Address, Listener, check_security, connect
from pyvhostvdpa.migration.pages import stream_sum
from pyvhostvdpa.migration.source import Source
from pyvhostvdpa.migration.stream import HEADER, Channel, Frame, words


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(end, stall=5.0) for end in socket.socketpair())
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A channel, and a peer that may send anything."""
    peer, end = socket.socketpair()
    channel = Channel(end, stall=5.0)
    yield peer, channel
    peer.close()
    channel.close()


def frame(kind: int, payload: bytes, length: int | None = None, wrong: int = 0) -> bytes:
    size = len(payload) if length is None else length
    return HEADER.pack(kind, 0, size, stream_sum(payload) ^ wrong) + payload


def test_a_frame_arrives_as_it_left(pair: tuple[Channel, Channel]) -> None:
    pair[0].send_frame(Frame.GUEST, b"state", count=3)
    header = pair[1].receive_header()
    assert (header.type, header.count, header.length) == (Frame.GUEST, 3, 5)
    assert pair[1].receive_payload(header) == b"state"


def test_a_large_frame_is_sent_whole_while_the_other_side_reads(pair: tuple[Channel, Channel]) -> None:
    payload = os.urandom(stream.MAX_CONTROL)
    sender = threading.Thread(target=pair[0].send_frame, args=(Frame.DEVICE, payload))
    sender.start()
    assert pair[1].expect(Frame.DEVICE) == (Frame.DEVICE, payload)
    sender.join()


def test_a_wrong_checksum_is_reported(raw: tuple[socket.socket, Channel]) -> None:
    raw[0].sendall(frame(Frame.GUEST, b"state", wrong=1))
    with pytest.raises(StreamCorrupt, match="GUEST frame: its checksum differs"):
        raw[1].expect(Frame.GUEST)


def test_a_frame_too_long_is_refused_before_it_is_read(raw: tuple[socket.socket, Channel]) -> None:
    raw[0].sendall(frame(Frame.GUEST, b"", length=stream.MAX_CONTROL + 1))
    with pytest.raises(StreamCorrupt, match="1048577 bytes, 1048576 are possible"):
        raw[1].expect(Frame.GUEST)


def test_a_frame_of_no_known_type_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    raw[0].sendall(frame(0x77, b""))
    with pytest.raises(StreamCorrupt, match="unknown frame type 0x77"):
        raw[1].receive_header()


def test_a_frame_out_of_turn_is_refused(pair: tuple[Channel, Channel]) -> None:
    pair[0].send_frame(Frame.GO)
    with pytest.raises(StreamCorrupt, match="a GO frame where ACCEPT or REFUSE belongs"):
        pair[1].expect(Frame.ACCEPT, Frame.REFUSE)


@pytest.mark.parametrize("cut", [0, 1, 23, 24, 28])
def test_an_end_in_the_middle_of_a_frame_is_reported(raw: tuple[socket.socket, Channel], cut: int) -> None:
    raw[0].sendall(frame(Frame.GUEST, b"state")[:cut])
    raw[0].close()
    with pytest.raises(StreamBroken, match="closed the stream"):
        raw[1].expect(Frame.GUEST)


def test_silence_is_a_broken_stream(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(StreamBroken, match=r"did nothing for 0\.05 s"):
        pair[0].expect(Frame.READY, seconds=0.05)


def test_a_peer_that_reads_nothing_is_a_broken_stream(pair: tuple[Channel, Channel]) -> None:
    pair[0].stall = 0.05
    with pytest.raises(StreamBroken, match="did nothing"):
        pair[0].send_frame(Frame.DEVICE, bytes(stream.MAX_CONTROL))
    assert pair[0].torn


def test_cancelling_ends_a_wait(pair: tuple[Channel, Channel]) -> None:
    pair[0].cancel = os.eventfd(1)
    try:
        with pytest.raises(MigrationCancelled):
            pair[0].expect(Frame.READY)
    finally:
        os.close(pair[0].cancel)


def test_a_frame_that_is_here_counts_although_the_user_has_cancelled_since() -> None:
    """It may be GO: from then on the guest is this side's."""
    near, far = socket.socketpair()
    with Cancel() as cancel, Channel(near) as here, Channel(far, cancel.fileno(), stall=5.0) as there:
        here.send_frame(Frame.GO, bytes(8))
        cancel.set()
        assert there.expect(Frame.GO, Frame.CANCEL) == (Frame.GO, bytes(8))
        with pytest.raises(MigrationCancelled):
            there.expect(Frame.GO, Frame.CANCEL)


@pytest.mark.parametrize("looked_before", [False, True])
def test_a_channel_that_was_closed_has_no_last_words_and_looks_at_no_other_file(looked_before: bool) -> None:
    near, far = socket.socketpair()
    with Channel(near), Channel(far, stall=60.0) as closed:
        if looked_before:
            assert not closed.readable()
        closed.close()
        # takes the number, and is never readable
        left, right = socket.socketpair()
        with left, right:
            begin = time.monotonic()
            assert closed.last_words() == ""
            with pytest.raises(StreamBroken):
                closed.expect(Frame.READY)
            assert time.monotonic() - begin < 5.0


def test_last_words_are_read_after_the_stream_broke(pair: tuple[Channel, Channel]) -> None:
    pair[1].send_frame(Frame.ALIVE, b"at work")
    pair[1].send_text(Frame.FAILED, "no memory")
    pair[1].close()
    with pytest.raises(StreamBroken):
        pair[0].send_frame(Frame.DEVICE, bytes(stream.MAX_CONTROL))
    assert pair[0].last_words() == "no memory"


def test_finishing_lets_the_last_frame_arrive_though_the_peer_still_sends() -> None:
    """Over TCP a socket closed with unread bytes resets the connection, and the last frames are lost."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = Channel(socket.create_connection(server.getsockname()))
        right = Channel(server.accept()[0])
    left.send_frame(Frame.DEVICE, bytes(200_000))
    right.send_text(Frame.FAILED, "enough")
    closer = threading.Thread(target=lambda: (right.finish(), right.close()))
    closer.start()
    assert left.last_words() == "enough"
    left.close()
    closer.join()


def test_peer_that_never_stops_sending_is_not_read_for_ever(raw: tuple[socket.socket, Channel]) -> None:
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.05):
            raw[0].send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    begin = time.monotonic()
    try:
        raw[1].finish(0.5)
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - begin < 10


def test_source_that_abandons_a_silent_destination_sends_cancel(pair: tuple[Channel, Channel]) -> None:
    source: Any = SimpleNamespace(channel=pair[0])
    assert Source._end_stream(source, StreamBroken("the other side did nothing")) == ""
    assert pair[1].expect(*Frame) == (Frame.CANCEL, b"the other side did nothing")


def test_words_of_the_other_side_cannot_touch_the_terminal() -> None:
    assert words(b"\x1b[2Jno\n\xff") == "?[2Jno?\ufffd"


# -- preamble ---------------------------------------------------------------------------


def test_greeting_succeeds_between_two_channels(pair: tuple[Channel, Channel]) -> None:
    other = threading.Thread(target=pair[1].greet)
    other.start()
    pair[0].greet()
    other.join()


def test_another_version_is_named(raw: tuple[socket.socket, Channel]) -> None:
    raw[0].sendall(struct.pack("<8sII", stream.MAGIC, 7, 0))
    with pytest.raises(
        MigrationRefused, match=f"speaks version 7 of the migration stream, this one version {stream.VERSION}"
    ):
        raw[1].greet()


def test_another_protocol_is_not_a_migration_stream(raw: tuple[socket.socket, Channel]) -> None:
    raw[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(MigrationRefused, match="no migration stream: the other side began with 47 45 54"):
        raw[1].greet()


def test_peer_that_leaves_is_not_a_migration_stream(raw: tuple[socket.socket, Channel]) -> None:
    raw[0].close()
    with pytest.raises(MigrationRefused, match="no migration stream"):
        raw[1].greet()


@settings(max_examples=300, deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_is_never_more_than_a_clear_error(junk: bytes) -> None:
    peer, end = socket.socketpair()
    with peer, Channel(end, stall=5.0) as channel:
        peer.sendall(junk)
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises((StreamBroken, StreamCorrupt)):
            read_on(channel)


def read_on(channel: Channel) -> None:
    while True:
        channel.receive_payload(channel.receive_header())


# -- addresses ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["unix:", "tcp:host", "tcp::1", "tcp:h:0", "tcp:h:65536", "udp:h:1", "/path", ""])
def test_invalid_stream_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(MigrationRefused, match="is not a valid address") as refused:
        Address.parse(text)
    assert "tcp:HOST:PORT" in refused.value.hint


def test_addresses_read_as_they_are_written() -> None:
    for text in ("unix:/run/x", "tcp:host:4444"):
        assert str(Address.parse(text)) == text
    assert Address.parse("tcp:[::1]:5").host == "::1"


def test_tcp_in_plain_is_refused_unless_it_is_meant() -> None:
    tcp = Address.parse("tcp:host:1")
    with pytest.raises(MigrationRefused, match="without TLS"):
        check_security(tcp, None, plain=False)
    check_security(tcp, None, plain=True)
    check_security(Address.parse("unix:/x"), None, plain=False)


def test_connect_without_a_listener_names_the_command_to_run_there(tmp_path: object) -> None:
    with pytest.raises(MigrationRefused) as refused:
        connect(Address.parse(f"unix:{tmp_path}/none"))
    assert "vhost-vdpa receive" in refused.value.hint


def test_connect_does_not_wait_for_a_listener_with_a_full_backlog(tmp_path: object) -> None:
    address = Address.parse(f"unix:{tmp_path}/s")
    with Listener(address), contextlib.ExitStack() as waiting:
        for _ in range(200):
            other = waiting.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            other.connect_ex(address.path)
        with pytest.raises(MigrationRefused, match="temporarily unavailable"):
            connect(address)


def test_a_killed_listeners_socket_is_in_nobodys_way(tmp_path: object) -> None:
    address = Address.parse(f"unix:{tmp_path}/s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address.path)
    with Listener(address):
        assert os.stat(address.path).st_mode & 0o777 == 0o600
    assert not os.path.exists(address.path)


def test_a_listeners_socket_in_use_is_not_taken_away(tmp_path: object) -> None:
    address = Address.parse(f"unix:{tmp_path}/s")
    with Listener(address), pytest.raises(MigrationRefused, match="cannot listen") as refused:
        Listener(address)
    assert "free address" in refused.value.hint
