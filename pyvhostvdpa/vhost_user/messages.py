# SPDX-License-Identifier: MIT
"""vhost-user messages: numbers, sizes, and decoding (docs/interop/vhost-user.rst of QEMU).

Everything here is a pure function of bytes. A message is decoded and checked in full before any of it is used: exact
payload size, exact number of descriptors, ring indices and addresses in their ranges. What depends on the state of a
session is checked by :mod:`~pyvhostvdpa.vhost_user.session`.

A guest that moves stands still for some thirty messages: what is known of a request is looked up once for each.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..base.errors import VhostVdpaError

HEADER = struct.Struct("=III")
"""Request, flags, bytes of payload; in the byte order of the machine."""
VERSION = 1
VERSION_MASK = 0x3
REPLY = 0x4
NEED_REPLY = 0x8
MAX_PAYLOAD = 4096
"""Bytes; the longest message in use is the memory table with 264."""
MAX_FDS = 8
"""Descriptors in one message (VHOST_MEMORY_BASELINE_NREGIONS)."""
MAX_TABLE = 8
"""Regions in a SET_MEM_TABLE."""
MAX_CONFIG = 256
NO_FD = 1 << 8
"""In the payload of a message about an eventfd, and in the reply to SET_DEVICE_STATE_FD: no descriptor comes along."""
INDEX_MASK = 0xFF


class ProtocolError(VhostVdpaError):
    """The front-end sent what no correct one sends. The connection cannot be used any more."""


class MessageRefused(VhostVdpaError):
    """One message is answered with an error; the connection continues."""


class Request(enum.IntEnum):
    """Requests of the front-end, by the specification's names."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class ProtocolFeature(enum.IntFlag):
    """Protocol features, by the specification's names."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22


class Number(NamedTuple):
    """A payload of one number."""

    value: int


@dataclass(frozen=True, slots=True)
class VringNumber:
    """A ring and a number: its size, its base, whether it is enabled."""

    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddress:
    """Where a ring lies, in the front-end's addresses or in GPAs (GPA_ADDRESSES); ``log`` is a GPA."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True, slots=True)
class VringFd:
    """A ring and whether an eventfd comes along."""

    index: int
    has_fd: bool


@dataclass(frozen=True, slots=True)
class TableRegion:
    """A region of guest memory: ``size`` bytes at ``offset`` of its file; ``user`` is the front-end's address."""

    gpa: int
    size: int
    user: int
    offset: int


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All regions of guest memory."""

    regions: tuple[TableRegion, ...]


@dataclass(frozen=True, slots=True)
class LogArea:
    """The dirty log: ``size`` bytes at ``offset`` of the file that comes along."""

    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """A piece of the configuration space."""

    offset: int
    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class StateTransfer:
    """The back-end's state goes to the file that comes along (``load`` False) or comes from it."""

    load: bool


Payload = (
    None
    | Number
    | VringNumber
    | VringAddress
    | VringFd
    | TableRegion
    | MemoryTable
    | LogArea
    | ConfigSpace
    | StateTransfer
)


class MessageHeader(NamedTuple):
    """What every message starts with."""

    request: int
    need_reply: bool
    size: int

    @property
    def name(self) -> str:
        """The request's name for people."""
        return _KNOWN[self.request].name if self.request in _KNOWN else f"request {self.request}"


_KNOWN = {int(each): each for each in Request}
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESS = struct.Struct("=IIQQQQ")
_REGION = struct.Struct("=QQQQ")
_TABLE = struct.Struct("=II")
_AREA = struct.Struct("=QQ")
_CONFIG = struct.Struct("=III")


def parse_header(data: bytes) -> MessageHeader:
    """Decode a header; ProtocolError for another version, a reply, or a payload that is too long."""
    request, flags, size = HEADER.unpack(data)
    if flags & VERSION_MASK != VERSION or flags & ~(VERSION_MASK | NEED_REPLY):
        raise ProtocolError(f"request {request} has the flags {flags:#x}: not a request of version {VERSION}")
    if size > MAX_PAYLOAD:
        raise ProtocolError(f"request {request} has a payload of {size} bytes; at most {MAX_PAYLOAD} are accepted")
    return MessageHeader(request, bool(flags & NEED_REPLY), size)


def _exactly(size: int, payload: bytes) -> None:
    if len(payload) != size:
        raise ProtocolError(f"has a payload of {len(payload)} bytes instead of {size}")


def _nothing(payload: bytes) -> None:
    _exactly(0, payload)


def _number(payload: bytes) -> Number:
    _exactly(_U64.size, payload)
    return Number(*_U64.unpack(payload))


def _state(payload: bytes) -> VringNumber:
    _exactly(_STATE.size, payload)
    return VringNumber(*_STATE.unpack(payload))


def _address(payload: bytes) -> VringAddress:
    _exactly(_ADDRESS.size, payload)
    return VringAddress(*_ADDRESS.unpack(payload))


def _vring_fd(payload: bytes) -> VringFd:
    _exactly(_U64.size, payload)
    [value] = _U64.unpack(payload)
    if value & ~(INDEX_MASK | NO_FD):
        raise ProtocolError(f"has the value {value:#x}: bits above 8 are reserved")
    return VringFd(value & INDEX_MASK, not value & NO_FD)


def _check_region(region: TableRegion) -> TableRegion:
    for name, start in (("guest", region.gpa), ("front-end", region.user), ("file", region.offset)):
        if start + region.size > 1 << 64:
            raise ProtocolError(f"has a region that leaves the {name} address space: {start:#x}+{region.size:#x}")
    return region


def _table(payload: bytes) -> MemoryTable:
    if len(payload) < _TABLE.size:
        raise ProtocolError(f"has a payload of {len(payload)} bytes, fewer than {_TABLE.size}")
    [count, _] = _TABLE.unpack_from(payload)
    if count > MAX_TABLE:
        raise ProtocolError(f"has {count} regions; at most {MAX_TABLE} are allowed")
    end = _TABLE.size + count * _REGION.size
    # User Mode Linux always sends two, with a count of one
    if not end <= len(payload) <= _TABLE.size + MAX_TABLE * _REGION.size or (len(payload) - end) % _REGION.size:
        raise ProtocolError(f"has a payload of {len(payload)} bytes instead of {end}, or with room for more regions")
    regions = _REGION.iter_unpack(payload[_TABLE.size : end])
    return MemoryTable(tuple(_check_region(TableRegion(*each)) for each in regions))


def _single_region(payload: bytes) -> TableRegion:
    _exactly(_U64.size + _REGION.size, payload)
    return _check_region(TableRegion(*_REGION.unpack_from(payload, _U64.size)))


def _log(payload: bytes) -> LogArea:
    _exactly(_AREA.size, payload)
    area = LogArea(*_AREA.unpack(payload))
    if area.size + area.offset > 1 << 63:
        raise ProtocolError(f"has a log of {area.size:#x} bytes at {area.offset:#x}")
    return area


def _config(payload: bytes) -> ConfigSpace:
    if len(payload) < _CONFIG.size:
        raise ProtocolError(f"has a payload of {len(payload)} bytes, fewer than {_CONFIG.size}")
    offset, size, flags = _CONFIG.unpack_from(payload)
    _exactly(_CONFIG.size + size, payload)
    if offset + size > MAX_CONFIG:
        raise ProtocolError(f"reaches to {offset + size} of a configuration space of {MAX_CONFIG} bytes")
    return ConfigSpace(offset, flags, payload[_CONFIG.size :])


def _transfer(payload: bytes) -> StateTransfer:
    _exactly(_STATE.size, payload)
    direction, phase = _STATE.unpack(payload)
    if direction > 1 or phase:
        raise ProtocolError(f"has direction {direction} and phase {phase}; only 0 and 1 in phase 0 exist")
    return StateTransfer(bool(direction))


_ALWAYS = ProtocolFeature(0)


@dataclass(frozen=True, slots=True)
class Shape:
    """How one request looks: its decoder, its descriptors (least, most), whether it has a reply of its own.

    ``needs`` is the protocol feature without which it must not be sent.
    """

    decode: Callable[[bytes], Payload]
    fds: tuple[int, int] = (0, 0)
    replies: bool = False
    needs: ProtocolFeature = _ALWAYS


_P = ProtocolFeature
SHAPES: dict[Request, Shape] = {
    Request.GET_FEATURES: Shape(_nothing, replies=True),
    Request.SET_FEATURES: Shape(_number),
    Request.SET_OWNER: Shape(_nothing),
    Request.RESET_OWNER: Shape(_nothing),
    Request.SET_MEM_TABLE: Shape(_table, fds=(0, MAX_TABLE)),
    Request.SET_LOG_BASE: Shape(_log, fds=(1, 1), replies=True, needs=_P.LOG_SHMFD),
    Request.SET_LOG_FD: Shape(_nothing, fds=(1, 1)),
    Request.SET_VRING_NUM: Shape(_state),
    Request.SET_VRING_ADDR: Shape(_address),
    Request.SET_VRING_BASE: Shape(_state),
    Request.GET_VRING_BASE: Shape(_state, replies=True),
    Request.SET_VRING_KICK: Shape(_vring_fd, fds=(0, 1)),
    Request.SET_VRING_CALL: Shape(_vring_fd, fds=(0, 1)),
    Request.SET_VRING_ERR: Shape(_vring_fd, fds=(0, 1)),
    Request.GET_PROTOCOL_FEATURES: Shape(_nothing, replies=True),
    Request.SET_PROTOCOL_FEATURES: Shape(_number),
    Request.GET_QUEUE_NUM: Shape(_nothing, replies=True, needs=_P.MQ),
    Request.SET_VRING_ENABLE: Shape(_state),
    Request.SEND_RARP: Shape(_number, needs=_P.RARP),
    Request.NET_SET_MTU: Shape(_number, needs=_P.MTU),
    Request.SET_BACKEND_REQ_FD: Shape(_nothing, fds=(1, 1), needs=_P.BACKEND_REQ),
    Request.GET_CONFIG: Shape(_config, replies=True, needs=_P.CONFIG),
    Request.SET_CONFIG: Shape(_config, needs=_P.CONFIG),
    Request.RESET_DEVICE: Shape(_nothing, needs=_P.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Shape(_nothing, replies=True, needs=_P.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Shape(_single_region, fds=(1, 1), needs=_P.CONFIGURE_MEM_SLOTS),
    # older front-ends send the descriptor along here too; it is closed
    Request.REM_MEM_REG: Shape(_single_region, fds=(0, 1), needs=_P.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Shape(_number, needs=_P.STATUS),
    Request.GET_STATUS: Shape(_nothing, replies=True, needs=_P.STATUS),
    Request.SET_DEVICE_STATE_FD: Shape(_transfer, fds=(1, 1), replies=True, needs=_P.DEVICE_STATE),
    Request.CHECK_DEVICE_STATE: Shape(_nothing, replies=True, needs=_P.DEVICE_STATE),
}
"""Every request that is served. The others belong to protocol features that are not offered."""
_SHAPES = {int(request): (request, shape) for request, shape in SHAPES.items()}


class Message(NamedTuple):
    """A decoded message. ``fds`` belong to its handler."""

    request: Request
    need_reply: bool
    payload: Payload
    fds: tuple[int, ...] = ()

    @property
    def has_own_reply(self) -> bool:
        """Whether it has a reply beside the acknowledgement that any message can ask for."""
        return SHAPES[self.request].replies


def decode(header: MessageHeader, payload: bytes, fds: tuple[int, ...] = ()) -> Message:
    """Decode a message in full. ProtocolError says what is wrong with it; the descriptors stay the caller's then."""
    known = _SHAPES.get(header.request)
    if known is None:
        raise ProtocolError(f"{header.name} is not served: it belongs to a feature that is not offered")
    request, shape = known
    try:
        decoded = shape.decode(payload)
        _check_fds(shape, decoded, len(fds))
    except ProtocolError as e:
        raise ProtocolError(f"{header.name} {e}") from None
    return Message(request, header.need_reply, decoded, fds)


def _check_fds(shape: Shape, payload: Payload, count: int) -> None:
    least, most = shape.fds
    if isinstance(payload, MemoryTable):
        least = most = len(payload.regions)
    elif isinstance(payload, VringFd):
        least = most = int(payload.has_fd)
    if not least <= count <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise ProtocolError(f"came with {count} file descriptors instead of {wanted}")


def reply(request: int, payload: bytes) -> bytes:
    """Return a reply as it goes to the front-end."""
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def reply_number(request: int, value: int) -> bytes:
    """Return a reply of one number, which an acknowledgement is as well (0: done)."""
    return reply(request, _U64.pack(value))


def reply_state(request: int, state: VringNumber) -> bytes:
    """Return a reply about one ring."""
    return reply(request, _STATE.pack(state.index, state.num))


def reply_log(request: int, area: LogArea) -> bytes:
    """Return the reply to SET_LOG_BASE: some front-ends read a log's description, some anything."""
    return reply(request, _AREA.pack(area.size, area.offset))


def reply_config(request: int, space: ConfigSpace) -> bytes:
    """Return the reply to GET_CONFIG; one without bytes says that it failed."""
    return reply(request, _CONFIG.pack(space.offset, len(space.data), space.flags) + space.data if space.data else b"")
