"""A device that moves frames: the door's double, and a C thread that sends each frame back to its pair.

For what stands between a driver and a device under load, with hundreds of switches. What a kernel does is not in it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from door_double import DESC_GROUP, PAIRS, DoorDouble
from native_programs import NATIVE, ROOT

from pyvhostvdpa.base.uapi import BackendFeature, Status

QUEUES = 2 * PAIRS


class _Ring(ctypes.Structure):
    _fields_ = (
        ("num", ctypes.c_uint16),
        ("desc", ctypes.c_void_p),
        ("avail", ctypes.c_void_p),
        ("used", ctypes.c_void_p),
    )


class _Queue(ctypes.Structure):
    _fields_ = (
        *(("ring", _Ring), ("avail", ctypes.c_uint16), ("used", ctypes.c_uint16), ("kick", ctypes.c_int)),
        *(("call", ctypes.c_int), ("held", ctypes.c_uint32), ("heads", ctypes.c_uint16 * 64)),
    )


class Loop(ctypes.Structure):
    """``struct loop_device``."""

    _fields_ = (
        *(("gpa", ctypes.c_uint64), ("size", ctypes.c_uint64), ("hva", ctypes.c_void_p), ("pairs", ctypes.c_uint32)),
        *(("ahead", ctypes.c_uint32), ("reorder", ctypes.c_uint32), ("simple", ctypes.c_uint32)),
        *(("frames", ctypes.c_uint64), ("dropped", ctypes.c_uint64), ("faults", ctypes.c_uint64)),
        *(("wake", ctypes.c_int), ("stop", ctypes.c_int), ("seed", ctypes.c_uint32), ("thread", ctypes.c_ulong)),
        ("queues", _Queue * 16),
    )


def build(folder: Path) -> ctypes.CDLL:
    """Build the data path with the compiler that CC names."""
    library = folder / "loop_device.so"
    command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread", "-shared", "-fPIC"]
    subprocess.run([*command, f"-I{ROOT / 'cdefs'}", NATIVE / "loop_device.c", "-o", library], check=True)
    return ctypes.CDLL(str(library))


class LoopDoor(DoorDouble):
    """A device that runs while it may touch its rings.

    A suspend leaves descriptors that it had fetched; ``base_avail`` says that it reports them as done.
    """

    library: ctypes.CDLL
    base_avail = False

    def __post_init__(self) -> None:
        self.loop = Loop(pairs=PAIRS, wake=os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), seed=1)
        self.runs = False
        super().__post_init__()

    def close(self) -> None:
        super().close()
        if self.loop.wake >= 0:
            os.close(self.loop.wake)
            self.loop.wake = -1

    def give(self, gpa: int, hva: int, size: int) -> None:
        """Tell it where guest memory is."""
        self.loop.gpa, self.loop.hva, self.loop.size = gpa, hva, size

    def _begin(self) -> None:
        rings = self.vrings[:QUEUES]
        if self.runs or not self.running or not all(ring.ready for ring in rings):
            return
        asid = self.asid_of[DESC_GROUP if BackendFeature.DESC_ASID in self.acked else 0]
        for queue, ring in zip(self.loop.queues, rings, strict=False):
            sizes = (16 * ring.num, 6 + 2 * ring.num, 6 + 8 * ring.num)
            places = [self.translate(asid, iova, size) for iova, size in zip(ring.addresses, sizes, strict=True)]
            assert None not in places, f"ring at {ring.addresses} in ASID {asid}"
            queue.ring = _Ring(ring.num, *places)
            queue.avail = queue.used = ring.base
            queue.kick, queue.call, queue.held = ring.kick, ring.call, 0
        assert self.library.loop_start(ctypes.byref(self.loop)) == 0
        self.runs = True

    def _end(self) -> None:
        if self.runs:
            self.library.loop_stop(ctypes.byref(self.loop))
            self.runs = False
            for queue, ring in zip(self.loop.queues, self.vrings[:QUEUES], strict=False):
                ring.base = queue.avail if self.base_avail else queue.used

    def set_status(self, status: Status) -> None:
        super().set_status(status)
        self._begin()

    def set_vring_enable(self, index: int, enable: bool) -> None:
        super().set_vring_enable(index, enable)
        self._begin()

    def suspend(self) -> None:
        self._end()
        super().suspend()

    def resume(self) -> None:
        super().resume()
        self._begin()

    def _reset(self) -> None:
        self._end()
        super()._reset()
