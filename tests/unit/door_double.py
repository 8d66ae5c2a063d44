"""A double of the door to a device: VhostVdpa's methods, the kernel's rules, a record of calls, errors on demand.

It is for state machines: which calls a procedure makes, in which order, and
what it leaves when any one of them fails. It moves no data and replaces no
test on a real device. The rules are those of drivers/vhost/vdpa.c
(``vhost_vdpa_vring_ioctl``, ``vhost_vdpa_set_status``, ``vhost_vdpa_process_iotlb_msg``).
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from prepared_double import PreparedDouble

from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.errors import DeviceClosed, KernelError
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, VIRTIO_ID_NET, Access, BackendFeature, IotlbType, Status
from pyvhostvdpa.chardev.calls import PreparedCalls
from pyvhostvdpa.chardev.message import IotlbMessage, IotlbWriteError
from pyvhostvdpa.net.features import CONTROL, SUPPORTED, Feature
from pyvhostvdpa.trace import Trace

PAIRS = 2
RING_MAX = 256
DATA_GROUP, CONTROL_GROUP, DESC_GROUP = 0, 1, 2
OFFERED = int(SUPPORTED | CONTROL | Feature.INDIRECT_DESC)
"""Features of the devices that the fixture ``opened`` opens."""


@dataclass
class Vring:
    num: int = 0
    base: int = 0
    addresses: tuple[int, int, int] = (0, 0, 0)
    kick: int = -1
    call: int = -1
    ready: bool = False


@dataclass
class Call:
    """One call at the door: its name as the kernel has it, and its arguments in short."""

    name: str
    arguments: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}{self.arguments}"


@dataclass
class Fault:
    """The call with this number, counted from when the fault was set, fails once with this errno."""

    at: int
    errno: int = errno.EIO


@dataclass
class DoorDouble:
    """An opened device with ``PAIRS`` pairs and a control queue.

    ``advertised`` are its backend features. ``set_group_after_driver_ok`` is
    how kernels before 7.x behave. ``refuses`` are status bits that it does
    not take, ``answered`` the number of calls before each control command
    was answered.
    """

    features: int
    advertised: BackendFeature = ALL_BACKEND_FEATURES
    as_num: int = 2
    set_group_after_driver_ok: bool = False
    path: str = "/dev/vhost-vdpa-double"
    calls: list[Call] = field(default_factory=list)
    fault: Fault | None = None
    refuses: int = 0
    answered: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trace = Trace().device(self.path)
        self.batch_asid: int | None = None
        self.closed = False
        self.status = Status(0)
        self.acked = BackendFeature(0)
        self.driver_features = 0
        self.suspended = False
        self.vrings = [Vring() for _ in range(2 * PAIRS + 1)]
        self.asid_of = [0, 0, 0]
        self.tree: list[dict[int, tuple[int, int]]] = [{} for _ in range(self.as_num)]
        """The kernel's tree: IOVA to size and address, by address space."""
        self.device_maps: list[dict[int, tuple[int, int]]] = [{} for _ in range(self.as_num)]
        """What the device translates with: a reset empties it unless PERSIST was acknowledged."""
        self.access: dict[tuple[int, int], Access] = {}
        """What the device may do with each map, by address space and IOVA."""
        self.resets = 0
        self.failed: Call | None = None
        self._control = _Answers(self)

    # -- the record ------------------------------------------------------------

    def _call(self, name: str, *arguments: int) -> None:
        if self.closed:
            raise DeviceClosed(f"{self.path} was closed")
        call = Call(name, arguments)
        self.calls.append(call)
        self._maybe_fail(call)

    def _maybe_fail(self, call: Call) -> None:
        if self.fault is not None:
            self.fault.at -= 1
            if self.fault.at == 0:
                number, self.fault = self.fault.errno, None
                self.failed = call
                raise KernelError(number, call.name, str(call.arguments))

    def names(self) -> list[str]:
        """The names of all calls so far."""
        return [call.name for call in self.calls]

    def _rule(self, broken: bool, number: int, name: str) -> None:
        if broken:
            raise KernelError(number, name, "")

    @property
    def running(self) -> bool:
        """Whether the device may touch its rings."""
        return bool(self.status & Status.DRIVER_OK) and not self.suspended

    # -- what VhostVdpa has -------------------------------------------------------

    def fileno(self) -> int:
        return -1

    def prepare(self) -> PreparedCalls:
        return PreparedDouble(self)

    def close(self) -> None:
        if not self.closed:
            self._control.stop()
            self._reset()
            self.closed = True

    def set_owner(self) -> None:
        self._call("SET_OWNER")

    def get_features(self) -> int:
        self._call("GET_FEATURES")
        return self.features

    def set_features(self, features: int) -> None:
        self._call("SET_FEATURES", features)
        self._rule(bool(self.status & Status.FEATURES_OK), errno.EBUSY, "SET_FEATURES")
        self._rule(bool(features & ~self.features), errno.EINVAL, "SET_FEATURES")
        self.driver_features = features

    def get_backend_features(self) -> BackendFeature:
        self._call("GET_BACKEND_FEATURES")
        return self.advertised

    def set_backend_features(self, features: BackendFeature) -> None:
        self._call("SET_BACKEND_FEATURES", int(features))
        self._rule(bool(features & ~self.advertised), errno.EOPNOTSUPP, "SET_BACKEND_FEATURES")
        self.acked = features

    def get_device_id(self) -> int:
        self._call("GET_DEVICE_ID")
        return VIRTIO_ID_NET

    def get_status(self) -> Status:
        self._call("GET_STATUS")
        return self.status

    def set_status(self, status: Status) -> None:
        self._call("SET_STATUS", int(status))
        if not status:
            self._reset()
            return
        self._rule(bool(self.status & ~status), errno.EINVAL, "SET_STATUS")
        started = bool(status & Status.DRIVER_OK) and not self.status & Status.DRIVER_OK
        self.status = status & ~Status(self.refuses)
        if started:
            self._control.start()

    def _reset(self) -> None:
        self._control.stop()
        self.resets += 1
        self.status = Status(0)
        self.suspended = False
        self.driver_features = 0
        self.vrings = [Vring() for _ in self.vrings]
        self.asid_of = [0, 0, 0]
        if BackendFeature.IOTLB_PERSIST not in self.acked:
            self.device_maps = [{} for _ in self.device_maps]

    def get_config_size(self) -> int:
        self._call("GET_CONFIG_SIZE")
        return 24

    def get_config(self, offset: int, length: int) -> bytes:
        self._call("GET_CONFIG", offset, length)
        space = bytes.fromhex("525491a1c200") + struct.pack("<HHH", 1, PAIRS, 1500)
        return space.ljust(24, b"\0")[offset : offset + length]

    def set_config_call(self, eventfd: int) -> None:
        self._call("SET_CONFIG_CALL", eventfd)

    def get_vqs_count(self) -> int:
        self._call("GET_VQS_COUNT")
        return len(self.vrings)

    def get_vring_num(self) -> int:
        self._call("GET_VRING_NUM")
        return RING_MAX

    def get_vring_busyloop_timeout(self, index: int) -> int:
        self._call("GET_VRING_BUSYLOOP_TIMEOUT", index)
        return 0

    def get_vring_size(self, index: int) -> int:
        self._call("GET_VRING_SIZE", index)
        return RING_MAX

    def set_vring_num(self, index: int, num: int) -> None:
        self._call("SET_VRING_NUM", index, num)
        self._rule(num > RING_MAX or num & (num - 1) != 0, errno.EINVAL, "SET_VRING_NUM")
        self.vrings[index].num = num

    def set_vring_base(self, index: int, base: int) -> None:
        self._call("SET_VRING_BASE", index, base)
        self._rule(self.running or base > 0xFFFF, errno.EINVAL, "SET_VRING_BASE")
        self.vrings[index].base = base

    def get_vring_base(self, index: int) -> int:
        self._call("GET_VRING_BASE", index)
        return self.vrings[index].base

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int) -> None:
        self._call("SET_VRING_ADDR", index, desc, avail, used)
        self._rule(self.running or bool(avail % 2 or used % 4), errno.EINVAL, "SET_VRING_ADDR")
        self.vrings[index].addresses = (desc, avail, used)

    def set_vring_kick(self, index: int, eventfd: int) -> None:
        self._call("SET_VRING_KICK", index, eventfd)
        self.vrings[index].kick = eventfd

    def set_vring_call(self, index: int, eventfd: int) -> None:
        self._call("SET_VRING_CALL", index, eventfd)
        self.vrings[index].call = eventfd

    def set_vring_enable(self, index: int, enable: bool) -> None:
        self._call("SET_VRING_ENABLE", index, int(enable))
        self.vrings[index].ready = enable

    def get_iova_range(self) -> tuple[int, int]:
        self._call("GET_IOVA_RANGE")
        return 0, (1 << 64) - 1

    def get_group_num(self) -> int:
        self._call("GET_GROUP_NUM")
        return 3

    def get_as_num(self) -> int:
        self._call("GET_AS_NUM")
        return self.as_num

    def get_vring_group(self, index: int) -> int:
        self._call("GET_VRING_GROUP", index)
        return CONTROL_GROUP if index == 2 * PAIRS else DATA_GROUP

    def get_vring_desc_group(self, index: int) -> int:
        self._call("GET_VRING_DESC_GROUP", index)
        self._rule(BackendFeature.DESC_ASID not in self.advertised, errno.EOPNOTSUPP, "GET_VRING_DESC_GROUP")
        return CONTROL_GROUP if index == 2 * PAIRS else DESC_GROUP

    def set_group_asid(self, group: int, asid: int) -> None:
        self._call("SET_GROUP_ASID", group, asid)
        self._rule(asid >= self.as_num, errno.EINVAL, "SET_GROUP_ASID")
        late = bool(self.status & Status.DRIVER_OK) and not self.set_group_after_driver_ok
        self._rule(late, errno.EBUSY, "SET_GROUP_ASID")
        self.asid_of[group] = asid

    def suspend(self) -> None:
        self._call("SUSPEND")
        self._rule(BackendFeature.SUSPEND not in self.advertised, errno.EOPNOTSUPP, "SUSPEND")
        self.suspended = bool(self.status & Status.DRIVER_OK)
        # mlx5_vdpa forgets that its control queue is ready, and RESUME does not undo that
        self.vrings[2 * PAIRS].ready = False

    def resume(self) -> None:
        self._call("RESUME")
        self._rule(BackendFeature.RESUME not in self.advertised, errno.EOPNOTSUPP, "RESUME")
        self.suspended = False

    def write_iotlb(self, messages: Sequence[IotlbMessage]) -> None:
        for number, message in enumerate(messages):
            call = Call(f"IOTLB_{message.type.name}", (message.asid, message.iova, message.size))
            self.calls.append(call)
            try:
                self._maybe_fail(call)
                self._apply(message)
            except KernelError as e:
                raise IotlbWriteError(e.errno or errno.EFAULT, message, number) from e

    def _apply(self, message: IotlbMessage) -> None:
        wrong_batch = self.batch_asid is not None and self.batch_asid != message.asid
        self._rule(wrong_batch or message.asid >= self.as_num, errno.EFAULT, "IOTLB")
        tree, device = self.tree[message.asid], self.device_maps[message.asid]
        if message.type is IotlbType.BATCH_BEGIN:
            self.batch_asid = message.asid
        elif message.type is IotlbType.BATCH_END:
            self.batch_asid = None
        elif message.type is IotlbType.UPDATE:
            end = message.iova + message.size
            overlap = any(iova < end and message.iova < iova + size for iova, (size, _) in tree.items())
            self._rule(overlap, errno.EFAULT, "IOTLB_UPDATE")
            tree[message.iova] = device[message.iova] = (message.size, message.uaddr)
            self.access[message.asid, message.iova] = message.perm
        else:
            for iova, (size, _) in list(tree.items()):
                if iova < message.iova + message.size and message.iova < iova + size:
                    del tree[iova]
                    device.pop(iova, None)

    # -- for tests -----------------------------------------------------------------

    def translate(self, asid: int, iova: int, size: int) -> int | None:
        """Return the address at which the device would read ``size`` bytes; None where it has no map."""
        for start, (length, uaddr) in self.device_maps[asid].items():
            if start <= iova and iova + size <= start + length:
                return uaddr + iova - start
        return None

    def _may_write(self, asid: int, iova: int) -> bool:
        starts = [start for start, (size, _) in self.device_maps[asid].items() if start <= iova < start + size]
        return all(self.access[asid, start] in (Access.WO, Access.RW) for start in starts)

    def unreachable_rings(self) -> list[str]:
        """Return the rings of enabled queues that the device cannot reach with the maps it has."""
        missing = []
        for index, ring in enumerate(self.vrings):
            group = CONTROL_GROUP if index == 2 * PAIRS else DATA_GROUP
            if BackendFeature.DESC_ASID in self.acked and group == DATA_GROUP:
                group = DESC_GROUP
            sizes = (16 * ring.num, 6 + 2 * ring.num, 6 + 8 * ring.num)
            for name, at, size in zip(("desc", "avail", "used"), ring.addresses, sizes, strict=True):
                if ring.ready and self.translate(self.asid_of[group], at, size) is None:
                    missing.append(f"queue {index} {name} at {at:#x} in ASID {self.asid_of[group]}")
                elif ring.ready and name == "used" and not self._may_write(self.asid_of[group], at):
                    missing.append(f"queue {index} used, which is read-only, at {at:#x}")
        return missing


class _Answers:
    """Answers OK to every control command, as a device does between DRIVER_OK and reset."""

    def __init__(self, door: DoorDouble) -> None:
        self._door = door
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._seen = 0

    def start(self) -> None:
        ring = self._door.vrings[2 * PAIRS]
        if ring.kick >= 0 and self._thread is None:
            self._seen = 0
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._serve, args=(ring, self._door.asid_of[CONTROL_GROUP]))
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            self._thread = None

    def _serve(self, ring: Vring, asid: int) -> None:
        poll = select.poll()
        poll.register(ring.kick, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                return
            os.eventfd_read(ring.kick)
            self._answer(ring, asid)

    def _answer(self, ring: Vring, asid: int) -> None:
        desc, avail, used = ring.addresses
        [end] = struct.unpack("<H", self._at(asid, avail + 2, 2))
        while self._seen != end:
            [head] = struct.unpack("<H", self._at(asid, avail + 4 + 2 * (self._seen % ring.num), 2))
            slot = head
            while True:
                at, size, flags, following = struct.unpack("<QIHH", self._at(asid, desc + 16 * slot, 16))
                if flags & 2:
                    self._at(asid, at, size)[:1] = b"\0"
                if not flags & 1:
                    break
                slot = following
            self._door.answered.append(len(self._door.calls))
            self._at(asid, used + 4 + 8 * (self._seen % ring.num), 8)[:] = struct.pack("<II", head, 1)
            self._seen = (self._seen + 1) & 0xFFFF
            self._at(asid, used + 2, 2)[:] = struct.pack("<H", self._seen)
        if ring.call >= 0:
            os.eventfd_write(ring.call, 1)

    def _at(self, asid: int, iova: int, size: int) -> memoryview:
        address = self._door.translate(asid, iova, size)
        assert address is not None, (
            f"the device reads {size} bytes at {iova:#x} in ASID {asid}, where nothing is mapped"
        )
        return memoryview(ffi.buffer(ffi.cast("char *", address), size))
