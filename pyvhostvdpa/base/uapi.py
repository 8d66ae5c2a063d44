# SPDX-License-Identifier: MIT
"""The vhost-vdpa user API as data: kernel names, numbers, arguments.

Names are those of ``linux/vhost.h``, ``linux/vhost_types.h`` and the virtio
specification without their prefix; numbers are computed by ``ioctl-opt`` and
compared by a test with what the compiler makes of the kernel's own header.
"""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass

import ioctl_opt

VHOST_VIRTIO = 0xAF
"""The ioctl type byte of ``linux/vhost.h``."""

MESSAGE_SIZE = 72
"""Bytes of a ``struct vhost_msg_v2``, and what a write() of one returns."""


class VringState(ctypes.Structure):
    """``struct vhost_vring_state``: an index and a value."""

    _fields_ = [("index", ctypes.c_uint32), ("num", ctypes.c_uint32)]


class VringFile(ctypes.Structure):
    """``struct vhost_vring_file``: an index and a file descriptor, -1 unbinds."""

    _fields_ = [("index", ctypes.c_uint32), ("fd", ctypes.c_int32)]


class VringAddr(ctypes.Structure):
    """``struct vhost_vring_addr``; for vhost-vdpa the addresses are IOVAs.

    The kernel's order is used before avail.
    """

    _fields_ = [
        ("index", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("desc_user_addr", ctypes.c_uint64),
        ("used_user_addr", ctypes.c_uint64),
        ("avail_user_addr", ctypes.c_uint64),
        ("log_guest_addr", ctypes.c_uint64),
    ]


class VdpaConfig(ctypes.Structure):
    """``struct vhost_vdpa_config`` without its trailing buffer."""

    _fields_ = [("off", ctypes.c_uint32), ("len", ctypes.c_uint32)]


class VhostMemory(ctypes.Structure):
    """``struct vhost_memory`` without its trailing regions."""

    _fields_ = [("nregions", ctypes.c_uint32), ("padding", ctypes.c_uint32)]


class VringWorker(ctypes.Structure):
    """``struct vhost_vring_worker``: which worker serves a ring. Not for vhost-vdpa, which has no worker."""

    _fields_ = [("index", ctypes.c_uint32), ("worker_id", ctypes.c_uint32)]


class WorkerState(ctypes.Structure):
    """``struct vhost_worker_state``. Not for vhost-vdpa."""

    _fields_ = [("worker_id", ctypes.c_uint32)]


class FeaturesArray(ctypes.Structure):
    """``struct vhost_features_array`` without its trailing words. Served by vhost-net only."""

    _fields_ = [("count", ctypes.c_uint64)]


class IovaRange(ctypes.Structure):
    """``struct vhost_vdpa_iova_range``: both ends inclusive."""

    _fields_ = [("first", ctypes.c_uint64), ("last", ctypes.c_uint64)]


_Scalar = (
    type[ctypes.c_uint8] | type[ctypes.c_uint16] | type[ctypes.c_int32] | type[ctypes.c_uint32] | type[ctypes.c_uint64]
)
Argument = type[ctypes.Structure] | _Scalar | None


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One request: what it is called, what it carries, what it needs.

    ``direction`` is from the caller's view: ``""`` (no argument), ``"R"``,
    ``"W"`` or ``"RW"``. ``needs_owner`` is whether the kernel answers EPERM
    to every process but the one that did ``SET_OWNER``
    (drivers/vhost/vhost.c:vhost_dev_check_owner). ``since`` is the first
    mainline version that is known to have it, a hint for messages: what a
    kernel can do is found out by asking it. ``rejected`` is why vhost-vdpa
    never serves it, "" for one that it does; such a request has no method of
    its own, :meth:`~pyvhostvdpa.chardev.door.VhostVdpa.request` makes it.
    """

    name: str
    direction: str
    number: int
    argument: Argument
    needs_owner: bool
    since: str
    rejected: str = ""

    @property
    def method(self) -> str:
        """The name of the method of :class:`~pyvhostvdpa.chardev.door.VhostVdpa` that makes it."""
        if self.rejected:
            return "request"
        return self.name.removeprefix("VHOST_").removeprefix("VDPA_").lower()

    @property
    def size(self) -> int:
        """Bytes of the argument's fixed part, 0 without one."""
        return 0 if self.argument is None else ctypes.sizeof(self.argument)

    @property
    def request(self) -> int:
        """The value that ioctl() takes."""
        if self.argument is None:
            return int(ioctl_opt.IO(VHOST_VIRTIO, self.number))
        encode = {"R": ioctl_opt.IOR, "W": ioctl_opt.IOW, "RW": ioctl_opt.IOWR}[self.direction]
        return int(encode(VHOST_VIRTIO, self.number, self.argument))


_NO_LOG = "vhost-vdpa logs no dirty pages"
_NO_WORKER = "vhost-vdpa has no worker thread: the parent's kick runs in the eventfd's wake-up"
_NET_ONLY = "vhost-vdpa has 64 feature bits; only vhost-net takes an array"

_TABLE = (
    Ioctl("VHOST_GET_FEATURES", "R", 0x00, ctypes.c_uint64, False, "5.7"),
    Ioctl("VHOST_SET_FEATURES", "W", 0x00, ctypes.c_uint64, False, "5.7"),
    Ioctl("VHOST_SET_OWNER", "", 0x01, None, False, "5.7"),
    Ioctl("VHOST_RESET_OWNER", "", 0x02, None, True, "5.7", "closing a device releases it"),
    Ioctl("VHOST_SET_MEM_TABLE", "W", 0x03, VhostMemory, True, "5.7"),
    Ioctl("VHOST_SET_LOG_BASE", "W", 0x04, ctypes.c_uint64, True, "5.7", _NO_LOG),
    Ioctl("VHOST_SET_LOG_FD", "W", 0x07, ctypes.c_int32, True, "5.7", _NO_LOG),
    Ioctl("VHOST_NEW_WORKER", "R", 0x08, WorkerState, True, "6.5", _NO_WORKER),
    Ioctl("VHOST_FREE_WORKER", "W", 0x09, WorkerState, True, "6.5", _NO_WORKER),
    Ioctl("VHOST_SET_VRING_NUM", "W", 0x10, VringState, True, "5.7"),
    Ioctl("VHOST_SET_VRING_ADDR", "W", 0x11, VringAddr, True, "5.7"),
    Ioctl("VHOST_SET_VRING_BASE", "W", 0x12, VringState, True, "5.7"),
    Ioctl("VHOST_GET_VRING_BASE", "RW", 0x12, VringState, True, "5.7"),
    Ioctl("VHOST_SET_VRING_ENDIAN", "W", 0x13, VringState, True, "5.7"),
    Ioctl("VHOST_GET_VRING_ENDIAN", "W", 0x14, VringState, True, "5.7"),
    Ioctl("VHOST_ATTACH_VRING_WORKER", "W", 0x15, VringWorker, True, "6.5", _NO_WORKER),
    Ioctl("VHOST_GET_VRING_WORKER", "RW", 0x16, VringWorker, True, "6.5", _NO_WORKER),
    Ioctl("VHOST_SET_VRING_KICK", "W", 0x20, VringFile, True, "5.7"),
    Ioctl("VHOST_SET_VRING_CALL", "W", 0x21, VringFile, True, "5.7"),
    Ioctl("VHOST_SET_VRING_ERR", "W", 0x22, VringFile, True, "5.7"),
    Ioctl("VHOST_SET_VRING_BUSYLOOP_TIMEOUT", "W", 0x23, VringState, True, "5.7"),
    Ioctl("VHOST_GET_VRING_BUSYLOOP_TIMEOUT", "W", 0x24, VringState, True, "5.7"),
    Ioctl("VHOST_SET_BACKEND_FEATURES", "W", 0x25, ctypes.c_uint64, False, "5.7"),
    Ioctl("VHOST_GET_BACKEND_FEATURES", "R", 0x26, ctypes.c_uint64, False, "5.7"),
    Ioctl("VHOST_VDPA_GET_DEVICE_ID", "R", 0x70, ctypes.c_uint32, False, "5.7"),
    Ioctl("VHOST_VDPA_GET_STATUS", "R", 0x71, ctypes.c_uint8, False, "5.7"),
    Ioctl("VHOST_VDPA_SET_STATUS", "W", 0x72, ctypes.c_uint8, False, "5.7"),
    Ioctl("VHOST_VDPA_GET_CONFIG", "R", 0x73, VdpaConfig, False, "5.7"),
    Ioctl("VHOST_VDPA_SET_CONFIG", "W", 0x74, VdpaConfig, False, "5.7"),
    Ioctl("VHOST_VDPA_SET_VRING_ENABLE", "W", 0x75, VringState, True, "5.7"),
    Ioctl("VHOST_VDPA_GET_VRING_NUM", "R", 0x76, ctypes.c_uint16, False, "5.7"),
    Ioctl("VHOST_VDPA_SET_CONFIG_CALL", "W", 0x77, ctypes.c_int32, False, "5.8"),
    Ioctl("VHOST_VDPA_GET_IOVA_RANGE", "R", 0x78, IovaRange, False, "5.10"),
    Ioctl("VHOST_VDPA_GET_CONFIG_SIZE", "R", 0x79, ctypes.c_uint32, False, "5.18"),
    Ioctl("VHOST_VDPA_GET_AS_NUM", "R", 0x7A, ctypes.c_uint32, False, "5.19"),
    Ioctl("VHOST_VDPA_GET_VRING_GROUP", "RW", 0x7B, VringState, True, "5.19"),
    Ioctl("VHOST_VDPA_SET_GROUP_ASID", "W", 0x7C, VringState, True, "5.19"),
    Ioctl("VHOST_VDPA_SUSPEND", "", 0x7D, None, False, "6.0"),
    Ioctl("VHOST_VDPA_RESUME", "", 0x7E, None, False, "6.3"),
    Ioctl("VHOST_VDPA_GET_VRING_DESC_GROUP", "RW", 0x7F, VringState, True, "6.7"),
    Ioctl("VHOST_VDPA_GET_VQS_COUNT", "R", 0x80, ctypes.c_uint32, False, "5.18"),
    Ioctl("VHOST_VDPA_GET_GROUP_NUM", "R", 0x81, ctypes.c_uint32, False, "5.19"),
    Ioctl("VHOST_VDPA_GET_VRING_SIZE", "RW", 0x82, VringState, True, "6.9"),
    Ioctl("VHOST_GET_FEATURES_ARRAY", "R", 0x83, FeaturesArray, True, "6.18", _NET_ONLY),
    Ioctl("VHOST_SET_FEATURES_ARRAY", "W", 0x83, FeaturesArray, True, "6.18", _NET_ONLY),
    Ioctl("VHOST_SET_FORK_FROM_OWNER", "W", 0x84, ctypes.c_uint8, False, "6.18"),
    Ioctl("VHOST_GET_FORK_FROM_OWNER", "R", 0x85, ctypes.c_uint8, False, "6.18"),
)

IOCTLS: dict[str, Ioctl] = {row.name: row for row in _TABLE}
"""Every request of ``linux/vhost.h`` but those of vhost-net, vhost-scsi and vhost-vsock, by kernel name.

``direction`` is how the kernel's number is made; the getters of an endianness
and of a busy-loop timeout are ``_IOW`` there and answer nevertheless.
"""


class BackendFeature(enum.IntFlag):
    """``VHOST_BACKEND_F_*`` (linux/vhost_types.h)."""

    IOTLB_MSG_V2 = 1 << 1
    IOTLB_BATCH = 1 << 2
    IOTLB_ASID = 1 << 3
    SUSPEND = 1 << 4
    RESUME = 1 << 5
    ENABLE_AFTER_DRIVER_OK = 1 << 6
    DESC_ASID = 1 << 7
    IOTLB_PERSIST = 1 << 8


ALL_BACKEND_FEATURES = BackendFeature(sum(BackendFeature))


class Access(enum.IntFlag):
    """``VHOST_ACCESS_*``: what the device may do with a mapping. 0 is accepted: mapped, for nothing."""

    RO = 1
    WO = 2
    RW = 3


class IotlbType(enum.IntEnum):
    """``VHOST_IOTLB_*``: the inner type of a message. vhost-vdpa refuses MISS and ACCESS_FAIL."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4
    BATCH_BEGIN = 5
    BATCH_END = 6


class MessageFormat(enum.IntEnum):
    """The outer type of a message: V1 knows address space 0 only."""

    V1 = 1
    V2 = 2


class Status(enum.IntFlag):
    """``VIRTIO_CONFIG_S_*`` (virtio 1.3, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 0x40
    FAILED = 0x80


VIRTIO_ID_NET = 1


def name_list(flags: enum.Flag) -> list[str]:
    """Return the names of the bits in ``flags``, unknown ones as ``bit N``."""
    known = [flag.name or "" for flag in type(flags) if flag.value & flags.value]
    rest = flags.value & ~sum(flag.value for flag in type(flags))
    return known + [f"bit {bit}" for bit in range(rest.bit_length()) if rest >> bit & 1]


def names(flags: enum.Flag) -> str:
    """Return the names of the bits in ``flags`` for people, "none" for no bits."""
    return " ".join(name_list(flags)) or "none"
