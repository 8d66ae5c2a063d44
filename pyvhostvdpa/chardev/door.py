# SPDX-License-Identifier: MIT
"""``/dev/vhost-vdpa-N``: the only door to the device.

One method is one system call, named as the kernel names it. Nothing else in
the package calls ioctl, write or mmap on the descriptor, so that everything
that reaches the device is timed and recorded here (:mod:`pyvhostvdpa.trace.recorder`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from .._cdefs import ffi, lib
from ..base.closing import Closing
from ..base.errors import DeviceBusy, DeviceClosed, KernelError, NotVhostVdpa, VhostVdpaError
from ..base.uapi import (
    IOCTLS,
    MESSAGE_SIZE,
    BackendFeature,
    IotlbType,
    IovaRange,
    MessageFormat,
    Status,
    VdpaConfig,
    VhostMemory,
    VringAddr,
    VringFile,
    VringState,
)
from ..trace.recorder import DeviceTrace, Fields, Trace, describe
from .calls import PreparedCalls
from .message import IotlbMessage, IotlbWriteError

_RECORDED_AS = {kind: f"IOTLB_{kind.name}" for kind in IotlbType}


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


def can_be_opened(path: str | os.PathLike[str]) -> bool:
    """Return whether a device is free, by opening and closing it, which resets it.

    Only a device in use counts as not free. A missing node or permission does
    not: the next call on the device reports those.
    """
    try:
        VhostVdpa(path).close()
    except DeviceBusy:
        return False
    except VhostVdpaError:
        return True
    return True


class VhostVdpa(Closing):
    """An open vhost-vdpa device at ``path``; what passes is recorded in ``trace``, a new one by default.

    Raises :class:`~pyvhostvdpa.NotVhostVdpa` before anything is opened,
    :class:`~pyvhostvdpa.DeviceBusy` if a process has it open, and
    :class:`~pyvhostvdpa.KernelError` with the errno of any call that fails.
    Opening resets the device and is exclusive
    (drivers/vhost/vdpa.c:vhost_vdpa_open). The ioctls and messages of one
    device serialize on one lock in the kernel; a slow one blocks the others.
    Not usable in a forked child: ownership is per address space.
    """

    any_opened: ClassVar[bool] = False
    """Whether this process has opened, and so reset, any device."""

    def __init__(self, path: str | os.PathLike[str], trace: Trace | None = None) -> None:
        check_path(path)
        self.path = os.fspath(path)
        self.trace: DeviceTrace = (trace or Trace()).device(self.path)
        self._fd = -1
        self.batch_asid: int | None = None
        """The address space whose batch is open, if it was opened here. A reset does not close one."""
        VhostVdpa.any_opened = True
        t = time.monotonic_ns()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            self._failed(t, "open", {}, e.errno or errno.EIO)
        self.trace.record(t, time.monotonic_ns(), "open", {"fd": self._fd}, 0)

    def fileno(self) -> int:
        """Return the file descriptor. It cannot be polled (epoll: EPERM).

        Raises :class:`~pyvhostvdpa.DeviceClosed` after :meth:`close`, as every
        call on a closed device does.
        """
        if self._fd < 0:
            raise DeviceClosed(f"{self.path} was closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close: the kernel resets the device and drops every map. Idempotent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        t = time.monotonic_ns()
        os.close(fd)
        self.trace.record(t, time.monotonic_ns(), "close", {}, 0)

    # -- the door ----------------------------------------------------------

    def _failed(self, t_begin: int, call: str, fields: Fields, number: int) -> None:
        self.trace.record(t_begin, time.monotonic_ns(), call, fields, -number)
        kind = DeviceBusy if call == "open" and number == errno.EBUSY else KernelError
        raise kind(number, call, self.path if call == "open" else describe(fields))

    def _ioctl(self, name: str, argument: bytearray | None = None, fields: Fields | None = None) -> int:
        fd = self.fileno()
        fields = {} if fields is None else fields
        request = IOCTLS[name].request
        t = time.monotonic_ns()
        try:
            result = int(fcntl.ioctl(fd, request, 0 if argument is None else argument))
        except OSError as e:
            self._failed(t, name, fields, e.errno or errno.EIO)
            raise
        self.trace.record(t, time.monotonic_ns(), name, fields, result)
        return result

    def prepare(self) -> PreparedCalls:
        """Return an empty list for requests to make later, in one go."""
        return PreparedCalls(self)

    def request(self, name: str, argument: bytes | None = b"") -> bytes:
        """Make request ``name`` of :data:`~pyvhostvdpa.base.uapi.IOCTLS`; return the argument as the kernel left it.

        For those that have no method of their own, and for arguments that a
        method would not let through. ``argument`` is filled up with zeros to
        the size the kernel reads; None hands over a null pointer.
        """
        row = IOCTLS[name]
        if row.argument is None or argument is None:
            self._ioctl(name)
            return b""
        buffer = bytearray(argument.ljust(row.size, b"\0"))
        self._ioctl(name, buffer, {"argument": argument.hex()})
        return bytes(buffer)

    def _read(self, name: str, what: str) -> int:
        buffer = bytearray(IOCTLS[name].size)
        fields: dict[str, int | str] = {}
        self._ioctl(name, buffer, fields)
        fields[what] = value = int.from_bytes(buffer, "little")
        return value

    def _vring(self, name: str, index: int, num: int = 0) -> int:
        buffer = bytearray(VringState(index, num))
        writes = IOCTLS[name].direction == "W"
        fields: dict[str, int | str] = {"index": index, "num": num} if writes else {"index": index}
        self._ioctl(name, buffer, fields)
        fields["num"] = value = int(VringState.from_buffer(buffer).num)
        return value

    # -- ownership, features, status -----------------------------------------

    def set_owner(self) -> None:
        """Make this process the owner; EBUSY if it already has one."""
        self._ioctl("VHOST_SET_OWNER")

    def set_fork_from_owner(self, fork: bool) -> None:
        """Choose whether a worker is a child of the owner (``fork``) or a kernel thread, before :meth:`set_owner`.

        EBUSY after it. Without effect here, since vhost-vdpa has no worker. EINVAL beyond 0
        and 1, ENOTTY where the kernel was built without the choice
        (drivers/vhost/vhost.c:vhost_dev_ioctl).
        """
        self._ioctl("VHOST_SET_FORK_FROM_OWNER", bytearray([int(fork)]), {"fork_from_owner": int(fork)})

    def get_fork_from_owner(self) -> bool:
        """Return the ``fork`` that :meth:`set_fork_from_owner` set."""
        return bool(self._read("VHOST_GET_FORK_FROM_OWNER", "fork_from_owner"))

    def set_mem_table(self) -> None:
        """Give vhost an empty memory table. Accepted and without effect: a device's memory is its maps."""
        self._ioctl("VHOST_SET_MEM_TABLE", bytearray(VhostMemory()), {"nregions": 0})

    def get_features(self) -> int:
        """Return the device's virtio feature bits."""
        return self._read("VHOST_GET_FEATURES", "features")

    def set_features(self, features: int) -> None:
        """Set the virtio ``features`` that the driver takes (virtio 1.3, 2.2).

        EBUSY after FEATURES_OK (drivers/vhost/vdpa.c:vhost_vdpa_set_features),
        EINVAL if the parent refuses.
        """
        self._ioctl("VHOST_SET_FEATURES", bytearray(features.to_bytes(8, "little")), {"features": features})

    def get_backend_features(self) -> BackendFeature:
        """Return what vhost-vdpa and the parent advertise. MSG_V2, BATCH and ASID always are."""
        return BackendFeature(self._read("VHOST_GET_BACKEND_FEATURES", "backend_features"))

    def set_backend_features(self, features: BackendFeature) -> None:
        """Acknowledge backend ``features`` until close.

        EOPNOTSUPP for one that the parent lacks, EINVAL for DESC_ASID without
        IOTLB_ASID (drivers/vhost/vdpa.c:vhost_vdpa_unlocked_ioctl).
        """
        self._ioctl(
            "VHOST_SET_BACKEND_FEATURES",
            bytearray(int(features).to_bytes(8, "little")),
            {"backend_features": int(features)},
        )

    def get_device_id(self) -> int:
        """Return the virtio device id (1 is net)."""
        return self._read("VHOST_VDPA_GET_DEVICE_ID", "device_id")

    def get_status(self) -> Status:
        """Return the virtio status byte."""
        return Status(self._read("VHOST_VDPA_GET_STATUS", "status"))

    def set_status(self, status: Status) -> None:
        """Write ``status`` (virtio 1.3, 2.1); 0 resets. Read back what the parent accepted.

        EINVAL if it would clear a bit (drivers/vhost/vdpa.c:vhost_vdpa_set_status).
        """
        self._ioctl("VHOST_VDPA_SET_STATUS", bytearray([int(status)]), {"status": int(status)})

    # -- configuration space --------------------------------------------------

    def get_config_size(self) -> int:
        """Return the size of the configuration space in bytes."""
        return self._read("VHOST_VDPA_GET_CONFIG_SIZE", "config_size")

    def get_config(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the configuration space from ``offset`` on. EINVAL beyond its end.

        Before features were set since reset the parent takes this for a
        legacy driver (drivers/vdpa/vdpa.c:vdpa_get_config_unlocked).
        """
        head = bytes(VdpaConfig(offset, length))
        buffer = bytearray(head + bytes(length))
        self._ioctl("VHOST_VDPA_GET_CONFIG", buffer, {"off": offset, "len": length})
        return bytes(buffer[len(head) :])

    def set_config(self, offset: int, data: bytes) -> None:
        """Write ``data`` to the configuration space at byte ``offset``. A parent that ignores it reports no error."""
        buffer = bytearray(bytes(VdpaConfig(offset, len(data))) + data)
        self._ioctl("VHOST_VDPA_SET_CONFIG", buffer, {"off": offset, "len": len(data)})

    def set_config_call(self, eventfd: int) -> None:
        """Set the ``eventfd`` of the configuration interrupt (virtio 1.3, 2.5), -1 for none."""
        self._ioctl("VHOST_VDPA_SET_CONFIG_CALL", bytearray(ctypes.c_int32(eventfd)), {"fd": eventfd})

    # -- virtqueues ----------------------------------------------------------

    def get_vqs_count(self) -> int:
        """Return the number of virtqueues, control queue included."""
        return self._read("VHOST_VDPA_GET_VQS_COUNT", "vqs_count")

    def get_vring_num(self) -> int:
        """Return the largest ring size."""
        return self._read("VHOST_VDPA_GET_VRING_NUM", "vring_num")

    def get_vring_size(self, index: int) -> int:
        """Return the ring size of queue ``index``. EOPNOTSUPP where the parent has no get_vq_size."""
        return self._vring("VHOST_VDPA_GET_VRING_SIZE", index)

    def set_vring_num(self, index: int, num: int) -> None:
        """Set the ring size of queue ``index`` to ``num`` descriptors, a power of two."""
        self._vring("VHOST_SET_VRING_NUM", index, num)

    def set_vring_base(self, index: int, base: int) -> None:
        """Set the avail index at which the device starts queue ``index`` to ``base``. EINVAL while it runs."""
        self._vring("VHOST_SET_VRING_BASE", index, base)

    def get_vring_base(self, index: int) -> int:
        """Return the ring index from which queue ``index`` has to be continued; meaningful once suspended.

        Some parents report the used index in place of the avail index.
        """
        return self._vring("VHOST_GET_VRING_BASE", index)

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int) -> None:
        """Set where the ring of queue ``index`` lies: ``desc``, ``avail`` and ``used``.

        These are IOVAs in the address space of its descriptor group. EINVAL
        while the device runs (drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl).
        """
        buffer = bytearray(VringAddr(index, 0, desc, used, avail, 0))
        self._ioctl("VHOST_SET_VRING_ADDR", buffer, {"index": index, "desc": desc, "avail": avail, "used": used})

    def set_vring_kick(self, index: int, eventfd: int) -> None:
        """Set the ``eventfd`` that kicks queue ``index``, -1 for none. One with a count kicks at once."""
        self._ioctl("VHOST_SET_VRING_KICK", bytearray(VringFile(index, eventfd)), {"index": index, "fd": eventfd})

    def set_vring_call(self, index: int, eventfd: int) -> None:
        """Set the ``eventfd`` that the device signals for queue ``index``, -1 for none."""
        self._ioctl("VHOST_SET_VRING_CALL", bytearray(VringFile(index, eventfd)), {"index": index, "fd": eventfd})

    def set_vring_err(self, index: int, eventfd: int) -> None:
        """Set the error ``eventfd`` of queue ``index``, -1 for none; vhost-vdpa stores and never signals it."""
        self._ioctl("VHOST_SET_VRING_ERR", bytearray(VringFile(index, eventfd)), {"index": index, "fd": eventfd})

    def set_vring_busyloop_timeout(self, index: int, microseconds: int) -> None:
        """Store a busy-loop timeout of ``microseconds`` for queue ``index``. No effect: vhost-vdpa polls no ring."""
        self._vring("VHOST_SET_VRING_BUSYLOOP_TIMEOUT", index, microseconds)

    def get_vring_busyloop_timeout(self, index: int) -> int:
        """Return the stored busy-loop timeout of queue ``index`` in microseconds."""
        return self._vring("VHOST_GET_VRING_BUSYLOOP_TIMEOUT", index)

    def set_vring_endian(self, index: int, big: bool) -> None:
        """Make the legacy ring of queue ``index`` big-endian if ``big``, little-endian if not.

        ENOTTY unless the kernel has VHOST_CROSS_ENDIAN_LEGACY.
        """
        self._vring("VHOST_SET_VRING_ENDIAN", index, int(big))

    def get_vring_endian(self, index: int) -> bool:
        """Return whether the legacy ring of queue ``index`` is big-endian. ENOTTY as for :meth:`set_vring_endian`."""
        return bool(self._vring("VHOST_GET_VRING_ENDIAN", index))

    def mmap_doorbell(self, index: int) -> mmap.mmap:
        """Map the doorbell page of queue ``index``: writing that index to its start notifies the device without a call.

        524 (ENOTSUPP) where the parent has no get_vq_notification
        (drivers/vhost/vdpa.c:vhost_vdpa_mmap). The page is write-only, reading
        it kills the process. Close it before the device: it keeps it open.
        """
        fd = self.fileno()
        t = time.monotonic_ns()
        try:
            page = mmap.mmap(
                fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE, offset=index * mmap.PAGESIZE
            )
        except OSError as e:
            self._failed(t, "mmap", {"index": index}, e.errno or errno.EIO)
            raise
        self.trace.record(t, time.monotonic_ns(), "mmap", {"index": index}, 0)
        return page

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Make queue ``index`` ready if ``enable``, not ready if not (virtio 1.3, 4.2.2: QueueReady)."""
        self._vring("VHOST_VDPA_SET_VRING_ENABLE", index, int(enable))

    # -- groups and address spaces ----------------------------------------------

    def get_iova_range(self) -> tuple[int, int]:
        """Return the first and last IOVA that can be mapped, both inclusive."""
        buffer = bytearray(IovaRange())
        fields: dict[str, int | str] = {}
        self._ioctl("VHOST_VDPA_GET_IOVA_RANGE", buffer, fields)
        both = IovaRange.from_buffer(buffer)
        fields["first"], fields["last"] = first, last = int(both.first), int(both.last)
        return first, last

    def get_group_num(self) -> int:
        """Return the number of virtqueue groups."""
        return self._read("VHOST_VDPA_GET_GROUP_NUM", "group_num")

    def get_as_num(self) -> int:
        """Return the number of address spaces."""
        return self._read("VHOST_VDPA_GET_AS_NUM", "as_num")

    def get_vring_group(self, index: int) -> int:
        """Return the group of queue ``index``. EOPNOTSUPP where the parent has no groups."""
        return self._vring("VHOST_VDPA_GET_VRING_GROUP", index)

    def get_vring_desc_group(self, index: int) -> int:
        """Return the group of the rings of queue ``index``. EOPNOTSUPP where that is not separate."""
        return self._vring("VHOST_VDPA_GET_VRING_DESC_GROUP", index)

    def set_group_asid(self, group: int, asid: int) -> None:
        """Bind ``group`` to address space ``asid``: after each reset, before DRIVER_OK.

        ENOBUFS if ``group`` is not below the number of queues, EINVAL beyond
        the groups or address spaces, EBUSY after DRIVER_OK on newer kernels.
        """
        self._vring("VHOST_VDPA_SET_GROUP_ASID", group, asid)

    # -- suspend -------------------------------------------------------------

    def suspend(self) -> None:
        """Stop processing descriptors; a no-op without DRIVER_OK. EOPNOTSUPP where the parent has no suspend."""
        self._ioctl("VHOST_VDPA_SUSPEND")

    def resume(self) -> None:
        """Continue after :meth:`suspend`. EOPNOTSUPP where the parent has no resume."""
        self._ioctl("VHOST_VDPA_RESUME")

    # -- IOTLB ---------------------------------------------------------------

    def write_iotlb(self, messages: Sequence[IotlbMessage], form: MessageFormat = MessageFormat.V2) -> None:
        """Write ``messages`` in order, one system call each, without the GIL.

        ``form`` V1 has no address space field: the kernel takes 0. The kernel
        answers EFAULT to everything that it rejects;
        :class:`pyvhostvdpa.chardev.iotlb.AddressSpace` knows more. Raises for the
        first that fails; those before it are in force (``applied`` of the
        error is their number).
        """
        fd = self.fileno()
        count = len(messages)
        raw = ffi.new("struct vhost_msg_v2[]", count)
        for slot, m in zip(raw, messages, strict=True):
            slot.type = form
            slot.asid = m.asid if form is MessageFormat.V2 else 0
            slot.iotlb.iova, slot.iotlb.size, slot.iotlb.uaddr = m.iova, m.size, m.uaddr
            slot.iotlb.perm, slot.iotlb.type = m.perm, m.type
        times = ffi.new("int64_t[]", 2 * count)
        error = ffi.new("int *")
        done: int = lib.iotlb_write_burst(fd, raw, count, times, error)
        stamps = ffi.unpack(times, 2 * count)
        for i, m in enumerate(messages[: done + 1]):
            result = MESSAGE_SIZE if i < done else -error[0]
            self.trace.record(stamps[2 * i], stamps[2 * i + 1], _RECORDED_AS[m.type], m.fields, result)
        self._follow_batch(messages[:done])
        if done < count:
            raise IotlbWriteError(error[0], messages[done], done)

    def send_prepared(self, burst: Any, deliver_signals_ns: int = 100_000_000) -> None:
        """Write the messages of ``burst``, a C ``struct iotlb_burst``, that are not done yet.

        :mod:`pyvhostvdpa.chardev.burst` makes one. There is one event in the
        trace for all of them, and no work per message outside C. Control
        returns to Python every ``deliver_signals_ns``, so that Ctrl-C ends a
        long one. Raises :class:`~pyvhostvdpa.KernelError` with the bare errno
        of the first that fails; ``burst.done`` is how many are in force.
        """
        fd = self.fileno()
        burst.batch = -1 if self.batch_asid is None else self.batch_asid
        try:
            while burst.done < burst.count and not burst.error:
                lib.iotlb_send(fd, burst, time.monotonic_ns() + deliver_signals_ns)
        finally:
            self.batch_asid = None if burst.batch < 0 else int(burst.batch)
            result = -burst.error if burst.error else burst.done
            self.trace.record(burst.begin, burst.end, "burst", {"messages": int(burst.count)}, result)
        if burst.error:
            raise KernelError(burst.error, "write IOTLB messages", f"message {burst.done + 1} of {burst.count}")

    def repeat(self, name: str, argument: bytes, count: int) -> list[int]:
        """Make request ``name`` ``count`` times from C; return how long each took, in ns.

        Each gets its own copy of ``argument``, at most 64 bytes, filled up
        with zeros to the size that the kernel reads. Raises ValueError for
        more, and :class:`~pyvhostvdpa.KernelError` for the first that fails.
        """
        row = IOCTLS[name]
        fd = self.fileno()
        if len(argument) > 64:
            raise ValueError(f"an argument of {len(argument)} bytes")
        took, error = ffi.new("int64_t[]", count), ffi.new("int *")
        t = time.monotonic_ns()
        raw = argument.ljust(row.size, b"\0")
        done: int = lib.ioctl_repeat(fd, row.request, raw, len(raw), count, took, error)
        if done < count:
            self._failed(t, name, {"argument": argument.hex()}, error[0])
        self.trace.record(t, time.monotonic_ns(), name, {"times": count}, 0)
        return list(took)

    def _follow_batch(self, accepted: Sequence[IotlbMessage]) -> None:
        for m in accepted:
            if m.type is IotlbType.BATCH_BEGIN:
                self.batch_asid = m.asid
            elif m.type is IotlbType.BATCH_END:
                self.batch_asid = None
