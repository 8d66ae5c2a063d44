# SPDX-License-Identifier: MIT
"""``/dev/vhost-vdpa-N``: the only door to the device.

One method is one system call, named as the kernel names it. Nothing else in
the package calls ioctl, write or mmap on the descriptor, so that everything
that reaches the device is timed and recorded here (:mod:`pyvhostvdpa.trace`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ._cdefs import ffi, lib
from .errors import DeviceBusy, DeviceClosed, KernelError, NotVhostVdpa
from .trace import DeviceTrace, Trace
from .uapi import (
    IOCTLS,
    Access,
    BackendFeature,
    IotlbType,
    IovaRange,
    Status,
    VdpaConfig,
    VringAddr,
    VringFile,
    VringState,
    names,
)


class IotlbMessage(NamedTuple):
    """One IOTLB message. Sizes and addresses in bytes; ``size`` 0 only with batches."""

    type: IotlbType
    asid: int
    iova: int = 0
    size: int = 0
    uaddr: int = 0
    perm: int = 0

    def __str__(self) -> str:
        if self.type in (IotlbType.BATCH_BEGIN, IotlbType.BATCH_END):
            return f"asid={self.asid}"
        text = f"asid={self.asid} iova={self.iova:#x} size={self.size:#x}"
        if self.type is IotlbType.UPDATE:
            text += f" uaddr={self.uaddr:#x} perm={Access(self.perm).name}"
        return text


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise unless ``path`` is a vhost-vdpa chardev; does not open it.

    Opening another device's node could change that device, and opening this
    one resets it, so the sysfs name is looked at first.
    """
    text = os.fspath(path)
    try:
        info = os.stat(text)
    except OSError as e:
        raise NotVhostVdpa(
            f"{text}: {os.strerror(e.errno or errno.ENOENT)}", hint="vhost-vdpa list shows the devices of this machine"
        ) from e
    number = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    name = Path(f"/sys/dev/char/{number}").resolve().name if stat.S_ISCHR(info.st_mode) else ""
    if not name.startswith("vhost-vdpa-"):
        raise NotVhostVdpa(
            f"{text}: not a vhost-vdpa character device", hint="vhost-vdpa list shows the devices of this machine"
        )


class VhostVdpa:
    """An open vhost-vdpa device.

    Opening resets the device and is exclusive
    (drivers/vhost/vdpa.c:vhost_vdpa_open). The ioctls and messages of one
    device serialize on one lock in the kernel; a slow one blocks the others.
    Not usable in a forked child: ownership is per address space.
    """

    def __init__(self, path: str | os.PathLike[str], trace: Trace | None = None) -> None:
        check_path(path)
        self.path = os.fspath(path)
        self.trace: DeviceTrace = (trace or Trace()).device(self.path)
        self._fd = -1
        t = time.monotonic_ns()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            self._failed(t, "open", "", e.errno or errno.EIO)
        self.trace.record(t, time.monotonic_ns(), "open", "", 0)

    def fileno(self) -> int:
        """Return the file descriptor. It cannot be polled (epoll: EPERM)."""
        if self._fd < 0:
            raise DeviceClosed(f"{self.path} was closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close: the kernel resets the device and drops every map. Twice is no error."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        t = time.monotonic_ns()
        os.close(fd)
        self.trace.record(t, time.monotonic_ns(), "close", "", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- the door ----------------------------------------------------------

    def _failed(self, t_begin: int, call: str, arguments: str, number: int) -> None:
        self.trace.record(t_begin, time.monotonic_ns(), call, arguments, -number)
        if call == "open" and number == errno.EBUSY:
            raise DeviceBusy(number, f"open {self.path}", cause="another process holds the device")
        if call == "open" and number in (errno.EACCES, errno.EPERM):
            raise KernelError(number, f"open {self.path}", hint="run as root, or give yourself access by a udev rule")
        raise KernelError(number, call, arguments)

    def _ioctl(self, name: str, argument: bytearray | None = None, text: str = "") -> int:
        fd = self.fileno()
        request = IOCTLS[name].request
        t = time.monotonic_ns()
        try:
            result = fcntl.ioctl(fd, request, 0 if argument is None else argument)
        except OSError as e:
            self._failed(t, name, text, e.errno or errno.EIO)
            raise
        self.trace.record(t, time.monotonic_ns(), name, text, result)
        return result

    def _read(self, name: str, size: int) -> int:
        buffer = bytearray(size)
        self._ioctl(name, buffer)
        return int.from_bytes(buffer, "little")

    def _vring(self, name: str, index: int, num: int = 0) -> int:
        buffer = bytearray(VringState(index, num))
        self._ioctl(name, buffer, f"index={index} num={num}" if IOCTLS[name].direction == "W" else f"index={index}")
        return int(VringState.from_buffer(buffer).num)

    # -- ownership, features, status -----------------------------------------

    def set_owner(self) -> None:
        """Make this process the owner; EBUSY if it already has one."""
        self._ioctl("VHOST_SET_OWNER")

    def get_features(self) -> int:
        """Return the device's virtio feature bits."""
        return self._read("VHOST_GET_FEATURES", 8)

    def set_features(self, features: int) -> None:
        """Set the driver's feature bits. EBUSY after FEATURES_OK, EINVAL if the parent refuses."""
        self._ioctl("VHOST_SET_FEATURES", bytearray(features.to_bytes(8, "little")), f"{features:#x}")

    def get_backend_features(self) -> BackendFeature:
        """Return what vhost-vdpa and the parent advertise. MSG_V2, BATCH and ASID always are."""
        return BackendFeature(self._read("VHOST_GET_BACKEND_FEATURES", 8))

    def set_backend_features(self, features: BackendFeature) -> None:
        """Acknowledge backend features until close. EOPNOTSUPP, EINVAL for DESC_ASID without IOTLB_ASID."""
        self._ioctl("VHOST_SET_BACKEND_FEATURES", bytearray(int(features).to_bytes(8, "little")), names(features))

    def get_device_id(self) -> int:
        """Return the virtio device id (1 is net)."""
        return self._read("VHOST_VDPA_GET_DEVICE_ID", 4)

    def get_status(self) -> Status:
        """Return the virtio status byte."""
        return Status(self._read("VHOST_VDPA_GET_STATUS", 1))

    def set_status(self, status: Status) -> None:
        """Write the status byte; 0 resets. EINVAL if it would clear a bit. Read back what the parent accepted."""
        self._ioctl("VHOST_VDPA_SET_STATUS", bytearray([int(status)]), names(status))

    # -- configuration space --------------------------------------------------

    def get_config_size(self) -> int:
        """Return the size of the configuration space in bytes."""
        return self._read("VHOST_VDPA_GET_CONFIG_SIZE", 4)

    def get_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the configuration space. EINVAL beyond its end.

        Before features were set since reset the parent takes this for a
        legacy driver (drivers/vdpa/vdpa.c:vdpa_get_config_unlocked).
        """
        head = bytes(VdpaConfig(offset, length))
        buffer = bytearray(head + bytes(length))
        self._ioctl("VHOST_VDPA_GET_CONFIG", buffer, f"off={offset} len={length}")
        return bytes(buffer[len(head) :])

    def set_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the configuration space. A parent that ignores it reports no error."""
        buffer = bytearray(bytes(VdpaConfig(offset, len(data))) + data)
        self._ioctl("VHOST_VDPA_SET_CONFIG", buffer, f"off={offset} len={len(data)}")

    def set_config_call(self, eventfd: int) -> None:
        """Set the eventfd of the configuration interrupt, -1 for none."""
        self._ioctl("VHOST_VDPA_SET_CONFIG_CALL", bytearray(ctypes.c_int32(eventfd)), f"fd={eventfd}")

    # -- virtqueues ----------------------------------------------------------

    def get_vqs_count(self) -> int:
        """Return the number of virtqueues, control queue included."""
        return self._read("VHOST_VDPA_GET_VQS_COUNT", 4)

    def get_vring_num(self) -> int:
        """Return the largest ring size."""
        return self._read("VHOST_VDPA_GET_VRING_NUM", 2)

    def get_vring_size(self, index: int) -> int:
        """Return one queue's ring size. EOPNOTSUPP where the parent has no get_vq_size."""
        return self._vring("VHOST_VDPA_GET_VRING_SIZE", index)

    def set_vring_num(self, index: int, num: int) -> None:
        """Set a ring size, a power of two."""
        self._vring("VHOST_SET_VRING_NUM", index, num)

    def set_vring_base(self, index: int, base: int) -> None:
        """Set the avail index at which the device starts. EINVAL while it runs."""
        self._vring("VHOST_SET_VRING_BASE", index, base)

    def get_vring_base(self, index: int) -> int:
        """Return the index from which to go on; meaningful once suspended. Some parents report the used index."""
        return self._vring("VHOST_GET_VRING_BASE", index)

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int) -> None:
        """Set ring addresses (IOVAs in the ASID of the descriptor group). EINVAL while the device runs."""
        buffer = bytearray(VringAddr(index, 0, desc, used, avail, 0))
        self._ioctl("VHOST_SET_VRING_ADDR", buffer, f"index={index} desc={desc:#x} avail={avail:#x} used={used:#x}")

    def set_vring_kick(self, index: int, eventfd: int) -> None:
        """Set the eventfd that notifies the device, -1 for none. One with a count kicks at once."""
        self._ioctl("VHOST_SET_VRING_KICK", bytearray(VringFile(index, eventfd)), f"index={index} fd={eventfd}")

    def set_vring_call(self, index: int, eventfd: int) -> None:
        """Set the eventfd that the device signals, -1 for none."""
        self._ioctl("VHOST_SET_VRING_CALL", bytearray(VringFile(index, eventfd)), f"index={index} fd={eventfd}")

    def set_vring_err(self, index: int, eventfd: int) -> None:
        """Set the error eventfd; vhost-vdpa stores and never signals it."""
        self._ioctl("VHOST_SET_VRING_ERR", bytearray(VringFile(index, eventfd)), f"index={index} fd={eventfd}")

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Make a queue ready or not."""
        self._vring("VHOST_VDPA_SET_VRING_ENABLE", index, int(enable))

    # -- groups and address spaces ----------------------------------------------

    def get_iova_range(self) -> tuple[int, int]:
        """Return the first and last IOVA that can be mapped, both inclusive."""
        buffer = bytearray(IovaRange())
        self._ioctl("VHOST_VDPA_GET_IOVA_RANGE", buffer)
        both = IovaRange.from_buffer(buffer)
        return int(both.first), int(both.last)

    def get_group_num(self) -> int:
        """Return the number of virtqueue groups."""
        return self._read("VHOST_VDPA_GET_GROUP_NUM", 4)

    def get_as_num(self) -> int:
        """Return the number of address spaces."""
        return self._read("VHOST_VDPA_GET_AS_NUM", 4)

    def get_vring_group(self, index: int) -> int:
        """Return a queue's group. EOPNOTSUPP where the parent has no groups."""
        return self._vring("VHOST_VDPA_GET_VRING_GROUP", index)

    def get_vring_desc_group(self, index: int) -> int:
        """Return the group of a queue's descriptor table, driver and device area. EOPNOTSUPP if not separate."""
        return self._vring("VHOST_VDPA_GET_VRING_DESC_GROUP", index)

    def set_group_asid(self, group: int, asid: int) -> None:
        """Bind a group to an address space: after each reset, before DRIVER_OK.

        ENOBUFS if ``group`` is not below the number of queues, EINVAL beyond
        the groups or address spaces, EBUSY after DRIVER_OK on newer kernels.
        """
        self._vring("VHOST_VDPA_SET_GROUP_ASID", group, asid)

    # -- suspend -------------------------------------------------------------

    def suspend(self) -> None:
        """Stop processing descriptors; a no-op without DRIVER_OK. EOPNOTSUPP."""
        self._ioctl("VHOST_VDPA_SUSPEND")

    def resume(self) -> None:
        """Go on after :meth:`suspend`. EOPNOTSUPP."""
        self._ioctl("VHOST_VDPA_RESUME")

    # -- IOTLB ---------------------------------------------------------------

    def write_iotlb(self, messages: Sequence[IotlbMessage]) -> None:
        """Write messages in order, one system call each, without the GIL.

        The kernel answers EFAULT to whatever it dislikes;
        :class:`pyvhostvdpa.iotlb.AddressSpace` knows more. Raises for the
        first that fails; those before it are in force (``applied`` of the
        error tells how many).
        """
        fd = self.fileno()
        count = len(messages)
        raw = ffi.new("struct vhost_msg_v2[]", count)
        for slot, m in zip(raw, messages, strict=True):
            slot.type = lib.VHOST_IOTLB_MSG_V2
            slot.asid = m.asid
            slot.iotlb.iova, slot.iotlb.size, slot.iotlb.uaddr = m.iova, m.size, m.uaddr
            slot.iotlb.perm, slot.iotlb.type = m.perm, m.type
        times = ffi.new("int64_t[]", 2 * count)
        error = ffi.new("int *")
        done: int = lib.iotlb_write_burst(fd, raw, count, times, error)
        for i, m in enumerate(messages[: done + 1]):
            result = ffi.sizeof("struct vhost_msg_v2") if i < done else -error[0]
            self.trace.record(times[2 * i], times[2 * i + 1], f"IOTLB_{m.type.name}", str(m), result)
        if done < count:
            raise IotlbWriteError(error[0], messages[done], done)


class IotlbWriteError(KernelError):
    """The kernel refused a message. ``applied`` messages of the burst are in force."""

    def __init__(self, number: int, message: IotlbMessage, applied: int) -> None:
        super().__init__(number, f"write IOTLB_{message.type.name}", str(message))
        self.rejected = message
        self.applied = applied
