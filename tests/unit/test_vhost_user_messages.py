"""Decoding vhost-user messages: exact sizes, exact numbers of descriptors, nothing else accepted."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leaks import nothing_left_behind
from vhost_front_end import FrontEnd

from pyvhostvdpa.vhost_user.channel import FrontEndGone, MessageChannel
from pyvhostvdpa.vhost_user.messages import (
    HEADER,
    MAX_PAYLOAD,
    MAX_TABLE,
    SHAPES,
    ConfigSpace,
    LogArea,
    MemoryTable,
    MessageHeader,
    Number,
    ProtocolError,
    Request,
    StateTransfer,
    TableRegion,
    VringAddress,
    VringFd,
    VringNumber,
    decode,
    parse_header,
)

U64 = struct.pack("=Q", 7)
STATE = struct.pack("=II", 1, 256)
REGION = struct.pack("=QQQQ", 0x100000, 0x200000, 0x7F0000000000, 0x1000)
TABLE = struct.pack("=II", 2, 0) + 2 * REGION
EXAMPLES: dict[Request, tuple[bytes, int, object]] = {
    Request.GET_FEATURES: (b"", 0, None),
    Request.SET_FEATURES: (U64, 0, Number(7)),
    Request.SET_OWNER: (b"", 0, None),
    Request.RESET_OWNER: (b"", 0, None),
    Request.SET_MEM_TABLE: (TABLE, 2, MemoryTable((TableRegion(0x100000, 0x200000, 0x7F0000000000, 0x1000),) * 2)),
    Request.SET_LOG_BASE: (struct.pack("=QQ", 4096, 64), 1, LogArea(4096, 64)),
    Request.SET_LOG_FD: (b"", 1, None),
    Request.SET_VRING_NUM: (STATE, 0, VringNumber(1, 256)),
    Request.SET_VRING_ADDR: (struct.pack("=IIQQQQ", 1, 1, 2, 3, 4, 5), 0, VringAddress(1, 1, 2, 3, 4, 5)),
    Request.SET_VRING_BASE: (STATE, 0, VringNumber(1, 256)),
    Request.GET_VRING_BASE: (STATE, 0, VringNumber(1, 256)),
    Request.SET_VRING_KICK: (U64, 1, VringFd(7, True)),
    Request.SET_VRING_CALL: (struct.pack("=Q", 7 | 256), 0, VringFd(7, False)),
    Request.SET_VRING_ERR: (U64, 1, VringFd(7, True)),
    Request.GET_PROTOCOL_FEATURES: (b"", 0, None),
    Request.SET_PROTOCOL_FEATURES: (U64, 0, Number(7)),
    Request.GET_QUEUE_NUM: (b"", 0, None),
    Request.SET_VRING_ENABLE: (STATE, 0, VringNumber(1, 256)),
    Request.SEND_RARP: (U64, 0, Number(7)),
    Request.NET_SET_MTU: (U64, 0, Number(7)),
    Request.SET_BACKEND_REQ_FD: (b"", 1, None),
    Request.GET_CONFIG: (struct.pack("=III", 4, 2, 0) + b"ab", 0, ConfigSpace(4, 0, b"ab")),
    Request.SET_CONFIG: (struct.pack("=III", 4, 2, 1) + b"ab", 0, ConfigSpace(4, 1, b"ab")),
    Request.RESET_DEVICE: (b"", 0, None),
    Request.GET_MAX_MEM_SLOTS: (b"", 0, None),
    Request.ADD_MEM_REG: (bytes(8) + REGION, 1, TableRegion(0x100000, 0x200000, 0x7F0000000000, 0x1000)),
    Request.REM_MEM_REG: (bytes(8) + REGION, 0, TableRegion(0x100000, 0x200000, 0x7F0000000000, 0x1000)),
    Request.SET_STATUS: (U64, 0, Number(7)),
    Request.GET_STATUS: (b"", 0, None),
    Request.SET_DEVICE_STATE_FD: (struct.pack("=II", 1, 0), 1, StateTransfer(True)),
    Request.CHECK_DEVICE_STATE: (b"", 0, None),
}
REQUESTS = sorted(EXAMPLES)
ROOM = [len(TABLE) + more * len(REGION) for more in range(MAX_TABLE - 1)]
"""Sizes of a table of two regions, which may have room for eight."""


def header(request: int, size: int = 0) -> MessageHeader:
    return MessageHeader(request, False, size)


def test_examples_cover_every_message_that_is_served() -> None:
    assert set(EXAMPLES) == set(SHAPES)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_message_is_decoded(request_: Request) -> None:
    payload, count, decoded = EXAMPLES[request_]
    message = decode(header(request_, len(payload)), payload, tuple(range(count)))
    assert message.payload == decoded
    assert message.fds == tuple(range(count))


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_payload_of_any_other_size_is_refused(request_: Request) -> None:
    payload, count, _ = EXAMPLES[request_]
    room = set(ROOM) if request_ is Request.SET_MEM_TABLE else set()
    for size in {*range(len(payload)), *range(len(payload) + 1, len(payload) + 41), MAX_PAYLOAD} - room:
        wrong = payload[:size].ljust(size, b"\0")
        with pytest.raises(ProtocolError, match=Request(request_).name):
            decode(header(request_, size), wrong, tuple(range(count)))


@pytest.mark.parametrize("request_", REQUESTS)
def test_any_other_number_of_descriptors_is_refused(request_: Request) -> None:
    payload, count, _ = EXAMPLES[request_]
    allowed = {0, 1} if request_ is Request.REM_MEM_REG else {count}
    for wrong in set(range(9)) - allowed:
        with pytest.raises(ProtocolError, match="file descriptors"):
            decode(header(request_, len(payload)), payload, tuple(range(wrong)))


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("=QQQQ", 1 << 63, (1 << 63) + 1, 0, 0),
        struct.pack("=QQQQ", 0, 2, (1 << 64) - 1, 0),
        struct.pack("=QQQQ", 0, 2, 0, (1 << 64) - 1),
    ],
)
def test_a_region_that_leaves_an_address_space_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="leaves the"):
        decode(header(Request.ADD_MEM_REG), bytes(8) + payload, (0,))
    with pytest.raises(ProtocolError, match="leaves the"):
        decode(header(Request.SET_MEM_TABLE), struct.pack("=II", 1, 0) + payload, (0,))


def test_a_table_of_too_many_regions_is_refused() -> None:
    with pytest.raises(ProtocolError, match="9 regions"):
        decode(header(Request.SET_MEM_TABLE), struct.pack("=II", 9, 0) + 9 * REGION, tuple(range(8)))


def test_a_table_may_have_room_for_more_regions_than_it_has() -> None:
    for size in ROOM:
        message = decode(header(Request.SET_MEM_TABLE, size), TABLE.ljust(size, b"\xff"), (0, 1))
        assert message.payload == EXAMPLES[Request.SET_MEM_TABLE][2]
    size = ROOM[-1] + len(REGION)
    with pytest.raises(ProtocolError, match="SET_MEM_TABLE"):
        decode(header(Request.SET_MEM_TABLE, size), TABLE.ljust(size, b"\0"), (0, 1))


@pytest.mark.parametrize("request_", sorted(set(range(64)) - set(SHAPES)))
def test_a_request_that_is_not_served_is_refused(request_: int) -> None:
    with pytest.raises(ProtocolError, match="is not served"):
        decode(header(request_), b"")


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0x11, 0x15, 1 << 31 | 1])
def test_flags_of_anything_but_a_request_are_refused(flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        parse_header(HEADER.pack(1, flags, 0))


def test_a_payload_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="payload"):
        parse_header(HEADER.pack(1, 1, MAX_PAYLOAD + 1))


@given(st.binary(min_size=12, max_size=12), st.binary(max_size=400), st.integers(0, 9))
def test_decode_raises_only_protocol_errors_for_any_bytes(head: bytes, payload: bytes, count: int) -> None:
    try:
        decode(parse_header(head), payload, tuple(range(count)))
    except ProtocolError:
        return


@given(st.sampled_from(REQUESTS), st.data())
def test_decode_raises_only_protocol_errors_for_edited_messages(request_: Request, data: st.DataObject) -> None:
    payload, count, _ = EXAMPLES[request_]
    edited = bytearray(payload)
    for _ in range(data.draw(st.integers(0, 4))):
        if edited:
            edited[data.draw(st.integers(0, len(edited) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(header(request_, len(edited)), bytes(edited), tuple(range(count)))
    except ProtocolError:
        return


# -- over a socket -------------------------------------------------------------------


def connected(deadline: float = 10.0) -> tuple[MessageChannel, FrontEnd]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return MessageChannel(ours, deadline), FrontEnd(theirs)


def test_a_message_in_pieces_is_one_message() -> None:
    channel, front = connected()
    whole = HEADER.pack(Request.SET_FEATURES, 1, 8) + U64
    with channel:
        thread = threading.Thread(target=lambda: [front.raw(whole[at : at + 1]) for at in range(1, len(whole))])
        front.raw(whole[:1])
        thread.start()
        head, payload, fds = channel.receive()
        thread.join()
    front.close()
    assert (head.request, payload, fds) == (Request.SET_FEATURES, U64, [])


def test_descriptors_come_with_their_message() -> None:
    channel, front = connected()
    before = len(os.listdir("/proc/self/fd"))
    with channel:
        memfd = os.memfd_create("x")
        front.send(Request.SET_VRING_KICK, U64, [memfd, memfd])
        _, _, fds = channel.receive()
        assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(memfd).st_ino] * 2
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in [*fds, memfd]:
            os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == before
    front.close()


@pytest.mark.parametrize("count", [9, 12, 64])
def test_too_many_descriptors_are_refused_and_closed(count: int) -> None:
    channel, front = connected()
    with channel:
        memfd = os.memfd_create("x")
        front.send(Request.SET_VRING_KICK, U64, [memfd] * count)
        os.close(memfd)
        with nothing_left_behind(), pytest.raises(ProtocolError, match="descriptors"):
            channel.receive()
    front.close()


def test_a_message_that_is_not_finished_ends_the_connection_and_leaves_nothing_open() -> None:
    channel, front = connected(deadline=0.1)
    with channel:
        memfd = os.memfd_create("x")
        front.raw(HEADER.pack(Request.SET_VRING_KICK, 1, 8), [memfd])
        os.close(memfd)
        with nothing_left_behind(), pytest.raises(FrontEndGone, match="finish a message"):
            channel.receive()
    front.close()


def test_a_front_end_that_reads_no_replies_is_left_after_the_deadline() -> None:
    channel, front = connected(deadline=0.1)
    with channel, pytest.raises(FrontEndGone, match="read a reply"):
        channel.send(bytes(100 << 20))
    front.close()


@pytest.mark.parametrize("size", [0, 5])
def test_connection_that_ends_is_distinguished_from_one_that_waits(size: int) -> None:
    channel, front = connected()
    with channel:
        if size:
            front.raw(bytes(size))
        front.close()
        with pytest.raises(FrontEndGone, match="closed"):
            channel.receive()
