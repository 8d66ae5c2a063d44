# SPDX-License-Identifier: MIT
"""Address spaces of a device: what is mapped, and why a map cannot be.

The kernel answers EFAULT to every bad map and says nothing of a batch that
failed. So each address space keeps a mirror of the kernel's tree and refuses
in advance what the kernel would refuse, with the reason.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..base.errors import MapRejected
from ..base.uapi import Access, IotlbType
from ..memory.guest import PAGE_SIZE
from ..memory.mapped import physical_runs
from ..memory.pinned import allow_pinning
from .door import VhostVdpa
from .message import IotlbMessage, IotlbWriteError
from .rejection import likely_cause


class GuestMapping(enum.Enum):
    """How guest memory lies in an address space."""

    NONE = "none"
    IDENTITY = "identity"
    TRANSLATED = "translated"


@dataclass(frozen=True, slots=True)
class Mapping:
    """One UPDATE. ``entries`` is its share of the kernel's limit."""

    iova: int
    size: int
    uaddr: int
    perm: Access
    entries: int = 1

    @property
    def last(self) -> int:
        """The last IOVA."""
        return self.iova + self.size - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the maps of a device.

    ``first`` and ``last`` are the lowest and the highest IOVA that can be
    mapped (VHOST_VDPA_GET_IOVA_RANGE), ``as_num`` the number of address spaces.
    ``pinned`` is whether the parent works on pinned pages, None if that is unknown; ``entries`` is
    the limit per address space, None if unknown. What follows from pinning alone is refused in advance only
    where pinning is certain.
    """

    first: int
    last: int
    as_num: int
    pinned: bool | None
    entries: int | None
    private: bool = False
    """Whether memory that no file is behind can be mapped: a parent on user addresses skips that without a word."""


class Iotlb:
    """The address spaces of one device, which ``chardev`` is open on and ``limits`` bound.

    The kernel has one batch per device, not one per space
    (drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_msg).
    """

    def __init__(self, chardev: VhostVdpa, limits: Limits) -> None:
        self.chardev = chardev
        self.limits = limits
        self.notes: list[str] = []
        """What was changed on the way (a raised RLIMIT_MEMLOCK)."""
        self._spaces: dict[int, AddressSpace] = {}

    def space(self, asid: int) -> AddressSpace:
        """Return address space ``asid``.

        Raises :class:`~pyvhostvdpa.MapRejected` if the device does not have
        that many.
        """
        if not 0 <= asid < self.limits.as_num:
            raise MapRejected(f"ASID {asid}: the device has {self.limits.as_num} address spaces")
        return self._spaces.setdefault(asid, AddressSpace(self, asid))

    def make_room(self, pinned: int) -> None:
        """Raise this process's memlock limit for ``pinned`` more bytes if that is needed and allowed."""
        try:
            note = allow_pinning(pinned) if pinned else ""
        except MapRejected:
            if self.limits.pinned:
                raise
            # the parent may well pin nothing: the kernel has the last word
            return
        if note:
            self.notes.append(note)

    def write(self, asid: int, messages: Sequence[IotlbMessage]) -> None:
        """Send ``messages`` of address space ``asid``, in order.

        Raises :class:`~pyvhostvdpa.MapRejected` while a batch of another
        address space is open, and a :class:`~pyvhostvdpa.KernelError` with its
        likely cause for the first that the kernel refuses; its ``applied`` are
        in force.
        """
        batch_asid = self.chardev.batch_asid
        if batch_asid not in (None, asid):
            raise MapRejected(
                f"ASID {asid}: a batch of ASID {batch_asid} is still open; a device can have only one",
                hint="write its BATCH_END; nothing else but close() ends it, not even a reset",
            )
        try:
            self.chardev.write_iotlb(messages)
        except IotlbWriteError as e:
            why = likely_cause(self.chardev, e.rejected, self.limits.pinned, self.limits.entries)
            raise IotlbWriteError(e.errno or 0, e.rejected, e.applied, why.cause, why.hint) from e

    def map_again(self) -> None:
        """Restore the device's translation after a reset without IOTLB_PERSIST.

        The reset emptied the device's own table but not the kernel's tree
        (drivers/vhost/vdpa.c:_compat_vdpa_reset), where an UPDATE would now
        meet its old self.
        """
        for space in self._spaces.values():
            space.map_again()


class AddressSpace:
    """Address space ``asid`` of a device, whose messages go through ``iotlb``: a mirror of the kernel's tree."""

    def __init__(self, iotlb: Iotlb, asid: int) -> None:
        self._iotlb = iotlb
        self.asid = asid
        self.guest_mapping = GuestMapping.NONE
        """How guest memory lies here, as given by the caller that mapped it."""
        self._maps: list[Mapping] = []
        self._to_restore: tuple[Mapping, ...] = ()
        """What :meth:`map_again` has not mapped yet: a second try must not forget what the first one unmapped."""

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """What is mapped, by IOVA."""
        return tuple(self._maps)

    def map(self, iova: int, uaddr: int, size: int, perm: Access = Access.RW) -> None:
        """Map ``size`` bytes at ``uaddr`` of this process to ``iova`` with access ``perm``, without a batch.

        On a pinned set_map parent this rebuilds the device's table once per
        physically contiguous run; see :meth:`batch`. Raises
        :class:`~pyvhostvdpa.MapRejected` for maps that the kernel would answer with
        a bare EFAULT: no multiple of a page, outside of the device's range,
        over another map, too many entries.
        """
        with self._one() as change:
            change.map(iova, uaddr, size, perm)

    def unmap(self, iova: int, size: int) -> None:
        """Unmap ``size`` bytes at ``iova``, exactly as they were mapped.

        The kernel drops every entry that the range touches, whole
        (drivers/vhost/vdpa.c:vhost_vdpa_pa_unmap). Raises
        :class:`~pyvhostvdpa.MapRejected` if there is no mapping of exactly
        this range.
        """
        with self._one() as change:
            change.unmap(iova, size)

    @contextmanager
    def _one(self) -> Iterator[Changes]:
        changes = Changes(self, self._iotlb.limits)
        yield changes
        self._iotlb.make_room(changes.pinned)
        self._iotlb.write(self.asid, changes.messages)
        self._maps = changes.planned

    def map_again(self) -> None:
        """Unmap and map everything again, in one batch. After a failure it can be called again and loses nothing."""
        self._to_restore = self._to_restore or self.mappings
        if not self._to_restore:
            return
        with self.batch() as batch:
            for m in self.mappings:
                batch.unmap(m.iova, m.size)
            for m in self._to_restore:
                batch.put_back(m)
        self._to_restore = ()

    @contextmanager
    def batch(self) -> Iterator[Changes]:
        """Collect maps and unmaps, then send them between BATCH_BEGIN and BATCH_END in one burst.

        Nothing is sent if the block raises. The kernel reports no failure of
        a batch as a whole (it ignores the parent's answer at BATCH_END).
        """
        changes = Changes(self, self._iotlb.limits)
        yield changes
        if not changes.messages:
            return
        begin = IotlbMessage(IotlbType.BATCH_BEGIN, self.asid)
        end = IotlbMessage(IotlbType.BATCH_END, self.asid)
        self._iotlb.make_room(changes.pinned)
        try:
            self._iotlb.write(self.asid, [begin, *changes.messages, end])
        except IotlbWriteError as e:
            if e.applied:
                self._maps = changes.after(e.applied - 1)
                self._end_batch()
            raise
        self._maps = changes.planned

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a batch open for the block: each map and unmap in it is written at once, the parent at its end.

        Unlike :meth:`batch` other calls may come in between, and the batch
        ends in any case: nothing but close() would end it later.
        """
        self._iotlb.write(self.asid, [IotlbMessage(IotlbType.BATCH_BEGIN, self.asid)])
        try:
            yield
        finally:
            end = IotlbMessage(IotlbType.BATCH_END, self.asid)
            try:
                self._iotlb.write(self.asid, [end])
            except IotlbWriteError:
                self._end_batch()
                raise

    def _end_batch(self) -> None:
        """End the batch after an error, also after a BATCH_END that failed: nothing but close() would end it later."""
        self._iotlb.chardev.write_iotlb([IotlbMessage(IotlbType.BATCH_END, self.asid)])


class Changes:
    """Maps and unmaps that are sent together when the block ends."""

    def __init__(self, space: AddressSpace, limits: Limits) -> None:
        self._asid = space.asid
        self._limits = limits
        self._before = list(space.mappings)
        self._entries = sum(m.entries for m in self._before)
        self._changes: list[tuple[bool, Mapping]] = []
        self.planned = list(self._before)
        self.messages: list[IotlbMessage] = []
        self.pinned = 0
        """Bytes that will be newly pinned, or may be where that is unknown."""

    def map(self, iova: int, uaddr: int, size: int, perm: Access = Access.RW) -> None:
        """Add a map; see :meth:`AddressSpace.map`."""
        what = f"map of {size:#x} bytes at IOVA {iova:#x} in ASID {self._asid}"
        self._check_range(what, iova, uaddr, size)
        self._check_overlap(what, iova, size)
        entries = (physical_runs(uaddr, size) or 1) if self._limits.pinned else 1
        self._check_entries(what, entries)
        self.put_back(Mapping(iova, size, uaddr, perm, entries))
        self.pinned += size if self._limits.pinned is not False else 0

    def _check_range(self, what: str, iova: int, uaddr: int, size: int) -> None:
        limits = self._limits
        if size <= 0 or size % PAGE_SIZE or iova % PAGE_SIZE or uaddr % PAGE_SIZE:
            raise MapRejected(f"{what}: IOVA, size and address {uaddr:#x} must be multiples of {PAGE_SIZE}")
        if iova < limits.first or iova + size - 1 > limits.last:
            raise MapRejected(f"{what}: outside the device's range {limits.first:#x}-{limits.last:#x}")

    def _check_overlap(self, what: str, iova: int, size: int) -> None:
        at = _index(self.planned, iova)
        for other in self.planned[max(at - 1, 0) : at + 1]:
            if other.iova <= iova + size - 1 and iova <= other.last:
                raise MapRejected(f"{what}: overlaps what is mapped at {other.iova:#x}-{other.last:#x}; unmap it first")

    def _check_entries(self, what: str, entries: int) -> None:
        allowed = self._limits.entries
        if allowed is not None and self._entries + entries > allowed:
            raise MapRejected(
                f"{what}: takes {entries} IOTLB entries (physically contiguous runs), {self._entries} are in use, "
                f"the kernel allows {allowed}",
                hint="use huge pages (echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled), "
                "or load vhost_vdpa with a larger max_iotlb_entries",
            )

    def put_back(self, mapping: Mapping) -> None:
        """Add a map that was checked before."""
        self.planned.insert(_index(self.planned, mapping.iova), mapping)
        self._entries += mapping.entries
        self._changes.append((True, mapping))
        self.messages.append(
            IotlbMessage(IotlbType.UPDATE, self._asid, mapping.iova, mapping.size, mapping.uaddr, int(mapping.perm))
        )

    def unmap(self, iova: int, size: int) -> None:
        """Add an unmap; see :meth:`AddressSpace.unmap`."""
        at = _index(self.planned, iova)
        mapping = self.planned[at] if at < len(self.planned) else None
        if mapping is None or (mapping.iova, mapping.size) != (iova, size):
            raise MapRejected(
                f"unmap of {size:#x} bytes at IOVA {iova:#x} in ASID {self._asid}: no mapping with exactly this range"
            )
        del self.planned[at]
        self._entries -= mapping.entries
        self._changes.append((False, mapping))
        self.messages.append(IotlbMessage(IotlbType.INVALIDATE, self._asid, iova, size))

    def after(self, count: int) -> list[Mapping]:
        """Return what is mapped once the first ``count`` changes were applied."""
        maps = {m.iova: m for m in self._before}
        for added, mapping in self._changes[:count]:
            if added:
                maps[mapping.iova] = mapping
            else:
                del maps[mapping.iova]
        return [maps[iova] for iova in sorted(maps)]


def _index(maps: Sequence[Mapping], iova: int) -> int:
    return bisect.bisect_left(maps, iova, key=lambda m: m.iova)
