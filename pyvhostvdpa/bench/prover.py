# SPDX-License-Identifier: MIT
"""Whether a device reaches what was mapped: frames out of it and into it.

A map that was accepted may have mapped nothing: the kernel ignores what the
parent answers at BATCH_END (drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_msg),
and a parent on user addresses skips private memory (vhost_vdpa_va_map). The
rings lie in memory of their own that is mapped before, because any later map
would hand the parent the whole table again and so mend what failed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import KernelError, MissingFeature, NotProved
from ..base.uapi import Access, BackendFeature, Status, names
from ..device.net import VdpaNetDevice
from ..host import mgmt
from ..memory.guest import HUGE_PAGE, PAGE_SIZE
from ..memory.mapped import SharedMemory
from ..virtqueue.layout import SplitLayout, fill_vring

SIZE = HUGE_PAGE
"""Bytes that the rings take: a huge page, one entry where the kernel can give one."""
FRAME = 256
_RING = 256
_SECONDS = 3.0
"""How long a device may take for one frame."""
_GRACE_NS = 150_000_000
"""How long a frame is waited for that may have been sent away."""
_READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK

ProofPlace = tuple[int, int]
"""IOVA and address in this process."""


class Prover:
    """A driver with one frame in flight on the first pair of an open device."""

    def __init__(self, device: VdpaNetDevice, iova: int, asid: int = 0, patience: float = _SECONDS) -> None:
        self.patience = patience
        """Seconds that the device may take for one frame."""
        self.device, self.iova, self.asid = device, iova, asid
        self.loops = False
        """Whether the device sends frames back; if not, finished descriptors are all that can be seen."""
        self._stack = ExitStack()
        self.rings = self._stack.enter_context(SharedMemory("bench-rings", SIZE))
        num = min(_RING, device.largest_ring((0, 1)))
        self._layout = SplitLayout(num)
        self._c: Any = ffi.new("struct touch *")
        for index, ring in enumerate((self._c.rx, self._c.tx)):
            at = self.rings.hva + index * self._layout.size
            fill_vring(ring, num, at, at + self._layout.avail_offset, at + self._layout.driver_area)
        self._fds = [self._eventfd() for _ in range(4)]
        self._c.rx_kick, self._c.rx_call, self._c.tx_kick, self._c.tx_call = self._fds
        self._statistics_of: int | None = -1

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stack.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Give memory and eventfds back; the device has to be closed before."""
        self._stack.close()

    # -- the device's states ------------------------------------------------------

    def map(self) -> None:
        """Map the rings."""
        with self.device.iotlb.space(self.asid).batch() as batch:
            batch.map(self.iova, self.rings.hva, SIZE, Access.RW)

    def begin(self) -> None:
        """Bring the device from a reset to FEATURES_OK."""
        c = self.device.chardev
        c.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        c.set_features(int(self.device.features))
        c.set_status(_READY)
        if not c.get_status() & Status.FEATURES_OK:
            raise MissingFeature(f"{c.path} refused the features {names(self.device.features)}")

    def start(self) -> None:
        """Set both queues up and let the device run."""
        c = self.device.chardev
        lib.touch_start(self._c)
        if self.asid:
            for group in self._groups():
                c.set_group_asid(group, self.asid)
        for index in (0, 1):
            at = self.iova + index * self._layout.size
            c.set_vring_num(index, self._layout.num)
            c.set_vring_base(index, 0)
            c.set_vring_addr(index, at, at + self._layout.avail_offset, at + self._layout.driver_area)
            c.set_vring_kick(index, self._fds[2 * index])
            c.set_vring_call(index, self._fds[2 * index + 1])
            c.set_vring_enable(index, True)
        c.set_status(_READY | Status.DRIVER_OK)
        if not c.get_status() & Status.DRIVER_OK:
            raise NotProved(f"{c.path} did not accept DRIVER_OK; its rings are mapped at {self.iova:#x}")

    def _groups(self) -> set[int]:
        c = self.device.chardev
        found = set()
        for ask in (c.get_vring_group, c.get_vring_desc_group):
            try:
                found |= {ask(index) for index in (0, 1)}
            except KernelError as e:
                if e.errno != errno.EOPNOTSUPP:
                    raise
        return found

    def reset(self) -> None:
        """Reset the device. Without IOTLB_PERSIST it forgets its maps, the kernel's tree does not."""
        self.device.chardev.set_status(Status(0))

    @property
    def forgets(self) -> bool:
        """Whether a reset makes the device forget its maps."""
        return BackendFeature.IOTLB_PERSIST not in self.device.backend_features

    # -- frames -------------------------------------------------------------------

    def look_for_loop(self) -> None:
        """Learn whether a frame within the rings' own memory comes back; :class:`NotProved` if not even one leaves."""
        self.begin()
        self.start()
        own = self.rings.size - 2 * PAGE_SIZE
        places = [(self.iova + own + i * PAGE_SIZE, self.rings.hva + own + i * PAGE_SIZE) for i in (0, 1)]
        state = self._touch(places[0], places[1], _GRACE_NS)
        if not state & lib.TOUCH_SENT:
            raise NotProved(
                f"{self.device.path} finished no descriptor within {self.patience:g} s, not even in memory that was "
                "mapped by one message "
                f"(status {names(self.device.chardev.get_status())})",
                hint="vhost-vdpa probe --verify shows what the device does",
            )
        self.loops = bool(state & lib.TOUCH_BACK)
        self.reset()

    def _touch(self, source: ProofPlace, target: ProofPlace, grace: int) -> int:
        places = [ffi.new("struct touch_place *", {"iova": p[0], "hva": ffi.cast("uint8_t *", p[1])}) for p in
                  (source, target)]  # fmt: skip
        deadline = time.monotonic_ns() + int(self.patience * 1e9)
        state: int = lib.touch_frame(self._c, *places, FRAME, deadline, grace)
        if state & lib.TOUCH_NONSENSE:
            raise NotProved(f"{self.device.path} wrote an invalid used ring (index or id out of range)")
        return state

    def reach(self, places: Sequence[ProofPlace]) -> None:
        """Send a frame out of each place and into the next one; :class:`NotProved` naming the one not reached."""
        for i, source in enumerate(places):
            target = places[(i + 1) % len(places)]
            state = self._touch(source, target, int(self.patience * 1e9) if self.loops else _GRACE_NS)
            if not state & lib.TOUCH_SENT:
                where = f"the page at IOVA {source[0]:#x} within {self.patience:g} s"
                raise NotProved(f"the device does not reach {where}{self._trouble()}")
            if self.loops and not state & lib.TOUCH_BACK:
                raise NotProved(
                    f"a frame out of the page at IOVA {source[0]:#x} did not arrive whole in the page at "
                    f"{target[0]:#x}{self._trouble()}"
                )

    def _trouble(self) -> str:
        status = self.device.chardev.get_status()
        return " (it has set NEEDS_RESET)" if status & Status.NEEDS_RESET else ""

    # -- the device's own count -----------------------------------------------------

    def set_maps(self) -> int | None:
        """Return the device's own count of set_map, after FEATURES_OK; None where it does not report it."""
        if self._statistics_of == -1:
            self._statistics_of = next((i for i in (2, self.device.vqs_count - 1) if self._count(i) is not None), None)
        return None if self._statistics_of is None else self._count(self._statistics_of)

    def _count(self, queue: int) -> int | None:
        return mgmt.vendor_statistics(self.device.path, [queue]).get(queue, {}).get("set_map")
