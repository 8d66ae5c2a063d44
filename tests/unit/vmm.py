"""Calls as QEMU makes them on one device, made by hand: a sample of their order and shape, not of their times."""

from __future__ import annotations

from traces import MS

from pyvhostvdpa.trace.recorder import Event, Trace

GIB = 1 << 30
RAM = 0x7F00_0000_0000
"""Where guest memory lies in the process."""
RINGS = 0x5500_0000_0000
"""Where it allocates shadow rings."""
LOW, LOW_SIZE = 0, 0xA0000
"""The first region of a PC's memory: small, in the same memory as the rest."""
HIGH, HIGH_SIZE = 0x10_0000, GIB - 0x10_0000
SHADOW_IOVA = 0x1000
FEATURES = 0x3_00CB_182B


class Vmm:
    """One process's calls on one device, with 10 us between them."""

    def __init__(self, trace: Trace, device: str, at: int = 0, pairs: int = 1, call_ns: int = 10_000) -> None:
        self.trace, self.device, self.at, self.call_ns = trace, device, at, call_ns
        self.queues = 2 * pairs + 1
        self.gpa = LOW
        self.base = 0
        """Where the guest's own rings continue; shadow rings begin at 0."""
        self.features = FEATURES

    def call(self, event: str, ns: int | None = None, result: int | None = 0, **fields: int | str) -> None:
        begin = self.at + 10_000
        self.at = begin + (self.call_ns if ns is None else ns)
        self.trace.append(Event(begin, self.at, self.device, "", event, fields, result))

    def wait(self, ms: float) -> None:
        self.at += int(ms * MS)

    def open(self, pid: int = 100, comm: str = "qemu") -> None:
        self.call("open", pid=pid, comm=comm)
        self.call("VHOST_SET_OWNER")
        self.call("VHOST_VDPA_GET_DEVICE_ID", device_id=1)
        self.call("VHOST_GET_FEATURES", features=FEATURES | 1 << 40)
        self.call("VHOST_GET_BACKEND_FEATURES", backend_features=0x1FE)
        self.call("VHOST_SET_BACKEND_FEATURES", backend_features=0x1E)
        for index in range(self.queues):
            self.call("VHOST_VDPA_GET_VRING_GROUP", index=index, num=int(index == self.queues - 1))

    def map(self, iova: int, size: int, uaddr: int, asid: int = 0, ns: int | None = None) -> None:
        self.call("IOTLB_UPDATE", ns, 72, asid=asid, iova=iova, size=size, uaddr=uaddr, perm=3)

    def unmap(self, iova: int, size: int, asid: int = 0, ns: int | None = None) -> None:
        self.call("IOTLB_INVALIDATE", ns, 72, asid=asid, iova=iova, size=size)

    def map_memory(self, moved: int = 0, ns: int | None = None) -> None:
        """Guest memory in one batch, at IOVA = GPA + ``moved``, as QEMU does with shadow rings."""
        self.call("IOTLB_BATCH_BEGIN", None, 72, asid=0)
        self.map(LOW + moved, LOW_SIZE, RAM + LOW)
        self.map(HIGH + moved, HIGH_SIZE, RAM + HIGH)
        self.call("IOTLB_BATCH_END", ns, 72, asid=0)

    def unmap_memory(self, moved: int = 0, ns: int | None = None) -> None:
        self.call("IOTLB_BATCH_BEGIN", None, 72, asid=0)
        self.unmap(LOW + moved, LOW_SIZE)
        self.unmap(HIGH + moved, HIGH_SIZE)
        self.call("IOTLB_BATCH_END", ns, 72, asid=0)

    def _begin_start(self) -> None:
        self.call("VHOST_VDPA_GET_STATUS", status=0)
        self.call("VHOST_VDPA_SET_STATUS", status=3)
        self.call("VHOST_SET_FEATURES", features=self.features)
        self.call("VHOST_VDPA_SET_STATUS", status=11)

    def _rings(self, shadow: bool) -> None:
        for index in range(self.queues):
            self.call("VHOST_SET_VRING_NUM", index=index, num=256)
            control = index == self.queues - 1
            self.call("VHOST_SET_VRING_BASE", index=index, num=0 if shadow or control else self.base)
            if control:
                self.call("VHOST_VDPA_SET_GROUP_ASID", index=1, num=1)
            if shadow or control:
                at = SHADOW_IOVA + 0x4000 * index
                self.map(at, 0x2000, RINGS + 0x10000 * index, int(control))
                self.map(at + 0x2000, 0x1000, RINGS + 0x10000 * index + 0x8000, int(control))
                self.call("VHOST_SET_VRING_ADDR", index=index, desc=at, avail=at + 0x1000, used=at + 0x2000)
            else:
                at = self.gpa + 0x4000 * (index + 1)
                self.call("VHOST_SET_VRING_ADDR", index=index, desc=at, avail=at + 0x1000, used=at + 0x2000)
            self.call("VHOST_SET_VRING_KICK", index=index, fd=20 + index)

    def prepare(self, shadow: bool = False, moved: int = 0, ns: int | None = None) -> None:
        """All of a start that comes before the device runs."""
        self._begin_start()
        self.map_memory(moved, ns)
        self._rings(shadow)

    def start(self, shadow: bool = False, moved: int = 0, ns: int | None = None) -> None:
        self.prepare(shadow, moved, ns)
        self.call("VHOST_VDPA_SET_STATUS", status=15)
        self.call("VHOST_VDPA_SET_VRING_ENABLE", index=self.queues - 1, num=1)
        for index in range(self.queues - 1):
            self.call("VHOST_VDPA_SET_VRING_ENABLE", index=index, num=1)

    def stop(self, shadow: bool = False, moved: int = 0, ns: int | None = None) -> None:
        self.call("VHOST_VDPA_SUSPEND")
        for index in range(self.queues):
            if not shadow:
                self.call("VHOST_GET_VRING_BASE", index=index, num=7)
            else:
                self.unmap(SHADOW_IOVA + 0x4000 * index, 0x2000, int(index == self.queues - 1))
                self.unmap(SHADOW_IOVA + 0x4000 * index + 0x2000, 0x1000, int(index == self.queues - 1))
        self.call("VHOST_VDPA_SET_STATUS", status=0)
        self.unmap_memory(moved, ns)

    def close(self) -> None:
        self.call("close")


MOVED = 0x4_0000_0000
"""How far shadow mode moves guest memory."""


def switch(vmm: Vmm, ns: int | None = None) -> tuple[int, int]:
    """Passthrough to shadow; when it began and ended."""
    begin = vmm.at + 10_000
    vmm.stop(ns=ns)
    vmm.start(shadow=True, moved=MOVED, ns=ns)
    return begin, vmm.at


def stop_for_good(vmm: Vmm, ns: int | None = None) -> tuple[int, int]:
    begin = vmm.at + 10_000
    vmm.stop(shadow=True, moved=MOVED, ns=ns)
    return begin, vmm.at


def sort(trace: Trace) -> Trace:
    trace.events.sort(key=lambda event: event.t_end)
    return trace
